"""Snapshots of a repository as plain values: files, folders, git object ids, edits and three-way merges."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hubmerge.localhub.errors import bad_request, entry_not_found

MAX_PATH_LENGTH = 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a snapshot.

    Attributes:
        path: From the repository's root.
        oid: Git blob id: of the content, or of the pointer file when ``lfs``.
        sha256: Digest of the content, under which the object store has it.
        size_bytes: Size of the content.
        lfs: Stored as a large file.
        changed_in: Commit that last changed the file.
    """

    path: str
    oid: str
    sha256: str
    size_bytes: int
    lfs: bool
    changed_in: str = ""

    @property
    def etag(self) -> str:
        """What the Hub sends as ETag: the SHA-256 of large files, the git id of others."""
        return self.sha256 if self.lfs else self.oid

    def same_content(self, other: Entry | None) -> bool:
        """Whether both are the same file content stored the same way."""
        return other is not None and self.oid == other.oid


Snapshot = Mapping[str, Entry]


def pointer_text(sha256: str, size_bytes: int) -> bytes:
    """The git-lfs pointer file that git would store in place of the content."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size_bytes}\n".encode()


def git_oid(kind: str, data: bytes) -> str:
    """Git's SHA-1 of an object of ``kind`` (blob, tree, commit)."""
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


def regular_entry(path: str, data: bytes, sha256: str) -> Entry:
    """An entry for a small file."""
    return Entry(path, git_oid("blob", data), sha256, len(data), lfs=False)


def lfs_entry(path: str, sha256: str, size_bytes: int) -> Entry:
    """An entry for a large file."""
    return Entry(path, git_oid("blob", pointer_text(sha256, size_bytes)), sha256, size_bytes, lfs=True)


def check_path(path: str) -> str:
    """Return ``path`` if a repository may contain it.

    Raises:
        HubError: 400 for empty, absolute, escaping or git-internal paths.
    """
    segments = path.split("/")
    if not path or len(path) > MAX_PATH_LENGTH or "\0" in path:
        raise bad_request(f"Invalid file path: {path[:80]!r}")
    if any(segment in ("", ".", "..") or segment.lower() == ".git" for segment in segments):
        raise bad_request(f"Invalid file path: {path!r}")
    return path


def parent_folders(path: str) -> Iterator[str]:
    """All folders that contain ``path``, outermost first."""
    position = path.find("/")
    while position >= 0:
        yield path[:position]
        position = path.find("/", position + 1)


class Edit:
    """A snapshot being changed by the operations of one commit, in their order."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._files = dict(snapshot)

    def put(self, entry: Entry) -> None:
        """Add or replace a file."""
        check_path(entry.path)
        self._files[entry.path] = entry

    def delete_file(self, path: str) -> None:
        """Remove one file.

        Raises:
            HubError: 404 if there is none of that name.
        """
        if self._files.pop(path, None) is None:
            raise entry_not_found(f"A file with this name doesn't exist: {path}")

    def delete_folder(self, path: str) -> None:
        """Remove everything below a folder; the empty path means the whole repository.

        Raises:
            HubError: 404 if nothing lies below it.
        """
        prefix = path.strip("/") + "/"
        doomed = list(self._files) if prefix == "/" else [name for name in self._files if name.startswith(prefix)]
        if not doomed:
            raise entry_not_found(f"A folder with this name doesn't exist: {path}")
        for name in doomed:
            del self._files[name]

    def finish(self) -> dict[str, Entry]:
        """The resulting snapshot.

        Raises:
            HubError: 400 if a name is used for both a file and a folder.
        """
        for path in self._files:
            for folder in parent_folders(path):
                if folder in self._files:
                    raise bad_request(f"{folder!r} cannot be both a file and a folder (of {path!r})")
        return self._files


def merge_snapshots(base: Snapshot, ours: Snapshot, theirs: Snapshot) -> tuple[dict[str, Entry], list[str]]:
    """Three-way merge by whole files.

    Returns:
        The merged snapshot, and the paths that both sides changed differently (those keep ``ours``).
    """
    merged = dict(ours)
    conflicts: list[str] = []
    for path in sorted(base.keys() | theirs.keys()):
        before, mine, other = base.get(path), ours.get(path), theirs.get(path)
        if _same(before, other) or _same(mine, other):
            continue
        if not _same(before, mine):
            conflicts.append(path)
        elif other is None:
            merged.pop(path, None)
        else:
            merged[path] = other
    # One side made a file where the other made a folder.
    clashing = {p for p in merged if any(folder in merged for folder in parent_folders(p))}
    return merged, sorted({*conflicts, *clashing})


def _same(left: Entry | None, right: Entry | None) -> bool:
    return left.same_content(right) if left is not None else right is None


def folder_oids(snapshot: Snapshot) -> dict[str, str]:
    """Git tree ids of all folders, keyed by path; ``""`` is the root."""
    children: dict[str, dict[str, tuple[str, str]]] = {"": {}}
    for entry in snapshot.values():
        for folder in parent_folders(entry.path):
            children.setdefault(folder, {})
        folder, _, name = entry.path.rpartition("/")
        children[folder][name] = ("100644", entry.oid)
    oids: dict[str, str] = {}
    for path in sorted(children, key=lambda p: (-p.count("/") if p else 1, p)):
        oids[path] = _tree_oid(children[path])
        if path:
            folder, _, name = path.rpartition("/")
            children[folder][name] = ("40000", oids[path])
    return oids


def _tree_oid(members: Mapping[str, tuple[str, str]]) -> str:
    # Git sorts folders as if their names ended in a slash.
    ordered = sorted(members.items(), key=lambda item: (item[0] + ("/" if item[1][0] == "40000" else "")).encode())
    body = b"".join(f"{mode} {name}\0".encode() + bytes.fromhex(oid) for name, (mode, oid) in ordered)
    return git_oid("tree", body)
