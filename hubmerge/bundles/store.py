"""An existing bundle, in a folder or on the Hub: its manifest, and its files, whose bytes are checked before use."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from hubmerge.bundles.manifest import MANIFEST_NAME, FileEntry, Manifest, TaskEntry, loads
from hubmerge.bundles.stream import StoredParts
from hubmerge.errors import IntegrityError, SourceError
from hubmerge.hub import Hub
from hubmerge.io.header import read_header
from hubmerge.io.local import FileSource
from hubmerge.lock import LOCK_NAME
from hubmerge.resolve import pin_model
from hubmerge.spec import ByteSource, PinnedModel, TensorSpec

_HASH_BLOCK_BYTES = 1 << 20
_MADE_ANEW = frozenset({MANIFEST_NAME, LOCK_NAME, "README.md", "hubmerge.yaml", ".gitattributes"})


@dataclass(slots=True)
class Bundle:
    """A bundle at one commit, or in a folder. Files from the Hub are kept in the Hugging Face cache."""

    label: str
    hub: Hub
    manifest: Manifest
    root: Path | None
    repo: str | None = None
    commit: str | None = None
    base_folder: str | None = None
    """Where the base is, if the manifest names a local folder."""
    _open: dict[str, ByteSource] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    # --- files

    def path(self, name: str) -> Path:
        """A file of the bundle on this machine.

        Raises:
            IntegrityError: It is missing, or not as long as the manifest says.
        """
        if self.root is not None:
            found = self.root / name
        else:
            assert self.repo is not None
            assert self.commit is not None
            found = self.hub.download(self.repo, self.commit, name)
        if not found.is_file():
            raise IntegrityError(f"{self.label}: {name} is missing", hint="fetch the bundle again")
        return found

    def check(self, names: Iterable[str]) -> None:
        """Compare files with the manifest: length and sha256.

        Raises:
            IntegrityError: A file differs; the message names it.
        """
        known = {f.path: f for f in self.manifest.files}
        for name in names:
            _check_file(self.path(name), known[name], self.label)

    def source(self, name: str) -> ByteSource:
        """A file, opened once."""
        with self._lock:
            found = self._open.get(name)
            if found is None:
                found = self._open[name] = FileSource(self.path(name))
            return found

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for source in self._open.values():
                source.close()
            self._open.clear()

    def tensors(self, names: Iterable[str]) -> dict[str, TensorSpec]:
        """The stored tensors of these files."""
        found: dict[str, TensorSpec] = {}
        for name in names:
            source = self.source(name)
            found |= read_header(lambda a, b, s=source: _bytes(s, a, b), source.size_bytes, name, name).tensors  # type: ignore[misc]
        return found

    def files(self, *, task: TaskEntry | None = None) -> list[str]:
        """Paths of the shared files, and of a task's private parts."""
        own = {task.parts_path} if task is not None else set()
        return [f.path for f in self.manifest.files if f.path.startswith("bundle-") or f.path in own]

    def small_files(self) -> dict[str, bytes]:
        """What accompanies the weights, but for the files that are made anew whenever the bundle changes."""
        weights = {f.path for f in self.manifest.files}
        if self.root is not None:
            names = [p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file()]
            return {n: (self.root / n).read_bytes() for n in sorted(names) if n not in weights | _MADE_ANEW}
        assert self.repo is not None
        assert self.commit is not None
        names = [f.path for f in self.hub.list_files(self.repo, self.commit)]
        return {n: self.hub.read_small(self.repo, self.commit, n) for n in names if n not in weights | _MADE_ANEW}

    def parts(self, task: TaskEntry | None = None) -> StoredParts:
        """The shared parts, and a task's own."""
        return StoredParts(self.tensors(self.files(task=task)), self.source)

    # --- models

    def base(self) -> PinnedModel:
        """The base, pinned as it was when the bundle was made.

        Raises:
            SourceError: It is not given, or another one.
        """
        origin = self.manifest.base
        if origin.repo is None and self.base_folder is None:
            raise SourceError(
                f"{self.label}: its base is {origin.label}, which only its maker has",
                hint="say where it is with --base FOLDER",
            )
        repo = self.base_folder or origin.repo
        assert repo is not None
        commit = None if self.base_folder else origin.commit
        found = pin_model(self.hub, repo, commit, "base", "base")
        if found.header_sha256 != origin.header_sha256:
            raise SourceError(
                f"{repo} is not the base of {self.label}: its tensors differ from those of {origin.label}",
                hint=f"use {origin.label}",
            )
        return found


def open_bundle(place: str, hub: Hub, *, base: str | None = None) -> Bundle:
    """Open a bundle.

    Args:
        place: A folder, or a repository with ``@revision`` if need be.
        hub: Where repositories are.
        base: The folder of the base, if the bundle's manifest names a local one.

    Raises:
        SourceError: There is no bundle.
        IntegrityError: The manifest is damaged.
        HubMergeError: It has a newer format or an unknown codec.
        AccessError: The repository is missing or not accessible.
    """
    folder = Path(place).expanduser()
    if place.startswith((".", "/", "~")) or folder.is_dir():
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise SourceError(f"{place}: no bundle: it has no {MANIFEST_NAME}", hint="give a bundle's folder or repo")
        bundle = Bundle(place, hub, loads(path.read_bytes(), f"{place}/{MANIFEST_NAME}"), folder, base_folder=base)
    else:
        repo, _, revision = place.partition("@")
        commit = hub.pin(repo, revision or None)
        label = f"{repo}@{commit[:12]}"
        if MANIFEST_NAME not in {f.path for f in hub.list_files(repo, commit)}:
            raise SourceError(f"{label}: no bundle: it has no {MANIFEST_NAME}", hint="give a bundle's folder or repo")
        content = hub.read_small(repo, commit, MANIFEST_NAME)
        bundle = Bundle(label, hub, loads(content, f"{label}/{MANIFEST_NAME}"), None, repo, commit, base_folder=base)
    bundle.manifest.codec_of()
    return bundle


def _check_file(path: Path, entry: FileEntry, label: str) -> None:
    size = path.stat().st_size
    if size != entry.size_bytes:
        raise IntegrityError(
            f"{label}: {entry.path} has {size} bytes, the manifest says {entry.size_bytes}",
            hint="fetch the bundle again",
        )
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    if digest.hexdigest() != entry.sha256:
        raise IntegrityError(
            f"{label}: {entry.path} has the sha256 {digest.hexdigest()[:12]}…, the manifest says {entry.sha256[:12]}…",
            hint="fetch the bundle again",
        )


def _bytes(source: ByteSource, start: int, stop: int) -> bytes:
    data = bytearray(stop - start)
    source.read_into(start, memoryview(data))
    return bytes(data)
