"""Signals that end a command."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hubmerge.ranks import Ranks


@contextmanager
def together() -> Iterator[Ranks]:
    """The processes that a launcher has started to run the command together; SIGTERM ends them as it ends one.

    A launcher also sends it to those that are left when one has ended; they know already, and are to say why.
    """
    from hubmerge.ranks import of_environment

    ranks = of_environment()
    with terminable(lambda: ranks.ending), ranks:
        yield ranks


@contextmanager
def terminable(ending: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Let SIGTERM, which schedulers and containers send, end a run in the same orderly way as Ctrl-C.

    Args:
        ending: Whether the run is about to end anyway, and the process is not to be interrupted any more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what happens at a signal
        return

    def interrupt(*_: Any) -> None:
        if not ending():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if not ending():
            signal.signal(signal.SIGTERM, before)
