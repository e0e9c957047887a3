"""Results of lm-evaluation-harness: ``results_*.json`` as its ``--output_path`` leaves them, of 0.3 and later."""

from __future__ import annotations

import datetime as dt
import json
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
    number,
    score_of,
    text,
)

PROGRAM = "lm-evaluation-harness"
_NO_METRICS = frozenset({"alias", "name", "samples", "sample_len", "sample_count", "bypass"})


def parse(data: Mapping[str, Any], label: str) -> Evaluation:
    """A file's content.

    Raises:
        UsageError: A metric's value is no number.
    """
    config = mapping(data.get("config"))
    arguments = _arguments(config.get("model_args"))
    # An adapter is evaluated on its base, which the arguments name, too.
    key = next((k for k in ("peft", "delta", "pretrained", "model", "path") if text(arguments.get(k))), None)
    named = (arguments.get(key) if key else None, data.get("model_name"), config.get("model_name"))
    sanitized = data.get("model_name_sanitized")
    names = (text(n) for n in (next((n for n in named if text(n)), None), sanitized))
    commit = config.get(f"{key}_sha") if key in ("peft", "delta") else config.get("model_sha")
    results = mapping(data.get("results"))
    scores = [s for name in results for s in _scores(data, name, mapping(results[name]), label)]
    return Evaluation(
        label=label,
        program=PROGRAM,
        version=text(data.get("lm_eval_version")) or text(data.get("git_hash")),
        models=tuple(dict.fromkeys(n for n in names if n)),
        commit=text(commit),
        scores=tuple(scores),
        date=_day(data.get("date")),
    )


def _arguments(given: object) -> Mapping[str, Any]:
    """``--model_args``: an object, its JSON, or ``key=value,key=value``."""
    if not isinstance(given, str):
        return mapping(given)
    if given.lstrip().startswith("{"):
        try:
            return mapping(json.loads(given))
        except (ValueError, RecursionError):
            return {}
    return dict(part.strip().split("=", 1) for part in given.split(",") if "=" in part)


def _day(seconds: object) -> str | None:
    found = number(seconds)
    if found is None or not 0 < found < 1e11:
        return None
    return dt.datetime.fromtimestamp(found, dt.UTC).date().isoformat()


# --- tasks --------------------------------------------------------------------------------------------------------


def _scores(data: Mapping[str, Any], name: str, entry: Mapping[str, Any], label: str) -> Iterator[Score]:
    task = _task(data, name, entry)
    with_filters = any("," in key for key in entry)
    directions = mapping(mapping(data.get("higher_is_better")).get(name)) or _listed(data, name)
    for key, value in entry.items():
        metric, comma, answers = key.partition(",")
        if not metric.strip() or metric in _NO_METRICS or bool(comma) != with_filters or metric.endswith("_stderr"):
            continue
        if not comma and not isinstance(value, int | float):
            continue
        stderr = entry.get(f"{metric}_stderr{comma}{answers}")
        shown = None if answers in ("", "none") else text(answers)
        yield score_of(label, PROGRAM, task, name_of(metric), value, stderr, directions.get(metric), shown)


def _listed(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Directions as the task's own configuration has them."""
    metrics = mapping(mapping(data.get("configs")).get(name)).get("metric_list")
    found = [mapping(m) for m in metrics] if isinstance(metrics, list) else []
    return {m["metric"]: m.get("higher_is_better") for m in found if isinstance(m.get("metric"), str)}


def _task(data: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> Task:
    parts = _leaves(data, name)
    members = parts or (name,)
    config = mapping(data.get("config"))
    shots = _few_shot(data, name, members)
    asked, original = _samples(data, members, entry)
    limit = _limit(config.get("limit"), asked, original)
    version = mapping(data.get("versions")).get(name)
    settings = {
        "few-shot examples": "not stated" if shots is None else str(shots),
        "task version": "not stated" if version is None else str(text(str(version))),
        "limit": limit or "none",
        **({"samples": str(asked)} if asked is not None else {}),
        **grouping(parts),
        **_prompting(data, config),
    }
    return Task(name_of(name), settings, shots, limit, _dataset(data, members), tuple(map(name_of, parts)))


def _leaves(data: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The tasks of a group, also of groups in groups; empty for a task."""
    groups = mapping(data.get("group_subtasks"))
    found: dict[str, None] = {}
    seen, pending = {name}, [name]
    while pending:
        below = groups.get(pending.pop(0))
        for part in below if isinstance(below, list) else []:
            if isinstance(part, str) and part not in seen:
                seen.add(part)
                pending.append(part)
                found[part] = None
    return tuple(p for p in found if not groups.get(p))


def _few_shot(data: Mapping[str, Any], name: str, members: tuple[str, ...]) -> int | None:
    stated = mapping(data.get("n-shot"))
    own = {count(stated.get(m)) for m in members} if name not in stated else {count(stated[name])}
    if len(own) == 1 and None not in own:
        return own.pop()
    return count(mapping(data.get("config")).get("num_fewshot")) if not stated else None


def _samples(
    data: Mapping[str, Any], members: tuple[str, ...], entry: Mapping[str, Any]
) -> tuple[int | None, int | None]:
    """How many questions were asked, and how many there are."""
    stated = mapping(data.get("n-samples"))
    asked, original = ([count(mapping(stated.get(m)).get(k)) for m in members] for k in ("effective", "original"))
    if None not in asked and None not in original:
        return sum(n for n in asked if n is not None), sum(n for n in original if n is not None)
    return count(entry.get("sample_len", entry.get("samples"))), None


def _limit(given: object, asked: int | None, original: int | None) -> str | None:
    if asked is not None and original is not None:
        return f"{asked} of {original} samples" if asked < original else None
    found = number(given)
    if not found:
        return None
    return f"{found:.3g} of the samples" if found < 1 else f"{found:g} samples"


def _prompting(data: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """What else is put to the model, and how it answers."""
    generation = config.get("gen_kwargs")
    instruction = data.get("system_instruction")
    return {
        "chat template": "applied" if data.get("chat_template") else "none",
        "few-shot examples as turns": "yes" if data.get("fewshot_as_multiturn") else "no",
        "system instruction": digest(instruction) if isinstance(instruction, str) and instruction else "none",
        "generation arguments": digest(generation) if generation else "none",
    }


def _dataset(data: Mapping[str, Any], members: tuple[str, ...]) -> Dataset | None:
    """Where a task's questions come from; of a group, what all its tasks have in common."""
    configs = [mapping(mapping(data.get("configs")).get(m)) for m in members]
    repos = {text(c.get("dataset_path")) for c in configs}
    repo = repos.pop() if len(repos) == 1 else None
    if repo is None:
        return None
    if len(configs) > 1:
        return Dataset(repo, None, None, whole=False)
    config = configs[0]
    split = text(config.get("test_split")) or text(config.get("validation_split"))
    # Such a function may choose among the questions, as those of MMLU-Pro's tasks do; the file does not tell.
    whole = not config.get("process_docs") and not config.get("dataset_kwargs")
    return Dataset(repo, text(config.get("dataset_name")), split, whole)
