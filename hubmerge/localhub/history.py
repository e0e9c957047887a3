"""Refs, commits and snapshots of a repository, as rows."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from hubmerge.localhub.database import Database
from hubmerge.localhub.errors import bad_request, conflict, entry_not_found, revision_not_found
from hubmerge.localhub.repos import Repo, now
from hubmerge.localhub.trees import Entry, folder_oids, git_oid

DEFAULT_BRANCH = "main"
_OID = re.compile(r"[0-9a-f]{7,40}")
_REF_BANNED = r"\s~^:?*\[\\\x00-\x1f\x7f"
_REF_NAME = re.compile(rf"(?!.*(\.\.|//|@\{{|\.lock$|\.$|/$))[^{_REF_BANNED}/.-][^{_REF_BANNED}]{{0,249}}")


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit."""

    oid: str
    parent: str | None
    tree_id: int
    tree_oid: str
    title: str
    message: str
    author: str
    date: str


def _commit(row: sqlite3.Row) -> Commit:
    return Commit(*(row[name] for name in Commit.__dataclass_fields__))


def _entry(row: sqlite3.Row) -> Entry:
    return Entry(row["path"], row["oid"], row["sha256"], row["size"], bool(row["lfs"]), row["changed_in"])


def branch_ref(revision: str) -> str:
    """Full name of the ref that a commit to ``revision`` moves: a branch, or a pull request's ``refs/pr/N``."""
    return revision if revision.startswith("refs/") else f"refs/heads/{revision}"


def check_ref_name(name: str) -> str:
    """Return ``name`` if a branch or tag may be called that.

    Raises:
        HubError: 400 otherwise.
    """
    if not _REF_NAME.fullmatch(name) or name.startswith("refs/"):
        raise bad_request(f"Invalid reference name: {name!r}")
    return name


class History:
    """Commits and refs of all repositories."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def ref(self, repo: Repo, name: str) -> str | None:
        """Commit that the ref of that full name points at."""
        row = (
            self._database.connection()
            .execute("SELECT oid FROM refs WHERE repo_id = ? AND name = ?", (repo.key, name))
            .fetchone()
        )
        return None if row is None else str(row["oid"])

    def refs(self, repo: Repo) -> dict[str, str]:
        """All refs by full name."""
        rows = self._database.connection().execute(
            "SELECT name, oid FROM refs WHERE repo_id = ? ORDER BY name", (repo.key,)
        )
        return {row["name"]: row["oid"] for row in rows}

    def resolve(self, repo: Repo, revision: str) -> str:
        """Commit id of a branch, tag, ``refs/…`` name, commit id, or unambiguous start of one.

        Raises:
            HubError: RevisionNotFound.
        """
        name = DEFAULT_BRANCH if revision == "HEAD" else revision
        for candidate in (name, f"refs/heads/{name}", f"refs/tags/{name}"):
            if candidate.startswith("refs/") and (oid := self.ref(repo, candidate)) is not None:
                return oid
        if _OID.fullmatch(name):
            rows = (
                self._database.connection()
                .execute(
                    "SELECT oid FROM commits WHERE repo_id = ? AND oid >= ? AND oid < ? LIMIT 2",
                    (repo.key, name, name + "g"),
                )
                .fetchall()
            )
            if len(rows) == 1:
                return str(rows[0]["oid"])
        raise revision_not_found(revision)

    def commit(self, repo: Repo, oid: str) -> Commit:
        """One commit by its full id.

        Raises:
            HubError: RevisionNotFound.
        """
        row = (
            self._database.connection()
            .execute("SELECT * FROM commits WHERE repo_id = ? AND oid = ?", (repo.key, oid))
            .fetchone()
        )
        if row is None:
            raise revision_not_found(oid)
        return _commit(row)

    def log(self, repo: Repo, oid: str, *, offset: int = 0, limit: int = 50) -> list[Commit]:
        """Ancestors of a commit, itself first."""
        rows = self._database.connection().execute(
            "WITH RECURSIVE walk (oid) AS (SELECT ? UNION SELECT c.parent FROM commits c JOIN walk w"
            " ON c.repo_id = ? AND c.oid = w.oid WHERE c.parent IS NOT NULL)"
            " SELECT c.* FROM commits c JOIN walk w ON c.repo_id = ? AND c.oid = w.oid"
            " ORDER BY c.seq DESC LIMIT ? OFFSET ?",
            (oid, repo.key, repo.key, limit, offset),
        )
        return [_commit(row) for row in rows]

    def snapshot(self, repo: Repo, oid: str) -> dict[str, Entry]:
        """All files of a commit, by path, sorted."""
        tree_id = self.commit(repo, oid).tree_id
        rows = self._database.connection().execute("SELECT * FROM entries WHERE tree_id = ? ORDER BY path", (tree_id,))
        return {row["path"]: _entry(row) for row in rows}

    def find(self, repo: Repo, oid: str, path: str) -> Entry | None:
        """One file of a commit."""
        row = (
            self._database.connection()
            .execute(
                "SELECT e.* FROM entries e JOIN commits c ON e.tree_id = c.tree_id"
                " WHERE c.repo_id = ? AND c.oid = ? AND e.path = ?",
                (repo.key, oid, path),
            )
            .fetchone()
        )
        return None if row is None else _entry(row)

    def entry(self, repo: Repo, oid: str, path: str) -> Entry:
        """One file of a commit.

        Raises:
            HubError: EntryNotFound, with the commit id, so that clients can cache the absence.
        """
        found = self.find(repo, oid, path)
        if found is None:
            raise entry_not_found("Entry not found", commit=oid)
        return found

    def append(
        self,
        db: sqlite3.Connection,
        repo: Repo,
        files: Mapping[str, Entry],
        *,
        parent: str | None,
        title: str,
        message: str,
        author: str,
    ) -> str:
        """Record a commit inside the caller's transaction; no ref is moved.

        Returns:
            Its id, which is the one git would compute.
        """
        before = self.snapshot(repo, parent) if parent else {}
        date, tree_oid = now(), folder_oids(files)[""]
        oid = _commit_oid(tree_oid, parent, author, date, f"{title}\n\n{message}" if message else title)
        known = db.execute("SELECT 1 FROM commits WHERE repo_id = ? AND oid = ?", (repo.key, oid)).fetchone()
        if known:  # same change on the same parent within one second: in git, too, that is one commit
            return oid
        tree_id = db.execute("INSERT INTO trees (repo_id) VALUES (?)", (repo.key,)).lastrowid
        stamped = [e if e.same_content(before.get(p)) else replace(e, changed_in=oid) for p, e in files.items()]
        db.executemany(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(tree_id, e.path, e.oid, e.sha256, e.size_bytes, e.lfs, e.changed_in) for e in stamped],
        )
        db.execute(
            "INSERT INTO commits (repo_id, oid, parent, tree_id, tree_oid, title, message, author, date)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (repo.key, oid, parent, tree_id, tree_oid, title, message, author, date),
        )
        return oid

    def set_ref(self, db: sqlite3.Connection, repo: Repo, name: str, oid: str) -> None:
        """Point a ref somewhere inside the caller's transaction."""
        db.execute("INSERT OR REPLACE INTO refs VALUES (?, ?, ?)", (repo.key, name, oid))

    def create_ref(self, repo: Repo, name: str, oid: str) -> None:
        """Add a branch or tag by its full name.

        Raises:
            HubError: 409 if it exists.
        """
        with self._database.write() as db:
            if self.ref(repo, name) is not None:
                raise conflict(f"Reference already exists: {name}")
            self.set_ref(db, repo, name, oid)

    def delete_ref(self, repo: Repo, name: str) -> None:
        """Remove a branch or tag by its full name; its commits stay readable by id.

        Raises:
            HubError: RevisionNotFound if there is none; 403 for the default branch.
        """
        if name == f"refs/heads/{DEFAULT_BRANCH}":
            raise bad_request("Cannot delete the default branch")
        with self._database.write() as db:
            if self.ref(repo, name) is None:
                raise revision_not_found(name.split("/", 2)[2])
            db.execute("DELETE FROM refs WHERE repo_id = ? AND name = ?", (repo.key, name))

    def squash(self, repo: Repo, branch: str, message: str, author: str) -> str:
        """Replace a branch's history by one commit with the same files."""
        name = branch_ref(branch)
        with self._database.write() as db:
            head = self.ref(repo, name)
            if head is None:
                raise revision_not_found(branch)
            files = self.snapshot(repo, head)
            oid = self.append(db, repo, files, parent=None, title=message, message="", author=author)
            self.set_ref(db, repo, name, oid)
        return oid

    def has_object(self, repo: Repo, sha256: str) -> bool:
        """Whether the large file was uploaded to, or committed in, this repository."""
        row = (
            self._database.connection()
            .execute("SELECT 1 FROM repo_objects WHERE repo_id = ? AND sha256 = ?", (repo.key, sha256))
            .fetchone()
        )
        return row is not None

    def add_object(self, repo_key: int, sha256: str) -> None:
        """Remember that the large file now belongs to this repository."""
        with self._database.write() as db:
            db.execute("INSERT OR IGNORE INTO repo_objects VALUES (?, ?)", (repo_key, sha256))


def _commit_oid(tree_oid: str, parent: str | None, author: str, date: str, message: str) -> str:
    seconds = int(datetime.strptime(date, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC).timestamp())
    person = f"{author} <{author}@users.noreply.localhub> {seconds} +0000"
    parents = f"parent {parent}\n" if parent else ""
    return git_oid("commit", f"tree {tree_oid}\n{parents}author {person}\ncommitter {person}\n\n{message}\n".encode())
