"""A remote file whose digest is known, checked on the way: what is read in order is hashed as it comes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable

from hubmerge.errors import SpoiledError
from hubmerge.spec import ByteSource

AHEAD_BYTES = 32_000_000
_BLOCK_BYTES = 4_000_000
_MOST_UNWANTED = 0.05
"""The part of a file that may be read for its digest alone: its header, tensors that take no part."""


class Ahead:
    """Room for pieces that came before their turn, shared by all files of a run."""

    def __init__(self, size_bytes: int = AHEAD_BYTES) -> None:
        self._free_bytes = size_bytes
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> bool:
        """Claim room, if there is so much."""
        with self._lock:
            fits = size_bytes <= self._free_bytes
            self._free_bytes -= size_bytes if fits else 0
            return fits

    def give_back(self, size_bytes: int) -> None:
        """Return it."""
        with self._lock:
            self._free_bytes += size_bytes


class CheckedSource(ByteSource):
    """Reads a file and compares its digest once all of it has come by, in whatever number of passes.

    A server has one digest for a file of gigabytes, so that its pieces can only be checked together, in their order.
    They are read nearly in order; those that are a little early wait as copies, those that are far away are passed
    over, and may come by in a later pass. What nobody wants is read in between.

    Args:
        source: The file.
        sha256: Its digest, in hex.
        label: The file's name in messages.
        wanted: The byte ranges that will be read, half-open.
        ahead: Room for early pieces.
    """

    def __init__(
        self, source: ByteSource, sha256: str, label: str, wanted: Iterable[tuple[int, int]], ahead: Ahead
    ) -> None:
        self.size_bytes = source.size_bytes
        self.label = label
        self._source = source
        self._expected = sha256
        self._ahead = ahead
        self._lock = threading.Lock()
        self._sha256 = hashlib.sha256()
        self._position = 0
        self._early: dict[int, bytes] = {}
        self._unwanted = _between(wanted, self.size_bytes)
        self._follows = sum(self._unwanted.values()) - sum(self._unwanted) <= _MOST_UNWANTED * self.size_bytes

    @property
    def is_checked(self) -> bool:
        """Whether all of the file has come by and has its digest."""
        return self._position == self.size_bytes

    def read_into(self, start_byte: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``start_byte`` on.

        Raises:
            SpoiledError: The file is complete with it, and does not have its digest.
            SourceError: The bytes could not be read.
        """
        self._source.read_into(start_byte, buffer)
        if self._follows:
            with self._lock:
                self._pass_unwanted()
                self._count(start_byte, buffer.cast("B"))
                self._pass_unwanted()

    def _count(self, start_byte: int, piece: memoryview) -> None:
        """Hash a piece whose turn it is, and what has waited for it; let others wait."""
        if start_byte <= self._position:
            self._hash(piece[self._position - start_byte :])
        elif (
            start_byte - self._position <= AHEAD_BYTES
            and start_byte not in self._early
            and self._ahead.take(len(piece))
        ):
            self._early[start_byte] = bytes(piece)
        for start in sorted(self._early):
            if start > self._position:
                break
            early = self._early.pop(start)
            self._ahead.give_back(len(early))
            self._hash(memoryview(early)[self._position - start :])

    def _pass_unwanted(self) -> None:
        """Read what nobody else will, up to the next piece that somebody does."""
        while (stop := self._unwanted.get(self._position)) is not None:
            start = self._position
            for low in range(start, stop, _BLOCK_BYTES):
                block = memoryview(bytearray(min(_BLOCK_BYTES, stop - low)))
                self._source.read_into(low, block)
                self._count(low, block)

    def close(self) -> None:
        """Close the file."""
        # Somebody whose server has fallen silent may be in there: who closes does not wait for that.
        if self._lock.acquire(blocking=False):
            try:
                for piece in self._early.values():
                    self._ahead.give_back(len(piece))
                self._early.clear()
            finally:
                self._lock.release()
        self._source.close()

    def _hash(self, data: memoryview | bytes) -> None:
        if len(data) == 0:
            return
        self._sha256.update(data)
        self._position += len(data)
        if self._position == self.size_bytes and self._sha256.hexdigest() != self._expected:
            raise SpoiledError(
                f"{self.label}: the bytes received do not have the digest of the commit: "
                f"sha256 {self._sha256.hexdigest()}, not {self._expected}",
                hint="A proxy may have changed them; nothing made of them is kept. Try another network or endpoint.",
            )


def _between(wanted: Iterable[tuple[int, int]], size_bytes: int) -> dict[int, int]:
    """The ranges of a file that are not in any of the given ones: where each starts, and where it ends."""
    found, position = {}, 0
    for start, stop in [*sorted(wanted), (size_bytes, size_bytes)]:
        if start > position:
            found[position] = start
        position = max(position, stop)
    return found
