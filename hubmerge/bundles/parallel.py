"""Arithmetic on a few threads in a process that is busy with something else."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch

from hubmerge.reader import Scratch

Work = Callable[[Scratch], None]


def side_by_side(works: Iterable[Work]) -> None:
    """Do all of these, on as many threads as torch has in this one; the first error stops them and is raised.

    Each thread works on its own, with one of torch's threads: to share every operation among several, and to wait for
    the last of them, would cost far more when processors are busy. How many threads torch has elsewhere in the process
    stays as it is.
    """
    before = torch.get_num_threads()
    run = _Run(works)
    try:
        try:
            run.begin(before)
        finally:
            torch.set_num_threads(before)  # what a new thread of the process begins with; those at work keep theirs
        run.finish()
    except BaseException as e:
        run.abandon(e)
        raise
    if run.error is not None:
        raise run.error


class _Pages(Scratch):
    """Buffers whose memory goes back to the system with the thread: malloc would keep it, for each thread there was."""

    def _memory(self, size_bytes: int) -> torch.Tensor:
        pages = mmap.mmap(-1, max(size_bytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=torch.uint8)


class _Run:
    def __init__(self, works: Iterable[Work]) -> None:
        self.error: BaseException | None = None
        self._works = iter(works)
        self._next = threading.Lock()
        self._threads: list[threading.Thread] = []

    def begin(self, count: int) -> None:
        """Let so many threads begin; each has one of torch's threads when this returns."""
        self._begun = threading.Barrier(count + 1)
        for i in range(count):
            thread = threading.Thread(target=self._work, name=f"switch {i}", daemon=True)
            thread.start()
            self._threads.append(thread)
        self._begun.wait()

    def finish(self) -> None:
        """Wait until all is done."""
        for thread in self._threads:
            thread.join()

    def abandon(self, error: BaseException) -> None:
        """Begin nothing more, and wait until what was begun is done."""
        self._stop(error)
        self._begun.abort()
        self.finish()

    def _stop(self, error: BaseException) -> None:
        self.error = self.error or error  # the first one wins

    def _work(self) -> None:
        torch.get_num_threads()  # when first asked, torch gives a new thread the process's number: let it be now
        torch.set_num_threads(1)
        with suppress(threading.BrokenBarrierError):
            self._begun.wait()
        scratch = _Pages()
        with torch.inference_mode(False), torch.no_grad():
            while self.error is None:
                try:
                    with self._next:
                        work = next(self._works, None)
                    if work is None:
                        return
                    work(scratch)
                except BaseException as e:
                    self._stop(e)
