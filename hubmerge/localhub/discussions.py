"""Discussions and pull requests: their events, status and merging."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from typing import Any

from hubmerge.localhub.auth import Identity
from hubmerge.localhub.database import Database
from hubmerge.localhub.errors import HubError, bad_request, conflict, forbidden
from hubmerge.localhub.history import DEFAULT_BRANCH, History, branch_ref
from hubmerge.localhub.repos import Repo, now
from hubmerge.localhub.trees import merge_snapshots


@dataclass(frozen=True, slots=True)
class Discussion:
    """A discussion, or a pull request when ``base`` names the branch it wants to change."""

    num: int
    title: str
    author: str
    status: str
    base: str | None
    merge_commit: str | None
    created_at: str

    @property
    def ref(self) -> str:
        """Full name of the pull request's ref."""
        return f"refs/pr/{self.num}"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a discussion; ``data`` has the Hub's JSON form."""

    id: str
    type: str
    author: str
    created_at: str
    data: dict[str, Any]


def _comment_data(text: str, author: str, at: str) -> dict[str, Any]:
    latest = {"raw": text, "html": "", "updatedAt": at, "author": {"name": author}}
    return {"edited": False, "hidden": False, "latest": latest, "history": [latest]}


class Discussions:
    """Discussions of all repositories."""

    def __init__(self, database: Database, history: History) -> None:
        self._database = database
        self._history = history

    def insert(
        self, db: sqlite3.Connection, repo: Repo, user: Identity, title: str, description: str,
        *, base: str | None, start: str | None, status: str = "open",
    ) -> int:  # fmt: skip
        """Open a discussion inside the caller's transaction and return its number.

        It is a pull request if ``base`` names the branch to change; ``start`` is the commit its ref first points at.
        """
        row = db.execute("SELECT COALESCE(MAX(num), 0) + 1 AS n FROM discussions WHERE repo_id = ?", (repo.key,))
        number = int(row.fetchone()["n"])
        at = now()
        db.execute(
            "INSERT INTO discussions (repo_id, num, title, author, status, is_pull_request, base, created_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (repo.key, number, title, user.name, status, base is not None, base, at),
        )
        self._add_event(db, repo, number, user, "comment", _comment_data(description, user.name, at))
        if start is not None:
            self._history.set_ref(db, repo, f"refs/pr/{number}", start)
        return number

    def open(self, repo: Repo, user: Identity, title: str, description: str, *, pull_request: bool) -> int:
        """Open a discussion, or a draft pull request against the default branch."""
        if len(title) < 3 or len(title) > 200:
            raise bad_request("A discussion's title has 3 to 200 characters")
        with self._database.write() as db:
            if not pull_request:
                return self.insert(db, repo, user, title, description, base=None, start=None)
            start = self._history.resolve(repo, DEFAULT_BRANCH)
            return self.insert(db, repo, user, title, description, base=DEFAULT_BRANCH, start=start, status="draft")

    def all(self, repo: Repo) -> list[Discussion]:
        """All discussions, newest first."""
        rows = self._database.connection().execute(
            "SELECT * FROM discussions WHERE repo_id = ? ORDER BY num DESC", (repo.key,)
        )
        return [_discussion(row) for row in rows]

    def get(self, repo: Repo, number: int) -> Discussion:
        """One discussion.

        Raises:
            HubError: 404.
        """
        row = (
            self._database.connection()
            .execute("SELECT * FROM discussions WHERE repo_id = ? AND num = ?", (repo.key, number))
            .fetchone()
        )
        if row is None:
            raise HubError(404, f"Discussion {number} not found")
        return _discussion(row)

    def events(self, repo: Repo, number: int) -> list[Event]:
        """What happened, oldest first."""
        rows = self._database.connection().execute(
            "SELECT * FROM events WHERE repo_id = ? AND num = ? ORDER BY id", (repo.key, number)
        )
        return [
            Event(f"{row['id']:024x}", row["type"], row["author"], row["created_at"], json.loads(row["data"]))
            for row in rows
        ]

    def add_commit_event(
        self, db: sqlite3.Connection, repo: Repo, number: int, user: Identity, title: str, oid: str
    ) -> None:
        """Note a commit to a pull request, which also publishes a draft."""
        db.execute(
            "UPDATE discussions SET status = 'open' WHERE repo_id = ? AND num = ? AND status = 'draft'",
            (repo.key, number),
        )
        self._add_event(db, repo, number, user, "commit", {"subject": title, "oid": oid})

    def comment(self, repo: Repo, number: int, user: Identity, text: str) -> Event:
        """Add a comment."""
        self.get(repo, number)
        with self._database.write() as db:
            self._add_event(db, repo, number, user, "comment", _comment_data(text, user.name, now()))
        return self.events(repo, number)[-1]

    def edit_comment(self, repo: Repo, number: int, event_id: str, user: Identity, text: str | None) -> Event:
        """Change a comment's text, or hide it when ``text`` is ``None``.

        Raises:
            HubError: 404 without such a comment; 403 if it is someone else's.
        """
        found = [e for e in self.events(repo, number) if e.id == event_id and e.type == "comment"]
        if not found:
            raise HubError(404, f"Comment {event_id} not found")
        data = found[0].data
        if found[0].author != user.name and not user.owns(repo.namespace):
            raise forbidden("Forbidden: this comment is someone else's")
        if text is None:
            data["hidden"] = True
            data["latest"]["raw"] = "This comment has been hidden"
        else:
            data["edited"] = True
            data["latest"] = _comment_data(text, user.name, now())["latest"]
            data["history"].append(data["latest"])
        with self._database.write() as db:
            db.execute("UPDATE events SET data = ? WHERE id = ?", (json.dumps(data), int(event_id, 16)))
        return next(e for e in self.events(repo, number) if e.id == event_id)

    def rename(self, repo: Repo, number: int, user: Identity, title: str) -> Event:
        """Change the title."""
        before = self.get(repo, number).title
        with self._database.write() as db:
            db.execute("UPDATE discussions SET title = ? WHERE repo_id = ? AND num = ?", (title, repo.key, number))
            self._add_event(db, repo, number, user, "title-change", {"from": before, "to": title})
        return self.events(repo, number)[-1]

    def set_status(self, repo: Repo, number: int, user: Identity, status: str, comment: str | None) -> Event:
        """Open or close.

        Raises:
            HubError: 400 for another status; 409 if it was merged.
        """
        if status not in ("open", "closed"):
            raise bad_request(f"Invalid discussion status: {status!r}")
        with self._database.write() as db:
            if self.get(repo, number).status == "merged":
                raise conflict("This pull request is merged")
            if comment:
                self._add_event(db, repo, number, user, "comment", _comment_data(comment, user.name, now()))
            self._set_status(db, repo, number, user, status)
        return self.events(repo, number)[-1]

    def conflicts(self, repo: Repo, discussion: Discussion) -> list[str]:
        """Paths that the pull request and its target changed differently since they parted."""
        if discussion.base is None or discussion.status == "merged":
            return []
        return self._merged(repo, discussion)[2]

    def merge(self, repo: Repo, number: int, user: Identity, comment: str | None) -> str:
        """Apply a pull request to its target branch as one commit.

        Returns:
            Id of that commit.

        Raises:
            HubError: 400 if it is no pull request; 409 if it is closed or merged, or if there are conflicts.
        """
        with self._database.write() as db:
            discussion = self.get(repo, number)
            if discussion.base is None:
                raise bad_request(f"Discussion {number} is not a pull request")
            if discussion.status in ("closed", "merged"):
                raise conflict(f"This pull request is {discussion.status}")
            head, files, clashes = self._merged(repo, discussion)
            if clashes:
                raise conflict(f"Merge conflict in: {', '.join(clashes)}", payload={"filesWithConflicts": clashes})
            title = f"{discussion.title} (#{number})"
            oid = self._history.append(
                db, repo, files, parent=head, title=title, message=comment or "", author=user.name
            )
            self._history.set_ref(db, repo, branch_ref(discussion.base), oid)
            db.execute("UPDATE discussions SET merge_commit = ? WHERE repo_id = ? AND num = ?", (oid, repo.key, number))
            self._set_status(db, repo, number, user, "merged")
        return oid

    def parted_at(self, repo: Repo, discussion: Discussion) -> str:
        """Last common ancestor of the pull request and its target."""
        base = discussion.base or DEFAULT_BRANCH
        target = {c.oid for c in self._history.log(repo, self._history.resolve(repo, branch_ref(base)), limit=-1)}
        lineage = self._history.log(repo, self._history.resolve(repo, discussion.ref), limit=-1)
        return next((c.oid for c in lineage if c.oid in target), lineage[-1].oid)

    def _merged(self, repo: Repo, discussion: Discussion) -> tuple[str, dict[str, Any], list[str]]:
        head = self._history.resolve(repo, branch_ref(discussion.base or DEFAULT_BRANCH))
        files, clashes = merge_snapshots(
            self._history.snapshot(repo, self.parted_at(repo, discussion)),
            self._history.snapshot(repo, head),
            self._history.snapshot(repo, self._history.resolve(repo, discussion.ref)),
        )
        return head, files, clashes

    def _set_status(self, db: sqlite3.Connection, repo: Repo, number: int, user: Identity, status: str) -> None:
        db.execute("UPDATE discussions SET status = ? WHERE repo_id = ? AND num = ?", (status, repo.key, number))
        self._add_event(db, repo, number, user, "status-change", {"status": status})

    def _add_event(
        self, db: sqlite3.Connection, repo: Repo, number: int, user: Identity, kind: str, data: dict[str, Any]
    ) -> None:
        db.execute(
            "INSERT INTO events (repo_id, num, type, author, created_at, data) VALUES (?, ?, ?, ?, ?, ?)",
            (repo.key, number, kind, user.name, now(), json.dumps(data)),
        )


def _discussion(row: sqlite3.Row) -> Discussion:
    return Discussion(
        row["num"], row["title"], row["author"], row["status"], row["base"] if row["is_pull_request"] else None,
        row["merge_commit"], row["created_at"],
    )  # fmt: skip
