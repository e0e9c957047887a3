"""JSON forms of repositories, files, commits and discussions, field for field as the Hub's API has them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from hubmerge.localhub import cards
from hubmerge.localhub.core import Core
from hubmerge.localhub.discussions import Discussion, Event
from hubmerge.localhub.history import Commit
from hubmerge.localhub.repos import Repo
from hubmerge.localhub.trees import Entry, Snapshot, folder_oids, parent_folders, pointer_text

MAX_DIFF_BYTES = 1_000_000


def _lfs(entry: Entry, digest_key: str) -> dict[str, Any]:
    pointer_size = len(pointer_text(entry.sha256, entry.size_bytes))
    return {digest_key: entry.sha256, "size": entry.size_bytes, "pointerSize": pointer_size}


def sibling(entry: Entry, *, blobs: bool) -> dict[str, Any]:
    """A file in a repository's info."""
    view: dict[str, Any] = {"rfilename": entry.path}
    if blobs:
        view |= {"size": entry.size_bytes, "blobId": entry.oid}
        if entry.lfs:
            view["lfs"] = _lfs(entry, "sha256")
    return view


def tree_item(entry: Entry, last_commit: Commit | None) -> dict[str, Any]:
    """A file in a tree listing; with its last commit if given."""
    view: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size_bytes, "path": entry.path}
    if entry.lfs:
        view["lfs"] = _lfs(entry, "oid")
    if last_commit is not None:
        view["lastCommit"] = _last_commit(last_commit)
        view["securityFileStatus"] = {"status": "unscanned", "avScan": None, "pickleImportScan": None}
    return view


def folder_item(path: str, oid: str, last_commit: Commit | None) -> dict[str, Any]:
    """A folder in a tree listing."""
    view: dict[str, Any] = {"type": "directory", "oid": oid, "size": 0, "path": path}
    if last_commit is not None:
        view["lastCommit"] = _last_commit(last_commit)
    return view


def _last_commit(commit: Commit) -> dict[str, str]:
    return {"id": commit.oid, "title": commit.title, "date": commit.date}


def listing(core: Core, repo: Repo, files: Snapshot, paths: Iterable[str], *, expand: bool) -> list[dict[str, Any]]:
    """Items for the given files and folders of a snapshot, in that order; unknown paths are left out."""
    oids = folder_oids(files)
    commits: dict[str, Commit] = {}

    def last(oid: str) -> Commit | None:
        if not expand:
            return None
        if oid not in commits:
            commits[oid] = core.history.commit(repo, oid)
        return commits[oid]

    items: list[dict[str, Any]] = []
    for path in paths:
        if path in files:
            items.append(tree_item(files[path], last(files[path].changed_in)))
        elif path in oids and path:
            changes = [last(e.changed_in) for e in files.values() if e.path.startswith(path + "/")] if expand else []
            newest = max((c for c in changes if c is not None), key=lambda c: c.date, default=None)
            items.append(folder_item(path, oids[path], newest))
    return items


def below(files: Snapshot, folder: str, *, recursive: bool) -> list[str]:
    """Paths of the files and folders under ``folder``, sorted; only direct children unless ``recursive``."""
    prefix = folder + "/" if folder else ""
    found: set[str] = set()
    for path in files:
        if path.startswith(prefix):
            for candidate in (*parent_folders(path), path):
                rest = candidate[len(prefix) :]
                if candidate.startswith(prefix) and rest and (recursive or "/" not in rest):
                    found.add(candidate)
    return sorted(found)


def card_tags(card: dict[str, Any]) -> list[str]:
    """Tags that the Hub derives from a card."""
    tags = [str(card["library_name"])] if "library_name" in card else []
    tags += [str(tag) for tag in card.get("tags") or []]
    for key, label in (("license", "license"), ("datasets", "dataset"), ("language", None)):
        values = card.get(key) or []
        tags += [f"{label}:{v}" if label else str(v) for v in (values if isinstance(values, list) else [values])]
    bases = card.get("base_model") or []
    bases = bases if isinstance(bases, list) else [bases]
    relation = card.get("base_model_relation") or ("merge" if len(bases) > 1 else "finetune")
    for base in bases:
        tags += [f"base_model:{base}", f"base_model:{relation}:{base}"]
    return list(dict.fromkeys([*tags, "region:us"]))


def repo_info(core: Core, repo: Repo, oid: str, *, blobs: bool, expand: list[str]) -> dict[str, Any]:
    """A repository at commit ``oid``; ``blobs`` adds sizes and digests of files, ``expand`` selects properties."""
    files = core.history.snapshot(repo, oid)
    card = cards.metadata(core.text(repo, oid, "README.md"))
    view: dict[str, Any] = {
        "_id": f"{repo.key:024x}",
        "id": repo.id,
        "author": repo.namespace,
        "sha": oid,
        "private": repo.private,
        "gated": repo.gated or False,
        "disabled": repo.disabled,
        "lastModified": core.history.commit(repo, oid).date,
        "createdAt": repo.created_at,
        "downloads": 0,
        "likes": 0,
        "tags": card_tags(card),
        "cardData": card,
        "siblings": [sibling(entry, blobs=blobs) for entry in files.values()],
        "usedStorage": sum(entry.size_bytes for entry in files.values()),
    }
    if repo.type == "model":
        view["modelId"] = repo.id
        view |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
        if "model-index" in card:
            view["model-index"] = card["model-index"]
    if repo.type == "space":
        view["sdk"] = card.get("sdk") or repo.sdk
    return {key: view[key] for key in ("_id", "id", *expand) if key in view} if expand else view


def commit_item(commit: Commit) -> dict[str, Any]:
    """A commit in a listing."""
    return {
        "id": commit.oid,
        "title": commit.title,
        "message": commit.message,
        "date": commit.date,
        "authors": [{"user": commit.author}],
        "parents": [commit.parent] if commit.parent else [],
    }


def discussion_item(repo: Repo, discussion: Discussion) -> dict[str, Any]:
    """A discussion in a listing."""
    return {
        "num": discussion.num,
        "title": discussion.title,
        "status": discussion.status,
        "author": {"name": discussion.author, "type": "user"},
        "createdAt": discussion.created_at,
        "isPullRequest": discussion.base is not None,
        "repo": {"name": repo.id, "type": repo.type},
    }


def discussion_details(core: Core, repo: Repo, discussion: Discussion, *, diff: bool) -> dict[str, Any]:
    """A discussion with its events; a pull request also with its conflicts and its diff."""
    view = discussion_item(repo, discussion)
    view["events"] = [event_item(event) for event in core.discussions.events(repo, discussion.num)]
    if discussion.base is not None:
        view["changes"] = {"base": f"refs/heads/{discussion.base}", "mergeCommitId": discussion.merge_commit}
        view["filesWithConflicts"] = core.discussions.conflicts(repo, discussion)
        if diff:
            before = core.history.snapshot(repo, core.discussions.parted_at(repo, discussion))
            after = core.history.snapshot(repo, core.history.resolve(repo, discussion.ref))
            view["diff"] = unified_diff(core, before, after)
    return view


def event_item(event: Event) -> dict[str, Any]:
    """Something that happened in a discussion."""
    return {
        "id": event.id,
        "type": event.type,
        "createdAt": event.created_at,
        "author": {"name": event.author, "type": "user"},
        "data": event.data,
    }


def unified_diff(core: Core, before: Snapshot, after: Snapshot) -> str:
    """Changes between two snapshots in git's format; large files as changes of their pointers."""
    out: list[str] = []
    for path in sorted(before.keys() | after.keys()):
        old, new = before.get(path), after.get(path)
        if old is not None and old.same_content(new):
            continue
        out.append(f"diff --git a/{path} b/{path}\n")
        names = "/dev/null" if old is None else f"a/{path}", "/dev/null" if new is None else f"b/{path}"
        lines = difflib.unified_diff(_lines(core, old), _lines(core, new), *names)
        out += [line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines]
    return "".join(out)


def _lines(core: Core, entry: Entry | None) -> list[str]:
    if entry is None:
        return []
    if entry.lfs:
        return pointer_text(entry.sha256, entry.size_bytes).decode().splitlines(keepends=True)
    if entry.size_bytes > MAX_DIFF_BYTES:
        return [f"{entry.size_bytes} bytes, git id {entry.oid}\n"]
    return core.objects.read(entry.sha256).decode("utf-8", errors="replace").splitlines(keepends=True)
