"""What of a run is finished, so that the next one continues there: the plan's identity, and a journal on the disk."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import hubmerge
from hubmerge.errors import TargetNotEmptyError
from hubmerge.io.local import sha256_of
from hubmerge.spec import OutputFile, Plan

TAG_LENGTH = 12


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file of the result."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Resumable:
    """A run that can be continued: finished files are taken over by every run of the same digest, by no other one."""

    digest: str
    """sha256 over all that decides the output's bytes, local inputs included."""
    outputs: tuple[OutputFile, ...]
    """The files that are taken over."""
    resume: bool = True
    """False removes what is there and starts over."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """For whoever finds what a run left, and wonders what it is."""

    @property
    def tag(self) -> str:
        """A short name."""
        return self.digest[:TAG_LENGTH]

    def takes_over(self, path: str) -> bool:
        """Whether the next run has use for this file."""
        return any(output.path == path for output in self.outputs)

    def described(self) -> dict[str, Any]:
        """What a journal begins with."""
        return {
            "plan_sha256": self.digest,
            "hubmerge_version": hubmerge.__version__,
            "recipe": dict(self.recipe),
            "outputs": [{"path": o.path, "size_bytes": o.size_bytes} for o in self.outputs],
        }


def resumable(plan: Plan, recipe: Mapping[str, Any], *, resume: bool = True) -> Resumable:
    """What of a plan can be continued.

    Merged adapters are computed again: what their rank loses stands in the card, and only computing tells.

    Args:
        plan: The plan.
        recipe: The recipe without paths of this machine.
        resume: Whether to take over what is there.
    """
    factors = {job.output for job in plan.jobs if job.factors is not None}
    outputs = tuple(output for i, output in enumerate(plan.outputs) if i not in factors)
    return Resumable(_digest(plan), outputs, resume, recipe)


def _digest(plan: Plan) -> str:
    """The plan's digest; with local inputs, one over their files' times too.

    A commit never changes, but a folder may be trained into again, and keep its layout.
    """
    states = []
    for model in (plan.base, *plan.models):
        if model.root is not None:
            for path in sorted({tensor.file for tensor in model.tensors.values()}):
                status = (Path(model.root) / path).stat()
                states.append([model.role, model.name, path, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps([plan.digest, states]).encode()).hexdigest() if states else plan.digest


class Journal:
    """The list of finished files of a folder, in a file beside it; a process that has it open is the only one.

    A line is written once the file that it names is on the disk for good. One that was cut short is not believed.

    Args:
        folder: Where the files are collected.
        work: What is being made there.
    """

    def __init__(self, folder: Path, work: Resumable) -> None:
        self.folder = folder
        self.path = folder.with_name(f"{folder.name}.journal")
        self._work = work
        self._file: IO[bytes] | None = None

    def open(self) -> tuple[Written, ...]:
        """Take the journal, and see what is finished; everything else in the folder is removed.

        Raises:
            TargetNotEmptyError: Another process works in the folder.
            OSError: The disk refuses.
        """
        self._file = _locked(self.path)
        self._file.seek(0)
        lines, end = _whole_lines(self._file)
        self._file.truncate(end)
        first, *noted = lines or [{}]
        done: tuple[Written, ...] = ()
        if self._work.resume and first.get("plan_sha256") == self._work.digest:
            done = self._believed(noted)
        else:
            self._file.truncate(0)
            self._append(self._work.described())
        _remove_all_but(self.folder, {w.path for w in done})
        return done

    def join(self) -> None:
        """Note files as well, beside the process that has opened the journal."""
        self._file = self.path.open("ab")

    def noted(self) -> frozenset[str]:
        """The files of this plan that are noted by now, whichever process has finished them."""
        if self._file is None or not self.path.exists():
            return frozenset()
        with self.path.open("rb") as file:
            found = {str(line.get("path")) for line in _whole_lines(file)[0]}
        return frozenset(output.path for output in self._work.outputs if output.path in found)

    def add(self, written: Written) -> None:
        """Note a file that is on the disk for good."""
        self._append(asdict(written))

    def close(self, *, keep: bool) -> None:
        """Let others have it; without ``keep``, the journal and the folder are removed first."""
        if self._file is None:
            return
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.path.unlink(missing_ok=True)
        self._file.close()
        self._file = None

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _believed(self, noted: Sequence[Mapping[str, Any]]) -> tuple[Written, ...]:
        """The files of this plan that have their digest still: reading them costs less than making them."""
        wanted = {o.path: o.size_bytes for o in self._work.outputs}
        found = {w.path: w for w in (Written(**line) for line in noted)}
        return tuple(w for w in found.values() if wanted.get(w.path) == w.size_bytes and self._is_whole(w))

    def _is_whole(self, written: Written) -> bool:
        path = self.folder / written.path
        return path.is_file() and path.stat().st_size == written.size_bytes and sha256_of(path) == written.sha256


def _whole_lines(file: IO[bytes]) -> tuple[list[dict[str, Any]], int]:
    """The lines of a journal up to one that was cut short, and where they end."""
    found, end = [], 0
    for line in file:
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(value, dict):
            break
        found.append(value)
        end += len(line)
    return found, end


def _locked(path: Path) -> IO[bytes]:
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise TargetNotEmptyError(
                f"{path.with_suffix('')}: another run is writing there",
                hint="wait for it, stop it, or give --out another name",
            ) from None
        # Whoever had it may have removed it in between.
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
        file.close()


def _remove_all_but(folder: Path, keep: set[str]) -> None:
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(place, name)
            if path.relative_to(folder).as_posix() not in keep:
                path.unlink()
