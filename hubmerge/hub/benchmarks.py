"""The Hub's benchmarks: datasets whose leaderboards it fills from the results that models' repositories hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubmerge.errors import AccessError, SourceError, TransportError, UsageError
from hubmerge.hub.writing import Hub

_TAG = "benchmark:official"
_FILE = "eval.yaml"
_MAX_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class BenchmarkTask:
    """What a benchmark's leaderboard ranks."""

    id: str
    config: str | None
    split: str | None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A dataset that the Hub lists as a benchmark."""

    repo: str
    """As the Hub names it now; older names lead there, too."""
    tasks: tuple[BenchmarkTask, ...]


def benchmark(hub: Hub, dataset: str) -> Benchmark | None:
    """What the Hub says of a dataset; None if it is no benchmark, or not accessible, or says nothing of its tasks.

    Raises:
        TransportError: The Hub could not be reached.
    """
    what = f"look up the dataset {dataset}"
    try:
        info = hub.call(what, dataset, lambda: hub.api.dataset_info(dataset, timeout=hub.policy.read_timeout_s))
        if _TAG not in (info.tags or []) or not info.sha:
            return None
        path = hub.call(what, info.id, lambda: _fetched(hub, info.id, str(info.sha)))
    except TransportError:
        raise
    except (AccessError, SourceError, UsageError):
        return None
    return Benchmark(info.id, _tasks(path))


def _fetched(hub: Hub, repo: str, commit: str) -> Path:
    found = hub.api.hf_hub_download(repo, _FILE, repo_type="dataset", revision=commit, cache_dir=hub.cache_dir)
    return Path(found)


def _tasks(path: Path) -> tuple[BenchmarkTask, ...]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if path.stat().st_size > _MAX_BYTES:
        return ()
    try:
        data = YAML(typ="safe", pure=True).load(path.read_bytes())
    except (YAMLError, ValueError, RecursionError):
        return ()
    listed = data.get("tasks") if isinstance(data, dict) else None
    return tuple(
        BenchmarkTask(task["id"], _text(task, "config"), _text(task, "split"))
        for task in (listed if isinstance(listed, list) else [])
        if isinstance(task, dict) and isinstance(task.get("id"), str)
    )


def _text(task: Mapping[str, Any], key: str) -> str | None:
    value = task.get(key)
    return value if isinstance(value, str) else None
