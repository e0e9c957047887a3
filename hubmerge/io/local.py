"""Random access to files on this machine."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from hubmerge.errors import IntegrityError, SourceError


class FileSource:
    """A ByteSource over a local file. ``pread`` has no shared position, so threads need no lock.

    Reading into cache-sized buffers beats mapping the file: pages are copied while hot and never count as resident
    memory.
    """

    def __init__(self, path: Path, size_bytes: int | None = None) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as e:
            raise SourceError(f"{path}: cannot be opened: {e.strerror}") from e
        self.size_bytes = os.fstat(self._fd).st_size
        if size_bytes is not None and size_bytes != self.size_bytes:
            self.close()
            raise IntegrityError(
                f"{path}: has {self.size_bytes} bytes now, {size_bytes} when it was planned",
                hint="do not change inputs while a merge runs; start it again",
            )

    def read_into(self, start_byte: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``start_byte`` on.

        Raises:
            SourceError: The file cannot be read.
            IntegrityError: The file ends before the buffer is full.
        """
        done = 0
        try:
            while done < len(buffer):
                n = os.preadv(self._fd, [buffer[done:]], start_byte + done)
                if n == 0:
                    raise IntegrityError(
                        f"{self.path}: ends at byte {start_byte + done}, {len(buffer) - done} bytes early",
                        hint="do not change inputs while a merge runs; start it again",
                    )
                done += n
        except OSError as e:
            raise SourceError(f"{self.path}: cannot be read at byte {start_byte + done}: {e.strerror}") from e

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def sha256_of(path: Path) -> str:
    """Digest of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
