"""Where a bundle is written: a folder or a repository, in which it appears, or changes, all at once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubmerge.bundles.store import Bundle
from hubmerge.hub import Hub
from hubmerge.output import FolderSink, Written
from hubmerge.publish import Publisher, PublishOptions
from hubmerge.signing import SIGNATURE_NAME
from hubmerge.spec import OutputFile
from hubmerge.uploading import ShardByShard


@dataclass(slots=True)
class Destination:
    """A place that is being written to. Nothing is seen there before ``finish``."""

    sink: Any
    """Takes the weight files."""
    publisher: Publisher | None = None
    old: Bundle | None = None
    """The bundle in a folder that is being changed …"""
    keep: frozenset[str] = frozenset()
    """… and what stays of it."""

    @property
    def repo(self) -> str | None:
        """The repository, if it is one."""
        return self.publisher.repo if self.publisher is not None else None

    @property
    def written(self) -> tuple[Written, ...]:
        """The weight files so far."""
        return tuple(self.sink.written)

    def finish(self, small: Mapping[str, bytes]) -> dict[str, Any]:
        """Make everything visible.

        Args:
            small: The small files that are new or have changed.

        Returns:
            ``path``, or ``url`` and ``commit``.
        """
        if self.publisher is not None:
            published = self.publisher.finish(small)
            return {"url": published.url, "commit": published.commit}
        if self.old is not None:
            assert self.old.root is not None
            gone = frozenset(f.path for f in self.old.lock().outputs) - self.keep
            self.old.close()
            _take_over(self.old.root, self.sink.folder, gone | small.keys() | {SIGNATURE_NAME})
        self.sink.commit(small)
        return {"path": self.sink.out}


def _take_over(old: Path, new: Path, without: frozenset[str]) -> None:
    """Bring everything that stays into the new folder: as links where the disk allows it, for nobody changes it."""
    for place, folders, names in os.walk(old):
        for name in [*names, *(f for f in folders if Path(place, f).is_symlink())]:
            source = Path(place, name)
            path = source.relative_to(old)
            target = new / path
            if path.as_posix() in without or target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target, follow_symlinks=False)
            except OSError:
                shutil.copy2(source, target, follow_symlinks=False)


Open = Callable[[Sequence[OutputFile], str, frozenset[str]], AbstractContextManager[Destination]]
"""Opens the destination, given what will be written, the plan's digest, and which files of the bundle before stay."""


def folder(out: Path, *, overwrite: bool = False, old: Bundle | None = None) -> Open:
    """A local folder: a new one, or that of an old bundle."""

    @contextmanager
    def open_folder(outputs: Sequence[OutputFile], digest: str, keep: frozenset[str]) -> Iterator[Destination]:
        needed_bytes = sum(o.size_bytes for o in outputs)
        with FolderSink(out, digest[:12], needed_bytes, overwrite=overwrite or old is not None) as sink:
            yield Destination(sink, old=old, keep=keep)

    return open_folder


def repository(hub: Hub, repo: str, options: Callable[[frozenset[str]], PublishOptions], max_disk: int | None) -> Open:
    """A repository; ``options`` are given which weight files of the commit before stay."""

    @contextmanager
    def open_repo(outputs: Sequence[OutputFile], digest: str, keep: frozenset[str]) -> Iterator[Destination]:
        # Private files are filled while shared ones come and go: there must be room for all of them.
        at_once = len(outputs) if any(o.path.startswith("tasks/") for o in outputs) else 1
        with (
            tempfile.TemporaryDirectory(prefix="hubmerge-") as temporary,
            Publisher(hub, repo, options(keep)) as publisher,
        ):
            yield Destination(ShardByShard(Path(temporary), publisher, outputs, max_disk, at_once=at_once), publisher)

    return open_repo
