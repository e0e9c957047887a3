"""The commit endpoint's work: parse the NDJSON operations, store small files, move the branch atomically."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hubmerge.localhub.auth import Identity
from hubmerge.localhub.database import Database
from hubmerge.localhub.discussions import Discussions
from hubmerge.localhub.errors import bad_request, entry_not_found, revision_not_found, stale_parent
from hubmerge.localhub.history import History, branch_ref
from hubmerge.localhub.objects import ObjectStore
from hubmerge.localhub.repos import Repo
from hubmerge.localhub.trees import Edit, Entry, check_path, lfs_entry, regular_entry
from hubmerge.localhub.xet import XetStore


@dataclass(frozen=True, slots=True)
class _Put:
    entry: Entry


@dataclass(frozen=True, slots=True)
class _Delete:
    path: str
    folder: bool


@dataclass(frozen=True, slots=True)
class _Copy:
    path: str
    source_path: str
    source_revision: str | None


@dataclass(slots=True)
class CommitRequest:
    """A parsed commit payload, its small files already in the object store."""

    title: str = ""
    message: str = ""
    parent: str | None = None
    operations: list[_Put | _Delete | _Copy] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CommitResult:
    """Where a commit ended up."""

    oid: str
    pull_request: int | None


class Committer:
    """Turns commit requests into commits."""

    def __init__(
        self,
        database: Database,
        objects: ObjectStore,
        history: History,
        discussions: Discussions,
        xet: XetStore | None = None,
    ) -> None:
        self._database = database
        self._objects = objects
        self._history = history
        self._discussions = discussions
        self._xet = xet

    def parse(self, repo: Repo, lines: Iterable[bytes]) -> CommitRequest:
        """Read the NDJSON body, line by line, so that only one file is in memory at a time.

        Raises:
            HubError: 400 for malformed lines, bad paths, or large files that were never uploaded here.
        """
        request = CommitRequest()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                key, value = item["key"], item["value"]
                if key == "header":
                    request.title = str(value["summary"])
                    request.message = str(value.get("description") or "")
                    request.parent = value.get("parentCommit")
                else:
                    request.operations.append(self._operation(repo, key, value))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise bad_request(f"Malformed commit operation on line {number}: {error!r}") from error
        if not request.title:
            raise bad_request("The commit payload has no header with a summary")
        return request

    def _operation(self, repo: Repo, key: str, value: dict[str, Any]) -> _Put | _Delete | _Copy:
        path = str(value["path"])
        if key == "file":
            return _Put(self._regular(check_path(path), value))
        if key == "lfsFile":
            return _Put(self._large(repo, check_path(path), value))
        if key in ("deletedFile", "deletedFolder", "deletedEntry"):
            return _Delete(path, folder=key == "deletedFolder")
        if key == "copyFile":
            revision = value.get("srcRevision")
            return _Copy(check_path(path), str(value["srcPath"]), None if revision is None else str(revision))
        raise bad_request(f"Unknown commit operation: {key!r}")

    def _regular(self, path: str, value: dict[str, Any]) -> Entry:
        content = str(value["content"])
        if value.get("encoding") == "base64":
            try:
                data = base64.b64decode(content, validate=True)
            except binascii.Error as error:
                raise bad_request(f"Content of {path!r} is not base64: {error}") from error
        else:
            data = content.encode()
        return regular_entry(path, data, self._objects.put(data))

    def _large(self, repo: Repo, path: str, value: dict[str, Any]) -> Entry:
        sha256 = str(value["oid"])
        if (
            self._xet is not None
            and not self._history.has_object(repo, sha256)
            and self._xet.bring(sha256, self._objects)
        ):
            self._history.add_object(repo.key, sha256)
        size_bytes = self._objects.size_bytes(sha256)
        if value.get("algo", "sha256") != "sha256":
            raise bad_request(f"LFS object of {path!r}: unknown algorithm {value['algo']!r}")
        if size_bytes is None or not self._history.has_object(repo, sha256):
            raise bad_request(f"LFS pointer pointed to a file that does not exist: {path!r}, oid {sha256}")
        if value.get("size") not in (None, size_bytes):
            raise bad_request(f"LFS object of {path!r} has {size_bytes} bytes, not {value['size']}")
        return lfs_entry(path, sha256, size_bytes)

    def commit(self, repo: Repo, revision: str, request: CommitRequest, user: Identity) -> CommitResult:
        """Apply a request to a branch or pull request.

        Raises:
            HubError: 412 if the request names a parent that is not the head; RevisionNotFound if ``revision`` is not
                something a commit can move; 404 or 400 if an operation does not fit the files that are there.
        """
        name = branch_ref(revision)
        with self._database.write() as db:
            head = self._history.ref(repo, name)
            if head is None or not name.startswith(("refs/heads/", "refs/pr/")):
                raise revision_not_found(revision)
            if request.parent is not None and request.parent != head:
                raise stale_parent()
            oid = self._record(db, repo, head, request, user)
            self._history.set_ref(db, repo, name, oid)
            if name.startswith("refs/pr/"):
                number = int(name.rsplit("/", 1)[1])
                self._discussions.add_commit_event(db, repo, number, user, request.title, oid)
        return CommitResult(oid, None)

    def commit_as_pull_request(self, repo: Repo, revision: str, request: CommitRequest, user: Identity) -> CommitResult:
        """Apply a request to a new pull request against ``revision``, starting at the named parent or the head.

        Raises:
            HubError: As :meth:`commit`, without the 412.
        """
        with self._database.write() as db:
            head = self._history.ref(repo, branch_ref(revision))
            if head is None:
                raise revision_not_found(revision)
            start = head if request.parent is None else self._history.resolve(repo, request.parent)
            oid = self._record(db, repo, start, request, user)
            number = self._discussions.insert(
                db, repo, user, request.title, request.message, base=revision, start=start
            )
            self._history.set_ref(db, repo, f"refs/pr/{number}", oid)
            self._discussions.add_commit_event(db, repo, number, user, request.title, oid)
        return CommitResult(oid, number)

    def _record(self, db: Any, repo: Repo, parent: str, request: CommitRequest, user: Identity) -> str:
        before = self._history.snapshot(repo, parent)
        edit = Edit(before)
        for operation in request.operations:
            if isinstance(operation, _Put):
                edit.put(operation.entry)
            elif isinstance(operation, _Copy):
                edit.put(self._copied(repo, parent, operation))
            elif operation.folder:
                edit.delete_folder(operation.path)
            else:
                edit.delete_file(operation.path)
        return self._history.append(
            db, repo, edit.finish(), parent=parent, title=request.title, message=request.message, author=user.name
        )

    def _copied(self, repo: Repo, parent: str, copy: _Copy) -> Entry:
        commit = parent if copy.source_revision is None else self._history.resolve(repo, copy.source_revision)
        source = self._history.find(repo, commit, copy.source_path)
        if source is None:
            raise entry_not_found(f"A file with this name doesn't exist: {copy.source_path}", commit=commit)
        return Entry(copy.path, source.oid, source.sha256, source.size_bytes, source.lfs)
