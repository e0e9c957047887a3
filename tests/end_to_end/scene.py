"""The stage for things that go wrong: inputs, places for results, a Hub, and what a case of the table says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from hubmerge.localhub import LocalHub
from tests.end_to_end import support
from tests.end_to_end.support import RepoState, Town, save, tensors

TARGET = "local/merged"
Arguments = Sequence[str | Path]


@dataclass
class Scene:
    """A base, two fine-tunes of it, and places for results; a Hub is there as soon as it is asked for."""

    tmp: Path
    start_hub: Callable[..., LocalHub]
    monkeypatch: pytest.MonkeyPatch
    stack: ExitStack
    expected_target: Callable[[RepoState | None], RepoState | None] = lambda before: before
    """What has become of the target when others have worked on it meanwhile."""
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base, self.a, self.b = (save(self.tmp / "in" / n, tensors(i)) for i, n in enumerate(("base", "a", "b")))
        self.out = self.tmp / "results" / "out"
        self.recipe = self.tmp / "merge.yaml"

    @cached_property
    def town(self) -> Town:
        return support.open_town(self.start_hub)

    @property
    def has_town(self) -> bool:
        return "town" in self.__dict__

    def write(self, text: str) -> Path:
        self.recipe.write_text(text)
        return self.recipe

    def merge(self, **keys: Any) -> Arguments:
        """Merge the three folders, with further keys of the recipe."""
        return ["merge", self.described(**keys), "--out", self.out]

    def push(self, *flags: str, **keys: Any) -> Arguments:
        _ = self.town
        return ["push", self.described(**keys), "--to", TARGET, *flags]

    def described(self, **keys: Any) -> Path:
        data = {"method": "task_arithmetic", "base": str(self.base), "models": [str(self.a), str(self.b)]} | keys
        return self.write(json.dumps(data, indent=1))

    def filled(self, text: str) -> str:
        """Names of places instead of ``{base}`` and the like."""
        for name in ("base", "a", "b", "out", "tmp"):
            text = text.replace(f"{{{name}}}", str(getattr(self, name)))
        return text


@dataclass(frozen=True)
class Case:
    """One thing that is wrong."""

    id: str
    code: int
    arrange: Callable[[Scene], Arguments]
    """Brings it about and gives the command line."""
    says: tuple[str, ...]
    """What, where and which values: parts of the message."""
    hint: str
    """Part of the line that says what to do."""


def with_flags(*more: str) -> Callable[[Scene], Arguments]:
    """The merge, with some flags more."""
    return lambda scene: [*scene.merge(), *more]
