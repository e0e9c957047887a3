"""Work for a few threads, in order of priority: what runs may queue more, and the first error stops all.

There is a queue for each device, which threads of its own take from: a lane.
"""

from __future__ import annotations

import ctypes
import heapq
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch

from hubmerge.devices import CPU
from hubmerge.errors import RankError
from hubmerge.reader import Scratch

Work = Callable[[Scratch], None]

_PATIENCE_S = 2.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Make malloc reuse freed chunks instead of giving them back to the system.

    A method's few temporaries of a megabyte are allocated and freed for every chunk; with glibc's defaults each round
    trip returns their pages and faults them in again, which costs ten times the arithmetic.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library
    mallopt(_M_MMAP_THRESHOLD, 1 << 22)  # what is fetched over the network is larger, and goes back to the system
    mallopt(_M_TRIM_THRESHOLD, 1 << 28)


class Cancelled(Exception):  # noqa: N818 - control flow between workers, never seen outside
    """Another worker failed or the user interrupted."""


class Schedule:
    """Callables run by several threads in order of priority; a running one may add more, the first error stops all."""

    def __init__(self) -> None:
        self._queues: defaultdict[str, list[tuple[tuple[int, ...], int, Work]]] = defaultdict(list)
        self._condition = threading.Condition()
        self._order = itertools.count()
        self._busy = 0
        self.error: BaseException | None = None

    def add(self, priority: tuple[int, ...], work: Work, lane: str = CPU) -> None:
        """Queue work for a lane; lower priorities run first."""
        with self._condition:
            heapq.heappush(self._queues[lane], (priority, next(self._order), work))
            self._condition.notify_all()

    def stop(self, error: BaseException) -> None:
        """Let no further work start; the first error wins."""
        with self._condition:
            if self.error is None:
                self.error = error
            self._queues.clear()
            self._condition.notify_all()

    def run(self, threads: Mapping[str, int]) -> None:
        """Work, with so many threads in each lane, until nothing is queued or running; raises the first error."""
        assert self._queues.keys() <= threads.keys()
        keep_freed_memory()
        before = torch.get_num_threads()
        try:
            self._run([(lane, i) for lane, count in threads.items() for i in range(count)])
        finally:
            torch.set_num_threads(before)  # workers change it for the whole process

    def _run(self, workers: list[tuple[str, int]]) -> None:
        threads = [
            threading.Thread(target=self._work, args=(lane,), name=f"merge {lane} {i}", daemon=True)
            for lane, i in workers
        ]
        for t in threads:
            t.start()
        try:
            for t in threads:
                while t.is_alive():
                    t.join(0.2)
                    if isinstance(self.error, RankError):
                        raise self.error  # whoever is left of a run that others have ended is not to wait for a server
        except BaseException as e:
            self.stop(e)
            # A thread that waits for a silent server is left behind: it looks for the stop before it writes again.
            until = time.monotonic() + _PATIENCE_S
            for t in threads:
                t.join(max(until - time.monotonic(), 0))
            raise
        if self.error is not None:
            raise self.error

    def _next(self, lane: str) -> Work | None:
        with self._condition:
            while not self._queues[lane]:
                # What runs or waits in another lane may still queue work for this one.
                if self.error is not None or (self._busy == 0 and not any(self._queues.values())):
                    self._condition.notify_all()
                    return None
                self._condition.wait()
            self._busy += 1
            return heapq.heappop(self._queues[lane])[2]

    def _work(self, lane: str) -> None:
        # One thread of torch per worker: parallelism is over chunks, and reductions must not depend on thread counts.
        torch.set_num_threads(1)
        scratch = Scratch()
        with torch.inference_mode():
            while (work := self._next(lane)) is not None:
                try:
                    work(scratch)
                except Cancelled:
                    pass
                except BaseException as e:
                    self.stop(e)
                finally:
                    with self._condition:
                        self._busy -= 1
                        self._condition.notify_all()
