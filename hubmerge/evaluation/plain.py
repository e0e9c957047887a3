"""Results of any other program, in a format of hubmerge's own: a list of scores."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hubmerge.errors import UsageError
from hubmerge.evaluation.scores import Dataset, Evaluation, Score, Task, count, mapping, score_of, text

_FEW_SHOT = "few-shot examples"
_KIND = re.compile(r"[a-z0-9]+(-[a-z0-9]+){0,7}", re.ASCII)


def parse(data: Mapping[str, Any], label: str) -> Evaluation:
    """A file's content: ``program``, ``model`` and ``results``, and what else is known.

    Raises:
        UsageError: An entry has no task or no metric, or its value is no number.
    """
    program, model = text(data.get("program")) or "?", text(data.get("model"))
    return Evaluation(
        label=label,
        program=program,
        version=text(data.get("version")),
        models=() if model is None else (model,),
        commit=text(data.get("commit")),
        scores=tuple(_score(mapping(entry), i, program, label) for i, entry in enumerate(data["results"])),
        date=text(data.get("date")),
    )


def _score(entry: Mapping[str, Any], number: int, program: str, label: str) -> Score:
    name, metric = text(entry.get("task")), text(entry.get("metric"))
    if name is None or metric is None:
        raise UsageError(
            f"{label}: entry {number} of results lacks {'task' if name is None else 'metric'}",
            hint="each is an object with task, metric and value (docs/evaluation.md)",
        )
    shots = count(entry.get("few_shot"))
    settings = {text(str(k)) or "?": text(str(v)) or "?" for k, v in mapping(entry.get("settings")).items()}
    if shots is not None:
        settings[_FEW_SHOT] = str(shots)
    repo = text(entry.get("dataset"))
    dataset = None if repo is None else Dataset(repo, text(entry.get("config")), text(entry.get("split")), whole=False)
    task = Task(name, settings, shots, text(entry.get("limit")), dataset, kind=_kind(entry.get("task_type")))
    return score_of(
        label, program, task, metric, entry.get("value"), entry.get("stderr"), entry.get("higher_is_better")
    )


def _kind(value: object) -> str | None:
    return value if isinstance(value, str) and _KIND.fullmatch(value) else None
