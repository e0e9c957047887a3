"""An artifact against its lock: every file's size and digest, and files that should not be there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import ValidationError

from hubmerge.errors import IntegrityError, SourceError, UsageError, VerificationError
from hubmerge.io import threads
from hubmerge.io.local import FileSource, sha256_of
from hubmerge.lock import LOCK_NAME, Lock, OutputDigest, loads
from hubmerge.markdown import one_line
from hubmerge.recipe.refs import ModelRef
from hubmerge.spec import ByteSource, FileSpec

if TYPE_CHECKING:
    from hubmerge.hub import Hub

_BLOCK_BYTES = 16 * 1024 * 1024
_MAX_LOCK_BYTES = 32_000_000
_MAX_THREADS = 8
_SHORT = 12
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".ggml",
    ".onnx",
    ".pkl",
    ".npz",
)
_CODE_AND_TEXT = (".py", ".jinja", ".model", ".tiktoken", ".index.json")
# What from_pretrained looks for by name: one more of these changes what is loaded as much as one more weight file.
_READ_BY_NAME = frozenset({
    "config.json", "adapter_config.json", "generation_config.json", "quantize_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.json", "preprocessor_config.json", "processor_config.json", "modules.json",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """What is there in place of a file."""

    size_bytes: int
    sha256: str | None = None
    """None where another size made it needless to read the file."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A file that is not as the lock says."""

    path: str
    kind: Literal["changed", "missing", "extra"]
    expected: Found | None
    found: Found | None

    def __str__(self) -> str:
        path = one_line(self.path)
        if self.kind == "missing":
            return f"missing  {path}: expected {_show(self.expected)}"
        if self.kind == "extra":
            return f"extra    {path}: {_show(self.found)}; the lock has no such file, and loading may pick it up"
        return f"changed  {path}: expected {_show(self.expected)}, found {_show(self.found)}"


def _show(state: Found | None) -> str:
    if state is None:
        return "nothing"
    return f"{state.size_bytes} bytes" + (f" with sha256 {state.sha256}" if state.sha256 else "")


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a verification."""

    target: str
    commit: str | None
    """The commit that was looked at; None for a local folder."""
    lock_sha256: str
    """Digest of the lock itself. Nothing in the artifact vouches for it: compare it with a record of your own."""
    files: int
    """How many files the lock lists."""
    size_bytes: int
    """Their total size."""
    read_bytes: int
    """How much of that was read and hashed here; for the rest, the digests are those the Hub keeps in its file list."""
    mismatches: tuple[Mismatch, ...]
    unlisted: tuple[str, ...]
    """Files the lock does not list and that no loader reads, such as images."""

    @property
    def ok(self) -> bool:
        """Whether everything is as the lock says."""
        return not self.mismatches

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"ok": self.ok, **asdict(self)}

    def text(self) -> str:
        """The verdict, one line; then a line for each file that differs."""
        where = f"{self.target} at {self.commit[:_SHORT]}" if self.commit else self.target
        if self.ok:
            how = (
                ""
                if self.read_bytes == self.size_bytes
                else f"; {self.read_bytes:,} bytes read, the rest by the Hub's list"
            )
            verdict = f"OK: {where}: {self.files} files, {self.size_bytes:,} bytes as in {LOCK_NAME}{how}"
        else:
            differ = f"{len(self.mismatches)} file{'s differ' if len(self.mismatches) != 1 else ' differs'}"
            verdict = f"MISMATCH: {where}: {differ} from {LOCK_NAME}, which lists {self.files}"
        extra = [f"note     {one_line(path)}: not in the lock" for path in self.unlisted]
        return "\n".join([verdict, *(f"  {line}" for line in [*map(str, self.mismatches), *extra])])

    def raise_for_mismatch(self) -> None:
        """Do nothing if everything matches.

        Raises:
            VerificationError: Listing every file that differs.
        """
        if not self.ok:
            raise VerificationError(self.text(), hint="fetch it again, or find out who changed it")


def verify(target: str | Path, hub: Hub | None = None, *, deep: bool = False) -> Report:
    """Check a model against its ``hubmerge.lock.json``.

    Args:
        target: A local folder, or ``repo`` or ``repo@revision`` on the Hub.
        hub: How to reach the Hub.
        deep: Also read and hash the large files of a Hub repository, whose digests are otherwise taken from its file
            list. A local folder is always read.

    Raises:
        VerificationError: There is no lock, or none that can be read.
        UsageError: The target is neither.
        AccessError: The repository is missing or not accessible.
    """
    place = open_place(target, hub)
    return _compare(place, deep=deep)


# --- the two kinds of place -------------------------------------------------------------------------------------


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

    def read_lock(self) -> bytes:
        """The text of its lock."""

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
    return _parse(_lock_text(place), place.name)


def _lock_text(place: Place) -> bytes:
    if LOCK_NAME not in place.sizes:
        raise VerificationError(
            f"{place.name}: has no {LOCK_NAME}",
            hint="hubmerge did not publish this model, or somebody removed the lock",
        )
    return place.read_lock()


class _Folder:
    commit = None

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UsageError(
                f"{folder}: no such folder", hint="give a folder with a merged model, or org/name[@revision]"
            )
        self.name, self._folder = str(folder), folder
        self.sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in _files(folder)}

    def read_lock(self) -> bytes:
        path = self._folder / LOCK_NAME
        if self.sizes[LOCK_NAME] > _MAX_LOCK_BYTES:
            raise VerificationError(f"{path}: {self.sizes[LOCK_NAME]} bytes is too large for a lock")
        return path.read_bytes()

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

    def read_lock(self) -> bytes:
        return self._hub.read_small(self.name, self.commit, LOCK_NAME)

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


# --- comparing --------------------------------------------------------------------------------------------------


def _compare(place: Place, *, deep: bool) -> Report:
    """Compare a place with the lock in it."""
    text = _lock_text(place)
    lock, present = _parse(text, place.name), place.sizes

    def check(file: OutputDigest) -> tuple[Mismatch | None, int]:
        expected = Found(file.size_bytes, file.sha256)
        if file.path not in present:
            return Mismatch(file.path, "missing", expected, None), 0
        if present[file.path] != file.size_bytes:
            return Mismatch(file.path, "changed", expected, Found(present[file.path])), 0
        found, was_read = place.digest(file, deep=deep)
        read_bytes = file.size_bytes if was_read else 0
        if found != file.sha256:
            return Mismatch(file.path, "changed", expected, Found(file.size_bytes, found)), read_bytes
        return None, read_bytes

    with threads.pool(min(_MAX_THREADS, 2 * (os.cpu_count() or 1))) as pool:
        results = list(pool.map(check, lock.outputs))
    others = sorted(present.keys() - {f.path for f in lock.outputs} - {LOCK_NAME, ".gitattributes"})
    extra = [Mismatch(p, "extra", None, Found(present[p])) for p in others if _is_loadable(p)]
    return Report(
        target=place.name,
        commit=place.commit,
        lock_sha256=hashlib.sha256(text).hexdigest(),
        files=len(lock.outputs),
        size_bytes=sum(f.size_bytes for f in lock.outputs),
        read_bytes=sum(n for _, n in results),
        mismatches=(*(m for m, _ in results if m is not None), *extra),
        unlisted=tuple(p for p in others if not _is_loadable(p)),
    )


def _parse(text: bytes, target: str) -> Lock:
    try:
        return loads(text, f"{target}/{LOCK_NAME}")
    except IntegrityError as e:
        raise VerificationError(e.message, hint=e.hint) from e


def _is_loadable(path: str) -> bool:
    name = PurePosixPath(path).name
    return name in _READ_BY_NAME or name.lower().endswith((*_WEIGHTS, *_CODE_AND_TEXT))
