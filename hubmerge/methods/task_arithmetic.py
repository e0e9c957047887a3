"""Task arithmetic: add the sum of the task vectors to the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from hubmerge.arithmetic import onto_base, total_weight, weighted_sum, zero_weight_problem
from hubmerge.linalg import concatenated
from hubmerge.spec import LowRank, Method, Params, TensorGroup


class TaskArithmeticParams(Params):
    """Parameters of ``task_arithmetic``."""

    scale: float = 0.3
    """λ, which multiplies the merged delta; 0.3 suits eight vision tasks, 1 / (number of models) averages."""
    normalize: bool = False
    """Divide the sum of the weighted deltas by the sum of the weights."""
    rule: Literal["exact", "mergekit"] = "exact"
    """mergekit: with normalize, a total weight below 1e-8 counts as 1 instead of being an error."""


class TaskArithmetic(Method):
    """``W0 + λ Σ wᵢ Δᵢ``."""

    name = "task_arithmetic"
    summary = "Base plus scale times the sum of weight × delta, where a delta is a model minus the base."
    paper = "Editing Models with Task Arithmetic, Ilharco et al., 2023, arXiv 2212.04089"
    parameters = TaskArithmeticParams

    def problem(self, p: TaskArithmeticParams, weights: Sequence[float]) -> str | None:
        """A normalised sum needs a total weight other than 0."""
        return zero_weight_problem(weights) if p.normalize and p.rule == "exact" else None

    def rank_problem(self, p: TaskArithmeticParams, weights: Sequence[float]) -> None:
        """Factors side by side: at most the sum of the deltas' ranks."""

    def merge(self, group: TensorGroup, p: TaskArithmeticParams, stats: Any | None) -> torch.Tensor | LowRank:
        """The merged chunk, (n,); of deltas in factors, the merged delta."""
        divisor = total_weight(group.weights, lenient=p.rule == "mergekit") if p.normalize else 1.0
        if (factors := group.all_factors()) is not None:
            return concatenated(factors, [w * p.scale / divisor for w in group.weights])
        total = weighted_sum(group.delta, group.weights)
        if p.normalize:
            total.div_(divisor)
        return onto_base(group.base(), total, p.scale)
