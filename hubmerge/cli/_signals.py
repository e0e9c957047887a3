"""Signals that end a command."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM, which schedulers and containers send, end a run in the same orderly way as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what happens at a signal
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
