"""Results of lighteval: ``results_*.json`` as its ``--output-dir`` has them, with or without names of suites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hubmerge.evaluation.scores import (
    Dataset,
    Evaluation,
    Score,
    Task,
    count,
    digest,
    grouping,
    mapping,
    name_of,
    score_of,
    text,
)

PROGRAM = "lighteval"
_OVERALL = "all"
_AVERAGE = ":_average"


def parse(data: Mapping[str, Any], label: str) -> Evaluation:
    """A file's content.

    Raises:
        UsageError: A metric's value is no number.
    """
    general = mapping(data.get("config_general"))
    model = mapping(general.get("model_config"))
    names = (text(general.get("model_name")), text(model.get("model_name")))
    sha = text(general.get("lighteval_sha"))
    results = mapping(data.get("results"))
    # The average over everything says nothing of any task.
    keys = [key for key in results if key != _OVERALL]
    return Evaluation(
        label=label,
        program=PROGRAM,
        version=None if sha == "?" else sha and sha[:12],
        models=tuple(dict.fromkeys(n for n in names if n)),
        commit=text(general.get("model_sha")),
        scores=tuple(s for key in keys for s in _scores(data, key, mapping(results[key]), label)),
    )


def _scores(data: Mapping[str, Any], key: str, entry: Mapping[str, Any], label: str) -> Iterator[Score]:
    task = _task(data, key)
    directions = _directions(_config(data, key))
    for metric, value in entry.items():
        if metric.endswith("_stderr") and metric.removesuffix("_stderr") in entry:
            continue
        # Of an average, it is the mean of the parts' errors, which is not its error.
        stderr = None if task.parts else entry.get(f"{metric}_stderr")
        yield score_of(label, PROGRAM, task, name_of(metric), value, stderr, directions.get(metric))


def _split(key: str) -> tuple[str, int | None]:
    """A task's name and its number of few-shot examples, from ``suite|task|5`` or ``task|5``."""
    name, bar, shots = key.rpartition("|")
    return (name, int(shots)) if bar and shots.isascii() and shots.isdigit() and len(shots) < 5 else (key, None)


def _config(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    tasks = mapping(data.get("config_tasks"))
    return mapping(tasks.get(key)) or mapping(tasks.get(_split(key)[0]))


def _directions(config: Mapping[str, Any]) -> dict[str, Any]:
    """By metric; one that computes several values has a direction for each."""
    found: dict[str, Any] = {}
    metrics = config.get("metrics", config.get("metric"))
    for metric in metrics if isinstance(metrics, list) else []:
        name, higher = mapping(metric).get("metric_name"), mapping(metric).get("higher_is_better")
        if isinstance(higher, dict):
            found |= higher
        for one in name if isinstance(name, list) else [name]:
            if isinstance(one, str) and isinstance(higher, bool):
                found[one] = higher
    return found


def _task(data: Mapping[str, Any], key: str) -> Task:
    name, shots = _split(key)
    general, config = mapping(data.get("config_general")), _config(data, key)
    shots = shots if shots is not None else count(config.get("num_fewshots"))
    most = count(general.get("max_samples"))
    parts = _parts(data, key)
    asked, original = count(config.get("effective_num_docs")), count(config.get("original_num_docs"))
    limit = f"at most {most} samples" if most is not None else None
    if asked and original and most is not None:
        limit = f"{asked} of {original} samples" if asked < original else None
    settings = {
        "few-shot examples": "not stated" if shots is None else str(shots),
        "task version": _version(data, parts or (key,)),
        "limit": limit or "none",
        **({"samples": str(asked)} if asked else {}),
        **grouping(parts),
        **_prompting(general),
    }
    return Task(name_of(name), settings, shots, limit, _dataset(config), tuple(name_of(_split(p)[0]) for p in parts))


def _prompting(general: Mapping[str, Any]) -> dict[str, str]:
    """What else is put to the model, and how it answers."""
    model = mapping(general.get("model_config"))
    generation = mapping(model.get("generation_parameters")) or mapping(general.get("generation_parameters"))
    chosen = {k: v for k, v in generation.items() if v is not None}
    instruction = model.get("system_prompt")
    return {
        "system instruction": digest(instruction) if instruction else "none",
        "generation arguments": digest(chosen) if chosen else "none",
    }


def _version(data: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    stated = mapping(data.get("versions"))
    found = {key: stated.get(key, _config(data, key).get("version")) for key in keys}
    versions = dict.fromkeys("not stated" if v is None else str(text(str(v))) for v in found.values())
    return ", ".join(versions)


def _parts(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The keys of the tasks that an average is of; empty for a task."""
    name, shots = _split(key)
    if not name.endswith(_AVERAGE):
        return ()
    start = name.removesuffix(_AVERAGE) + ":"
    others = {other: _split(other) for other in mapping(data.get("results")) if other != key}
    return tuple(other for other, (n, s) in others.items() if n.startswith(start) and s == shots)


def _dataset(config: Mapping[str, Any]) -> Dataset | None:
    repo = text(config.get("hf_repo"))
    if repo is None:
        return None
    splits = config.get("evaluation_splits")
    split = text(splits[0]) if isinstance(splits, list) and len(splits) == 1 else None
    subset = text(config.get("hf_subset"))
    return Dataset(repo, subset, split, whole=split is not None and not config.get("hf_filter"))
