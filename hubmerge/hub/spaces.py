"""Spaces: applications that the Hub runs, and what their repositories are filled with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hubmerge.errors import AccessError
from hubmerge.hub.repos import Repos

SDK = "gradio"


@dataclass(frozen=True, slots=True)
class Deployed:
    """What stands in a Space now."""

    url: str
    commit: str
    created: bool
    """Whether the Space is a new one."""


class Spaces:
    """The Spaces that the token of a ``Hub`` may write to."""

    def __init__(self, hub: Repos) -> None:
        self._hub = hub

    def url(self, repo: str) -> str:
        """Address of a Space's page."""
        return f"{self._hub.endpoint}/spaces/{repo}"

    def publish(
        self, repo: str, files: Mapping[str, bytes], *, message: str, private: bool | None = None,
        hardware: str | None = None, stale: tuple[str, ...] = (),
    ) -> Deployed:  # fmt: skip
        """Fill a Space with one commit; it is made if it is not there.

        Args:
            repo: ``namespace/name``.
            files: Their content, by path.
            message: Of the commit.
            private: Who sees it; None leaves it as it is, and a new one is private.
            hardware: The machine it runs on, by the Hub's name; None leaves it as it is.
            stale: Ends of the names of files at the root that are removed unless they are among the files.

        Raises:
            AccessError: No token, or one that may not do that.
            PublishError: The Hub refused: the front matter, the hardware, or for want of a paid plan.
        """
        hub, what = self._hub, f"deploy to the Space {repo}"
        if hub.call(what, repo, hub.token, writing=True) is None:
            raise AccessError(
                f"cannot {what}: there is no token",
                hint="Log in with `hf auth login`, or set HF_TOKEN to a token with write permission.",
            )
        created = self._ensure(repo, what, private is not False, hardware)
        operations = self._operations(repo, what, files, () if created else stale)

        def commit() -> str:
            return str(hub.api.create_commit(repo, operations, commit_message=message, repo_type="space").oid)

        oid = hub.call(what, repo, commit, writing=True)
        if not created:
            self._configure(repo, what, private, hardware)
        return Deployed(self.url(repo), oid, created)

    def _ensure(self, repo: str, what: str, private: bool, hardware: str | None) -> bool:
        """Make the Space unless it is there; says whether this call did."""
        hub = self._hub
        if hub.call(what, repo, lambda: hub.api.repo_exists(repo, repo_type="space"), writing=True):
            return False
        asked: Any = hardware

        def create() -> None:
            hub.api.create_repo(
                repo, repo_type="space", space_sdk=SDK, private=private, space_hardware=asked, exist_ok=True
            )  # fmt: skip

        hub.call(what, repo, create, writing=True)
        return True

    def _operations(self, repo: str, what: str, files: Mapping[str, bytes], stale: tuple[str, ...]) -> list[Any]:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        hub = self._hub
        found: list[Any] = [CommitOperationAdd(path, content) for path, content in files.items()]
        if stale:
            there = hub.call(what, repo, lambda: hub.api.list_repo_files(repo, repo_type="space"))
            gone = [p for p in there if "/" not in p and p.endswith(stale) and p not in files]
            found += [CommitOperationDelete(path) for path in gone]
        return found

    def _configure(self, repo: str, what: str, private: bool | None, hardware: str | None) -> None:
        api = self._hub.api
        if private is not None:
            self._hub.call(
                what, repo, lambda: api.update_repo_settings(repo, private=private, repo_type="space"), writing=True
            )
        if hardware is not None:
            asked: Any = hardware
            self._hub.call(what, repo, lambda: api.request_space_hardware(repo, asked), writing=True)
