"""TALL-masks: one multi-task vector, and per task a mask of the entries it relies on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from hubmerge.arithmetic import elect_and_merge, sum_all
from hubmerge.codec import Codec, CodecParams, Encoding, Part, Parts, Target, Task
from hubmerge.masks import keep_, tall_mask
from hubmerge.spec import TensorGroup
from hubmerge.topk import Selection


class TallMaskParams(CodecParams):
    """Parameters of ``tall_mask``."""

    mask_lambda: float = Field(0.4, ge=0.0, json_schema_extra={"per_model": True})
    """A task relies on an entry if its own delta exceeds this multiple of the rest of the multi-task vector there.

    0.4 is the middle of the values searched for the paper, 0.2 to 0.6.
    """
    multi_task: Literal["sum", "ties"] = "sum"
    """The multi-task vector: the sum of all deltas, or of trimmed ones that have the elected sign, as in TIES."""
    density: float = Field(0.2, ge=0.0, le=1.0)
    """With ties: fraction of each delta that is kept, the largest magnitudes of the whole model."""


class TallMask(Codec):
    """``Δ̂_t = m_t ⊙ Δ`` with the multi-task vector Δ and masks ``m_t = [|Δ_t| > λ_t |Δ - Δ_t|]``."""

    name = "tall_mask"
    summary = "Keep the sum of all deltas, or their TIES merge, and per task a mask of the entries that serve it."
    paper = (
        "Localizing Task Information for Improved Model Merging and Compression (TALL-masks), Wang et al., 2024, "
        "arXiv 2405.07813"
    )
    parameters = TallMaskParams
    incremental = False

    def begin(self, p: TallMaskParams) -> Selection | None:
        """The thresholds, where deltas are trimmed."""
        return Selection() if _density(p) is not None else None

    def observe(self, group: TensorGroup, p: TallMaskParams, stats: Any) -> Selection:
        """Counts for the thresholds."""
        found: Selection = stats.observe(group, [_density(p)] * len(group), group.delta)
        return found

    def settle(self, stats: Any, total: Any, p: TallMaskParams) -> Selection:
        """The next windows, or the thresholds."""
        found: Selection = stats.settle(total, lambda density, n: (int(density * n),))
        return found

    def parts(self, p: TallMaskParams, target: Target, rank: int | None = None) -> tuple[Part, ...]:
        """The multi-task vector, and a mask for each task."""
        return (Part("", target.shape, "shared"), Part("mask", target.shape, "task", "bits"))

    def encode(
        self,
        group: TensorGroup,
        target: Target,
        tasks: Sequence[Task],
        p: TallMaskParams,
        stats: Any | None = None,
        onto: Parts | None = None,
    ) -> Encoding:
        """The multi-task vector and the masks, (n,).

        Source: arXiv 2405.07813, section 4.
        """
        total = _merged(group, p, stats)
        masks = [tall_mask(group.delta(i), total, q.mask_lambda) for i, q in enumerate(group.params)]
        return Encoding({"": total}, tuple({"mask": mask} for mask in masks))

    def decode(
        self,
        stored: Parts,
        target: Target,
        task: Task,
        p: TallMaskParams,
        *,
        start: int = 0,
        facts: Mapping[str, float] | None = None,
    ) -> torch.Tensor:
        """The entries the task relies on, (n,)."""
        return keep_(stored[""], stored["mask"])


def _density(p: TallMaskParams) -> float | None:
    """What is kept of every delta; None if that is all."""
    return p.density if p.multi_task == "ties" and p.density < 1.0 else None


def _merged(group: TensorGroup, p: TallMaskParams, stats: Any | None) -> torch.Tensor:
    deltas = [group.delta(i) for i in range(len(group))]
    if p.multi_task == "sum":
        return sum_all(deltas)
    if (density := _density(p)) is not None:
        assert isinstance(stats, Selection)
        deltas = [stats.trim_(group, i, density, delta) for i, delta in enumerate(deltas)]
    return elect_and_merge(deltas, [1.0] * len(deltas), aggregate="sum")
