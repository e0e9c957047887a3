"""Arithmetic on a few threads in a process that is busy with something else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

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
    run = _Run(works, before)
    try:
        run.begun.wait()
    finally:
        torch.set_num_threads(before)  # what a new thread of the process begins with; those at work keep theirs
    try:
        run.finish()
    except BaseException as e:
        run.stop(e)
        run.finish()
        raise
    if run.error is not None:
        raise run.error


class _Run:
    def __init__(self, works: Iterable[Work], count: int) -> None:
        self.error: BaseException | None = None
        self.begun = threading.Barrier(count + 1)
        self._works = iter(works)
        self._next = threading.Lock()
        self._threads = [threading.Thread(target=self._work, name=f"switch {i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Wait until all is done."""
        for thread in self._threads:
            thread.join()

    def stop(self, error: BaseException) -> None:
        """Begin nothing more; the first error wins."""
        self.error = self.error or error

    def _work(self) -> None:
        torch.set_num_threads(1)
        self.begun.wait()
        scratch = Scratch()
        with torch.inference_mode(False), torch.no_grad():
            while self.error is None:
                try:
                    with self._next:
                        work = next(self._works, None)
                    if work is None:
                        return
                    work(scratch)
                except BaseException as e:
                    self.stop(e)
