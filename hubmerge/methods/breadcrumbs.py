"""Model breadcrumbs: drop each delta's outliers and its smallest entries, tensor by tensor, then add up the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from hubmerge.arithmetic import (
    elect_and_merge,
    onto_base,
    scaled_,
    total_weight,
    weighted_sum,
    zero_weight_problem,
)
from hubmerge.spec import Method, Params, TensorGroup
from hubmerge.topk import Selection


class BreadcrumbsParams(Params):
    """Parameters of ``breadcrumbs``."""

    scale: float = 0.3
    """λ, which multiplies the merged delta."""
    density: float = Field(0.9, ge=0.0, le=1.0, json_schema_extra={"per_model": True})
    """Fraction of a tensor's delta that is kept: the largest entries below the outliers; 1 keeps everything."""
    gamma: float = Field(0.01, ge=0.0, le=1.0, json_schema_extra={"per_model": True})
    """Fraction of a tensor's delta that is dropped as outliers, its largest entries; at most 1 - density."""
    elect_sign: bool = False
    """Elect a sign per entry and add up only the entries that agree with it, as TIES does."""
    normalize: bool = False
    """Divide by the sum of the weights, or with elect_sign by the sum of the agreeing weights."""
    rule: Literal["exact", "mergekit"] = "exact"
    """mergekit: where entries cancel, plus is elected; with normalize, a total weight below 1e-8 counts as 1."""


class Breadcrumbs(Method):
    """``W0 + λ Σ wᵢ mᵢ ⊙ Δᵢ`` with masks mᵢ that keep a middle band of magnitudes."""

    name = "breadcrumbs"
    summary = (
        "Drop each delta's largest and smallest entries, tensor by tensor, and add the rest, weighted, to the base."
    )
    paper = (
        "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks, Davari and Belilovsky, 2024, "
        "arXiv 2312.06795"
    )
    parameters = BreadcrumbsParams

    def problem(self, p: BreadcrumbsParams, weights: Sequence[float]) -> str | None:
        """A normalised sum needs a total weight other than 0."""
        return zero_weight_problem(weights) if p.normalize and p.rule == "exact" and not p.elect_sign else None

    def begin(self, p: BreadcrumbsParams) -> Selection:
        """Nothing is known yet."""
        return Selection()

    def observe(self, group: TensorGroup, p: BreadcrumbsParams, stats: Selection) -> Selection:
        """The chunk's part of the thresholds' counts."""
        return stats.observe(group, _bands(group), group.delta)

    def settle(self, stats: Selection, total: Selection, p: BreadcrumbsParams) -> Selection:
        """The next windows, or both thresholds."""
        return stats.settle(total, _ranks)

    def merge(self, group: TensorGroup, p: BreadcrumbsParams, stats: Any | None) -> torch.Tensor:
        """The merged chunk, (n,)."""
        assert isinstance(stats, Selection)
        bands = _bands(group)

        def kept(i: int) -> torch.Tensor:
            delta, band = group.delta(i), bands[i]
            if band is None:
                return delta
            outliers = stats.trim_(group, i, band, delta.clone(), which=0)
            return stats.trim_(group, i, band, delta, which=1).sub_(outliers)

        if p.elect_sign:
            parts = [scaled_(kept(i), w) for i, w in enumerate(group.weights)]
            total = elect_and_merge(
                parts,
                group.weights,
                aggregate="weighted" if p.normalize else "sum",
                zero_sign=1 if p.rule == "mergekit" else 0,
            )
        else:
            total = weighted_sum(kept, group.weights)
            if p.normalize:
                total.div_(total_weight(group.weights, lenient=p.rule == "mergekit"))
        return onto_base(group.base(), total, p.scale)


def _bands(group: TensorGroup) -> list[tuple[float, float] | None]:
    return [None if q.density >= 1.0 else (q.gamma, q.density) for q in group.params]


def _ranks(band: tuple[float, float], size: int) -> tuple[int, int]:
    gamma, density = band
    kept = int(density * size)
    outliers = min(int(gamma * size), size - kept)
    return outliers, outliers + kept
