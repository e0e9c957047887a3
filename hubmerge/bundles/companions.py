"""The small files of every task's model, such as a tokenizer's: those that are the base's too are not kept again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from hubmerge import layout
from hubmerge.bundles.manifest import TaskEntry
from hubmerge.bundles.store import DAMAGED, Bundle
from hubmerge.errors import IntegrityError
from hubmerge.hub import Hub
from hubmerge.inputs import read_small
from hubmerge.spec import PinnedModel


@dataclass(slots=True)
class Companions:
    """The small files of one task's model."""

    files: dict[str, str | None] = field(default_factory=dict)
    """As in the manifest: digests of those that are kept for the task; None for the base's own."""
    kept: dict[str, bytes] = field(default_factory=dict)
    """Contents of those that are kept."""


def companions(base: PinnedModel, model: PinnedModel, hub: Hub) -> Companions:
    """What belongs to a task's model: its own files; the base's where it is an adapter, or has no tokenizer."""
    found = Companions()
    for path, owner in sorted(_owners(base, model).items()):
        if owner is base or _known_same(base, owner, path):
            found.files[path] = None
            continue
        content = read_small(owner, hub, path)
        is_same = path in base.files and len(content) == base.files[path].size_bytes
        if is_same and read_small(base, hub, path) == content:
            found.files[path] = None
        else:
            found.files[path] = hashlib.sha256(content).hexdigest()
            found.kept[path] = content
    return found


def _owners(base: PinnedModel, model: PinnedModel) -> dict[str, PinnedModel]:
    """Whose version of each file belongs to the task's model."""
    main = base if model.adapter is not None else model
    tokenizer = model if layout.tokenizer_files(model, 0) else base
    found = {f.path: base for f in layout.notices(base)}
    for file in layout.companions(main, tokenizer, 0):
        found[file.path] = main if file.source == -1 else tokenizer
    return found


def _known_same(base: PinnedModel, model: PinnedModel, path: str) -> bool:
    """Whether the two have the same file, by digests that need no reading."""
    ours, theirs = base.files.get(path), model.files[path]
    pairs = [(ours.sha256, theirs.sha256), (ours.git_sha1, theirs.git_sha1)] if ours is not None else []
    return any(a is not None and a == b for a, b in pairs)


def own_files(bundle: Bundle, task: TaskEntry) -> dict[str, bytes]:
    """The small files that are kept for a task.

    Raises:
        IntegrityError: One is missing or damaged.
    """
    found: dict[str, bytes] = {}
    for path, sha256 in task.files.items():
        if sha256 is not None:
            found[path] = bundle.read(task.file_path(path))
            if hashlib.sha256(found[path]).hexdigest() != sha256:
                raise IntegrityError(
                    f"{bundle.label}: {task.file_path(path)} is not the file that the manifest names",
                    hint=DAMAGED,
                )
    return found


def all_files(bundle: Bundle, task: TaskEntry, base: PinnedModel, hub: Hub) -> dict[str, bytes]:
    """All small files of a task's model, but for its config.

    Raises:
        IntegrityError: One is missing or damaged.
    """
    of_base = [path for path, sha256 in task.files.items() if sha256 is None]
    for path in of_base:
        if path not in base.files:
            raise IntegrityError(
                f"{bundle.label}: task {task.name!r} has the base's {path}, and the base has no such file",
                hint=DAMAGED,
            )
    return own_files(bundle, task) | {path: read_small(base, hub, path) for path in of_base}
