"""The plan's digest decides what a run may take over of another: it changes with all that changes a byte, only then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import hubmerge
from hubmerge.localhub import LocalHub
from tests.end_to_end import support
from tests.end_to_end.support import Town, save, tensors

RECIPE = """\
method: ties
base: local/base
models:
  - local/a
  - {repo: local/b, weight: 0.5}
parameters: {density: 0.4, scale: 0.9}
dtype: float32
seed: 3
"""


@pytest.fixture
def town(start_hub: Callable[..., LocalHub], tmp_path: Path) -> Town:
    made = support.open_town(start_hub)
    for seed, name in enumerate(("base", "a", "b")):
        made.publish(f"local/{name}", save(tmp_path / name, tensors(seed)))
    return made


def digest(tmp_path: Path, text: str = RECIPE) -> str:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    return hubmerge.plan(hubmerge.Recipe.load(recipe)).digest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("method: ties", "method: task_arithmetic"),
        ("  - local/a\n  - {repo: local/b, weight: 0.5}", "  - {repo: local/b, weight: 0.5}\n  - local/a"),
        ("weight: 0.5", "weight: 0.6"),
        ("{repo: local/b, weight: 0.5}", "{repo: local/b, weight: 0.5, name: other}"),
        ("density: 0.4", "density: 0.5"),
        ("scale: 0.9", "scale: 0.8"),
        ("dtype: float32", "dtype: bfloat16"),
        ("seed: 3", "seed: 4"),
        ("seed: 3", "seed: 3\nexclude: ['*norm*']"),
        ("seed: 3", "seed: 3\noutput: {shard_size: 700B}"),
    ],
    ids=["method", "order", "weight", "name", "density", "scale", "dtype", "seed", "exclude", "shard size"],
)
def test_a_change_of_the_recipe_changes_it(old: str, new: str, town: Town, tmp_path: Path) -> None:
    assert old in RECIPE
    changed = RECIPE.replace(old, new)
    changed = changed.replace("density: 0.4, ", "") if "task_arithmetic" in changed else changed
    assert digest(tmp_path, changed) != digest(tmp_path)


@pytest.mark.parametrize("repo", ["local/base", "local/a", "local/b"])
def test_a_new_commit_of_an_input_changes_it(repo: str, town: Town, tmp_path: Path) -> None:
    before = digest(tmp_path)
    town.commit(repo, "notes.txt", b"not even about the weights")
    assert digest(tmp_path) != before


def test_another_version_of_the_program_changes_it(town: Town, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(tmp_path)
    monkeypatch.setattr(hubmerge, "__version__", "999.0")
    assert digest(tmp_path) != before


@pytest.mark.parametrize(
    "same",
    [
        "\n".join(reversed(RECIPE.strip().split("\n")[:2])) + "\n" + "\n".join(RECIPE.strip().split("\n")[2:]) + "\n",
        "# a comment\n" + RECIPE.replace("dtype: float32", "dtype: float32  # as the base"),
        RECIPE.replace("{density: 0.4, scale: 0.9}", "{scale: 0.9, density: 0.4}"),
        RECIPE.replace("{repo: local/b, weight: 0.5}", "{weight: 5.0e-1, repo: 'local/b'}"),
        RECIPE.replace("parameters: {density: 0.4, scale: 0.9}", "parameters:\n  density: 0.4\n  scale: 0.9"),
        RECIPE.replace("- local/a", "- repo: local/a\n    weight: 1.0"),
        RECIPE + "card: {title: Another title}\n",
    ],
    ids=["order of keys", "comments", "order of parameters", "order in a model", "block style", "default", "card"],
)
def test_the_same_said_otherwise_does_not_change_it(same: str, town: Town, tmp_path: Path) -> None:
    assert same != RECIPE
    assert digest(tmp_path, same) == digest(tmp_path)


def test_a_branch_that_points_to_the_same_commit_is_the_same_input(town: Town, tmp_path: Path) -> None:
    before = digest(tmp_path)
    town.api.create_tag("local/a", tag="v1")
    assert digest(tmp_path, RECIPE.replace("- local/a", "- local/a@v1")) == before
