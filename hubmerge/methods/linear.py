"""Weighted average of the models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from hubmerge.arithmetic import total_weight, weighted_sum, zero_weight_problem
from hubmerge.linalg import concatenated
from hubmerge.spec import LowRank, Method, Params, TensorGroup


class LinearParams(Params):
    """Parameters of ``linear``."""

    normalize: bool = True
    """Divide by the sum of the weights."""


class Linear(Method):
    """``Σ wᵢ Wᵢ / Σ wᵢ``."""

    name = "linear"
    summary = "Weighted average of the models' weights: the sum of weight × model, divided by the sum of the weights."
    paper = (
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference "
        "time, Wortsman et al., 2022, arXiv 2203.05482"
    )
    parameters = LinearParams
    uses_base = False

    def problem(self, p: LinearParams, weights: Sequence[float]) -> str | None:
        """A normalised average needs a total weight other than 0."""
        return zero_weight_problem(weights) if p.normalize else None

    def rank_problem(self, p: LinearParams, weights: Sequence[float]) -> str | None:
        """A sum that is no average scales the base, too."""
        if p.normalize or math.fsum(weights) == 1.0:
            return None
        return f"without normalize, the weights {list(weights)} scale the base, which an adapter cannot express"

    def merge(self, group: TensorGroup, p: LinearParams, stats: Any | None) -> torch.Tensor | LowRank:
        """The average of the chunk, (n,); of deltas in factors, their average.

        Computed as the first model plus weighted differences to it: fine-tunes are close to one another, so the
        differences carry the rounding errors of their own small magnitude, and what all models share stays exact.
        """
        total = total_weight(group.weights) if p.normalize else 1.0
        if (factors := group.all_factors()) is not None:
            return concatenated(factors, [w / total for w in group.weights])
        first = group.model(0)
        excess = 0.0 if p.normalize else math.fsum([*group.weights, -1.0])
        if len(group) == 1:
            return first if excess == 0.0 else first.mul_(group.weights[0])
        moved = weighted_sum(lambda i: group.model(i + 1).sub_(first), group.weights[1:])
        if total != 1.0:
            moved.div_(total)
        if excess != 0.0:
            moved.add_(first, alpha=excess)
        return moved.add_(first)
