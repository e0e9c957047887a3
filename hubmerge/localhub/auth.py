"""Users, tokens and what each may do with a repository."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hubmerge.localhub.database import Database
from hubmerge.localhub.errors import forbidden, invalid_token, login_required

Role = Literal["read", "write"]

DEFAULT_TOKEN = "hf_local"  # noqa: S105 - documented, public, and only ever valid on a loopback demo server


@dataclass(frozen=True, slots=True)
class User:
    """A person with one token.

    Attributes:
        name: Namespace the user owns.
        token: Secret that identifies the user; one person may have several entries with different tokens.
        role: What the token may do.
        orgs: Further namespaces the user may write to.
    """

    name: str
    token: str
    role: Role = "write"
    orgs: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"User(name={self.name!r}, role={self.role!r}, orgs={self.orgs!r})"


LOCAL_USER = User("local", DEFAULT_TOKEN)
GATED_REPOS = "gated-repos"
"""Scope of a token that reads the gated repositories that its user may read, and nothing private."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is asking, as far as a token tells."""

    name: str
    role: Role
    orgs: tuple[str, ...]
    scope: str = ""
    """What the token is for, if not for all that its user may do: a repository's path, or ``GATED_REPOS``."""

    def owns(self, namespace: str) -> bool:
        """Whether repositories of ``namespace`` belong to this user."""
        return not self.scope and (namespace == self.name or namespace in self.orgs)

    def reaches(self, namespace: str, path: str) -> bool:
        """Whether a repository is this user's, or the one that the token is for."""
        return self.owns(namespace) or self.scope == path

    def may_contribute(self, path: str) -> bool:
        """Whether the token may open discussions and pull requests on a repository that it can read."""
        return self.can_write and self.scope in ("", path)

    @property
    def can_write(self) -> bool:
        """Whether the token may change anything at all."""
        return self.role == "write"


def parse_user(text: str) -> User:
    """Parse ``NAME:TOKEN[:read|write][:ORG,ORG…]``.

    Raises:
        ValueError: The text has another form; the message does not repeat the token.
    """
    parts = text.split(":")
    if not 2 <= len(parts) <= 4 or not parts[0] or not parts[1]:
        raise ValueError("a user is given as NAME:TOKEN, NAME:TOKEN:read or NAME:TOKEN:write")
    role = parts[2] if len(parts) > 2 else "write"
    orgs = tuple(org for org in parts[3].split(",") if org) if len(parts) > 3 else ()
    if role == "read":
        return User(parts[0], parts[1], "read", orgs)
    if role == "write":
        return User(parts[0], parts[1], "write", orgs)
    raise ValueError(f"user {parts[0]!r}: role {role!r} is neither 'read' nor 'write'")


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class Accounts:
    """The users of one hub. Only digests of tokens are kept."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def replace(self, users: Sequence[User]) -> None:
        """Make ``users`` the only ones whose tokens are valid."""
        with self._database.write() as db:
            db.execute("DELETE FROM tokens")
            db.executemany(
                "INSERT OR REPLACE INTO tokens VALUES (?, ?, ?, ?)",
                [(_digest(user.token), user.name, user.role, json.dumps(user.orgs)) for user in users],
            )

    def identify(self, authorization: str | None) -> Identity | None:
        """Who an ``Authorization`` header stands for; ``None`` without one.

        Raises:
            HubError: 401 if the token is nobody's.
        """
        if not authorization:
            return None
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise invalid_token()
        row = (
            self._database.connection()
            .execute(
                "SELECT user, role, orgs, '' AS scope FROM tokens WHERE digest = :digest UNION ALL "
                "SELECT user, role, '[]', scope FROM issued WHERE digest = :digest AND expires_at > :now",
                {"digest": _digest(token.strip()), "now": time.time()},
            )
            .fetchone()
        )
        if row is None:
            raise invalid_token()
        role: Role = "write" if row["role"] == "write" else "read"
        return Identity(row["user"], role, tuple(json.loads(row["orgs"])), row["scope"])

    def issue(self, identity: Identity, prefix: str, ttl_s: float) -> str:
        """A new token, beside those that users have, for a limited time and purpose."""
        token, now = prefix + secrets.token_urlsafe(32), time.time()
        with self._database.write() as db:
            db.execute("DELETE FROM issued WHERE expires_at < ?", (now,))
            row = (_digest(token), identity.name, identity.role, identity.scope, now + ttl_s)
            db.execute("INSERT INTO issued VALUES (?, ?, ?, ?, ?)", row)
        return token

    def names(self) -> list[str]:
        """All users' names, in order."""
        rows = self._database.connection().execute("SELECT DISTINCT user FROM tokens ORDER BY user")
        return [row["user"] for row in rows]

    def exists(self, name: str) -> bool:
        """Whether a user of that name is known."""
        row = self._database.connection().execute("SELECT 1 FROM tokens WHERE user = ?", (name,)).fetchone()
        return row is not None


def require_user(identity: Identity | None) -> Identity:
    """The caller, who must have sent a token."""
    if identity is None:
        raise login_required()
    return identity


def require_writer(identity: Identity | None, namespace: str) -> Identity:
    """The caller, who must be allowed to change repositories of ``namespace``."""
    user = require_user(identity)
    if not user.can_write:
        raise forbidden(f"Forbidden: you must use a write token to make changes in {namespace}")
    if not user.owns(namespace):
        raise forbidden(f"Forbidden: you don't have the rights to make changes in {namespace}")
    return user
