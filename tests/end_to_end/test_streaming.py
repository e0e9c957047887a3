"""A push that streams: no input ever lies on the disk, one output shard does at most, memory stays within the plan."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hubmerge.localhub import LocalHub
from tests.end_to_end import support
from tests.end_to_end.support import Town, save, tensors
from tests.end_to_end.watching import Watch, run_watched

TARGET = "local/merged"
MB = 1_000_000
SMALL_FILES_BYTES = 1 * MB
SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (1000, 500) for i in range(12)}
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A fresh HF_HOME and TMPDIR for the command alone."""
    folders = tmp_path / "home", tmp_path / "tmp"
    for folder in folders:
        folder.mkdir()
    monkeypatch.setenv("HF_HOME", str(folders[0]))
    monkeypatch.setenv("TMPDIR", str(folders[1]))
    return folders


@pytest.fixture
def town(start_hub: Callable[..., LocalHub], tmp_path: Path) -> Town:
    return support.open_town(start_hub)


def recipe(tmp_path: Path, names: list[str], shard_size: str, method: str = "task_arithmetic") -> Path:
    path = tmp_path / "merge.yaml"
    models = [f"local/{name}" for name in names[1:]]
    data = {"method": method, "base": f"local/{names[0]}", "models": models, "output": {"shard_size": shard_size}}
    path.write_text(json.dumps(data))
    return path


def push(town: Town, path: Path, home: tuple[Path, Path], *flags: str, timeout_s: float = 240) -> Watch:
    command = [sys.executable, "-m", "hubmerge", "push", str(path), "--to", TARGET, "--fetch", "stream", *flags]
    code, output, watch = run_watched(command, home, timeout_s)
    assert code == 0, output
    assert town.state(TARGET) is not None
    return watch


def assert_one_shard_at_a_time(watch: Watch, town: Town) -> None:
    weights = {
        f.path: f.size for f in town.api.list_repo_tree(TARGET, recursive=True) if f.path.endswith(".safetensors")
    }
    # Only what was looked at often enough was looked at.
    assert watch.seen(".safetensors") == set(weights)
    largest = max(weights.values())
    for sample in watch.samples:
        shards = [path for path, _ in sample.files if path.endswith(".safetensors")]
        assert len(shards) <= 1, sample
        assert sample.size_bytes <= largest + SMALL_FILES_BYTES, sample


@pytest.mark.parametrize(
    ("method", "passes"), [("task_arithmetic", 1), pytest.param("ties", 6, marks=pytest.mark.slow)]
)
def test_no_input_touches_the_disk(
    method: str, passes: int, town: Town, home: tuple[Path, Path], tmp_path: Path
) -> None:
    names = ["base", "a", "b"]
    for seed, name in enumerate(names):
        town.publish(f"local/{name}", save(tmp_path / "in" / name, tensors(seed, SHAPES), shards=4))
    town.hub.requests.clear()
    town.hub.limits.read_bytes_s = 60 * MB  # long enough to be watched
    town.hub.limits.write_bytes_s = 40 * MB
    watch = push(town, recipe(tmp_path, names, "6MB", method), home)
    town.hub.limits.read_bytes_s = town.hub.limits.write_bytes_s = None

    assert_one_shard_at_a_time(watch, town)
    assert len(watch.samples) > 50
    # Each byte of the inputs comes once for each time the method looks at it at most, plus the headers.
    sizes = 3 * sum(4 * rows * columns for rows, columns in SHAPES.values())
    fetched = sum(r.response_bytes for r in town.hub.requests.find("GET", "^/_cdn/"))
    assert sizes <= fetched <= passes * sizes + 12 * 300_000
    assert support.hubmerge("verify", TARGET).code == 0


def make_models(shape: str, folder: Path) -> list[str]:
    """A Llama-shaped base and three fine-tunes in bfloat16 shards, made by the benchmarks' own maker."""
    make = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from models import *; "
        "make(eval(sys.argv[2]), Path(sys.argv[3]))"
    )
    subprocess.run([sys.executable, "-c", make, BENCHMARKS, shape, folder], check=True)
    return ["base", "ft-a", "ft-b", "ft-c"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("method", "limit_mb"), [("task_arithmetic", 500), ("ties", 800)])
def test_a_model_of_a_billion_parameters(
    method: str, limit_mb: int, town: Town, home: tuple[Path, Path], tmp_path: Path
) -> None:
    """8.8 GB in, 2.2 GB out, through a process that holds no more than a merge of local files may."""
    names = make_models("SHAPES['1b']", tmp_path / "in")
    for name in names:
        town.publish(f"local/{name}", tmp_path / "in" / name)
        shutil.rmtree(tmp_path / "in" / name)
    watch = push(town, recipe(tmp_path, names, "500MB", method), home, timeout_s=900)
    assert_one_shard_at_a_time(watch, town)
    assert watch.peak_rss_bytes <= limit_mb * MB, f"{watch.peak_rss_bytes / MB:.0f} MB"
    print(f"{method}: peak {watch.peak_rss_bytes / MB:.0f} MB, {len(watch.samples)} looks at the disk")


@pytest.mark.slow
def test_memory_stays_within_the_plan(town: Town, home: tuple[Path, Path], tmp_path: Path) -> None:
    """Four models of 400 MB, streamed through a process that may have 600 MB."""
    names = make_models("Shape(1024, 2816, 12, 16, 4, 32000, 100_000_000)", tmp_path / "in")
    for name in names:
        town.publish(f"local/{name}", tmp_path / "in" / name)
    path = recipe(tmp_path, names, "100MB", "ties")
    planned = support.hubmerge("plan", path, "--json", "--max-memory", "600MB", "--fetch", "stream")
    assert planned.code == 0, planned.text
    promised = json.loads(planned.out)["memory_bytes"]
    assert promised <= 600 * MB
    watch = push(town, path, home, "--max-memory", "600MB", timeout_s=280)
    assert_one_shard_at_a_time(watch, town)
    assert watch.peak_rss_bytes <= promised, f"{watch.peak_rss_bytes / MB:.0f} MB of {promised / MB:.0f} MB"
