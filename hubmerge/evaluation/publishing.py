"""A merged model's own results as the Hub reads them: ``model-index``, and ``.eval_results`` for its benchmarks.

Only what the merged model itself reached, over whole tasks; a parent's results are never among them.

Sources: the Hub's model card specification (``modelcard.md``) and its documentation of evaluation results.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from hubmerge.evaluation.comparison import Comparison
from hubmerge.evaluation.scores import Evaluation, Score

if TYPE_CHECKING:
    from hubmerge.hub.benchmarks import Benchmark

RESULTS_FOLDER = ".eval_results"
_REPO = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}(/[\w.-]{1,96})?", re.ASCII)
_DEFAULT = "default"


def model_index(found: Comparison, name: str, task_type: str | None) -> list[dict[str, Any]]:
    """The value of ``model-index``; empty without results.

    Args:
        found: What was evaluated.
        name: The model's.
        task_type: The model's ``pipeline_tag``, if that is known.
    """
    results = [_entry(scores, task_type) for scores in _own(found)]
    return [{"name": name, "results": results}] if results else []


def _own(found: Comparison) -> list[list[Score]]:
    """What the merged model has in the table, by task; nothing of tasks of which only a part was asked."""
    tasks: dict[tuple[Any, ...], list[Score]] = {}
    for score in (row.merged for row in found.rows if row.merged is not None):
        if score.task.limit is None:
            settings = tuple(score.task.settings.items())
            tasks.setdefault((score.program, score.task.name, settings), []).append(score)
    return list(tasks.values())


def _entry(scores: list[Score], task_type: str | None) -> dict[str, Any]:
    task = scores[0].task
    shots = f" ({task.few_shot}-shot)" if task.few_shot is not None else ""
    dataset: dict[str, Any] = {"name": task.name, "type": task.name}
    given = task.dataset
    if given is not None and _REPO.fullmatch(given.repo):
        dataset |= {"type": given.repo, "config": given.config, "split": given.split}
    if task.few_shot is not None:
        dataset["args"] = {"num_few_shot": task.few_shot}
    metrics = [{"type": s.metric, "value": s.value, "name": s.measure} for s in scores]
    return {
        "task": {"type": task_type or task.kind or "other", "name": task.name + shots},
        "dataset": {k: v for k, v in dataset.items() if v is not None},
        "metrics": metrics,
    }


def result_files(found: Comparison, benchmark: Callable[[str], Benchmark | None]) -> dict[str, bytes]:
    """Files for the leaderboards of benchmarks, a file for each dataset; most results are of none.

    A result is of a benchmark if the Hub lists its dataset as one, the task asks the whole of exactly one of the
    benchmark's tasks, and there is one metric, for the format has no word for which one it is.

    Args:
        found: What was evaluated.
        benchmark: What the Hub says of a dataset; None for one that is no benchmark.
    """
    files: dict[str, list[dict[str, Any]]] = {}
    known: dict[str, Benchmark | None] = {}
    for scores, evaluation in _whole_splits(found):
        dataset = scores[0].task.dataset
        assert dataset is not None
        if dataset.repo not in known:
            known[dataset.repo] = benchmark(dataset.repo)
        listed = known[dataset.repo]
        if listed is None:
            continue
        tasks = [t for t in listed.tasks if _same(t.config, dataset.config) and t.split == dataset.split]
        if len(tasks) != 1:
            continue
        entries = (_result(s, evaluation, listed.repo, tasks[0].id) for s in scores)
        files.setdefault(f"{RESULTS_FOLDER}/{listed.repo.replace('/', '--')}.yaml", []).extend(entries)
    return {path: _dumped(entries) for path, entries in files.items()}


def _whole_splits(found: Comparison) -> Iterable[tuple[list[Score], Evaluation]]:
    """The scores of each task that alone asks the whole of a dataset's split, if they are of one metric."""
    own = _own(found)
    asked = [scores[0].task.dataset for scores in own]
    times = Counter((d.repo, d.config, d.split) for d in asked if d is not None)
    for dataset, scores in zip(asked, own, strict=True):
        if dataset is None or not dataset.whole or not _REPO.fullmatch(dataset.repo):
            continue
        if times[dataset.repo, dataset.config, dataset.split] == 1 and len({s.metric for s in scores}) == 1:
            yield scores, next(e for e in found.merged if any(s is scores[0] for s in e.scores))


def _same(a: str | None, b: str | None) -> bool:
    return (a or _DEFAULT) == (b or _DEFAULT)


def _result(score: Score, evaluation: Evaluation, repo: str, task_id: str) -> dict[str, Any]:
    shots = f"{score.task.few_shot}-shot, " if score.task.few_shot is not None else ""
    data: dict[str, Any] = {"dataset": {"id": repo, "task_id": task_id}, "value": score.value}
    if evaluation.date is not None:
        data["date"] = evaluation.date
    return data | {"notes": f"{shots}{score.measure}, {evaluation.made_with}"}


def _dumped(entries: list[dict[str, Any]]) -> bytes:
    from ruamel.yaml import YAML
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    def styled(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: styled(v) for k, v in value.items()}
        return DoubleQuotedScalarString(value) if isinstance(value, str) else value

    yaml = YAML(typ="rt", pure=True)
    yaml.width = 2**16
    out = io.BytesIO()
    yaml.dump([styled(e) for e in entries], out)
    return out.getvalue()
