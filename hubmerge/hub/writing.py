"""Writing to the Hub: uploads ahead of a commit, and commits that survive a lost reply."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote, urlsplit

from hubmerge.errors import PublishError, SourceError, TargetMovedError, TransportError
from hubmerge.hub import xet
from hubmerge.hub.repos import Repos

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy

# A repository's .gitignore must not drop shards: this stands in for it, and is not empty so that it does.
_IGNORE_NOTHING = "# nothing is ignored\n"
_XET_HOSTS = frozenset({"huggingface.co", "hf.co", "hub-ci.huggingface.co"})
_MARK = "hubmerge-content: "
_RECENT_PULL_REQUESTS = 10
_NO_SECOND_TIME = (
    "Run the same command again: it continues with the shards that are finished. A stream cannot be sent a second time "
    "within a run; with `--upload file`, shards are."
)


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A file whose large content is on the server already and which the next commit may name."""

    path: str
    size_bytes: int
    sha256: str
    operation: CommitOperationAdd | CommitOperationCopy = field(repr=False)


@dataclass(frozen=True, slots=True)
class CommitInfo:
    """A commit that was made."""

    oid: str
    url: str
    pr_url: str | None = None


class Hub(Repos):
    """What hubmerge needs of a Hub."""

    _xet_settled = False

    def upload(
        self,
        repo: str,
        revision: str,
        source: Path | bytes | xet.XetStream,
        path_in_repo: str,
        *,
        sha256: str | None = None,
        create_pr: bool = False,
    ) -> StagedFile:
        """Send a file's content ahead of the commit that will name it; ``source`` is not needed afterwards.

        A stream from ``open_stream`` is finished; it needs the digest.

        Args:
            repo: Target.
            revision: A branch that exists.
            source: The file, its content, or the stream that it was written to.
            path_in_repo: Its name in the repository.
            sha256: Digest in hex, if known: saves reading the file once more.
            create_pr: Whether the commit will be a pull request.
        """
        from huggingface_hub import CommitOperationAdd

        if isinstance(source, xet.XetStream):
            assert sha256 is not None
            return StagedFile(path_in_repo, source.size_bytes, sha256, source.finish(sha256))

        def stage() -> CommitOperationAdd:
            operation = CommitOperationAdd(path_in_repo, source)
            if sha256 is not None:
                operation.upload_info.sha256 = bytes.fromhex(sha256)
            self.api.preupload_lfs_files(
                repo, [operation], revision=revision, create_pr=create_pr, gitignore_content=_IGNORE_NOTHING
            )
            # The server wants this one inside the commit itself: keep the content, the file may be deleted.
            if isinstance(operation.path_or_fileobj, str):
                operation.path_or_fileobj = Path(operation.path_or_fileobj).read_bytes()
            return operation

        what = f"upload {path_in_repo} to {repo}"
        self._settle_xet(repo, what, create_pr=create_pr)
        operation = self.call(what, repo, stage, writing=True)
        info = operation.upload_info
        return StagedFile(operation.path_in_repo, info.size, info.sha256.hex(), operation)

    def why_no_stream(self, repo: str, *, create_pr: bool = False) -> str | None:
        """Why no stream can be opened to a repository, or for a pull request to it; None if one can."""
        if (reason := xet.unusable()) is not None:
            return reason
        self._settle_xet(repo, f"find out how {repo} takes uploads", create_pr=create_pr)
        return f"{self.endpoint} has no xet storage" if xet.unusable() is not None else None

    def open_stream(self, repo: str, revision: str, path_in_repo: str, *, create_pr: bool = False) -> xet.XetStream:
        """Open a stream for a file's content, which ``upload`` is given when all of it is written.

        Args:
            repo: Target.
            revision: A branch that exists.
            path_in_repo: Its name in the repository.
            create_pr: Whether the commit will be a pull request, which everyone may open who can read the branch.

        Raises:
            AccessError: The token may not write there.
            TransportError: The Hub could not be reached.
        """
        from huggingface_hub import hf_raise_for_status

        what = f"upload {path_in_repo} to {repo}"
        token_url = self._xet_token_url(repo, None if create_pr else revision)

        def ask() -> xet.Access:
            response = self.session().get(token_url, headers=self.headers())
            hf_raise_for_status(response)
            return xet.Access.of(response.json())

        def fail(error: Exception) -> NoReturn:
            try:
                self.fail(error, what, repo, writing=True)
            except (SourceError, PublishError) as known:
                raise type(known)(known.message, hint=_NO_SECOND_TIME) from error

        # hf_xet would ask by itself, but neither as patiently nor with as good an account of what is wrong.
        access = self.call(what, repo, ask, writing=True)
        return xet.XetStream(path_in_repo, access, token_url, self.headers(), fail)

    def copied(self, path: str, source_path: str, commit: str, *, size_bytes: int, sha256: str) -> StagedFile:
        """A file that a commit of the same repository has already, under this or another name."""
        from huggingface_hub import CommitOperationCopy

        return StagedFile(path, size_bytes, sha256, CommitOperationCopy(source_path, path, src_revision=commit))

    def append(self, repo: str, branch: str, staged: Sequence[StagedFile], *, message: str) -> str:
        """One commit of more files on top of whatever a branch points to; returns its id.

        It is sent until a reply comes: adding the same files twice changes nothing.

        Raises:
            AccessError: The branch is gone, or may not be written to.
            PublishError: The Hub refused.
        """
        what = f"commit to {repo}@{branch}"
        operations: list[Any] = [file.operation for file in staged]

        def send() -> str:
            return str(self.api.create_commit(repo, operations, commit_message=message, revision=branch).oid)

        for failures in range(1, self.policy.attempts + 1):
            try:
                return self.call(what, repo, send, writing=True)
            except PublishError as error:
                if not _was_overtaken(error.__cause__) or failures == self.policy.attempts:
                    raise
            time.sleep(self.policy.wait_s(failures))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def commit(
        self,
        repo: str,
        staged: Sequence[StagedFile],
        *,
        parent: str,
        message: str,
        delete: Sequence[str] = (),
        revision: str = "main",
        create_pr: bool = False,
        again: bool = False,
    ) -> CommitInfo:
        """One commit with all files and deletions, on top of ``parent`` or not at all.

        If the reply gets lost, the branch is read again: a commit that landed is recognised by a digest in its
        description, one that did not is sent again. A pull request is not sent twice; ``again`` says that a run before
        may have opened it.

        Raises:
            TargetMovedError: The branch points to another commit than ``parent``.
            PublishError: The Hub refused, e.g. because of the model card's front matter.
        """
        from huggingface_hub import CommitOperationDelete

        if create_pr and (head := self.head(repo, revision)) != parent:
            raise _moved(repo, revision, parent, head)  # for a pull request the Hub does not compare them itself
        operations: list[Any] = [CommitOperationDelete(path, is_folder=False) for path in delete]
        operations += [file.operation for file in staged]
        mark = _MARK + _digest(staged, delete, parent)
        if create_pr and again and (opened := self._landed_pull_request(repo, mark)) is not None:
            return opened
        what = f"commit to {repo}@{revision}"
        for failures in range(1, self.policy.attempts + 1):
            self.session()
            try:
                made = self.api.create_commit(
                    repo,
                    operations,
                    commit_message=message,
                    commit_description=mark,
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=parent,
                )
                return CommitInfo(made.oid, made.commit_url, made.pr_url)
            except Exception as error:
                try:
                    landed = self._landed(repo, revision, parent, mark, create_pr=create_pr)
                except TransportError as lost:
                    raise TransportError(
                        f"cannot {what}: the reply was lost, and whether the commit landed could not be found out",
                        hint=f"Look at {self.endpoint}/{repo}/commits/{revision}, then run the same command again.",
                    ) from lost
                if landed is not None:
                    return landed
                wait_s = self.wait_s(error, failures)
                if create_pr or not _may_repeat(error) or failures == self.policy.attempts or wait_s is None:
                    self.fail(error, what, repo, writing=True)
            time.sleep(wait_s)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def validate_card(self, card: str) -> None:
        """Let the Hub check a model card's front matter, as it does again at the commit.

        Raises:
            PublishError: What is wrong with it.
        """
        from huggingface_hub import hf_raise_for_status

        def ask() -> list[str]:
            body = {"content": card, "repoType": "model"}
            response = self.session().post(f"{self.endpoint}/api/validate-yaml", json=body, headers=self.headers())
            if response.status_code != 400:
                hf_raise_for_status(response)
                return []
            return [str(problem.get("message")) for problem in response.json().get("errors", [])] or ["no reason given"]

        problems = self.call("check the model card", "README.md", ask, writing=True)
        if problems:
            raise PublishError(
                f"the Hub does not accept the front matter of README.md: {'; '.join(problems)}",
                hint="Correct the `card:` section of the recipe.",
            )

    def _xet_token_url(self, repo: str, revision: str | None) -> str:
        """Where access to the xet storage is given for a branch, or for a pull request."""
        branch = "None?create_pr=1" if revision is None else quote(revision, safe="")
        return f"{self.endpoint}/api/models/{repo}/xet-write-token/{branch}"

    def _settle_xet(self, repo: str, what: str, *, create_pr: bool) -> None:
        """Find out once whether the server has xet storage, and switch the client library to plain LFS if not.

        huggingface_hub 2.4 sends every upload to xet when hf_xet is installed, and fails on a server without it.
        The switch is a setting of the whole process.
        """
        from huggingface_hub import constants, hf_raise_for_status

        if self._xet_settled or urlsplit(self.endpoint).hostname in _XET_HOSTS:
            return
        url = self._xet_token_url(repo, None if create_pr else "main")

        def ask() -> bool:
            response = self.session().get(url, headers=self.headers())
            if response.status_code >= 500 or response.status_code == 429:
                hf_raise_for_status(response)
            return "x-xet-cas-url" in response.headers

        if not constants.HF_HUB_DISABLE_XET and not self.call(what, repo, ask, writing=True):
            constants.HF_HUB_DISABLE_XET = True
        self._xet_settled = True

    def _landed(self, repo: str, revision: str, parent: str, mark: str, *, create_pr: bool) -> CommitInfo | None:
        """Our commit, if it is there although no good reply came; None if the branch still is at ``parent``.

        Raises:
            TargetMovedError: The branch has other commits on top of ``parent``.
        """
        if create_pr:
            return self._landed_pull_request(repo, mark)
        head = self.head(repo, revision)
        if head == parent:
            return None
        what = f"read the history of {repo}@{revision}"
        for made in self.call(what, repo, lambda: self.api.list_repo_commits(repo, revision=revision)):
            if mark in made.message:
                return CommitInfo(made.commit_id, f"{self.endpoint}/{repo}/commit/{made.commit_id}")
            if made.commit_id == parent:
                break
        raise _moved(repo, revision, parent, head)

    def _landed_pull_request(self, repo: str, mark: str) -> CommitInfo | None:
        what = f"list the pull requests of {repo}"
        refs = self.call(what, repo, lambda: self.api.list_repo_refs(repo, include_pull_requests=True))
        numbered = sorted(
            ((int(ref.ref.rpartition("/")[2]), ref.ref) for ref in refs.pull_requests or []), reverse=True
        )
        for number, ref in numbered[:_RECENT_PULL_REQUESTS]:
            commits = self.call(what, repo, lambda ref=ref: self.api.list_repo_commits(repo, revision=ref))  # type: ignore[misc]
            if commits and mark in commits[0].message:
                oid, page = commits[0].commit_id, f"{self.endpoint}/{repo}"
                return CommitInfo(oid, f"{page}/commit/{oid}", f"{page}/discussions/{number}")
        return None


def _moved(repo: str, revision: str, parent: str, head: str | None) -> TargetMovedError:
    return TargetMovedError(
        f"{repo}@{revision} moved from {parent} to {head} while this run was working; nothing was committed",
        hint="Look at the new commit, then run the same command again to publish on top of it.",
    )


def _was_overtaken(error: BaseException | None) -> bool:
    """Whether somebody else's commit came in between; the Hub then refuses also those that name no parent."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, HfHubHTTPError) and error.response.status_code in (409, 412)


def _may_repeat(error: Exception) -> bool:
    from hubmerge.hub.translate import is_transient

    return is_transient(error)


def _digest(staged: Sequence[StagedFile], delete: Sequence[str], parent: str) -> str:
    """Identifies a commit by its parent and content."""
    lines = [f"parent {parent}", *(f"add {f.sha256} {f.path}" for f in staged), *(f"delete {path}" for path in delete)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
