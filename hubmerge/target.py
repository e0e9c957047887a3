"""The repository that a result goes to: what may be published there, and what it holds already."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from hubmerge import __version__
from hubmerge.errors import HubMergeError, PublishError, TargetMovedError, TargetNotEmptyError
from hubmerge.hub import Hub, Refs
from hubmerge.journal import Resumable, Written
from hubmerge.lock import LOCK_NAME, loads
from hubmerge.signing import SIGNATURE_NAME
from hubmerge.spec import FileSpec

# What the Hub puts into every new repository: a repository with nothing else holds nobody's work.
_INITIAL_FILES = frozenset({".gitattributes"})
# Files that a loader would pick up as weights. Left from an earlier version, they would be loaded beside the new ones.
_WEIGHTS = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "adapter_config.json",
    "adapter_model*.safetensors",
    "adapter_model*.bin",
    "hubmerge_bundle.json",
    "bundle-*.safetensors",
    "tasks/*.safetensors",
    "heads/*.safetensors",
    "heads/*.json",
    "heads/*/*",
    "heads/*/*/*",
)


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """Where and how to publish."""

    revision: str = "main"
    """Branch; created from main if it is missing."""
    create_pr: bool = False
    """Open a pull request against the branch instead of committing to it."""
    tag: str | None = None
    public: bool | None = None
    """True makes the repository public after the commit; False insists on a private one; None creates a private one
    and leaves an existing one as it is."""
    overwrite: bool = False
    """Publish into a repository with content that hubmerge did not make."""
    parent: str | None = None
    """The commit that the result continues; publishing fails if the branch is at another one."""
    keep: frozenset[str] = frozenset()
    """Files of the commit before that stay, although they are weights or hubmerge has made them."""
    message: str = f"Publish a merge made with hubmerge {__version__}"


@dataclass(frozen=True, slots=True)
class State:
    """What a target holds before anything is published."""

    branch: str
    """The branch that is published to; if that is not there yet, the one it will be made from."""
    parent: str
    """Where it points to."""
    files: Mapping[str, FileSpec]
    stale: tuple[str, ...]
    """Files that the result replaces or makes wrong."""
    tagged: str | None
    """What the tag that is asked for points to, if it is there."""


def inspect(hub: Hub, repo: str, refs: Refs, options: PublishOptions) -> State:
    """See what a repository holds, and refuse what would destroy something.

    Raises:
        TargetNotEmptyError: It holds something that hubmerge did not make.
        TargetMovedError: It is not at the commit that the result continues.
        PublishError: The options do not fit the repository.
    """
    if options.revision in refs.tags:
        raise PublishError(f"{options.revision!r} is a tag of {repo}", hint="Publish to a branch.")
    branch = options.revision if options.revision in refs.branches else "main"
    if branch not in refs.branches or (options.create_pr and branch != options.revision):
        raise PublishError(
            f"{repo} has no branch {branch if branch not in refs.branches else options.revision!r}",
            hint=f"Its branches are: {', '.join(sorted(refs.branches)) or 'none'}.",
        )
    parent = refs.branches[branch]
    if options.parent is not None and options.parent != parent:
        raise TargetMovedError(
            f"{repo}@{branch} is at {parent[:12]} now, not at {options.parent[:12]}",
            hint="somebody else changed it; run the same command again",
        )
    files = {file.path: file for file in hub.list_files(repo, parent)}
    foreign = sorted(files.keys() - _INITIAL_FILES) if LOCK_NAME not in files else []
    if foreign and not (options.overwrite or options.create_pr):
        raise TargetNotEmptyError(
            f"{repo}@{branch} holds {len(foreign)} files that hubmerge did not make, e.g. {foreign[0]}",
            hint="Choose another repository, open a pull request (--pr), or give --overwrite (overwrite=True).",
        )
    # A signature is of everything at once: with any other file, the one that is there holds no more.
    ours = (_made_before(hub, repo, parent) if LOCK_NAME in files else frozenset()) | {SIGNATURE_NAME}
    stale = tuple(p for p in files if (is_weight_file(p) or p in ours) and p not in options.keep)
    return State(branch, parent, files, stale, refs.tags.get(options.tag) if options.tag else None)


def _made_before(hub: Hub, repo: str, commit: str) -> frozenset[str]:
    """What hubmerge has put there; nothing is known if the lock is damaged."""
    try:
        return frozenset(f.path for f in loads(hub.read_small(repo, commit, LOCK_NAME)).outputs)
    except HubMergeError:
        return frozenset()


def published_before(hub: Hub, repo: str, state: State, work: Resumable) -> dict[str, Written]:
    """The files of this very plan that the target has: an earlier run got as far as its commit."""
    files = state.files
    try:
        lock = loads(hub.read_small(repo, state.parent, LOCK_NAME)) if LOCK_NAME in files else None
    except HubMergeError:
        return {}  # not a lock of ours: nothing is known of the files beside it
    if lock is None or lock.plan_sha256 != work.digest:
        return {}
    locked = {output.path: Written(output.path, output.size_bytes, output.sha256) for output in lock.outputs}
    return {
        o.path: locked[o.path]
        for o in work.outputs
        if o.path in locked
        and o.path in files
        and files[o.path].size_bytes == locked[o.path].size_bytes
        and hub.sha256(repo, state.parent, files[o.path]) == locked[o.path].sha256
    }


def is_weight_file(path: str) -> bool:
    """Whether a file of a repository holds weights, or tells a loader where they are."""
    return any(fnmatch.fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in _WEIGHTS)
