"""An artifact against its lock: every file's size and digest, files that should not be there, and the signature."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from hubmerge.errors import VerificationError
from hubmerge.io import threads
from hubmerge.lock import LOCK_NAME, Lock, OutputDigest
from hubmerge.markdown import one_line
from hubmerge.places import Place, lock_text, open_place, parse_lock
from hubmerge.signing import SIGNATURE_NAME, Verifier

if TYPE_CHECKING:
    from hubmerge.hub import Hub

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
class Signature:
    """What is known of the signature over the lock and the files in it."""

    state: Literal["unchecked", "holds", "fails"]
    says: str
    """The same as a sentence, with the reason."""

    def __str__(self) -> str:
        return f"{'note' if self.state == 'unchecked' else 'signed':8} {self.says}"


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a verification."""

    target: str
    commit: str | None
    """The commit that was looked at; None for a local folder."""
    lock_sha256: str
    """Digest of the lock itself. Only a signature vouches for it; without one, compare it with your own record."""
    files: int
    """How many files the lock lists."""
    size_bytes: int
    """Their total size."""
    read_bytes: int
    """How much of that was read and hashed here; for the rest, the digests are those the Hub keeps in its file list."""
    mismatches: tuple[Mismatch, ...]
    unlisted: tuple[str, ...]
    """Files the lock does not list and that no loader reads, such as images."""
    signature: Signature | None = None
    """None if there is none, and none was asked for."""

    @property
    def ok(self) -> bool:
        """Whether everything is as the lock says, and the lock as it was signed, where that was checked."""
        return not self.mismatches and (self.signature is None or self.signature.state != "fails")

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
        elif not self.mismatches:
            verdict = f"MISMATCH: {where}: {self.files} files are as in {LOCK_NAME}, and the signature does not hold"
        else:
            differ = f"{len(self.mismatches)} file{'s differ' if len(self.mismatches) != 1 else ' differs'}"
            verdict = f"MISMATCH: {where}: {differ} from {LOCK_NAME}, which lists {self.files}"
        extra = [f"note     {one_line(path)}: not in the lock" for path in self.unlisted]
        signed = [str(self.signature)] if self.signature is not None else []
        return "\n".join([verdict, *(f"  {line}" for line in [*map(str, self.mismatches), *extra, *signed])])

    def raise_for_mismatch(self) -> None:
        """Do nothing if everything matches.

        Raises:
            VerificationError: Listing every file that differs.
        """
        if not self.ok:
            raise VerificationError(self.text(), hint="fetch it again, or find out who changed it")


def verify(
    target: str | Path, hub: Hub | None = None, *, deep: bool = False, verifier: Verifier | None = None
) -> Report:
    """Check a model against its ``hubmerge.lock.json``.

    Args:
        target: A local folder, or ``repo`` or ``repo@revision`` on the Hub.
        hub: How to reach the Hub.
        deep: Also read and hash the large files of a Hub repository, whose digests are otherwise taken from its file
            list. A local folder is always read.
        verifier: Who must have signed it. Without, a signature is told of and not checked.

    Raises:
        VerificationError: There is no lock, or none that can be read.
        UsageError: The target is neither.
        AccessError: The repository is missing or not accessible.
    """
    place = open_place(target, hub)
    return _compare(place, deep=deep, verifier=verifier)


# --- comparing --------------------------------------------------------------------------------------------------


def _compare(place: Place, *, deep: bool, verifier: Verifier | None) -> Report:
    """Compare a place with the lock in it."""
    text = lock_text(place)
    lock, present = parse_lock(text, place), place.sizes

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
    others = sorted(present.keys() - {f.path for f in lock.outputs} - {LOCK_NAME, SIGNATURE_NAME, ".gitattributes"})
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
        signature=_signature(place, text, lock, verifier),
    )


def _signature(place: Place, text: bytes, lock: Lock, verifier: Verifier | None) -> Signature | None:
    """Whether somebody vouches for the lock; the lock vouches for the rest."""
    if SIGNATURE_NAME not in place.sizes:
        return None if verifier is None else Signature("fails", f"there is no {SIGNATURE_NAME}")
    if verifier is None:
        return Signature("unchecked", f"{SIGNATURE_NAME}: a signature that was not checked; --public-key FILE does it")
    digests = {LOCK_NAME: hashlib.sha256(text).hexdigest(), **{f.path: f.sha256 for f in lock.outputs}}
    if problem := verifier.problem(place.read_small(SIGNATURE_NAME), digests):
        return Signature("fails", problem)
    return Signature("holds", f"{SIGNATURE_NAME} holds under {verifier.trusted}")


def _is_loadable(path: str) -> bool:
    name = PurePosixPath(path).name
    return name in _READ_BY_NAME or name.lower().endswith((*_WEIGHTS, *_CODE_AND_TEXT))
