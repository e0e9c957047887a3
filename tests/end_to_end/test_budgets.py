"""Memory and disk that a run may use: what cannot fit is refused with what would, and what was used is reported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from hubmerge.localhub import LocalHub
from tests.end_to_end import support
from tests.end_to_end.support import Town, save, tensors

TARGET = "local/merged"
SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (200, 100) for i in range(4)}
SHARD_BYTES = 80_000 + 200  # one tensor and its header, or a little more


@pytest.fixture
def recipe(start_hub: Callable[..., LocalHub], tmp_path: Path) -> Path:
    town: Town = support.open_town(start_hub)
    for seed, name in enumerate(("base", "a", "b")):
        town.publish(f"local/{name}", save(tmp_path / name, tensors(seed, SHAPES)))
    path = tmp_path / "merge.yaml"
    path.write_text("method: ties\nbase: local/base\nmodels: [local/a, local/b]\noutput: {shard_size: 80KB}\n")
    return path


def named(text: str, before: str) -> str:
    """The size that stands after some words, as an option takes it."""
    found = re.search(before + r" ([0-9.]+ [kMG]?B)", text)
    assert found, text
    return found[1].replace(" ", "")


def pushed(recipe: Path, *flags: str) -> dict[str, int]:
    done = support.hubmerge("push", recipe, "--to", TARGET, "--json", *flags)
    assert done.code == 0, done.text
    answer: dict[str, int] = json.loads(done.out)
    return answer


@pytest.mark.parametrize("command", [["plan"], ["push", "--to", TARGET]], ids=["plan", "push"])
def test_memory_that_is_too_little_is_refused_with_what_would_do(command: list[str], recipe: Path) -> None:
    refused = support.hubmerge(*command, recipe, "--max-memory", "100MB")
    assert refused.code == 1, refused.text
    assert "100 MB are allowed" in refused.err
    enough = named(refused.err, "raise --max-memory to")
    assert support.hubmerge(*command, recipe, "--max-memory", enough).code == 0


def test_a_shard_that_is_too_large_is_refused_with_one_that_is_not(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("80KB", "1GB"))
    planned = support.hubmerge("plan", recipe, "--max-disk", "100KB", "--fetch", "stream")
    assert planned.code == 0
    assert "a push needs 320 kB of disk at a time: more than 100 kB" in planned.err
    refused = support.hubmerge("push", recipe, "--to", TARGET, "--max-disk", "100KB", "--fetch", "stream")
    assert refused.code == 1, refused.text
    assert "320 kB are needed at a time, 100 kB may be used" in refused.err
    fitting = named(refused.err, r"\(--shard-size\) to at most")
    recipe.write_text(recipe.read_text().replace("1GB", fitting))
    answer = pushed(recipe, "--max-disk", "100KB", "--fetch", "stream")
    assert 80_000 < answer["peak_disk_bytes"] <= 100_000


@pytest.mark.parametrize("command", [["plan"], ["push", "--to", TARGET]], ids=["plan", "push"])
def test_downloads_that_are_too_large_together_are_refused(command: list[str], recipe: Path) -> None:
    """Each of the three models would fit."""
    given = 700_000
    refused = support.hubmerge(*command, recipe, "--fetch", "cache", "--max-disk", "700KB")
    assert refused.code == 1, refused.text
    assert "local/a, local/b, local/base: 961 kB to download" in refused.err
    more = float(named(refused.err, "raise --max-disk, by").removesuffix("kB"))
    enough = f"{given / 1000 + more}kB"
    for works in (("--fetch", "stream", "--max-disk", "700KB"), ("--fetch", "cache", "--max-disk", enough)):
        assert support.hubmerge(*command, recipe, *works).code == 0


def test_what_was_used_is_reported_and_within_the_budget(recipe: Path, tmp_path: Path) -> None:
    streamed = pushed(recipe, "--fetch", "stream")
    assert 80_000 < streamed["peak_disk_bytes"] <= SHARD_BYTES
    assert streamed["peak_rss_bytes"] > 100_000_000
    again = pushed(recipe, "--fetch", "cache", "--no-resume", "--overwrite", "--max-disk", "1.1MB")
    files = sum((tmp_path / name / "model.safetensors").stat().st_size for name in ("base", "a", "b"))
    assert files + 80_000 < again["peak_disk_bytes"] <= files + SHARD_BYTES <= 1_100_000
    merged = support.hubmerge("merge", recipe, "--out", tmp_path / "out")
    assert re.search(r"with at most [0-9.]+ [MG]B of memory and 0 B of disk at a time", merged.out), merged.text


def test_auto_downloads_what_the_budget_takes_and_streams_the_rest(recipe: Path) -> None:
    answer = pushed(recipe, "--fetch", "auto", "--max-disk", "500KB")
    assert answer["peak_disk_bytes"] <= 500_000
