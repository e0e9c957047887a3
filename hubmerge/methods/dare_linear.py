"""DARE followed by task arithmetic: drop entries at random, rescale the rest, add them up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from hubmerge.arithmetic import onto_base, scaled_, total_weight, weighted_sum, zero_weight_problem
from hubmerge.drop import Rescale, kept_delta, observed_norms, rescale_factor
from hubmerge.spec import Method, Params, TensorGroup
from hubmerge.sums import Sums


class DareLinearParams(Params):
    """Parameters of ``dare_linear``."""

    scale: float = 0.3
    """λ, which multiplies the merged delta."""
    density: float = Field(0.5, gt=0.0, le=1.0, json_schema_extra={"per_model": True})
    """Probability with which an entry of a delta is kept, in steps of 2**-24; language models bear 0.1."""
    rescale: Rescale = "inverse"
    """What kept entries are multiplied by: 1 / density, the factor that restores each tensor's L1 norm, or nothing."""
    normalize: bool = False
    """Divide the sum of the weighted deltas by the sum of the weights."""
    rule: Literal["exact", "mergekit"] = "exact"
    """mergekit: with normalize, a total weight below 1e-8 counts as 1 instead of being an error."""


class DareLinear(Method):
    """``W0 + λ Σ wᵢ mᵢ ⊙ Δᵢ / density`` with random masks mᵢ."""

    name = "dare_linear"
    summary = "Drop entries of every delta at random, rescale the rest, and add their weighted sum to the base."
    paper = (
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch (DARE), "
        "Yu et al., 2024, arXiv 2311.03099"
    )
    parameters = DareLinearParams

    def problem(self, p: DareLinearParams, weights: Sequence[float]) -> str | None:
        """A normalised sum needs a total weight other than 0."""
        return zero_weight_problem(weights) if p.normalize and p.rule == "exact" else None

    def begin(self, p: DareLinearParams) -> Sums | None:
        """Only the L1 rescale needs to know more than the chunk."""
        return Sums() if p.rescale == "l1" else None

    def observe(self, group: TensorGroup, p: DareLinearParams, stats: Any) -> Sums:
        """The chunk's part of the L1 norms."""
        return observed_norms(group, [q.density for q in group.params])

    def settle(self, stats: Any, total: Sums, p: DareLinearParams) -> Sums:
        """The L1 norms."""
        return total.settled()

    def merge(self, group: TensorGroup, p: DareLinearParams, stats: Any | None) -> torch.Tensor:
        """The merged chunk, (n,)."""

        def part(i: int) -> torch.Tensor:
            density = group.params[i].density
            return scaled_(kept_delta(group, i, density), rescale_factor(p.rescale, density, i, stats))

        total = weighted_sum(part, group.weights)
        if p.normalize:
            total.div_(total_weight(group.weights, lenient=p.rule == "mergekit"))
        return onto_base(group.base(), total, p.scale)
