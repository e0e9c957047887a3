"""Where the shards of a push lie between being made and being published: a few at a time, or none at all."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from hubmerge.errors import BudgetError
from hubmerge.hub.xet import XetStream
from hubmerge.journal import Written
from hubmerge.publish import Publisher
from hubmerge.quantities import size
from hubmerge.spec import OutputFile


class ShardByShard:
    """A sink that keeps few finished or unfinished shards: each is uploaded before another one is begun.

    Args:
        folder: Where they are.
        publisher: Uploads them.
        outputs: What will be written.
        max_disk_bytes: How much of the disk may be used.
        at_once: How many files are there at most; 1, unless several are filled side by side.
        streaming: Whether they are sent as they are made, and never lie on the disk.
    """

    def __init__(
        self,
        folder: Path,
        publisher: Publisher,
        outputs: Sequence[OutputFile],
        max_disk_bytes: int | None,
        *,
        at_once: int = 1,
        streaming: bool = False,
    ) -> None:
        self._folder = folder
        self._streaming = streaming
        self._publisher = publisher
        self._room = threading.Semaphore(at_once)
        self.written: list[Written] = list(publisher.done)
        """The files that are finished; from the start, those of earlier runs."""
        self.peak_bytes = 0
        """The most that has been on the disk at a time."""
        self._held_bytes = 0
        self._lock = threading.Lock()
        if not streaming:
            self._check_room(outputs, max_disk_bytes, at_once)

    def _check_room(self, outputs: Sequence[OutputFile], max_disk_bytes: int | None, at_once: int) -> None:
        done = {w.path for w in self.written}
        largest = sum(sorted((o.size_bytes for o in outputs if o.path not in done), reverse=True)[:at_once])
        free = shutil.disk_usage(self._folder).free
        limit = free if max_disk_bytes is None else min(free, max_disk_bytes)
        if largest > limit:
            raise BudgetError(
                f"{self._folder}: {size(largest)} are needed at a time, {size(limit)} may be used",
                hint=f"set output.shard_size (--shard-size) to at most {size(0.995 * limit / at_once)}, "
                f"or TMPDIR to a larger disk, or --max-disk to {size(1.005 * largest)}",
            )

    def place(self, output: OutputFile, stopped: Callable[[], bool]) -> Path | XetStream | None:
        """Where the shard goes, once the one before is gone."""
        while not self._room.acquire(timeout=0.1):
            if stopped():
                return None
        if self._streaming:
            return self._publisher.open_stream(output.path)
        self._hold(output.size_bytes)
        path = self._folder / output.path
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finished(self, output: OutputFile, place: Path | XetStream, sha256: str) -> None:
        """Upload it and make room."""
        try:
            self._publisher.shard_done(place, output.path, sha256, output.size_bytes)
            self.written.append(Written(output.path, output.size_bytes, sha256))
        finally:
            if not self._streaming:
                self._hold(-output.size_bytes)
            self._room.release()

    def _hold(self, size_bytes: int) -> None:
        with self._lock:
            self._held_bytes += size_bytes
            self.peak_bytes = max(self.peak_bytes, self._held_bytes)
