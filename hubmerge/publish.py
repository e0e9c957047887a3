"""Publishing a result: every shard is uploaded when it is finished, and one commit makes all of them visible."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from hubmerge.errors import (
    HubMergeError,
    IntegrityError,
    PublishError,
    RankError,
    SpoiledError,
    UsageError,
)
from hubmerge.hub import CommitInfo, Hub, StagedFile
from hubmerge.hub.xet import XetStream
from hubmerge.journal import Resumable, Written
from hubmerge.ranks import ALONE, Ranks
from hubmerge.staging import Stage
from hubmerge.target import PublishOptions, State, inspect, published_before

log = logging.getLogger(__name__)

_PATIENCE_S = 1.5


@dataclass(frozen=True, slots=True)
class PublishedInfo:
    """What was published."""

    repo: str
    commit: str
    url: str
    """Page of the result, or of the pull request."""


class Publisher:
    """One publication, as a context manager.

    Entering checks everything that can be checked before a weight is read, and finds what earlier runs of the same
    plan have finished. Leaving without ``finish`` keeps what is staged and takes back what else was created; the
    branches of an existing repository are never changed except by the one commit of ``finish``.

    Args:
        hub: The Hub, with a token that may write.
        repo: Target; without a namespace, the token's own.
        options: Where and how.
        work: What is published, if it can be continued: its shards are then staged as they are finished.
        ranks: The processes that upload what they finish; the first one does everything else.
    """

    def __init__(
        self,
        hub: Hub,
        repo: str,
        options: PublishOptions | None = None,
        work: Resumable | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.repo = repo
        self.options = options or PublishOptions()
        self.done: tuple[Written, ...] = ()
        """What earlier runs have finished; known once entered."""
        self._hub = hub
        self._work = work
        self._ranks = ranks
        self._lock = threading.Lock()
        self._stage: Stage | None = None
        self._staged: dict[str, StagedFile] = {}
        self._state = State("main", "", {}, (), None)
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
        try:
            self.repo, self._state, self.done, stageable = self._ranks.from_first(self._prepared)
        except BaseException as error:
            self._take_back(error)
            raise
        if stageable and self._stage is None:
            self._stage = self._new_stage()
        return self

    def _prepared(self) -> tuple[str, State, tuple[Written, ...], bool]:
        """Do what ``__enter__`` promises; returns what the other processes need to know of it."""
        target = self._hub.check_write(self.repo, create_pr=self.options.create_pr)
        self.repo = target.repo
        if target.exists and not target.private and self.options.public is False:
            raise PublishError(
                f"{self.repo} is public, and a private result was asked for",
                hint="Choose another repository, or make this one private first.",
            )
        if not target.exists:
            self._created_repo = self._hub.ensure_repo(self.repo, private=True)
        self._inspect(stageable=target.writable)
        return self.repo, self._state, self.done, self._stage is not None

    def takes_streams(self) -> bool:
        """Whether shards need no file; if they do, why is reported."""
        reason = self._hub.why_no_stream(self.repo, create_pr=self.options.create_pr)
        if reason is not None and self._ranks.first:
            log.warning("shards are uploaded from files, one at a time: %s", reason)
        return reason is None

    def open_stream(self, path_in_repo: str) -> XetStream:
        """Open a stream for a shard, for ``shard_done``.

        Raises:
            AccessError: The token may not write there.
            TransportError: The Hub could not be reached.
        """
        if (stage := self._stage_of(path_in_repo)) is not None:
            return stage.open_stream(path_in_repo)
        branch, create_pr = self._state.branch, self.options.create_pr
        return self._hub.open_stream(self.repo, branch, path_in_repo, create_pr=create_pr)

    def shard_done(self, source: Path | XetStream, path_in_repo: str, sha256: str, size_bytes: int) -> None:
        """Upload a finished shard and delete the local file; callers on other threads wait for their turn.

        Args:
            source: The shard's file, gone afterwards, and left where it is if the upload fails; or its stream.
            path_in_repo: Its name in the repository.
            sha256: Digest of its content, in hex.
            size_bytes: Its length.
        """
        with self._lock:
            found = source.stat().st_size if isinstance(source, Path) else source.size_bytes
            if found != size_bytes:
                raise IntegrityError(
                    f"{source} has {found} bytes, {size_bytes} were written",
                    hint="Something else changed the file; use another folder for temporary files.",
                )
            if (stage := self._stage_of(path_in_repo)) is not None:
                stage.add(source, Written(path_in_repo, size_bytes, sha256))
            else:
                self._staged[path_in_repo] = self._upload(source, path_in_repo, sha256)
            if isinstance(source, Path):
                source.unlink()
            log.info("uploaded %s (%d bytes)", path_in_repo, size_bytes)

    def finish(self, small_files: Mapping[str, bytes]) -> PublishedInfo:
        """Commit all shards, the small files and the deletion of stale weights at once; then visibility, then the tag.

        Raises:
            TargetMovedError: Somebody else committed to the branch since ``__enter__``; nothing was committed.
            PublishError: The Hub refused, e.g. the card's front matter.
        """
        given = list(self._ranks.gather((self._staged, self._stage.files if self._stage is not None else {})))
        info = self._ranks.from_first(lambda: self._finish(small_files, given))
        self._published = True
        return info

    def _finish(
        self, small_files: Mapping[str, bytes], given: Sequence[tuple[Mapping[str, StagedFile], Mapping[str, Written]]]
    ) -> PublishedInfo:
        if "README.md" in small_files:
            self._hub.validate_card(small_files["README.md"].decode())
        for uploaded, _ in given:
            self._staged |= uploaded
        if self._stage is not None:
            if self._ranks.size > 1:
                self._stage.gather({path: written for _, staged in given for path, written in staged.items()})
            self._staged |= self._stage.copies()
        for path, content in small_files.items():
            self._staged[path] = self._upload(content, path)
        if self._state.branch != self.options.revision:
            self._created_branch = self._hub.branch(self.repo, self.options.revision, self._state.parent)
        with self._stage.in_use() if self._stage is not None else nullcontext():
            made = self._commit()
        self._published = True
        page = f"{self._hub.endpoint}/{self.repo}"
        if self.options.revision != "main":
            page += f"/tree/{self.options.revision}"
        info = PublishedInfo(self.repo, made.oid, made.pr_url or page)
        if self._stage is not None:
            self._stage.remove()
        self._announce(info)
        return info

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take back what was created, unless it was published; what is staged stays, if it may be continued."""
        if self._published:
            return
        if isinstance(error, SpoiledError) and self._stage is not None:
            self._stage.remove()
            self._stage.files.clear()
        if isinstance(error, KeyboardInterrupt | RankError):
            # Whoever interrupts has waited long enough: a silent server gets a moment, not all its retries.
            thread = threading.Thread(target=self._take_back, args=(error,), name="take back", daemon=True)
            thread.start()
            thread.join(_PATIENCE_S)
        else:
            self._take_back(error)
        if self._stage is not None and self._stage.files and error is not None:
            error.add_note(f"{self._stage}; the same command continues from there, on any machine")

    def _stage_of(self, path: str) -> Stage | None:
        """Where a file is staged, if the next run has use for it."""
        return self._stage if self._work is not None and self._work.takes_over(path) else None

    def _upload(self, source: Path | bytes | XetStream, path: str, sha256: str | None = None) -> StagedFile:
        branch, create_pr = self._state.branch, self.options.create_pr
        return self._hub.upload(self.repo, branch, source, path, sha256=sha256, create_pr=create_pr)

    def _commit(self) -> CommitInfo:
        return self._hub.commit(
            self.repo,
            [self._staged[path] for path in sorted(self._staged)],
            delete=[path for path in self._state.stale if path not in self._staged],
            parent=self._state.parent,
            message=self.options.message,
            revision=self.options.revision,
            create_pr=self.options.create_pr,
            again=self._work is not None and len(self.done) == len(self._work.outputs),
        )

    def _inspect(self, *, stageable: bool) -> None:
        """Remember what the target holds, refuse what would destroy something, find what is finished already."""
        refs = self._hub.refs(self.repo)
        self._state = state = inspect(self._hub, self.repo, refs, self.options)
        work = self._work
        published = published_before(self._hub, self.repo, state, work) if work is not None and work.resume else {}
        # The run that published may have been killed before it ended: then the tag is its own.
        if state.tagged is not None and not (published and state.tagged == state.parent):
            raise PublishError(f"{self.repo} has a tag {self.options.tag!r} already", hint="Choose another tag.")
        self._staged |= {
            w.path: self._hub.copied(w.path, w.path, state.parent, size_bytes=w.size_bytes, sha256=w.sha256)
            for w in published.values()
        }
        if work is not None and stageable:
            self._stage = self._new_stage()
            self._stage.find(refs.branches.get(self._stage.branch))
            published |= self._stage.files
        self.done = tuple(published.values())
        if work is not None and self.done:
            log.warning("continuing: %d of %d files are finished", len(self.done), len(work.outputs))

    def _new_stage(self) -> Stage:
        assert self._work is not None
        return Stage(self._hub, self.repo, self._work, self._state.branch, self._state.parent)

    def _announce(self, info: PublishedInfo) -> None:
        """Visibility and tag: a failure here is reported, but the commit stands."""
        try:
            if self.options.public:
                self._hub.set_visibility(self.repo, private=False)
            if self.options.tag:
                self._hub.tag(self.repo, self.options.tag, info.commit)
        except HubMergeError as error:
            raise PublishError(
                f"published as commit {info.commit} of {self.repo}, but {error.message}", hint=error.hint
            ) from error

    def _take_back(self, cause: BaseException | None) -> None:
        """Delete the repository or branch that this run created, if nobody has used it since."""
        try:
            if self._stage is not None and self._ranks.size > 1:
                self._stage.look_again()
            if self._ranks.first:
                self._remove_unused()
        except HubMergeError as error:
            # The first error is the one to report; this one only says what is left over.
            log.warning("could not clean up: %s", error.message)
            if cause is not None and self._ranks.first:
                cause.add_note(f"Also, {error.message}; it is empty and private, delete it by hand.")

    def _remove_unused(self) -> None:
        kept = self._stage is not None and bool(self._stage.files)
        if self._stage is not None and not kept:
            self._stage.remove_if_made()
        if self._created_branch:
            self._take_back_branch()
        if self._created_repo and not kept:
            self._take_back_repo()

    def _take_back_branch(self) -> None:
        head = self._hub.head(self.repo, self.options.revision)
        if head == self._state.parent:
            self._hub.delete_branch(self.repo, self.options.revision)
        elif head is not None:
            log.warning("%s@%s was left in place: it has a new commit %s", self.repo, self.options.revision, head)

    def _take_back_repo(self) -> None:
        branches = dict(self._hub.refs(self.repo).branches)
        head = branches.pop("main", None)
        if branches or (self._state.parent and head != self._state.parent):
            log.warning("%s was left in place: somebody works with it", self.repo)
        else:
            self._hub.delete_repo(self.repo)


__all__ = ["PublishOptions", "PublishedInfo", "Publisher"]
