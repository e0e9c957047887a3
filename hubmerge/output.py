"""A local folder as the place where results go: it appears under its final name only when everything in it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from hubmerge.errors import BudgetError, HubMergeError, TargetNotEmptyError
from hubmerge.spec import OutputFile


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file of the result."""

    path: str
    size_bytes: int
    sha256: str


class FolderSink:
    """Collects files beside the target and renames the whole folder at the end.

    Used as a context manager: leaving it without ``commit`` removes what was written.

    Args:
        out: The target; must not exist, or be an empty folder, unless ``overwrite``.
        tag: Distinguishes this run's temporary folder.
        needed_bytes: What will be written; checked against the free space before anything is.

    Raises:
        TargetNotEmptyError: The target holds something.
        BudgetError: The disk is too small.
    """

    def __init__(self, out: Path, tag: str, needed_bytes: int, *, overwrite: bool = False) -> None:
        self.out = out.expanduser().absolute()
        if self.out.exists() and not self.out.is_dir():
            raise TargetNotEmptyError(f"{out}: is a file", hint="give --out another name")
        if self.out.is_dir() and any(self.out.iterdir()) and not overwrite:
            raise TargetNotEmptyError(
                f"{out}: the folder is not empty", hint="give --out another name, or --overwrite to replace it"
            )
        self.folder = self.out.parent / f".{self.out.name}.hubmerge-{tag}"
        self._needed_bytes = needed_bytes
        self.written: list[Written] = []

    def __enter__(self) -> FolderSink:
        parent = self.folder.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            if self.folder.exists():
                shutil.rmtree(self.folder)
            free = shutil.disk_usage(parent).free
            if free < self._needed_bytes:
                raise BudgetError(
                    f"{parent}: {self._needed_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
                    hint="free some space, give --out on another disk, or push: it keeps one shard at a time",
                )
            self.folder.mkdir()
        except OSError as e:
            reason = (
                "it, or a folder on the way, is a file"
                if isinstance(e, FileExistsError | NotADirectoryError)
                else e.strerror
            )
            raise HubMergeError(
                f"{parent}: cannot be written: {reason}", hint="give --out a folder you may write to"
            ) from e
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, output: OutputFile, stopped: Callable[[], bool]) -> Path:
        """Where to write this file."""
        path = self.folder / output.path
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finished(self, output: OutputFile, path: Path, sha256: str) -> None:
        """Note a finished file."""
        self.written.append(Written(output.path, output.size_bytes, sha256))

    def commit(self, files: Mapping[str, bytes]) -> None:
        """Add the small files and give the folder its name."""
        try:
            for name, content in files.items():
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            for name in [*files, *(w.path for w in self.written)]:
                _flush(self.folder / name)
            old = None
            if self.out.exists():
                old = self.out.parent / f".{self.out.name}.hubmerge-old"
                self.out.rename(old)
            self.folder.rename(self.out)
            _flush(self.out.parent)
            if old is not None:
                shutil.rmtree(old)
        except OSError as e:
            raise HubMergeError(f"{self.out}: cannot be written: {e.strerror}", hint="free some disk space") from e


def _flush(path: Path) -> None:
    """Make a file's content, or a folder's names, survive a power failure."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
