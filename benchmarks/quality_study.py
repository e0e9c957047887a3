"""Owns the steps of the quality benchmark for one seed: train, merge and bundle, tune the scale, measure."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quality_bundles import EXACT, Fidelity, Packing, pack_and_unpack, packings
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
    suite_of,
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
class Recovery:
    """What the models out of one bundle reached on the test images, each on its own task."""

    default: Scores
    """At λ = 1."""
    best: Scores
    """At the λ with which the bundle in float32 was best on validation images."""
    best_scale: float | None
    fidelity: Fidelity


@dataclass(frozen=True, slots=True)
class Field:
    """All about one kind of fine-tunes of one seed."""

    ceiling: Scores
    """Every task's own fine-tune."""
    outcomes: Mapping[str, Outcome]
    """By the contender's label."""
    bundles: Mapping[str, Mapping[str, Recovery]]
    """By the packing's label, then by the storage form."""
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
    suite = suite_of(pictures, scale, folder, seed)
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
    goal = own_scores(suite, deltas, validation)
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
    bundles = {p.label: recover(p, suite, kind, test, validation, grid_step) for p in packings(kind)}
    geometry = measure_geometry(suite.base, deltas, linear_weights(encoder_of(suite.base)))
    return Field(own_scores(suite, deltas, test), outcomes, bundles, geometry)


def own_scores(suite: Suite, deltas: Sequence[State], exam: Exam, scale: float = 1.0) -> Scores:
    """What every task's own model reaches on it: the base plus a multiple of the task's delta."""
    return {
        task.name: exam.accuracy(encoder_of(moved(suite.base, delta, scale)), suite.heads, task.name)
        for task, delta in zip(TASKS, deltas, strict=True)
    }


def recover(
    packing: Packing, suite: Suite, kind: str, test: Exam, validation: Exam, grid_step: int
) -> dict[str, Recovery]:
    """Measure a bundle in its storage forms; λ is chosen once, so that they differ in nothing else."""
    found, best_scale = {}, None
    for storage in packing.storages:
        deltas, fidelity = pack_and_unpack(packing, suite, kind, storage)
        if storage == EXACT:
            best_scale = choose_lambda(packing, deltas, suite, kind, validation, grid_step)
        default = own_scores(suite, deltas, test)
        best = default if best_scale is None else own_scores(suite, deltas, test, best_scale)
        found[storage] = Recovery(default, best, best_scale, fidelity)
    return found


def choose_lambda(
    packing: Packing, deltas: Sequence[State], suite: Suite, kind: str, exam: Exam, grid_step: int
) -> float | None:
    """The λ of the packing's grid with the best normalised accuracy, of equals the one nearest to 1."""
    grid = packing.grid(kind)[::grid_step]
    if not grid:
        return None
    goal = own_scores(suite, suite.deltas[kind], exam)
    return best_of(grid, 1.0, lambda scale: own_scores(suite, deltas, exam, scale), goal)


def tune(
    contender: Contender, delta: State, suite: Suite, exam: Exam, goal: Mapping[str, float], grid_step: int
) -> float | None:
    """The scale of the contender's grid with the best normalised accuracy, of equals the one nearest to the default."""
    if contender.scale is None:
        return None
    return best_of(
        contender.grid[::grid_step],
        contender.scale,
        lambda scale: exam.accuracies(at_scale(contender, delta, suite, scale), suite.heads),
        goal,
    )


def best_of(
    grid: Sequence[float], default: float, scores: Callable[[float], Scores], goal: Mapping[str, float]
) -> float:
    """The scale with the best normalised accuracy, of equals the one nearest to the default."""
    return max(grid, key=lambda scale: (normalised(scores(scale), goal), -abs(scale - default)))


def at_scale(contender: Contender, delta: State, suite: Suite, scale: float) -> State:
    """The merge at another scale, from its delta at the default; every method's is proportional to the scale."""
    assert contender.scale is not None
    return moved(suite.base, delta, scale / contender.scale)


def normalised(scores: Mapping[str, float], ceiling: Mapping[str, float]) -> float:
    """Mean over tasks of accuracy divided by the accuracy of the task's own fine-tune."""
    return sum(scores[task] / ceiling[task] for task in ceiling) / len(ceiling)
