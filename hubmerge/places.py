"""Where a published model lies: a folder, or a repository at a commit; its files and its lock."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pydantic import ValidationError

from hubmerge.errors import IntegrityError, SourceError, UsageError, VerificationError
from hubmerge.io.local import FileSource, sha256_of
from hubmerge.lock import LOCK_NAME, Lock, OutputDigest, loads
from hubmerge.recipe.refs import ModelRef
from hubmerge.spec import ByteSource, FileSpec

if TYPE_CHECKING:
    from hubmerge.hub import Hub

_BLOCK_BYTES = 16 * 1024 * 1024
_MAX_SMALL_BYTES = 32_000_000


class Place(Protocol):
    """Where a published model lies."""

    @property
    def name(self) -> str:
        """How to call it."""

    @property
    def commit(self) -> str | None:
        """Which commit it is; None for a folder."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Of its files."""

    def read_small(self, path: str) -> bytes:
        """One of its small files, such as the lock."""

    def digest(self, file: OutputDigest, *, deep: bool) -> tuple[str, bool]:
        """Digest of a file that has the size the lock says, and whether its bytes were read for it."""

    def open(self, path: str) -> ByteSource:
        """One of its files."""


def open_place(target: str | Path, hub: Hub | None = None) -> Place:
    """A local folder, or ``repo`` or ``repo@revision`` on the Hub.

    Raises:
        UsageError: It is neither.
        AccessError: The repository is missing or not accessible.
    """
    try:
        ref = ModelRef.parse(str(target))
    except ValidationError as e:
        reason = e.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise UsageError(
            f"cannot verify {str(target)!r}: {reason}", hint="give a folder, or org/name[@revision]"
        ) from e
    if ref.is_local or isinstance(target, Path):
        return _Folder(Path(target).expanduser())
    if hub is None:
        from hubmerge.hub import Hub

        hub = Hub()
    return _Repo(ref.repo, ref.revision, hub)


def lock_of(place: Place) -> Lock:
    """Its lock.

    Raises:
        VerificationError: There is none, or none that can be read.
    """
    return parse_lock(lock_text(place), place)


def lock_text(place: Place) -> bytes:
    """The bytes of its lock.

    Raises:
        VerificationError: There is none.
    """
    if LOCK_NAME not in place.sizes:
        raise VerificationError(
            f"{place.name}: has no {LOCK_NAME}",
            hint="hubmerge did not publish this model, or somebody removed the lock",
        )
    return place.read_small(LOCK_NAME)


def parse_lock(text: bytes, place: Place) -> Lock:
    """The lock that the bytes hold.

    Raises:
        VerificationError: They hold none.
    """
    try:
        return loads(text, f"{place.name}/{LOCK_NAME}")
    except IntegrityError as e:
        raise VerificationError(e.message, hint=e.hint) from e


class _Folder:
    commit = None

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UsageError(
                f"{folder}: no such folder", hint="give a folder with a merged model, or org/name[@revision]"
            )
        self.name, self._folder = str(folder), folder
        self.sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in _files(folder)}

    def read_small(self, path: str) -> bytes:
        if self.sizes[path] > _MAX_SMALL_BYTES:
            what = "lock" if path == LOCK_NAME else "signature"
            raise VerificationError(f"{self._folder / path}: {self.sizes[path]} bytes is too large for a {what}")
        return (self._folder / path).read_bytes()

    def digest(self, file: OutputDigest, *, deep: bool) -> tuple[str, bool]:
        try:
            return sha256_of(self._folder / file.path), True
        except OSError as e:
            raise SourceError(f"{self._folder / file.path}: cannot be read: {e.strerror}") from e

    def open(self, path: str) -> ByteSource:
        return FileSource(self._folder / path, self.sizes[path])


def _files(folder: Path) -> Iterable[Path]:
    """All files but those in hidden folders, which hold what git and download tools note down."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (p for name in sorted(names) if (p := Path(root, name)).is_file())


class _Repo:
    def __init__(self, repo: str, revision: str | None, hub: Hub) -> None:
        self.name, self._hub = repo, hub
        self.commit: str = hub.pin(repo, revision)
        self._files: Mapping[str, FileSpec] = {f.path: f for f in hub.list_files(repo, self.commit)}
        self.sizes = {path: spec.size_bytes for path, spec in self._files.items()}

    def read_small(self, path: str) -> bytes:
        return self._hub.read_small(self.name, self.commit, path)

    def digest(self, file: OutputDigest, *, deep: bool) -> tuple[str, bool]:
        spec = self._files[file.path]
        if spec.sha256 is None:
            return hashlib.sha256(self._hub.read_small(self.name, self.commit, file.path)).hexdigest(), True
        # A list that already disagrees needs no reading to be wrong.
        if not deep or spec.sha256 != file.sha256:
            return spec.sha256, False
        return self._read_digest(spec), True

    def _read_digest(self, spec: FileSpec) -> str:
        total = hashlib.sha256()
        buffer = memoryview(bytearray(min(_BLOCK_BYTES, spec.size_bytes)))
        with closing(self.open(spec.path)) as source:
            for start in range(0, spec.size_bytes, _BLOCK_BYTES):
                part = buffer[: min(_BLOCK_BYTES, spec.size_bytes - start)]
                source.read_into(start, part)
                total.update(part)
        return total.hexdigest()

    def open(self, path: str) -> ByteSource:
        return self._hub.open(self.name, self.commit, self._files[path])
