"""Weighted average of the models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hubmerge.arithmetic import total_weight, weighted_sum, zero_weight_problem
from hubmerge.spec import Method, Params, TensorGroup


class LinearParams(Params):
    """Parameters of ``linear``."""

    normalize: bool = True
    """Divide by the sum of the weights."""


class Linear(Method):
    """``Σ wᵢ Wᵢ / Σ wᵢ``."""

    name = "linear"
    summary = "Weighted average of the models' weights: the sum of weight × model, divided by the sum of the weights."
    paper = "Model soups, Wortsman et al., 2022, arXiv 2203.05482"
    parameters = LinearParams
    uses_base = False

    def problem(self, p: LinearParams, weights: Sequence[float]) -> str | None:
        """A normalised average needs a total weight other than 0."""
        return zero_weight_problem(weights) if p.normalize else None

    def merge(self, group: TensorGroup, p: LinearParams, stats: Any | None) -> torch.Tensor:
        """The average of the chunk, (n,)."""
        total = weighted_sum(group.model, group.weights)
        return total.div_(total_weight(group.weights)) if p.normalize else total
