"""An existing bundle, in a folder or on the Hub: its manifest, and its files, whose bytes are checked before use."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hubmerge.bundles.manifest import MANIFEST_NAME, Manifest, Origin, TaskEntry, loads
from hubmerge.bundles.stream import StoredParts
from hubmerge.errors import IntegrityError, SourceError
from hubmerge.hub import Hub
from hubmerge.io.header import read_header
from hubmerge.io.local import FileSource
from hubmerge.lock import LOCK_NAME, Digested, Lock
from hubmerge.lock import loads as load_lock
from hubmerge.output import recover
from hubmerge.resolve import Role, pin_model
from hubmerge.spec import ByteSource, PinnedModel, TensorSpec
from hubmerge.storage import Stored

DAMAGED = "the bundle is damaged: fetch or copy it again"
"""The next step where a bundle's files contradict one another."""


@dataclass(slots=True)
class Bundle:
    """A bundle at one commit, or in a folder. Files from the Hub are kept in the Hugging Face cache."""

    label: str
    hub: Hub
    manifest: Manifest
    root: Path | None
    repo: str | None = None
    commit: str | None = None
    revision: str | None = None
    """The branch, tag or commit that was asked for."""
    base_folder: str | None = None
    """Where the base is, if it is not where the manifest says."""
    _open: dict[str, ByteSource] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    # --- files

    def path(self, name: str) -> Path:
        """A file of the bundle on this machine.

        Raises:
            IntegrityError: It is missing.
        """
        if self.root is not None:
            found = self.root / name
            if not found.is_file():
                raise IntegrityError(f"{self.label}: {name} is missing", hint=DAMAGED)
            return found
        self._check_listed(name)
        return self.hub.download(*self._place, name)

    def read(self, name: str) -> bytes:
        """A small file.

        Raises:
            IntegrityError: It is missing or damaged.
        """
        if self.root is not None:
            return self.path(name).read_bytes()
        self._check_listed(name)
        return self.hub.read_small(*self._place, name)

    @property
    def _place(self) -> tuple[str, str]:
        assert self.repo is not None
        assert self.commit is not None
        return self.repo, self.commit

    def _check_listed(self, name: str) -> None:
        if name not in {f.path for f in self.hub.list_files(*self._place)}:
            raise IntegrityError(f"{self.label}: {name} is missing", hint=DAMAGED)

    def check(self, names: Iterable[str]) -> None:
        """Compare weight files with the manifest: length and sha256.

        Raises:
            IntegrityError: A file differs; the message names it.
        """
        known = {f.path: f for f in self.manifest.files}
        for name in names:
            path = self.path(name)
            again = DAMAGED if self.root is not None else f"delete {path} and run the same command again"
            check_file(path, known[name], f"{self.label}: {name}", again)

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

    def shared_files(self) -> list[str]:
        """Paths of the files with shared parts."""
        return [f.path for f in self.manifest.files if f.path.startswith("bundle-")]

    def files(self, *, task: TaskEntry | None = None) -> list[str]:
        """Paths of the shared files, and of a task's private parts."""
        own = [f.path for f in self.manifest.files if task is not None and f.path == task.parts_path]
        return [*self.shared_files(), *own]

    def head_files(self, task: TaskEntry) -> list[str]:
        """The path of the file with what only this task has, if there is one."""
        return [f.path for f in self.manifest.files if f.path == task.head_path]

    def lock(self) -> Lock:
        """The bundle's lock.

        Raises:
            IntegrityError: It is missing or damaged.
        """
        return load_lock(self.read(LOCK_NAME), f"{self.label}/{LOCK_NAME}")

    def parts(self, task: TaskEntry | None = None) -> StoredParts:
        """The shared parts, and a task's own.

        Raises:
            IntegrityError: The files do not hold what the manifest promises.
        """
        found = self.tensors(self.files(task=task))
        for name, stored in self._expected(task):
            spec = found.get(name)
            if spec is None or (spec.dtype, spec.shape) != (stored.dtype, stored.shape):
                what = "missing" if spec is None else f"{spec.dtype.name} {list(spec.shape)}"
                raise IntegrityError(
                    f"{self.label}: the stored tensor {name!r} is {what}; the manifest promises "
                    f"{stored.dtype.name} {list(stored.shape)}",
                    hint=DAMAGED,
                )
        return StoredParts(found, self.source)

    def _expected(self, task: TaskEntry | None) -> Iterator[tuple[str, Stored]]:
        """What the files hold, by the manifest."""
        codec, params = self.manifest.codec_of()
        for entry in self.manifest.targets:
            target = entry.target()
            for part in codec.parts(params, target, None if task is None else task.ranks.get(target.name)):
                if part.owner == "shared" or task is not None:
                    yield from part.stored(target, params.storage).items()

    # --- models

    def base(self) -> PinnedModel:
        """The base, pinned as it was when the bundle was made.

        Raises:
            SourceError: It is not given, or another one.
            AccessError: It is not accessible, or no longer there.
            IntegrityError: The manifest names tensors that the base does not have.
        """
        origin = self.manifest.base
        if origin.repo is None and self.base_folder is None:
            raise SourceError(
                f"{self.label}: its base is {origin.label}, which only its maker has",
                hint="say where it is: --base FOLDER",
            )
        found = pinned_again(self.hub, origin, self.base_folder, "base", f"the base of {self.label}")
        for target in () if self.manifest.factors else self.manifest.targets:
            spec = found.tensors.get(target.name)
            if spec is None or spec.shape != target.shape or not spec.dtype.mergeable:
                raise IntegrityError(
                    f"{self.label}/{MANIFEST_NAME}: the base has no tensor {target.name!r} of shape "
                    f"{list(target.shape)}",
                    hint=DAMAGED,
                )
        return found


def open_bundle(place: str, hub: Hub, *, base: str | None = None) -> Bundle:
    """Open a bundle.

    Args:
        place: A folder, or a repository with ``@revision`` if need be.
        hub: Where repositories are.
        base: The folder of the base, if it is not where the manifest says.

    Raises:
        SourceError: There is no bundle.
        IntegrityError: The manifest is damaged.
        HubMergeError: It has a newer format or an unknown codec.
        AccessError: The repository is missing or not accessible.
    """
    folder = Path(place).expanduser()
    recover(folder)
    if place.startswith((".", "/", "~")) or folder.is_dir():
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise SourceError(f"{place}: no bundle: it has no {MANIFEST_NAME}", hint=_GIVE)
        found = loads(path.read_bytes(), f"{place}/{MANIFEST_NAME}")
        bundle = Bundle(place, hub, found, folder.resolve(), base_folder=base)
    else:
        repo, _, revision = place.partition("@")
        commit = hub.pin(repo, revision or None)
        label = f"{repo}@{commit[:12]}"
        if MANIFEST_NAME not in {f.path for f in hub.list_files(repo, commit)}:
            raise SourceError(f"{label}: no bundle: it has no {MANIFEST_NAME}", hint=_GIVE)
        found = loads(hub.read_small(repo, commit, MANIFEST_NAME), f"{label}/{MANIFEST_NAME}")
        bundle = Bundle(label, hub, found, None, repo, commit, revision or None, base)
    bundle.manifest.codec_of(f"{bundle.label}/{MANIFEST_NAME}")
    return bundle


_GIVE = "give the folder or the repository of a bundle"


def pinned_again(hub: Hub, origin: Origin, folder: str | None, role: Role, what: str) -> PinnedModel:
    """A model that is recorded in a manifest, pinned as it was then.

    Args:
        hub: Where repositories are.
        origin: What is recorded.
        folder: Where it is, if not where the record says; its weight files must then have the recorded digests.
        role: Of the model.
        what: What messages call it.

    Raises:
        SourceError: It is another model.
        AccessError: It is not accessible, or no longer there.
    """
    place = folder or origin.repo
    assert place is not None
    found = pin_model(hub, place, None if folder else origin.commit, role, origin.name)
    different = f"{place} is not {what}, which is {origin.label}"
    if found.header_sha256 != origin.header_sha256:
        raise SourceError(f"{different}: its tensors have other names, types or shapes", hint=f"use {origin.label}")
    for file in origin.files if found.root is not None else ():
        path = Path(found.root or "") / file.path
        if not path.is_file() or (file.sha256 is not None and digest_of(path) != file.sha256):
            raise SourceError(f"{different}: {file.path} has other values", hint=f"use {origin.label}")
    return found


def check_file(path: Path, expected: Digested, label: str, hint: str) -> None:
    """Compare a file's length and sha256 with what the manifest says of it.

    Raises:
        IntegrityError: It differs; the message calls the file ``label``.
    """
    size = path.stat().st_size
    if size != expected.size_bytes:
        raise IntegrityError(f"{label} has {size} bytes, the manifest says {expected.size_bytes}", hint=hint)
    if (found := digest_of(path)) != expected.sha256:
        raise IntegrityError(
            f"{label} has the sha256 {found[:12]}…, the manifest says {(expected.sha256 or '')[:12]}…", hint=hint
        )


def digest_of(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes(source: ByteSource, start: int, stop: int) -> bytes:
    data = bytearray(stop - start)
    source.read_into(start, memoryview(data))
    return bytes(data)
