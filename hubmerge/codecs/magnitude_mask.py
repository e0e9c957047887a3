"""Magnitude masks: the sum of all deltas, and per task a mask of its own delta's largest entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field

from hubmerge.codec import Codec, CodecParams, Encoding, Part, Parts, Target, Task
from hubmerge.masks import keep_
from hubmerge.spec import TensorGroup
from hubmerge.topk import Selection


class MagnitudeMaskParams(CodecParams):
    """Parameters of ``magnitude_mask``."""

    density: float = Field(0.1, ge=0.0, le=1.0, json_schema_extra={"per_model": True})
    """Fraction of a task's entries that its mask keeps: the largest magnitudes of its delta, over the whole model."""


class MagnitudeMask(Codec):
    """``Δ̂_t = m_t ⊙ Σ Δ_j`` with masks m_t of the largest entries of ``|Δ_t|``; never of entries that are 0."""

    name = "magnitude_mask"
    summary = "Keep the sum of all deltas, and per task a mask of the entries that are largest in its own delta."
    paper = (
        "Localizing Task Information for Improved Model Merging and Compression (magnitude masks, a baseline), "
        "Wang et al., 2024, arXiv 2405.07813"
    )
    parameters = MagnitudeMaskParams
    incremental = True

    def begin(self, p: MagnitudeMaskParams) -> Selection:
        """Nothing is known yet."""
        return Selection()

    def observe(self, group: TensorGroup, p: MagnitudeMaskParams, stats: Any) -> Selection:
        """Counts for the thresholds."""
        found: Selection = stats.observe(group, _settings(group), group.delta)
        return found

    def settle(self, stats: Any, total: Any, p: MagnitudeMaskParams) -> Selection:
        """The next windows, or the thresholds."""
        found: Selection = stats.settle(total, lambda density, n: (int(density * n),))
        return found

    def parts(self, p: MagnitudeMaskParams, target: Target, rank: int | None = None) -> tuple[Part, ...]:
        """The sum, and a mask for each task."""
        return (Part("", target.shape, "shared"), Part("mask", target.shape, "task", "bits"))

    def encode(
        self,
        group: TensorGroup,
        target: Target,
        tasks: Sequence[Task],
        p: MagnitudeMaskParams,
        stats: Any | None = None,
        onto: Parts | None = None,
    ) -> Encoding:
        """The sum, in the tasks' order and in float32, and the masks, (n,).

        It starts from zeros, not from the first delta: so it is never -0, which adding and removing would not restore.
        """
        assert isinstance(stats, Selection)
        total = None if onto is None else onto[""]
        masks = []
        for i, density in enumerate(_settings(group)):
            delta = group.delta(i)
            total = (torch.zeros_like(delta, dtype=torch.float32) if total is None else total).add_(delta.float())
            masks.append((delta if density is None else stats.trim_(group, i, density, delta)) != 0)
        assert total is not None
        return Encoding({"": total}, tuple({"mask": mask} for mask in masks))

    def remove(
        self, shared: Parts, group: TensorGroup, target: Target, tasks: Sequence[Task], p: MagnitudeMaskParams
    ) -> Parts:
        """The sum without these tasks."""
        total = shared[""]
        for i in range(len(group)):
            total.sub_(group.delta(i).float())
        return {"": total}

    def decode(
        self,
        stored: Parts,
        target: Target,
        task: Task,
        p: MagnitudeMaskParams,
        *,
        start: int = 0,
        facts: Mapping[str, float] | None = None,
    ) -> torch.Tensor:
        """The sum where the task's own delta is large, (n,)."""
        return keep_(stored[""], stored["mask"])


def _settings(group: TensorGroup) -> list[float | None]:
    return [None if q.density >= 1.0 else q.density for q in group.params]
