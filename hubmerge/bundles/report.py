"""What a bundle's manifest tells a person: its tasks, how well they come back, and what it saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hubmerge.bundles.manifest import Manifest, TaskEntry
from hubmerge.quantities import size


@dataclass(frozen=True, slots=True)
class Sizes:
    """The bundle beside the models as they are; all in bytes, of weight files alone."""

    bundle_bytes: int
    base_bytes: int
    plain_bytes: int
    """Of the tasks' own weight files together."""
    tasks: int
    adapters: int
    """How many of the tasks are adapters, which need the base as much as the bundle does."""

    @classmethod
    def of(cls, manifest: Manifest) -> Sizes:
        """Of a bundle."""
        adapters = sum(t.adapter for t in manifest.tasks)
        base_bytes = manifest.base.size_bytes
        return cls(manifest.size_bytes, base_bytes, manifest.plain_bytes, len(manifest.tasks), adapters)

    @property
    def with_base_bytes(self) -> tuple[int, int]:
        """What it takes to have every task: by the bundle, and by the models as they are."""
        plain_needs_base = self.adapters > 0
        return self.bundle_bytes + self.base_bytes, self.plain_bytes + plain_needs_base * self.base_bytes

    @property
    def saves(self) -> bool:
        """Whether the bundle takes less than the models as they are."""
        ours, plain = self.with_base_bytes
        return ours < plain

    @property
    def verdict(self) -> str:
        """The comparison in a sentence, the base counted where it is needed."""
        noun, many = "adapter" if self.adapters == self.tasks else "model", self.tasks != 1
        models = f"the {noun}s as they are" if many else f"the {noun} as it is"
        if self.adapters == self.tasks:
            ours, plain, needed = self.bundle_bytes, self.plain_bytes, ""
        else:
            (ours, plain), needed = self.with_base_bytes, " with its base"
            models += " with it" if self.adapters else ""
        if self.saves:
            return f"The bundle{needed} takes {size(ours)}, {models} {size(plain)}: {ours / plain:.2f} of it."
        take = "take" if many else "takes"
        return f"Plain storage is no larger: {models} {take} {size(plain)}, the bundle{needed} {size(ours)}."


def task_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """The tasks as plain data."""
    return [_row(manifest, t) for t in manifest.tasks]


def _row(manifest: Manifest, task: TaskEntry) -> dict[str, Any]:
    return {
        "name": task.name,
        "id": task.id,
        "repo": task.source.repo,
        "commit": task.source.commit,
        "kind": "adapter" if task.adapter else "full",
        "norm": task.norm,
        "expected_error": task.error,
        "expected_relative_error": task.relative_error,
        "own_bytes": manifest.own_bytes(task),
        "plain_bytes": task.source.size_bytes,
    }


def describe(manifest: Manifest) -> dict[str, Any]:
    """A bundle as plain data, without its tensors."""
    sizes = Sizes.of(manifest)
    return {
        "codec": manifest.codec,
        "parameters": dict(manifest.parameters),
        "seed": manifest.seed,
        "base": {"repo": manifest.base.repo, "commit": manifest.base.commit, "size_bytes": sizes.base_bytes},
        "tensors": len(manifest.targets),
        "tasks": task_rows(manifest),
        "size_bytes": sizes.bundle_bytes,
        "plain_bytes": sizes.plain_bytes,
        "saves": sizes.saves,
    }
