"""Reading, merging, writing and uploading at once: the slowest one sets the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hubmerge.localhub import LocalHub
from tests.end_to_end import support
from tests.end_to_end.support import Town, save, tensors

TARGET = "local/merged"
PER_SHARD, WORKERS = 20, 2
SHARD_BYTES = PER_SHARD * 10_000


def town_with(shards: int, start_hub: Callable[..., LocalHub], tmp_path: Path) -> Town:
    """A Hub with a base and a fine-tune of it."""
    shapes = {f"model.layers.{i:03d}.mlp.up_proj.weight": (50, 50) for i in range(shards * PER_SHARD)}
    made = support.open_town(start_hub)
    for seed, name in enumerate(("base", "a")):
        made.publish(f"local/{name}", save(tmp_path / name, tensors(seed, shapes)))
    made.hub.requests.clear()
    return made


def push(tmp_path: Path, *flags: str) -> None:
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(
        f"method: task_arithmetic\nbase: local/base\nmodels: [local/a]\noutput: {{shard_size: {SHARD_BYTES}B}}\n"
    )
    done = support.hubmerge(
        "push", recipe, "--to", TARGET, "--fetch", "stream", "--workers", WORKERS, "--overwrite", *flags
    )
    assert done.code == 0, done.text


def read_while_uploading(town: Town) -> list[int]:
    """How many reads began during the upload of each shard, but for the last one, which has nothing beside it."""
    counts: list[int] = []
    for record in town.hub.requests:
        if record.method == "PUT" and "/_lfs/" in record.path:
            counts.append(0)
            uploading = True
        elif record.path.endswith("/lfs/verify"):
            uploading = False
        elif counts and uploading and record.method == "GET" and "/_cdn/" in record.path:
            counts[-1] += 1
    return counts[:-1]


def test_the_next_shard_is_made_while_one_is_uploaded(start_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    """With room for two. With room for one, each worker that waits for it has read what it will write first."""
    town = town_with(3, start_hub, tmp_path)
    town.hub.limits.write_bytes_s = 2 * SHARD_BYTES
    push(tmp_path, "--max-disk", f"{int(2.1 * SHARD_BYTES)}B")
    counts = read_while_uploading(town)
    assert len(counts) == 2
    assert min(counts) > 2 * WORKERS
    town.api.delete_repo(TARGET)
    town.hub.requests.clear()
    push(tmp_path)
    assert max(read_while_uploading(town)) <= 2 * WORKERS


@pytest.mark.slow
def test_the_slower_of_reading_and_uploading_sets_the_time(start_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    shards, rate_bytes_s = 10, SHARD_BYTES / 1.5
    town = town_with(shards, start_hub, tmp_path)
    push(tmp_path)  # imports, and a repository to push to
    sizes = [r.response_bytes for r in town.hub.requests.find("GET", "^/_cdn/")]
    town.api.delete_repo(TARGET)
    town.hub.limits.read_bytes_s = town.hub.limits.write_bytes_s = rate_bytes_s
    reading_s, uploading_s = sum(sizes) / rate_bytes_s, shards * SHARD_BYTES / rate_bytes_s
    started = time.monotonic()
    push(tmp_path, "--max-disk", f"{int(2.1 * SHARD_BYTES)}B")
    took_s = time.monotonic() - started
    print(f"reading alone {reading_s:.1f} s, uploading alone {uploading_s:.1f} s, together {took_s:.1f} s")
    assert took_s <= 1.25 * max(reading_s, uploading_s)
