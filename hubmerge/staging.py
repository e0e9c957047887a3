"""The staging branch of a publication: journal, rendezvous and resume point in one, in the repository it goes to."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hubmerge.errors import AccessError, HubMergeError, PublishError, TargetMovedError
from hubmerge.hub import Hub, StagedFile
from hubmerge.hub.xet import XetStream
from hubmerge.journal import Resumable, Written

log = logging.getLogger(__name__)

PREFIX = "hubmerge/stage-"
_ABOUT = "plan.json"


class Stage:
    """What runs of one plan have finished.

    The branch is made when the first file is finished. It starts where the target stands, so that the Hub treats its
    files alike; what is staged lies in a folder of the branch's own name, beside ``plan.json``, which says of what plan
    it is. Their digests are in the commit's tree: that is the journal.

    Args:
        hub: The Hub, with a token that may write.
        repo: Where the result goes.
        work: What is being made.
        target: The branch that it will be published to, or that this one will be made from.
        start: The commit it points to.
    """

    def __init__(self, hub: Hub, repo: str, work: Resumable, target: str, start: str) -> None:
        self.branch = PREFIX + work.tag
        self.files: dict[str, Written] = {}
        """The finished files, by their path in the result."""
        self._hub, self._repo, self._work = hub, repo, work
        self._target, self._start = target, start
        self._head: str | None = None
        self._made = False

    def __str__(self) -> str:
        return f"{len(self.files)} of {len(self._work.outputs)} files are staged in {self._repo}@{self.branch}"

    def find(self, head: str | None) -> None:
        """Take over what the runs before have finished, or remove it if they are not to be continued.

        Args:
            head: Where the branch points to, if it is there.

        Raises:
            PublishError: The branch is of another plan.
        """
        if head is None:
            return
        if not self._work.resume:
            self._hub.delete_branch(self._repo, self.branch)
            return
        self._look(head)

    def _look(self, head: str) -> None:
        """See what the branch holds."""
        listed = {file.path: file for file in self._hub.list_files(self._repo, head)}
        if self._path(_ABOUT) not in listed:
            return  # a run ended right after it had made the branch
        if _plan_of(self._hub.read_small(self._repo, head, self._path(_ABOUT))) != self._work.digest:
            raise PublishError(
                f"{self._repo}@{self.branch} holds the files of another plan",
                hint="give --no-resume to remove them and start over",
            )
        self._head = head
        for output in self._work.outputs:
            file = listed.get(self._path(output.path))
            if file is not None and file.size_bytes == output.size_bytes:
                digest = self._hub.sha256(self._repo, head, file)
                self.files[output.path] = Written(output.path, output.size_bytes, digest)

    def open_stream(self, path: str) -> XetStream:
        """Open a stream for a file of the result, for ``add``."""
        return self._hub.open_stream(self._repo, self._target, self._path(path))

    def add(self, source: Path | XetStream, written: Written) -> None:
        """Upload a finished file and commit it to the branch.

        Raises:
            TargetMovedError: The branch was removed: another run of the plan has published, or somebody cleaned up.
            PublishError: The Hub refused.
        """
        files = [self._upload(source, written.path, written.sha256)]
        if self._head is None:
            about = json.dumps(self._work.described(), indent=2, ensure_ascii=False) + "\n"
            files.insert(0, self._upload(about.encode(), _ABOUT))
            self._made = self._hub.branch(self._repo, self.branch, self._start, exist_ok=True)
        with self.in_use():
            self._head = self._hub.append(self._repo, self.branch, files, message=f"Stage {written.path}")
        self.files[written.path] = written

    def look_again(self) -> None:
        """See what other processes of this run have added."""
        head = self._hub.head(self._repo, self.branch)
        self.files.clear()
        if head is not None:
            self._look(head)

    def gather(self, files: Mapping[str, Written]) -> None:
        """Make sure that what the processes of this run have added is there.

        Raises:
            TargetMovedError: Another run is at work in the branch, or it was removed.
        """
        self.look_again()
        for path, written in files.items():
            if self.files.get(path) != written:
                raise TargetMovedError(
                    f"{self._repo}@{self.branch} no longer holds {path} as this run has staged it: another run works "
                    "there, has published this plan, or somebody removed it",
                    hint=f"look at {self._repo}, then run the same command again",
                )

    def copies(self) -> dict[str, StagedFile]:
        """The finished files, for a commit to the target: copies that the Hub makes by itself."""
        assert self._head is not None or not self.files
        return {
            w.path: self._hub.copied(
                w.path, self._path(w.path), self._head or "", size_bytes=w.size_bytes, sha256=w.sha256
            )
            for w in self.files.values()
        }

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Explain a failure that comes of the branch's having been removed."""
        try:
            yield
        except TargetMovedError:
            raise
        except (AccessError, PublishError) as error:
            if self._head is None or self._hub.head(self._repo, self.branch) is not None:
                raise
            raise TargetMovedError(
                f"{self._repo}@{self.branch} is gone: another run has published this plan, or somebody removed it",
                hint=f"look at {self._repo}, then run the same command again",
            ) from error

    def remove(self) -> None:
        """Delete the branch; its going wrong costs nothing but room, and is only reported."""
        try:
            if self._hub.head(self._repo, self.branch) is not None:
                self._hub.delete_branch(self._repo, self.branch)
        except HubMergeError as error:
            log.warning("%s; `hubmerge push --to %s --cleanup` removes it", error.message, self._repo)

    def remove_if_made(self) -> None:
        """Delete the branch if this run has made it: nothing is in it."""
        if self._made:
            self.remove()

    def _path(self, path: str) -> str:
        return f"{self.branch}/{path}"

    def _upload(self, source: Path | bytes | XetStream, path: str, sha256: str | None = None) -> StagedFile:
        return self._hub.upload(self._repo, self._target, source, self._path(path), sha256=sha256)


def _plan_of(about: bytes) -> object:
    try:
        data = json.loads(about)
    except ValueError:
        return None
    return data.get("plan_sha256") if isinstance(data, dict) else None


def clean_up(hub: Hub, repo: str) -> tuple[str, ...]:
    """Delete all staging branches of a repository; returns their names.

    Raises:
        AccessError: The token may not write there.
        PublishError: The Hub refused.
    """
    target = hub.check_write(repo)
    if not target.exists:
        return ()
    found = tuple(sorted(name for name in hub.refs(target.repo).branches if name.startswith(PREFIX)))
    for name in found:
        hub.delete_branch(target.repo, name)
    return found
