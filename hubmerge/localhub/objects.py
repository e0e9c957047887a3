"""Content-addressed blobs on disk: objects/ab/cdef…, named by SHA-256, never changed once there."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

COPY_BYTES = 1 << 20


class DigestMismatchError(Exception):
    """The bytes received are not the bytes announced."""


class ObjectWriter:
    """A blob being received: bytes go to a temporary file and through SHA-256 in one pass.

    The blob appears in the store only in :meth:`commit`, complete and flushed to disk. Methods may be called from
    different threads, one at a time.
    """

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._path = objects.temporary_path()
        self._file = self._path.open("xb", buffering=0)
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append ``data``."""
        self._digest.update(data)
        view = memoryview(data)
        while view:
            written = self._file.write(view)
            view = view[written:]
        self.size_bytes += len(data)

    @property
    def sha256(self) -> str:
        """Hex digest of what was written so far."""
        return self._digest.hexdigest()

    def commit(self, *, sha256: str | None = None, size_bytes: int | None = None) -> str:
        """Move the blob into the store.

        Args:
            sha256: Digest it must have, if known beforehand.
            size_bytes: Size it must have, if known beforehand.

        Returns:
            Its SHA-256, hex.

        Raises:
            DigestMismatchError: The content differs from what was announced; nothing is stored.
        """
        found = self.sha256
        if (sha256 is not None and sha256 != found) or (size_bytes is not None and size_bytes != self.size_bytes):
            self.abort()
            raise DigestMismatchError(
                f"expected {sha256} ({size_bytes} bytes), received {found} ({self.size_bytes} bytes)"
            )
        os.fsync(self._file.fileno())
        self._file.close()
        self._objects.adopt(self._path, found)
        return found

    def keep_part(self, sha256: str, number: int) -> None:
        """Keep the bytes as one part of a multipart upload of ``sha256``."""
        self._file.close()
        self._objects.adopt_part(self._path, sha256, number, self.size_bytes)

    def abort(self) -> None:
        """Throw the received bytes away."""
        self._file.close()
        self._path.unlink(missing_ok=True)


class ObjectStore:
    """The blobs below ``root``, plus parts of multipart uploads in progress.

    Args:
        root: Folder of the hub; created when absent.
    """

    def __init__(self, root: Path) -> None:
        self._objects = root / "objects"
        self._parts = root / "parts"
        self._temporary = root / "tmp"
        # Whatever lies here belongs to a server that was killed: nothing in it was ever acknowledged.
        shutil.rmtree(self._temporary, ignore_errors=True)
        for folder in (self._objects, self._parts, self._temporary):
            folder.mkdir(parents=True, exist_ok=True)

    def temporary_path(self) -> Path:
        """A fresh name on the same file system as the objects."""
        return self._temporary / uuid.uuid4().hex

    def path(self, sha256: str) -> Path:
        """Where the blob lies, or would lie."""
        return self._objects / sha256[:2] / sha256[2:]

    def size_bytes(self, sha256: str) -> int | None:
        """Size of a stored blob; ``None`` if it is not stored."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, sha256: str) -> bytes:
        """Whole content; meant for small files."""
        return self.path(sha256).read_bytes()

    def writer(self) -> ObjectWriter:
        """Start receiving a blob."""
        return ObjectWriter(self)

    def put(self, data: bytes) -> str:
        """Store ``data`` and return its SHA-256, hex."""
        sha256 = hashlib.sha256(data).hexdigest()
        if self.size_bytes(sha256) is None:
            writer = self.writer()
            writer.write(data)
            writer.commit()
        return sha256

    def adopt(self, temporary: Path, sha256: str) -> None:
        """Give a complete temporary file its final name."""
        final = self.path(sha256)
        if final.exists():
            temporary.unlink(missing_ok=True)
            return
        if not final.parent.exists():
            final.parent.mkdir(exist_ok=True)
            _sync_folder(self._objects)
        temporary.replace(final)
        _sync_folder(final.parent)

    def part_path(self, sha256: str, number: int, length_bytes: int) -> Path:
        """Where one part of a multipart upload lies; the length keeps layouts of different part sizes apart."""
        return self._parts / sha256 / f"{number:05d}-{length_bytes}"

    def adopt_part(self, temporary: Path, sha256: str, number: int, length_bytes: int) -> None:
        """Give a complete part its final name."""
        final = self.part_path(sha256, number, length_bytes)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(final)

    def assemble(self, sha256: str, size_bytes: int, parts: Iterable[Path]) -> None:
        """Join parts into one blob.

        Raises:
            DigestMismatchError: The joined bytes are not the announced object.
            FileNotFoundError: A part was never uploaded.
        """
        writer = self.writer()
        try:
            for part in parts:
                with part.open("rb", buffering=0) as source:
                    while chunk := source.read(COPY_BYTES):
                        writer.write(chunk)
        except BaseException:
            writer.abort()
            raise
        writer.commit(sha256=sha256, size_bytes=size_bytes)
        shutil.rmtree(self._parts / sha256, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
