"""Forward passes of a model side by side, or one change of its weights: never both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hubmerge.errors import HubMergeError, UsageError

_LOOK_S = 0.5
"""How often a change that waits looks whether a thread it waits for has died."""


class _Place:
    """In the line."""

    def __init__(self, *, change: bool) -> None:
        self.change = change


class Turns:
    """A readers-writer lock that a model's own hooks take, in order of arrival.

    A change waits for the passes that run; a pass waits for the changes that came before it, and for no later one.
    Shares belong to threads, so a thread that holds the model can run any number of passes while a change waits.
    """

    def __init__(self) -> None:
        self.torn = False
        """A change was broken off: the weights are no task's."""
        self._state = threading.Condition()
        self._passing: set[threading.Thread] = set()
        self._holding: set[threading.Thread] = set()
        self._line: list[_Place] = []
        """Who waits, in order of arrival, and the change that is being made."""

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        # A copy of the model, or one that was saved and loaded, is a model of its own.
        return (Turns, ())

    def guard(self, model: Any) -> None:
        """Take a share around each of the model's forward passes, also those that raise."""
        model.register_forward_pre_hook(self.begin)
        model.register_forward_hook(self.end, always_call=True)

    # --- passes

    def begin(self, *_: object) -> None:
        """Before a pass.

        Raises:
            HubMergeError: The weights are no task's.
        """
        me = threading.current_thread()
        with self._state:
            if me not in self._holding:
                self._forget(me)
                self._wait_for_earlier_changes()
            if self.torn:
                raise HubMergeError(
                    "the model's weights are those of no task: a change to another one was broken off",
                    hint="call switch again, for any task",
                )
            self._passing.add(me)

    def end(self, *_: object) -> None:
        """After a pass; also after one that another hook kept from beginning."""
        with self._state:
            self._forget(threading.current_thread())

    def _forget(self, thread: threading.Thread) -> None:
        """A thread that begins a pass, or asks for a change, is in none: Ctrl-C may have broken one off unnoticed."""
        self._passing.discard(thread)
        self._state.notify_all()

    def _wait_for_earlier_changes(self) -> None:
        mine = _Place(change=False)
        self._line.append(mine)
        try:
            while any(place.change for place in self._line[: self._line.index(mine)]):
                self._state.wait()
        finally:
            self._leave(mine)

    def _leave(self, mine: _Place) -> None:
        self._line.remove(mine)
        self._state.notify_all()

    # --- longer turns

    @contextmanager
    def hold(
        self, ready: Callable[[], bool] = lambda: True, change: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Let no change happen meanwhile.

        Args:
            ready: Whether the model is as it should be.
            change: Makes it so, alone, and with no turn of another thread before the model is held.

        Raises:
            UsageError: This thread holds the model already.
        """
        me = threading.current_thread()
        with self._state:
            self._refuse_holder("holding")
            self._wait_for_earlier_changes()
            if held := ready():
                self._holding.add(me)
        if not held:
            with self.alone():
                if not ready():
                    change()
                with self._state:
                    self._holding.add(me)
        try:
            yield
        finally:
            with self._state:
                self._holding.discard(me)
                self._state.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let nothing else happen meanwhile.

        Raises:
            UsageError: This thread holds the model, and would wait for itself.
        """
        me, mine = threading.current_thread(), _Place(change=True)
        with self._state:
            self._refuse_holder("switch")
            self._forget(me)
            self._line.append(mine)
        try:
            with self._state:
                while self._line[0] is not mine or self._others():
                    self._state.wait(_LOOK_S)
            yield
        finally:
            with self._state:
                self._leave(mine)

    def _others(self) -> bool:
        return any(t.is_alive() for t in self._passing | self._holding)

    def _refuse_holder(self, what: str) -> None:
        if threading.current_thread() in self._holding:
            raise UsageError(
                f"{what}: this thread holds the model already, and would wait for itself",
                hint="leave the `with bundle.holding(model)` block first",
            )
