"""The processes of one run: which of them this is, what they tell one another, and that none dies unnoticed.

``torchrun`` or ``accelerate launch`` start the same command several times, on one machine or several. Each process has
a rank; rank 0 decides and publishes what only one can. A run by itself is a world of one, where all of this is nothing.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from hubmerge.errors import HubMergeError, RankError, SpoiledError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_JOIN = timedelta(minutes=5)
_SILENCE = timedelta(seconds=30)
"""A machine that says nothing for so long is gone; a process that ends is noticed at once."""
_FOREVER = timedelta(days=365)
"""Ranks wait for each other's shards. Whether there is still somebody to wait for, the pulse tells."""
_PULSE_S = 0.25
_GRACE_S = 1.0
_PATIENCE_S = 2.0
_ROW_BYTES = 512


def dealt(sizes: Sequence[int], count: int) -> list[int]:
    """Who of ``count`` takes each piece: the largest first, to whoever has least so far, and of those to the first."""
    owners, loads = [0] * len(sizes), [0] * count
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners


class Ranks:
    """The processes of a run; of this class, the only one. Used as a context manager around the run."""

    rank = 0
    size = 1
    local_rank = 0
    """Among the processes on this machine."""
    local_size = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides."""
        return self.rank == 0

    @property
    def ending(self) -> bool:
        """Whether this rank is about to end in disorder, because it failed or another one did."""
        return False

    def gather(self, value: T) -> Iterator[T]:
        """What all ranks give, in their order, for the first rank to go through; for others, nothing.

        Raises:
            RankError: A rank died or failed.
        """
        return iter((value,))

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, everywhere; other ranks wait for it.

        Raises:
            RankError: A rank died or failed.
        """
        return make()

    def agree(self, facts: Mapping[str, str]) -> None:
        """Make sure that all ranks are about the same thing.

        Args:
            facts: What must be equal, by what it is called.

        Raises:
            RankError: A rank knows otherwise.
        """

    def when_lost(self, told: Callable[[BaseException], None]) -> None:
        """Have a function called, on another thread, once the run cannot go on."""


ALONE = Ranks()


def of_environment(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks that a launcher has announced; not joined yet.

    Raises:
        RankError: What it announced makes no sense.
    """
    if not all(environment.get(name) for name in _VARIABLES):
        return ALONE
    try:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank, local_size = (int(environment.get(f"LOCAL_{n}") or d) for n, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    except ValueError as e:
        raise RankError(f"the launcher's environment has a rank that is no number: {e}", hint=_LAUNCH) from e
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise RankError(
            f"the launcher's environment says rank {rank} of {size}, on this machine {local_rank} of {local_size}",
            hint=_LAUNCH,
        )
    return Launched(rank, size, local_rank, local_size) if size > 1 else ALONE


_LAUNCH = "start it with torchrun or accelerate launch, or without RANK and WORLD_SIZE"


# --- what the ranks tell each other all the time ------------------------------------------------------------------

_WORKS, _DONE, _INTERRUPTED, _FAILED, _SPOILED, _DEAD = range(6)


@dataclass(frozen=True, slots=True)
class _Sign:
    """How a rank is doing."""

    state: int = _WORKS
    text: str = ""

    def encoded(self) -> torch.Tensor:
        import torch

        content = bytes([self.state]) + self.text.encode()[: _ROW_BYTES - 1]
        return torch.frombuffer(bytearray(content.ljust(_ROW_BYTES, b"\0")), dtype=torch.uint8)

    @classmethod
    def decoded(cls, row: torch.Tensor) -> _Sign:
        content = bytes(row.tolist())
        return cls(content[0], content[1:].rstrip(b"\0").decode(errors="ignore"))

    @classmethod
    def of(cls, error: BaseException) -> _Sign:
        if isinstance(error, KeyboardInterrupt):
            return cls(_INTERRUPTED)
        state = _SPOILED if isinstance(error, SpoiledError) else _FAILED
        return cls(state, error.message if isinstance(error, HubMergeError) else f"{type(error).__name__}: {error}")


class Launched(Ranks):
    """The processes that a launcher has started, connected by gloo."""

    def __init__(self, rank: int, size: int, local_rank: int, local_size: int) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self._lost: HubMergeError | None = None
        """Why the run cannot go on, if another rank died or failed."""
        self._told: list[Callable[[BaseException], None]] = []
        self._lock = threading.Lock()
        self._sign = _Sign()
        self._names = [f"rank {r}" for r in range(size)]
        self._own_world = False
        self._data: Any = None
        self._pulse: Any = None
        self._beat = threading.Thread(target=self._watch, name="pulse")

    # --- joining and leaving ---

    def __enter__(self) -> Self:
        """Meet the other ranks.

        Raises:
            RankError: They did not come.
        """
        self._wait(self._join)
        self._beat.start()
        names = list(self.gather(f"rank {self.rank} ({socket.gethostname()}, process {os.getpid()})"))
        self._names = self.from_first(lambda: names)
        return self

    def _join(self) -> None:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_JOIN)
            self._own_world = True
        # The first rank looks at the others one by one: they give it the time to find a silent one.
        silence = _SILENCE if self.first else 2 * _SILENCE
        self._data = dist.new_group(backend="gloo", timeout=_FOREVER)
        self._pulse = dist.new_group(backend="gloo", timeout=silence)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others how this rank ends; in good order, all of them end together.

        Raises:
            RankError: Another rank died or failed, which may be why a launcher has stopped this one.
        """
        if error is None:
            self._sign = _Sign(_DONE)
            while self._beat.is_alive():
                self._beat.join(0.1)
            if self._lost is not None:
                raise self._lost
            self._disband()
            return
        self._sign = _Sign.of(error)
        self._beat.join(_PATIENCE_S)
        if isinstance(error, KeyboardInterrupt) and self._lost is not None:
            for note in getattr(error, "__notes__", ()):
                self._lost.add_note(note)
            raise self._lost from error

    def _disband(self) -> None:
        import torch.distributed as dist

        for group in (self._pulse, self._data):
            dist.destroy_process_group(group)
        if self._own_world:
            dist.destroy_process_group()

    # --- what they give each other ---

    @property
    def ending(self) -> bool:
        """As for one rank."""
        return self._lost is not None or self._sign.state > _DONE

    def gather(self, value: T) -> Iterator[T]:
        """As for one rank; the first one must go through all of it."""
        import torch.distributed as dist

        def received(rank: int) -> T:
            found: list[Any] = [None]
            self._wait(lambda: dist.recv_object_list(found, src=rank, group=self._data))
            value: T = found[0]
            return value

        if not self.first:
            self._wait(lambda: dist.send_object_list([value], dst=0, group=self._data))
            return iter(())
        return itertools.chain((value,), map(received, range(1, self.size)))

    def from_first(self, make: Callable[[], T]) -> T:
        """As for one rank."""
        import torch.distributed as dist

        shared: list[Any] = [make() if self.first else None]
        self._wait(lambda: dist.broadcast_object_list(shared, src=0, group=self._data))
        value: T = shared[0]
        return value

    def agree(self, facts: Mapping[str, str]) -> None:
        """As for one rank."""
        given = list(self.gather(facts))
        difference = self.from_first(lambda: self._difference(given))
        if difference is not None:
            raise RankError(
                difference,
                hint="give all processes the same command and the same inputs; pin revisions to commits, and put local "
                "models into a folder that all machines share",
            )

    def _difference(self, given: Sequence[Mapping[str, str]]) -> str | None:
        mine = given[0]
        for rank, theirs in enumerate(given):
            for what in mine:
                if mine[what] != theirs.get(what):
                    return f"{self._names[rank]} has another {what} than rank 0: {theirs.get(what)}, not {mine[what]}"
        return None

    def when_lost(self, told: Callable[[BaseException], None]) -> None:
        """As for one rank."""
        with self._lock:
            self._told.append(told)
            lost = self._lost
        if lost is not None:
            told(lost)

    def _wait(self, action: Callable[[], object]) -> None:
        """Do what may wait for other ranks, on another thread: no signal reaches one that waits inside gloo."""
        failed: list[Exception] = []

        def work() -> None:
            try:
                action()
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=work, name="wait for other ranks")
        thread.start()
        while thread.is_alive() and self._lost is None:
            thread.join(0.1)
        if failed and self._beat.is_alive():
            self._beat.join(_PATIENCE_S)  # it finds out whose connection broke
        if self._lost is not None:
            raise self._lost
        if failed and not isinstance(failed[0], RuntimeError):
            raise failed[0]
        if failed:
            reason = str(failed[0]).partition("\n")[0]
            raise RankError(f"rank {self.rank} cannot reach the other {self.size - 1}: {reason}") from failed[0]

    # --- the pulse ---

    def _watch(self) -> None:
        """Exchange signs until all are done or one is in trouble."""
        while True:
            signs = self._round()
            others = [(sign.state, rank) for rank, sign in enumerate(signs) if rank != self.rank]
            state, rank = max(others, key=lambda pair: (pair[0], -pair[1]))
            if state > _DONE and not (state == _INTERRUPTED and self._interrupted_too()):
                self._lose(self._told_of(rank, signs[rank]))
            if max(state, signs[self.rank].state) > _DONE or all(sign.state == _DONE for sign in signs):
                return
            time.sleep(_PULSE_S)

    def _interrupted_too(self) -> bool:
        """Whether the signal that another rank got comes to this one as well, as Ctrl-C does."""
        until = time.monotonic() + _GRACE_S
        while self._sign.state != _INTERRUPTED and time.monotonic() < until:
            time.sleep(0.05)
        return self._sign.state == _INTERRUPTED

    def _round(self) -> list[_Sign]:
        """Every rank's sign: all send theirs to the first rank, which sends all of them back."""
        import torch
        import torch.distributed as dist

        table = torch.zeros(self.size, _ROW_BYTES, dtype=torch.uint8)
        table[self.rank] = own = self._sign.encoded()
        dead = _Sign(_DEAD).encoded()
        if self.first:
            for rank in range(1, self.size):
                try:
                    dist.recv(table[rank], src=rank, group=self._pulse)
                except RuntimeError:
                    table[rank] = dead
            for rank in (r for r in range(1, self.size) if int(table[r, 0]) != _DEAD):
                try:
                    dist.send(table, dst=rank, group=self._pulse)
                except RuntimeError:
                    table[rank] = dead
        else:
            try:
                dist.send(own, dst=0, group=self._pulse)
                dist.recv(table, src=0, group=self._pulse)
            except RuntimeError:
                table[0] = dead
        return [_Sign.decoded(row) for row in table]

    def _told_of(self, rank: int, sign: _Sign) -> HubMergeError:
        name = self._names[rank]
        if sign.state == _DEAD:
            return RankError(f"{name} is gone: it was killed, or its machine cannot be reached")
        if sign.state == _INTERRUPTED:
            return RankError(f"{name} was interrupted")
        if sign.state == _SPOILED:
            return SpoiledError(f"{name} failed: {sign.text}")  # what this rank has made may be of the same bytes
        return RankError(f"{name} failed: {sign.text}", hint=f"correct that, then {RankError.next_step}")

    def _lose(self, error: HubMergeError) -> None:
        with self._lock:
            self._lost = error
            told = list(self._told)
        for tell in told:
            tell(error)


__all__ = ["ALONE", "Launched", "Ranks", "dealt", "of_environment"]
