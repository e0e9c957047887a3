"""Owns the steps of the quality benchmark for one seed: train, merge, tune the scale, measure."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quality_geometry import Geometry, flat, measure_geometry
from quality_merge import Contender, contenders, merge
from quality_models import (
    KINDS,
    SCALES,
    Exam,
    State,
    Suite,
    difference,
    encoder_of,
    linear_weights,
    moved,
    train_suite,
)
from quality_tasks import TASKS, load_pictures
from transformers.utils import logging as transformers_logging

from examples.demo.train import make_deterministic

Scores = dict[str, float]
"""Task -> accuracy."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one contender reached on the test images."""

    default: Scores
    """At the method's defaults."""
    best: Scores
    """At the scale that was best on validation images; a method without a scale has but its defaults."""
    best_scale: float | None
    length: float
    """Length of the merged delta at the defaults, as a fraction of the mean task vector's."""


@dataclass(frozen=True, slots=True)
class Field:
    """All about one kind of fine-tunes of one seed."""

    ceiling: Scores
    """Every task's own fine-tune."""
    outcomes: Mapping[str, Outcome]
    """By the contender's label."""
    geometry: Geometry


@dataclass(frozen=True, slots=True)
class Study:
    """All that one seed has shown."""

    seed: int
    base: Scores
    """The base with the heads: what fine-tuning starts from."""
    fields: Mapping[str, Field]
    """By kind of fine-tunes."""
    wall_s: float
    cpu_s: float
    """Of the processor, on all cores together."""


def run_seed(seed: int, scale_name: str, folder: Path) -> Study:
    """Train and measure everything for one seed; the folder is for its models."""
    start_s, start_cpu_s = time.monotonic(), time.process_time()
    _quieten()
    make_deterministic()
    scale = SCALES[scale_name]
    pictures = load_pictures()
    suite = train_suite(pictures, scale, folder, seed)
    test = Exam.draw(pictures, "test", scale.test_images)
    validation = Exam.draw(pictures, "validation", scale.validation_images)
    fields = {kind: _measure(suite, kind, test, validation, scale.grid_step) for kind in KINDS}
    base = test.accuracies(suite.base, suite.heads)
    return Study(seed, base, fields, time.monotonic() - start_s, time.process_time() - start_cpu_s)


def _quieten() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("hubmerge").setLevel(logging.ERROR)
    # PEFT 0.21 asks transformers 5.23 for a property that is about to be renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def _measure(suite: Suite, kind: str, test: Exam, validation: Exam, grid_step: int) -> Field:
    deltas = suite.deltas[kind]
    goal = own_scores(suite, kind, validation)
    length = float(sum(flat(delta).norm() for delta in deltas)) / len(deltas)
    outcomes = {}
    for contender in contenders():
        merged = merge(contender, suite, kind)
        delta = difference(merged, suite.base)
        default = test.accuracies(merged, suite.heads)
        best_scale = tune(contender, delta, suite, validation, goal, grid_step)
        best = (
            default
            if best_scale is None
            else test.accuracies(at_scale(contender, delta, suite, best_scale), suite.heads)
        )
        outcomes[contender.label] = Outcome(default, best, best_scale, float(flat(delta).norm()) / length)
    geometry = measure_geometry(suite.base, deltas, linear_weights(encoder_of(suite.base)))
    return Field(own_scores(suite, kind, test), outcomes, geometry)


def own_scores(suite: Suite, kind: str, exam: Exam) -> Scores:
    """What every task's own fine-tune reaches."""
    tuned = zip(TASKS, suite.deltas[kind], strict=True)
    return {
        task.name: exam.accuracy(encoder_of(moved(suite.base, delta)), suite.heads, task.name) for task, delta in tuned
    }


def tune(
    contender: Contender, delta: State, suite: Suite, exam: Exam, goal: Mapping[str, float], grid_step: int
) -> float | None:
    """The scale of the contender's grid with the best normalised accuracy, of equals the one nearest to the default."""
    if contender.scale is None:
        return None
    default = contender.scale

    def merit(scale: float) -> tuple[float, float]:
        found = exam.accuracies(at_scale(contender, delta, suite, scale), suite.heads)
        return normalised(found, goal), -abs(scale - default)

    return max(contender.grid[::grid_step], key=merit)


def at_scale(contender: Contender, delta: State, suite: Suite, scale: float) -> State:
    """The merge at another scale, from its delta at the default; every method's is proportional to the scale."""
    assert contender.scale is not None
    return moved(suite.base, delta, scale / contender.scale)


def normalised(scores: Mapping[str, float], ceiling: Mapping[str, float]) -> float:
    """Mean over tasks of accuracy divided by the accuracy of the task's own fine-tune."""
    return sum(scores[task] / ceiling[task] for task in ceiling) / len(ceiling)
