"""A local folder as the place where results go: it appears under its final name only when everything in it is whole."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from hubmerge.errors import BudgetError, HubMergeError, RankError, SpoiledError, TargetNotEmptyError
from hubmerge.journal import Journal, Resumable, Written
from hubmerge.ranks import ALONE, Ranks
from hubmerge.spec import OutputFile

log = logging.getLogger(__name__)


class FolderSink:
    """Collects files beside the target and renames the whole folder at the end.

    Used as a context manager: leaving it without ``commit`` removes what was written; with ``work``, finished files
    stay beside the target, for the next run of the same plan.

    Args:
        out: The target; must not exist, or be an empty folder, unless ``overwrite``.
        tag: Distinguishes this run's temporary folder.
        needed_bytes: What will be written; checked against the free space before anything is.
        work: What is made, if it can be continued.
        ranks: The processes that write into the folder; the first one opens it, and gives it its name.

    Raises:
        TargetNotEmptyError: The target holds something, or another run is at work on it.
        BudgetError: The disk is too small.
    """

    def __init__(
        self,
        out: Path,
        tag: str,
        needed_bytes: int,
        *,
        overwrite: bool = False,
        work: Resumable | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.out = out.expanduser().absolute()
        if self.out.exists() and not self.out.is_dir():
            raise TargetNotEmptyError(f"{out}: is a file", hint="give --out another name")
        if self.out.is_dir() and any(self.out.iterdir()) and not overwrite:
            raise TargetNotEmptyError(
                f"{out}: the folder is not empty", hint="give --out another name, or --overwrite to replace it"
            )
        self.folder = self.out.parent / f".{self.out.name}.hubmerge-{tag}"
        self._needed_bytes = needed_bytes
        self._work = work
        self._journal = Journal(self.folder, work) if work is not None else None
        self._ranks = ranks
        self.written: list[Written] = []
        """The files that are finished; from the start, those of the run before."""

    def __enter__(self) -> FolderSink:
        parent = self.folder.parent
        try:
            self.written = self._ranks.from_first(self._open)
            if self._ranks.size > 1:
                self._meet()
        except OSError as e:
            self._leave(e)
            reason = (
                "it, or a folder on the way, is a file"
                if isinstance(e, FileExistsError | NotADirectoryError)
                else e.strerror
            )
            raise HubMergeError(
                f"{parent}: cannot be written: {reason}", hint="give --out a folder you may write to"
            ) from e
        except BaseException as e:
            self._leave(e)
            raise
        return self

    def _open(self) -> list[Written]:
        """Make the folder; returns what is finished in it."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        recover(self.out)
        self._take_over()
        self._check_room()
        self.folder.mkdir(exist_ok=True)
        return self.written

    def _meet(self) -> None:
        """Make sure that all processes are in the same folder, which one of the name on another disk is not."""
        mark = self._ranks.from_first(self._marked)
        seen = list(self._ranks.gather((self.folder / mark).exists()))
        blind = self._ranks.from_first(lambda: seen.count(False))
        if self._ranks.first:
            (self.folder / mark).unlink()
        if blind:
            raise RankError(
                f"{self.out.parent}: {blind} of {self._ranks.size} processes do not see the folder of the others",
                hint="give --out a folder that all machines share, or push to the Hub, which needs none",
            )
        if self._journal is not None and not self._ranks.first:
            self._journal.join()

    def _marked(self) -> str:
        name = uuid.uuid4().hex
        (self.folder / name).touch()
        return name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        """Remove everything but finished files that the next run may take over."""
        if self._journal is None or self._work is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        spoiled = isinstance(error, SpoiledError)
        kept = len(self._journal.noted()) if self.folder.is_dir() and not spoiled else 0
        self._journal.close(keep=kept > 0 or not (self._ranks.first or spoiled))
        if kept and error is not None:
            error.add_note(f"{_files(kept)} kept in {self.folder}; the same command continues from there")

    def _take_over(self) -> None:
        """Find what the run before has finished, and remove what else is in the way."""
        if _old(self.out).exists():
            shutil.rmtree(_old(self.out))
        if self._journal is None:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            return
        self.written += self._journal.open()
        if self.written:
            log.warning("continuing: %s in %s", _files(len(self.written)), self.folder)
        for left in sorted(self.out.parent.glob(f".{self.out.name}.hubmerge-*.journal")):
            if left != self._journal.path:
                folder = left.with_suffix("")
                log.warning("%s is left of another merge into %s; delete it if you need it no more", folder, self.out)

    def _check_room(self) -> None:
        parent = self.folder.parent
        needed_bytes = self._needed_bytes - sum(w.size_bytes for w in self.written)
        free = shutil.disk_usage(parent).free
        if free < needed_bytes:
            raise BudgetError(
                f"{parent}: {needed_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
                hint="free some space, give --out on another disk, or push: it keeps one shard at a time",
            )

    def place(self, output: OutputFile, stopped: Callable[[], bool]) -> Path:
        """Where to write this file."""
        path = self.folder / output.path
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finished(self, output: OutputFile, path: Path, sha256: str) -> None:
        """Note a finished file; what the next run may take over is on the disk for good before.

        Raises:
            HubMergeError: The disk refuses.
        """
        written = Written(output.path, output.size_bytes, sha256)
        if self._journal is not None and self._work is not None and self._work.takes_over(output.path):
            try:
                _flush(path)
                _flush(path.parent)
                self._journal.add(written)
            except OSError as e:
                raise HubMergeError(f"{path}: cannot be written: {e.strerror}", hint="free some disk space") from e
        self.written.append(written)

    def commit(self, files: Mapping[str, bytes]) -> None:
        """Add the small files and give the folder its name."""
        self._ranks.from_first(lambda: self._commit(files))

    def _commit(self, files: Mapping[str, bytes]) -> None:
        try:
            for name, content in files.items():
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            for name in [*files, *(w.path for w in self.written)]:
                _flush(self.folder / name)
            old = None
            if self.out.exists():
                old = _old(self.out)
                self.out.rename(old)
            self.folder.rename(self.out)
            _flush(self.out.parent)
            if old is not None:
                shutil.rmtree(old)
        except OSError as e:
            recover(self.out)
            raise HubMergeError(f"{self.out}: cannot be written: {e.strerror}", hint="free some disk space") from e


def _files(count: int) -> str:
    return f"{count} finished file{'s' if count != 1 else ''}"


def recover(out: Path) -> None:
    """Bring a folder back if the run that was replacing it was killed between the two renames of ``commit``."""
    out = out.expanduser().absolute()
    if not out.exists() and _old(out).is_dir():
        _old(out).rename(out)


def _old(out: Path) -> Path:
    return out.parent / f".{out.name}.hubmerge-old"


def _flush(path: Path) -> None:
    """Make a file's content, or a folder's names, survive a power failure."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


__all__ = ["FolderSink", "Written", "recover"]
