"""Repositories: create, find, change and delete them, and who may see what."""

from __future__ import annotations

import re
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime

from hubmerge.localhub.auth import Identity, require_writer
from hubmerge.localhub.database import Database
from hubmerge.localhub.errors import (
    bad_request,
    conflict,
    disabled_repo,
    forbidden,
    gated_repo,
    repo_not_found,
)

TYPES = ("model", "dataset", "space")
_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9]([\w.-]{0,94}[A-Za-z0-9_])?", re.A)


@dataclass(frozen=True, slots=True)
class Repo:
    """One repository, as of the time it was looked up.

    Attributes:
        key: Its number in the database.
        type: ``model``, ``dataset`` or ``space``.
        gated: ``""``, ``"auto"`` or ``"manual"``.
    """

    key: int
    type: str
    namespace: str
    name: str
    private: bool
    gated: str
    disabled: bool
    sdk: str | None
    created_at: str

    @property
    def id(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    @property
    def url_path(self) -> str:
        """Path of its page, without leading slash: models have no type prefix."""
        return self.id if self.type == "model" else f"{self.type}s/{self.id}"


def now() -> str:
    """Current time as the Hub writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def split_id(repo_id: str) -> tuple[str, str]:
    """``namespace/name`` as a pair.

    Raises:
        HubError: 400 if either part is not a name the Hub accepts.
    """
    namespace, slash, name = repo_id.partition("/")
    if not slash or not _NAME.fullmatch(namespace) or not _NAME.fullmatch(name) or name.endswith(".git"):
        raise bad_request(f"Invalid repository id: {repo_id!r}")
    return namespace, name


def _from_row(row: sqlite3.Row) -> Repo:
    return Repo(
        row["id"], row["type"], row["namespace"], row["name"], bool(row["private"]), row["gated"],
        bool(row["disabled"]), row["sdk"], row["created_at"],
    )  # fmt: skip


class Repos:
    """All repositories of one hub."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, kind: str, repo_id: str) -> Repo | None:
        """The repository, whoever asks."""
        namespace, _, name = repo_id.partition("/")
        row = (
            self._database.connection()
            .execute("SELECT * FROM repos WHERE type = ? AND namespace = ? AND name = ?", (kind, namespace, name))
            .fetchone()
        )
        return None if row is None else _from_row(row)

    def visible(self, kind: str, repo_id: str, identity: Identity | None) -> Repo:
        """The repository, if the caller may know that it exists.

        Raises:
            HubError: RepoNotFound, also for other people's private repositories; 403 if it is disabled.
        """
        repo = self.find(kind, repo_id)
        if repo is None or (repo.private and not (identity and identity.reaches(repo.namespace, repo.url_path))):
            raise repo_not_found(anonymous=identity is None)
        if repo.disabled:
            raise disabled_repo()
        return repo

    def readable(self, kind: str, repo_id: str, identity: Identity | None) -> Repo:
        """The repository, if the caller may download its files.

        Raises:
            HubError: As :meth:`visible`, and GatedRepo without accepted access.
        """
        repo = self.visible(kind, repo_id, identity)
        self.check_gate(repo, identity)
        return repo

    def check_gate(self, repo: Repo, identity: Identity | None) -> None:
        """Raise GatedRepo if the caller has no access to a gated repository's files."""
        if not repo.gated:
            return
        if identity and (identity.reaches(repo.namespace, repo.url_path) or identity.name == repo.namespace):
            return
        if identity and self.has_access(repo, identity.name):
            return
        raise gated_repo(f"{repo.type} {repo.id}", anonymous=identity is None)

    def writable(self, kind: str, repo_id: str, identity: Identity | None) -> tuple[Repo, Identity]:
        """The repository, if the caller may change it.

        Raises:
            HubError: As :meth:`visible`; RepoNotFound without a token; 403 for read tokens and strangers.
        """
        repo = self.visible(kind, repo_id, identity)
        if identity is None:
            raise repo_not_found(anonymous=True)
        if identity.can_write and identity.reaches(repo.namespace, repo.url_path):
            return repo, identity
        return repo, require_writer(identity, repo.namespace)

    def contributable(self, kind: str, repo_id: str, identity: Identity | None) -> tuple[Repo, Identity]:
        """The repository, if the caller may open discussions and pull requests on it.

        Raises:
            HubError: As :meth:`readable`; RepoNotFound without a token; 403 for read tokens.
        """
        repo = self.readable(kind, repo_id, identity)
        if identity is None:
            raise repo_not_found(anonymous=True)
        if not identity.may_contribute(repo.url_path):
            raise forbidden(f"Forbidden: you must use a write token to contribute to {repo.id}")
        return repo, identity

    def listed(self, kind: str, identity: Identity | None) -> list[Repo]:
        """Repositories of one type that the caller may see, newest first."""
        rows = self._database.connection().execute("SELECT * FROM repos WHERE type = ? ORDER BY id DESC", (kind,))
        found = [_from_row(row) for row in rows]
        return [repo for repo in found if not repo.private or (identity and identity.owns(repo.namespace))]

    def insert(self, db: sqlite3.Connection, kind: str, repo_id: str, *, private: bool, sdk: str | None) -> Repo:
        """Add a repository inside the caller's transaction.

        Raises:
            HubError: 400 for an unknown type or bad name; 409 if it exists.
        """
        if kind not in TYPES:
            raise bad_request(f"Invalid repository type: {kind!r}")
        namespace, name = split_id(repo_id)
        if self.find(kind, repo_id) is not None:
            raise conflict(f"You already created this {kind} repo: {repo_id}")
        db.execute(
            "INSERT INTO repos (type, namespace, name, private, sdk, created_at) VALUES (?, ?, ?, ?, ?, ?)",
            (kind, namespace, name, private, sdk, now()),
        )
        repo = self.find(kind, repo_id)
        assert repo is not None
        return repo

    def delete(self, repo: Repo) -> None:
        """Remove a repository with its history; blobs stay, since others may share them."""
        with self._database.write() as db:
            db.execute("DELETE FROM repos WHERE id = ?", (repo.key,))

    def move(self, repo: Repo, repo_id: str) -> None:
        """Rename a repository.

        Raises:
            HubError: 409 if the new name is taken.
        """
        namespace, name = split_id(repo_id)
        with self._database.write() as db:
            if self.find(repo.type, repo_id) is not None:
                raise conflict(f"A {repo.type} repo named {repo_id} already exists")
            db.execute("UPDATE repos SET namespace = ?, name = ? WHERE id = ?", (namespace, name, repo.key))

    def configure(
        self, repo: Repo, *, private: bool | None = None, gated: str | None = None, disabled: bool | None = None
    ) -> None:
        """Change settings; ``None`` leaves one as it is."""
        with self._database.write() as db:
            db.execute(
                "UPDATE repos SET private = COALESCE(?, private), gated = COALESCE(?, gated),"
                " disabled = COALESCE(?, disabled) WHERE id = ?",
                (private, gated, disabled, repo.key),
            )

    def set_hardware(self, repo: Repo, flavor: str) -> None:
        """Note down what a Space is to run on."""
        with self._database.write() as db:
            db.execute("INSERT OR REPLACE INTO hardware VALUES (?, ?)", (repo.key, flavor))

    def hardware(self, repo: Repo) -> str | None:
        """What a Space is to run on; None if nobody has said."""
        rows = self._database.connection().execute("SELECT flavor FROM hardware WHERE repo_id = ?", (repo.key,))
        row = rows.fetchone()
        return None if row is None else str(row["flavor"])

    def grant(self, repo: Repo, user: str) -> None:
        """Let a user download a gated repository's files."""
        with self._database.write() as db:
            db.execute("INSERT OR IGNORE INTO access VALUES (?, ?)", (repo.key, user))

    def revoke(self, repo: Repo, user: str) -> None:
        """Take that back."""
        with self._database.write() as db:
            db.execute("DELETE FROM access WHERE repo_id = ? AND user = ?", (repo.key, user))

    def has_access(self, repo: Repo, user: str) -> bool:
        """Whether the user was granted access to the gated repository."""
        return user in self.accepted(repo)

    def accepted(self, repo: Repo) -> list[str]:
        """Users with granted access."""
        rows = self._database.connection().execute(
            "SELECT user FROM access WHERE repo_id = ? ORDER BY user", (repo.key,)
        )
        return [row["user"] for row in rows]
