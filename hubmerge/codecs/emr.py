"""EMR: one elected vector for all tasks, and per task a mask and a factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hubmerge.arithmetic import elected_sign
from hubmerge.codec import Codec, CodecParams, Encoding, Part, Parts, Target, Task
from hubmerge.masks import keep_
from hubmerge.spec import TensorGroup
from hubmerge.sums import Sums, magnitude_sums


class EmrParams(CodecParams):
    """Parameters of ``emr``; the method itself has none."""


class Emr(Codec):
    """``Δ̂_t = s_t m_t ⊙ Δ_uni`` with ``Δ_uni = γ max {|Δ_t| : sgn Δ_t = γ}``, ``γ = sgn Σ Δ_t``, ``m_t = [Δ_t γ > 0]``.

    The factors ``s_t = Σ |Δ_t| / Σ |m_t Δ_uni|``, over the whole model, restore the deltas' L1 norms.
    """

    name = "emr"
    summary = "Keep per entry the largest delta of the elected sign, and per task which entries agree and a factor."
    paper = "EMR-Merging: Tuning-Free High-Performance Model Merging, Huang et al., 2024, arXiv 2405.17461"
    parameters = EmrParams
    incremental = False

    def begin(self, p: EmrParams) -> Sums:
        """Nothing is known yet."""
        return Sums()

    def observe(self, group: TensorGroup, p: EmrParams, stats: Any) -> Sums:
        """The chunk's part of ``Σ |Δ_t|``, then of ``Σ |m_t Δ_uni|``: 2T sums."""
        deltas = [group.delta(i) for i in range(len(group))]
        _, largest, masks = _elected(deltas)
        kept = [magnitude_sums(keep_(largest.clone(), mask)) for mask in masks]
        return Sums((np.stack([*(magnitude_sums(d.abs_()) for d in deltas), *kept], axis=1),))

    def settle(self, stats: Any, total: Sums, p: EmrParams) -> Sums:
        """The sums."""
        return total.settled()

    def parts(self, p: EmrParams, target: Target, rank: int | None = None) -> tuple[Part, ...]:
        """The elected vector, and a mask for each task."""
        return (Part("", target.shape, "shared"), Part("mask", target.shape, "task", "bits"))

    def encode(
        self,
        group: TensorGroup,
        target: Target,
        tasks: Sequence[Task],
        p: EmrParams,
        stats: Any | None = None,
        onto: Parts | None = None,
    ) -> Encoding:
        """The elected values and the masks, (n,).

        Source: arXiv 2405.17461, section 3.
        """
        sign, largest, masks = _elected([group.delta(i) for i in range(len(group))])
        return Encoding({"": largest.mul_(sign)}, tuple({"mask": mask} for mask in masks))

    def facts(self, p: EmrParams, stats: Any | None, count: int) -> tuple[Mapping[str, float], ...]:
        """The factors; 0 for a task that does not differ from the base."""
        assert isinstance(stats, Sums)
        pairs = zip(stats.totals[:count], stats.totals[count:], strict=True)
        return tuple({"rescaler": whole / kept if kept else 0.0} for whole, kept in pairs)

    def decode(
        self,
        stored: Parts,
        target: Target,
        task: Task,
        p: EmrParams,
        *,
        start: int = 0,
        facts: Mapping[str, float] | None = None,
    ) -> torch.Tensor:
        """The rescaled entries that agree, (n,)."""
        return keep_(stored[""], stored["mask"]).mul_((facts or {})["rescaler"])


def _elected(deltas: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Per entry the elected sign, minus where deltas cancel; the largest magnitude that has it; and who has it."""
    sign = elected_sign(deltas, -1)
    largest = torch.zeros_like(sign)
    masks = []
    for delta in deltas:
        agreeing = (delta * sign).relu_()  # relu and maximum let NaN through
        masks.append(agreeing > 0)
        largest = torch.maximum(largest, agreeing)
    return sign, largest, masks
