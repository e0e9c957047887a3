"""What an evaluation says, whichever program wrote it: scores of tasks, and how each was run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hubmerge.errors import UsageError
from hubmerge.markdown import one_line

MAX_NAME_CHARS = 200
# Of metrics of which a file does not tell it.
_LOWER_TEXT = """
perplexity word_perplexity byte_perplexity bits_per_byte ppl nll loss brier_score ece wer cer ter mae mse rmse
"""
_HIGHER_TEXT = """
acc acc_norm acc_norm_nospace acc_bytes acc_mutual_info acc_all accuracy em qem pem pqem exact_match extractive_match
f1 macro_f1 mcc mc1 mc2 truthfulqa_mc1 truthfulqa_mc2 bleu chrf rouge1 rouge2 rougeL rougeLsum pass@1
prompt_level_strict_acc prompt_level_loose_acc inst_level_strict_acc inst_level_loose_acc
"""
_LOWER, _HIGHER = frozenset(_LOWER_TEXT.split()), frozenset(_HIGHER_TEXT.split())


@dataclass(frozen=True, slots=True)
class Dataset:
    """What a task's questions come from."""

    repo: str
    """Its name on the Hub."""
    config: str | None
    split: str | None
    whole: bool
    """Whether the task asks all of that split, as far as the file tells."""


@dataclass(frozen=True, slots=True)
class Task:
    """A task and how it was run."""

    name: str
    settings: Mapping[str, str]
    """By name; values of two evaluations are compared only where these agree."""
    few_shot: int | None = None
    limit: str | None = None
    """How much of the task was asked, in words; None if it was all of it."""
    dataset: Dataset | None = None
    parts: tuple[str, ...] = ()
    """The tasks that it sums up."""
    kind: str | None = "text-generation"
    """What the Hub calls its kind; None if the file of another program than those of language models does not tell."""


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task."""

    program: str
    task: Task
    metric: str
    filter: str | None
    """How answers were taken from what the model wrote, if that has a name."""
    value: float
    stderr: float | None
    higher_is_better: bool | None

    @property
    def key(self) -> tuple[str, str, str, str | None]:
        """What it measures, however the task was run."""
        return (self.program, self.task.name, self.metric, self.filter)

    @property
    def measure(self) -> str:
        """Metric and filter, as people write them."""
        return f"{self.metric} ({self.filter})" if self.filter else self.metric


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One file of results."""

    label: str
    """How messages call the file."""
    program: str
    version: str | None
    """The program's."""
    models: tuple[str, ...]
    """What the file calls the model, the surest name first."""
    commit: str | None
    """The commit of the model that was evaluated, where the file has one."""
    scores: tuple[Score, ...]
    date: str | None = None
    """The day of the evaluation, ISO 8601."""

    @property
    def made_with(self) -> str:
        """The program and its version."""
        return f"{self.program} {self.version}" if self.version else self.program


def score_of(
    label: str, program: str, task: Task, metric: str, found: Any, stderr: Any, higher: Any, answers: str | None = None
) -> Score:
    """A score from what a file has in its place.

    Raises:
        UsageError: It is no number.
    """
    value = number(found)
    if value is None:
        raise UsageError(
            f"{label}: task {task.name!r}, metric {metric!r}: {str(found)[:40]!r} is no number",
            hint="evaluate that task again, or take it out of the file's results",
        )
    if not isinstance(higher, bool):
        plain = metric.partition(":")[0]  # lighteval adds parameters, as in "pass@1:16_samples"
        higher = True if plain in _HIGHER else False if plain in _LOWER else None
    error = number(stderr)
    return Score(program, task, metric, answers, value, error if error is not None and error >= 0 else None, higher)


# --- values that strangers wrote ----------------------------------------------------------------------------------


def text(value: object) -> str | None:
    """A string on one line, without what cannot be seen; None for anything else, and for nothing."""
    return one_line(value)[:MAX_NAME_CHARS] or None if isinstance(value, str) else None


def name_of(key: str) -> str:
    """A name that is a key of a JSON object, as ``text`` makes it."""
    return text(key) or "?"


def number(value: object) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def count(value: object) -> int | None:
    """A number of things; None for anything else."""
    found = number(value)
    return int(found) if found is not None and found >= 0 and found == int(found) else None


def mapping(value: object) -> Mapping[str, Any]:
    """A JSON object; empty for anything else."""
    return value if isinstance(value, dict) else {}


def grouping(parts: Sequence[str]) -> dict[str, str]:
    """The setting that says of which tasks a group is; none for a single task."""
    return {"parts": f"{len(parts)} tasks ({digest(sorted(parts))})"} if parts else {}


def digest(value: object) -> str:
    """Stands for something long where only its being the same matters."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
