"""Threads that wait for the network together, and how to leave without them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose end waits for its threads, unless the user interrupts: a silent server must not hold that up."""
    made = ThreadPoolExecutor(max_workers=workers)
    try:
        yield made
    except BaseException as error:
        made.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
        raise
    made.shutdown()


def anybody_left() -> bool:
    """Whether threads are still at work that the interpreter would wait for at its end."""
    return any(t.is_alive() and not t.daemon for t in threading.enumerate() if t is not threading.current_thread())
