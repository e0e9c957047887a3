"""Writing one safetensors file in place: ranges arrive in any order, every byte is hashed once, in file order."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from hubmerge.errors import HubMergeError

_HASH_BLOCK_BYTES = 1 << 20


class ShardWriter:
    """A file of known length, filled by several threads while one more hashes the finished part behind them.

    The file exists under ``path`` from the start: the caller gives a temporary name and renames when ``finish``
    returned.

    Args:
        path: Where to write.
        size_bytes: Final length.
        header: First bytes of the file.
    """

    def __init__(self, path: Path, size_bytes: int, header: bytes) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o644)
        self._condition = threading.Condition()
        self._frontier = len(header)
        self._finished: dict[int, int] = {}
        self._failed = False
        self._sha256 = hashlib.sha256()
        self._error: OSError | None = None
        try:
            # Reserving the blocks finds a full disk now instead of hours later, and makes every write cheaper.
            os.posix_fallocate(self._fd, 0, size_bytes)
        except OSError as e:
            os.close(self._fd)
            path.unlink(missing_ok=True)
            raise HubMergeError(
                f"{path}: {size_bytes / 1e9:.2f} GB cannot be reserved: {e.strerror}", hint="free some disk space"
            ) from e
        self.write(0, header)
        self._hasher = threading.Thread(target=self._hash, name=f"hash {path.name}", daemon=True)
        self._hasher.start()

    def write(self, start_byte: int, data: memoryview | bytes) -> None:
        """Write at an offset; does not yet count as finished.

        Raises:
            HubMergeError: The disk refuses.
        """
        view = memoryview(data)
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], start_byte + done)
        except OSError as e:
            raise HubMergeError(
                f"{self.path}: cannot be written: {e.strerror}", hint="free some disk space, or give another --out"
            ) from e

    def mark(self, start_byte: int, end_byte: int) -> None:
        """Declare a range finished: it will not be written again, and may be hashed."""
        if start_byte == end_byte:
            return  # an empty tensor starts where its successor does
        with self._condition:
            self._finished[start_byte] = end_byte
            moved = False
            while self._frontier in self._finished:
                self._frontier = self._finished.pop(self._frontier)
                moved = True
            if moved:
                self._condition.notify()

    def finish(self) -> str:
        """Wait for the hash and close; returns the sha256 in hex. Flushing to disk is left to whoever keeps the file.

        Raises:
            HubMergeError: A range was never finished, or the disk failed.
        """
        with self._condition:
            if self._frontier < self.size_bytes:
                self._failed = True
                self._condition.notify()
        self._hasher.join()
        try:
            if self._error is not None:
                raise HubMergeError(f"{self.path}: cannot be read back: {self._error.strerror}") from self._error
            if self._failed:
                raise HubMergeError(f"{self.path}: finished at byte {self._frontier} of {self.size_bytes}")
        finally:
            self._close()
        return self._sha256.hexdigest()

    def abort(self) -> None:
        """Stop and remove the file; a second call, or one after ``finish``, removes what is left."""
        with self._condition:
            self._failed = True
            self._condition.notify()
        self._hasher.join()
        self._close()
        self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _hash(self) -> None:
        # The bytes come back from the page cache: cheaper than keeping chunks until their turn, and bounded in memory.
        block = memoryview(bytearray(_HASH_BLOCK_BYTES))
        position = 0
        while position < self.size_bytes:
            with self._condition:
                while not self._failed and self._frontier < min(position + _HASH_BLOCK_BYTES, self.size_bytes):
                    self._condition.wait()
                if self._failed:
                    return
            try:
                n = os.preadv(self._fd, [block[: self.size_bytes - position]], position)
            except OSError as e:
                self._error = e
                return
            self._sha256.update(block[:n])
            position += n
