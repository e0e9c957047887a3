"""The output files of a run: opened when first needed, shipped when their last byte is there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

from hubmerge.io.stream import ByteStream, StreamWriter
from hubmerge.io.writer import ShardWriter
from hubmerge.schedule import Cancelled
from hubmerge.spec import OutputFile


class Sink(Protocol):
    """Where finished files go."""

    def place(self, output: OutputFile, stopped: Callable[[], bool]) -> Path | ByteStream | None:
        """Where this file goes; may wait until there is room for it, and gives up with None once ``stopped()``."""
        ...

    def finished(self, output: OutputFile, place: Any, sha256: str) -> None:
        """The file is whole at the place it was given, and flushed."""
        ...


class Outputs:
    """The writers of a run, opened when first needed and finished when their last byte is there.

    Args:
        outputs: What is to be written.
        sink: Where finished files go.
        stopped: Whether the run has ended early.
        done: Paths of files that are finished from the start.
    """

    def __init__(
        self, outputs: Sequence[OutputFile], sink: Sink, stopped: Callable[[], bool], done: Collection[str] = ()
    ) -> None:
        self._outputs = outputs
        self._stopped = stopped
        self._sink = sink
        self._lock = threading.Lock()
        self._locks = [threading.Lock() for _ in outputs]
        self._writers: dict[int, ShardWriter | StreamWriter] = {}
        self._places: dict[int, Path | ByteStream] = {}
        self._left = [o.size_bytes - len(o.header) for o in outputs]
        self.done = frozenset(o for o, output in enumerate(outputs) if output.path in done)
        """Indices of the files that are finished from the start."""
        self._empty = [o for o, left in enumerate(self._left) if left == 0 and o not in self.done]
        self._shipped: set[int] = set()

    def writer(self, output: int) -> ShardWriter | StreamWriter:
        """The writer of an output file; may wait for room.

        Files are opened in their order: a later one in the only room would wait for work that waits for an earlier one.
        """
        first = output if output in self._writers or output in self._empty else 0
        for earlier in range(first, output):
            if earlier not in self._empty and earlier not in self.done:
                self._opened(earlier)
        return self._opened(output)

    def _opened(self, output: int) -> ShardWriter | StreamWriter:
        with self._locks[output]:
            found = self._writers.get(output)
            if found is None:
                spec = self._outputs[output]
                place = self._sink.place(spec, self._stopped)
                if place is None:
                    raise Cancelled
                self._places[output] = place
                if isinstance(place, Path):
                    found = ShardWriter(place, spec.size_bytes, spec.header)
                else:
                    found = StreamWriter(place, spec.size_bytes, spec.header, self._stopped)
                self._writers[output] = found
            return found

    def written(self, output: int, start_byte: int, end_byte: int) -> bool:
        """Count a finished range; the last one ships the file. Returns whether it did."""
        if start_byte == end_byte:
            return False  # an empty tensor completes nothing, and the file may have been shipped already
        self.writer(output).mark(start_byte, end_byte)
        with self._lock:
            self._left[output] -= end_byte - start_byte
            last = self._left[output] == 0
        if last:
            self.ship(output)
        return last

    def path(self, output: int) -> str:
        """The name of a file in the result."""
        return self._outputs[output].path

    def ship(self, output: int) -> None:
        """Finish a complete file and hand it to the sink."""
        writer = self.writer(output)
        sha256 = writer.finish()
        self._sink.finished(self._outputs[output], self._places[output], sha256)
        self._shipped.add(output)

    def ship_empty(self) -> None:
        """Files without a single element are complete from the start."""
        for output in self._empty:
            self.ship(output)

    def abort(self) -> None:
        """Remove everything unfinished."""
        for output, writer in list(self._writers.items()):
            if output not in self._shipped:
                writer.abort()
