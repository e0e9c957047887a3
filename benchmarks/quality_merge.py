"""Owns the quality benchmark's contenders: which methods, with which parameters, at which scales; and their merges."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from quality_models import State, Suite, state_of
from quality_tasks import TASKS
from transformers import ViTModel

import hubmerge
from hubmerge.methods import all_methods
from hubmerge.spec import Method

# Scales to choose from, as the papers do: a method that adds deltas up is tried below 1, one that averages them or
# recomposes a matrix also above; DRM and AWD name ranges of their own.
SUMS = tuple(i / 10 for i in range(1, 11))
AVERAGES = tuple(i / 10 for i in range(1, 31))
GRIDS = {"drm": tuple(i / 10 for i in range(8, 16)), "awd": tuple(i / 10 for i in range(3, 11))}
# Method -> label of a row -> parameters other than the defaults. A method that is not named has one row.
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "drm": {
        "drm": (),
        "drm, vertical": ("direction=vertical",),
        "drm, not renormalised": ("renormalize=false",),
    }
}


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the table."""

    label: str
    method: str
    parameters: tuple[str, ...]
    """As on the command line: ``key=value``."""
    scale: float | None
    """The default; None if the method has none."""
    grid: tuple[float, ...]
    """The scales to choose from."""


def contenders() -> list[Contender]:
    """All methods that merge this many models, at their defaults, and some variants of theirs."""
    found = []
    for method in all_methods():
        if method.max_models is None or method.max_models >= len(TASKS):
            scale = _default_scale(method)
            for label, parameters in VARIANTS.get(method.name, {method.name: ()}).items():
                found.append(Contender(label, method.name, parameters, scale, _grid(method.name, scale)))
    return found


def _default_scale(method: Method) -> float | None:
    declared = method.parameters.model_fields.get("scale")
    return None if declared is None else float(declared.default)


def _grid(method: str, scale: float | None) -> tuple[float, ...]:
    if scale is None:
        return ()
    return GRIDS.get(method, SUMS if scale < 1 else AVERAGES)


def merge(contender: Contender, suite: Suite, kind: str, *, scale: float | None = None) -> State:
    """Merge the saved models into a folder, as a user would, and load the encoder from it with transformers.

    Args:
        contender: The method and its parameters.
        suite: The saved models.
        kind: Which fine-tunes.
        scale: Other than the default.
    """
    parameters = [*contender.parameters, *(() if scale is None else (f"scale={scale}",))]
    models = [str(suite.tuned_folder(kind, task)) for task in TASKS]
    out = suite.folder / "merged"
    hubmerge.merge(hubmerge.Recipe.from_flags(contender.method, str(suite.base_folder), models, parameters), out)
    merged = state_of(ViTModel.from_pretrained(out, add_pooling_layer=False))
    shutil.rmtree(out)
    return merged
