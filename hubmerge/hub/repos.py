"""Repositories as a whole: permissions, creation, branches, tags, visibility."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hubmerge.errors import AccessError, PublishError
from hubmerge.hub.reading import Reader


@dataclass(frozen=True, slots=True)
class Target:
    """A repository to write to."""

    repo: str
    """Its full id, namespace included."""
    exists: bool
    private: bool
    writable: bool = True
    """False where only pull requests may be opened."""


@dataclass(frozen=True, slots=True)
class Refs:
    """Branches and tags, each with the commit it stands for."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]


class Repos(Reader):
    """The part of ``Hub`` that manages repositories."""

    def check_write(self, repo: str, *, create_pr: bool = False) -> Target:
        """Make sure that the token may write to the repository, or create it, before anything else is done.

        Args:
            repo: Target; without a namespace, the token's own.
            create_pr: Only a pull request is to be opened, which every reader of the repository may do.

        Raises:
            AccessError: No token, a wrong or read-only one, or somebody else's namespace.
        """
        what = f"write to {repo}"
        if self.call(what, repo, self.token, writing=True) is None:
            raise AccessError(
                f"cannot {what}: there is no token",
                hint="Log in with `hf auth login`, or set HF_TOKEN to a token with write permission.",
            )
        if self.is_job:
            return self._check_job(repo, what)
        me = self.call(what, repo, self.api.whoami, writing=True)
        self._refuse_read_only(me, what)
        full = repo if "/" in repo else f"{me['name']}/{repo}"
        if self.call(what, full, lambda: self.api.repo_exists(full), writing=True):
            return self._existing(full, what, self._may_write(full, what, needed=not create_pr))
        namespace = full.partition("/")[0]
        orgs = {org["name"]: org.get("roleInOrg", "write") for org in me.get("orgs", [])}
        if namespace != me["name"] and orgs.get(namespace, "read") == "read":
            raise AccessError(
                f"cannot {what}: it is missing or not visible, and {me['name']} may not create it in {namespace}",
                hint=f"Publish to {me['name']}/{full.partition('/')[2]}, or use a token of a member of {namespace}.",
            )
        return Target(full, False, True)

    def refs(self, repo: str) -> Refs:
        """All branches and tags."""
        found = self.call(f"list the branches of {repo}", repo, lambda: self.api.list_repo_refs(repo))
        return Refs(
            {ref.name: ref.target_commit for ref in found.branches},
            {ref.name: ref.target_commit for ref in found.tags},
        )

    def head(self, repo: str, branch: str = "main") -> str | None:
        """The commit a branch points to; None if there is no such branch."""
        return self.refs(repo).branches.get(branch)

    def ensure_repo(self, repo: str, private: bool) -> bool:
        """Create the repository unless it exists.

        Returns:
            Whether this call created it. If the reply was lost, it says no: what is not surely ours is never deleted.
        """
        from huggingface_hub.errors import HfHubHTTPError

        def create() -> bool:
            try:
                self.api.create_repo(repo, private=private, repo_type="model")
            except HfHubHTTPError as error:
                if error.response.status_code != 409:
                    raise
                return False
            return True

        return self.call(f"create {repo}", repo, create, writing=True)

    def branch(self, repo: str, name: str, commit: str, *, exist_ok: bool = False) -> bool:
        """Create a branch at a commit; with ``exist_ok``, one that is there stays where it is.

        Returns:
            Whether this call created it; as in ``ensure_repo``, not if the reply was lost.

        Raises:
            PublishError: There is one, at another commit.
        """
        from huggingface_hub.errors import HfHubHTTPError

        def create() -> bool:
            try:
                self.api.create_branch(repo, branch=name, revision=commit)
            except HfHubHTTPError as error:
                if error.response.status_code != 409:
                    raise
                return False
            return True

        created = self.call(f"create the branch {name!r} of {repo}", repo, create, writing=True)
        if not (created or exist_ok) and (head := self.head(repo, name)) != commit:
            raise PublishError(
                f"{repo} has got a branch {name!r}, at {head}", hint="Run the same command again to publish on top."
            )
        return created

    def delete_branch(self, repo: str, name: str) -> None:
        """Delete a branch; one that is gone already is fine."""
        what = f"delete the branch {name!r} of {repo}"
        try:
            self.call(what, repo, lambda: self.api.delete_branch(repo, branch=name), writing=True)
        except (AccessError, PublishError):
            if self.head(repo, name) is not None:
                raise

    def tag(self, repo: str, name: str, commit: str) -> None:
        """Create a tag at a commit; one that stands there already is fine."""
        what = f"tag {repo} as {name!r}"
        try:
            self.call(what, repo, lambda: self.api.create_tag(repo, tag=name, revision=commit), writing=True)
        except PublishError:
            if self.refs(repo).tags.get(name) != commit:
                raise

    def set_visibility(self, repo: str, *, private: bool) -> None:
        """Make a repository private or public."""
        what = f"make {repo} {'private' if private else 'public'}"
        self.call(what, repo, lambda: self.api.update_repo_settings(repo, private=private), writing=True)

    def delete_repo(self, repo: str) -> None:
        """Delete a repository for good."""
        self.call(
            f"delete {repo}", repo, lambda: self.api.delete_repo(repo, repo_type="model", missing_ok=True), writing=True
        )

    def _check_job(self, repo: str, what: str) -> Target:
        """The target of a CI job: its token is for one repository that exists, and belongs to no user to ask about.

        Raises:
            AccessError: The repository is missing, or the job may not write there.
        """
        if "/" not in repo or not self.call(what, repo, lambda: self.api.repo_exists(repo), writing=True):
            raise AccessError(
                f"cannot {what}: it does not exist, and a trusted publisher cannot create it",
                hint=f"Create it with `hf repos create {repo} --private`, and add the publisher in its settings.",
            )
        return self._existing(repo, what, self._may_write(repo, what, needed=True))

    def _existing(self, repo: str, what: str, writable: bool) -> Target:
        info = self.call(what, repo, lambda: self.api.model_info(repo, expand=["private"]), writing=True)
        return Target(repo, True, bool(info.private), writable)

    def _may_write(self, repo: str, what: str, *, needed: bool) -> bool:
        """Whether the token may write to a repository; an error if it may not, or may not even read where it need not.

        Raises:
            AccessError: It may not.
        """
        try:
            self.call(what, repo, lambda: self.api.auth_check(repo, write=True), writing=True)
        except AccessError:
            if needed:
                raise
            self.call(what, repo, lambda: self.api.auth_check(repo), writing=True)
            return False
        return True

    def _refuse_read_only(self, me: Mapping[str, Any], what: str) -> None:
        token = me.get("auth", {}).get("accessToken") or {}
        # Fine-grained and workflow identities have other roles; what they may do shows at the repository itself.
        if token.get("role") == "read":
            raise AccessError(
                f"cannot {what}: the token of {me['name']} is read-only",
                hint=f"Create one with write permission at {self.endpoint}/settings/tokens and set HF_TOKEN to it.",
            )
