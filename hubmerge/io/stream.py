"""Writing one file into a stream: ranges come nearly in order, each is hashed and passed on when its turn has come."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import Protocol

from hubmerge.errors import HubMergeError

HELD_BYTES = 64_000_000
STREAM_BYTES = HELD_BYTES + 400_000_000
"""What a stream takes of the memory: ranges that came early, and what the storage's client has on the way; measured."""

_BLOCK_BYTES = 8_000_000
_PATIENCE_S = 1.0


class ByteStream(Protocol):
    """Takes a file from its first byte to its last."""

    def write(self, data: bytes) -> None:
        """Take the next bytes; waits while the other end is slow."""
        ...

    def abort(self) -> None:
        """Forget everything; ends a ``write`` that waits, and may be called again."""
        ...


class StreamWriter:
    """A file of known length that exists nowhere: filled by several threads, passed on by one more.

    It is used like a ``ShardWriter``. What comes before its turn is kept; where there is no room for it, whoever brings
    it waits. The bytes whose turn it is always find room, so that somebody must be at work on them: of work that is
    taken in the order of the file, that is so.

    Args:
        stream: Where the bytes go.
        size_bytes: Length of the file.
        header: First bytes of the file.
        stopped: Whether the run has ended early; then nobody waits any longer.
        held_bytes: Room for what came early.
    """

    def __init__(
        self,
        stream: ByteStream,
        size_bytes: int,
        header: bytes,
        stopped: Callable[[], bool] = lambda: False,
        held_bytes: int = HELD_BYTES,
    ) -> None:
        self.size_bytes = size_bytes
        self.peak_bytes = len(header)
        """The most that has been kept at a time."""
        self._stream = stream
        self._stopped = stopped
        self._room_bytes = held_bytes
        self._condition = threading.Condition()
        self._held = {0: header} if header else {}
        self._held_bytes = len(header)
        self._position = 0
        self._ended = False
        self._error: Exception | None = None
        self._sha256 = hashlib.sha256()
        self._thread = threading.Thread(target=self._pass_on, name="stream", daemon=True)
        self._thread.start()

    def write(self, start_byte: int, data: memoryview | bytes) -> None:
        """Give a range; it cannot be written again.

        Raises:
            HubMergeError: The stream broke, the run has ended, or the bytes were given before.
        """
        # In blocks, for a range may be a whole tensor; copies, for the caller has other uses for its memory.
        for low in range(0, len(data), _BLOCK_BYTES):
            self._keep(start_byte + low, data[low : low + _BLOCK_BYTES])

    def _keep(self, start_byte: int, block: memoryview | bytes) -> None:
        with self._condition:
            while not self._admits(start_byte, len(block)):
                self._condition.wait(0.1)
            self._held[start_byte] = bytes(block)
            self._held_bytes += len(block)
            self.peak_bytes = max(self.peak_bytes, self._held_bytes)
            self._condition.notify_all()

    def mark(self, start_byte: int, end_byte: int) -> None:
        """Nothing to do: what is written is finished."""

    def finish(self) -> str:
        """Wait until all bytes are passed on; returns the sha256 in hex. The stream is left to whoever keeps it.

        Raises:
            HubMergeError: A range was never written, or the stream broke.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._ended or self._error or self._position not in self._held)
            self._ended = True
            self._condition.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._position != self.size_bytes:
            raise HubMergeError(f"a stream was finished at byte {self._position} of {self.size_bytes}")
        return self._sha256.hexdigest()

    def abort(self) -> None:
        """Stop and forget everything; may be called again, and after ``finish``."""
        with self._condition:
            self._ended = True
            self._held.clear()
            self._condition.notify_all()
        self._stream.abort()
        self._thread.join(_PATIENCE_S)

    def _admits(self, start_byte: int, size_bytes: int) -> bool:
        if self._error is not None:
            raise self._error
        if self._ended or self._stopped():
            raise HubMergeError("the run has ended, and its streams are closed")
        if start_byte < self._position or start_byte in self._held:
            raise HubMergeError(f"byte {start_byte} of a stream was written twice")
        return start_byte == self._position or self._held_bytes + size_bytes <= self._room_bytes

    def _pass_on(self) -> None:
        while (piece := self._next()) is not None:
            try:
                self._sha256.update(piece)
                self._stream.write(piece)
            except Exception as e:
                with self._condition:
                    self._error = e
                    self._condition.notify_all()
                return
            with self._condition:
                # Only now: what the stream has not taken still takes memory.
                self._held.pop(self._position, None)
                self._held_bytes -= len(piece)
                self._position += len(piece)
                self._condition.notify_all()

    def _next(self) -> bytes | None:
        """The bytes whose turn it is, once they are there; None at the end."""
        with self._condition:
            self._condition.wait_for(lambda: self._ended or self._position in self._held)
            return None if self._ended else self._held[self._position]
