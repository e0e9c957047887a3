"""Publishing a result: every shard is uploaded when it is finished, and one commit makes all of them visible."""

from __future__ import annotations

import fnmatch
import logging
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from hubmerge import __version__
from hubmerge.errors import (
    BudgetError,
    HubMergeError,
    IntegrityError,
    PublishError,
    TargetMovedError,
    TargetNotEmptyError,
    UsageError,
)
from hubmerge.hub import Hub, StagedFile
from hubmerge.output import Written
from hubmerge.spec import OutputFile

log = logging.getLogger(__name__)

LOCK_FILE = "hubmerge.lock.json"
# What the Hub puts into every new repository: a repository with nothing else holds nobody's work.
_INITIAL_FILES = frozenset({".gitattributes"})
# Files that a loader would pick up as weights. Left from an earlier version, they would be loaded beside the new ones.
_WEIGHTS = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "adapter_config.json",
    "adapter_model*.safetensors",
    "adapter_model*.bin",
    "hubmerge_bundle.json",
    "bundle-*.safetensors",
    "tasks/*.safetensors",
    "heads/*.safetensors",
    "heads/*.json",
    "heads/*/*",
    "heads/*/*/*",
)


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """Where and how to publish."""

    revision: str = "main"
    """Branch; created from main if it is missing."""
    create_pr: bool = False
    """Open a pull request against the branch instead of committing to it."""
    tag: str | None = None
    public: bool | None = None
    """True makes the repository public after the commit; False insists on a private one; None creates a private one
    and leaves an existing one as it is."""
    overwrite: bool = False
    """Publish into a repository with content that hubmerge did not make."""
    parent: str | None = None
    """The commit that the result continues; publishing fails if the branch is at another one."""
    keep: frozenset[str] = frozenset()
    """Files of the commit before that stay although they are weights or belong to some."""
    message: str = f"Publish a merge made with hubmerge {__version__}"


@dataclass(frozen=True, slots=True)
class PublishedInfo:
    """What was published."""

    repo: str
    commit: str
    url: str
    """Page of the result, or of the pull request."""


class Publisher:
    """One publication, as a context manager.

    Entering checks everything that can be checked before a weight is read. Leaving without ``finish`` takes back what
    entering has created; an existing repository is never changed except by the one commit of ``finish``.

    Args:
        hub: The Hub, with a token that may write.
        repo: Target; without a namespace, the token's own.
        options: Where and how.
    """

    def __init__(self, hub: Hub, repo: str, options: PublishOptions | None = None) -> None:
        self.repo = repo
        self.options = options or PublishOptions()
        self._hub = hub
        self._lock = threading.Lock()
        self._staged: dict[str, StagedFile] = {}
        self._stale: tuple[str, ...] = ()
        self._parent = ""
        self._created_repo = False
        self._created_branch = False
        self._published = False

    def __enter__(self) -> Self:
        """Check the target and create what is missing.

        Raises:
            AccessError: The token is missing or may not write there.
            TargetNotEmptyError: The repository holds something that hubmerge did not make.
            PublishError: The options do not fit the repository.
            UsageError: The options contradict each other.
        """
        if self.options.create_pr and (self.options.tag or self.options.public is not None):
            raise UsageError(
                "a pull request cannot be combined with a tag or a visibility: it changes nothing until it is merged",
                hint="Leave out the pull request, or set tag and visibility after merging it.",
            )
        target = self._hub.check_write(self.repo, create_pr=self.options.create_pr)
        self.repo = target.repo
        if target.exists and not target.private and self.options.public is False:
            raise PublishError(
                f"{self.repo} is public, and a private result was asked for",
                hint="Choose another repository, or make this one private first.",
            )
        try:
            if not target.exists:
                self._created_repo = self._hub.ensure_repo(self.repo, private=True)
            self._inspect()
        except BaseException as error:
            self._take_back(error)
            raise
        return self

    def shard_done(self, local_path: Path, path_in_repo: str, sha256: str, size_bytes: int) -> None:
        """Upload a finished shard and delete the local file; callers on other threads wait for their turn.

        Args:
            local_path: The shard; gone afterwards. It is left where it is if the upload fails.
            path_in_repo: Its name in the repository.
            sha256: Digest of its content, in hex.
            size_bytes: Its length.
        """
        with self._lock:
            found = local_path.stat().st_size
            if found != size_bytes:
                raise IntegrityError(
                    f"{local_path} has {found} bytes, {size_bytes} were written",
                    hint="Something else changed the file; use another folder for temporary files.",
                )
            self._staged[path_in_repo] = self._upload(local_path, path_in_repo, sha256)
            local_path.unlink()
            log.info("uploaded %s (%d bytes)", path_in_repo, size_bytes)

    def finish(self, small_files: Mapping[str, bytes]) -> PublishedInfo:
        """Commit all shards, the small files and the deletion of stale weights at once; then tag, then make public.

        Raises:
            TargetMovedError: Somebody else committed to the branch since ``__enter__``; nothing was committed.
            PublishError: The Hub refused, e.g. the card's front matter.
        """
        if "README.md" in small_files:
            self._hub.validate_card(small_files["README.md"].decode())
        for path, content in small_files.items():
            self._staged[path] = self._upload(content, path)
        made = self._hub.commit(
            self.repo,
            [self._staged[path] for path in sorted(self._staged)],
            delete=[path for path in self._stale if path not in self._staged],
            parent=self._parent,
            message=self.options.message,
            revision=self.options.revision,
            create_pr=self.options.create_pr,
        )
        self._published = True
        page = f"{self._hub.endpoint}/{self.repo}"
        if self.options.revision != "main":
            page += f"/tree/{self.options.revision}"
        info = PublishedInfo(self.repo, made.oid, made.pr_url or page)
        self._announce(info)
        return info

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take back what was created, unless it was published."""
        if not self._published:
            self._take_back(error)

    def _upload(self, source: Path | bytes, path: str, sha256: str | None = None) -> StagedFile:
        options = self.options
        return self._hub.upload(self.repo, options.revision, source, path, sha256=sha256, create_pr=options.create_pr)

    def _inspect(self) -> None:
        """Remember the branch's head, refuse what would destroy something, and find stale weights."""
        options = self.options
        refs = self._hub.refs(self.repo)
        if options.tag in refs.tags:
            raise PublishError(f"{self.repo} has a tag {options.tag!r} already", hint="Choose another tag.")
        if options.revision in refs.tags:
            raise PublishError(f"{options.revision!r} is a tag of {self.repo}", hint="Publish to a branch.")
        branch = options.revision if options.revision in refs.branches else "main"
        if branch not in refs.branches or (options.create_pr and branch != options.revision):
            raise PublishError(
                f"{self.repo} has no branch {branch if branch not in refs.branches else options.revision!r}",
                hint=f"Its branches are: {', '.join(sorted(refs.branches)) or 'none'}.",
            )
        self._parent = refs.branches[branch]
        if options.parent is not None and options.parent != self._parent:
            raise TargetMovedError(
                f"{self.repo}@{branch} is at {self._parent[:12]} now, not at {options.parent[:12]}",
                hint="somebody else changed it; run the same command again",
            )
        paths = [file.path for file in self._hub.list_files(self.repo, self._parent)]
        foreign = sorted(set(paths) - _INITIAL_FILES) if LOCK_FILE not in paths else []
        if foreign and not (options.overwrite or options.create_pr):
            raise TargetNotEmptyError(
                f"{self.repo}@{branch} holds {len(foreign)} files that hubmerge did not make, e.g. {foreign[0]}",
                hint="Choose another repository, open a pull request (--pr), or give --overwrite (overwrite=True).",
            )
        self._stale = tuple(path for path in paths if is_weight_file(path) and path not in options.keep)
        if branch != options.revision:
            self._hub.branch(self.repo, options.revision, self._parent)
            self._created_branch = True

    def _announce(self, info: PublishedInfo) -> None:
        """Tag and visibility: a failure here is reported, but the commit stands."""
        try:
            if self.options.tag:
                self._hub.tag(self.repo, self.options.tag, info.commit)
            if self.options.public:
                self._hub.set_visibility(self.repo, private=False)
        except HubMergeError as error:
            raise PublishError(
                f"published as commit {info.commit} of {self.repo}, but {error.message}", hint=error.hint
            ) from error

    def _take_back(self, cause: BaseException | None) -> None:
        """Delete the repository or branch that this run created, if nobody has used it since."""
        try:
            if not (self._created_repo or self._created_branch):
                return
            head = self._hub.head(self.repo, self.options.revision if self._created_branch else "main")
            if self._parent and head != self._parent:
                log.warning("%s was left in place: it has a new commit %s", self.repo, head)
            elif self._created_repo:
                self._hub.delete_repo(self.repo)
            else:
                self._hub.delete_branch(self.repo, self.options.revision)
        except HubMergeError as error:
            # The first error is the one to report; this one only says what is left over.
            log.warning("could not clean up: %s", error.message)
            if cause is not None:
                cause.add_note(f"Also, {error.message}; it is empty and private, delete it by hand.")


def is_weight_file(path: str) -> bool:
    """Whether a file of a repository holds weights, or tells a loader where they are."""
    return any(fnmatch.fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in _WEIGHTS)


class ShardByShard:
    """A sink that keeps few finished or unfinished shards on disk: each is uploaded before another one is begun.

    Args:
        folder: Where they are.
        publisher: Uploads them.
        outputs: What will be written.
        max_disk_bytes: How much of the disk may be used.
        at_once: How many files are there at most; 1, unless several are filled side by side.
    """

    def __init__(
        self,
        folder: Path,
        publisher: Publisher,
        outputs: Sequence[OutputFile],
        max_disk_bytes: int | None,
        *,
        at_once: int = 1,
    ) -> None:
        self._folder = folder
        self._publisher = publisher
        self._room = threading.Semaphore(at_once)
        self.written: list[Written] = []
        largest = sum(sorted((o.size_bytes for o in outputs), reverse=True)[:at_once])
        free = shutil.disk_usage(folder).free
        limit = free if max_disk_bytes is None else min(free, max_disk_bytes)
        if largest > limit:
            raise BudgetError(
                f"{folder}: {largest / 1e9:.2f} GB are needed at a time, {limit / 1e9:.2f} GB may be used",
                hint="set a smaller output.shard_size (--shard-size), or TMPDIR to a larger disk",
            )

    def path(self, output: OutputFile, stopped: Callable[[], bool]) -> Path | None:
        """Where to write the shard, once the one before is gone."""
        while not self._room.acquire(timeout=0.1):
            if stopped():
                return None
        path = self._folder / output.path
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finished(self, output: OutputFile, path: Path, sha256: str) -> None:
        """Upload it and make room."""
        try:
            self._publisher.shard_done(path, output.path, sha256, output.size_bytes)
            self.written.append(Written(output.path, output.size_bytes, sha256))
        finally:
            self._room.release()
