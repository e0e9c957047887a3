"""DARE followed by TIES: drop entries at random, rescale the rest, optionally trim, elect signs, merge what agrees."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from hubmerge.arithmetic import Aggregate, elect_and_merge, onto_base, scaled_
from hubmerge.drop import Rescale, kept_delta, observed_norms, rescale_factor
from hubmerge.spec import Method, Params, Scope, TensorGroup
from hubmerge.sums import Sums
from hubmerge.topk import Selection


class DareTiesParams(Params):
    """Parameters of ``dare_ties``."""

    scale: float = 1.0
    """λ, which multiplies the merged delta."""
    density: float = Field(0.2, gt=0.0, le=1.0, json_schema_extra={"per_model": True})
    """Probability with which an entry of a delta is kept, in steps of 2**-24."""
    rescale: Rescale = "inverse"
    """What kept entries are multiplied by: 1 / density, the factor that restores each tensor's L1 norm, or nothing."""
    aggregate: Aggregate = "mean"
    """What becomes of the agreeing entries: their mean, their sum, or their sum divided by the sum of their weights."""
    trim_after: bool = False
    """Also trim what the random drop has left, as TIES does, instead of dropping alone."""
    trim_density: float = Field(0.2, ge=0.0, le=1.0, json_schema_extra={"per_model": True})
    """With trim_after: fraction of all entries that is kept, the largest ones."""
    trim: Scope = "model"
    """With trim_after: what trim_density is about, the model as a whole or each tensor by itself."""
    rule: Literal["exact", "mergekit"] = "exact"
    """Where kept entries cancel exactly: no sign is elected (exact) or plus is (mergekit)."""

    @model_validator(mode="after")
    def _one_statistic(self) -> Self:
        if self.trim_after and self.rescale == "l1":
            raise ValueError("trim_after cannot be combined with rescale: l1; use rescale: inverse")
        return self


class DareTies(Method):
    """TIES' election and disjoint merge on randomly dropped deltas."""

    name = "dare_ties"
    summary = "Drop entries of every delta at random, rescale the rest, elect a sign per entry, and merge what agrees."
    paper = (
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch (DARE), "
        "Yu et al., 2024, arXiv 2311.03099"
    )
    parameters = DareTiesParams

    def scope(self, p: DareTiesParams) -> Scope:
        """Norms are per tensor; a trim is about what ``trim`` says."""
        return p.trim if p.trim_after else "tensor"

    def begin(self, p: DareTiesParams) -> Selection | Sums | None:
        """Thresholds for the trim, norms for the L1 rescale, or nothing."""
        if p.trim_after:
            return Selection()
        return Sums() if p.rescale == "l1" else None

    def observe(self, group: TensorGroup, p: DareTiesParams, stats: Any) -> Selection | Sums:
        """The chunk's part of the thresholds' counts or of the norms."""
        if isinstance(stats, Selection):
            return stats.observe(group, _trims(group), lambda i: _rescaled(group, p, i, None))
        return observed_norms(group, [q.density for q in group.params])

    def settle(self, stats: Any, total: Any, p: DareTiesParams) -> Selection | Sums:
        """The next windows, or the norms."""
        if isinstance(stats, Selection):
            return stats.settle(total, lambda density, n: (int(density * n),))
        assert isinstance(total, Sums)
        return total.settled()

    def merge(self, group: TensorGroup, p: DareTiesParams, stats: Any | None) -> torch.Tensor:
        """The merged chunk, (n,)."""
        parts = []
        for i, trim in enumerate(_trims(group)):
            # A trim must see what it ranked: the rescaled delta, before the weight.
            trims = isinstance(stats, Selection) and trim is not None
            part = _rescaled(group, p, i, stats, 1.0 if trims else group.weights[i])
            if isinstance(stats, Selection) and trim is not None:
                scaled_(stats.trim_(group, i, trim, part), group.weights[i])
            parts.append(part)
        zero_sign = 1 if p.rule == "mergekit" else 0
        merged = elect_and_merge(parts, group.weights, aggregate=p.aggregate, zero_sign=zero_sign)
        return onto_base(group.base(), merged, p.scale)


def _trims(group: TensorGroup) -> list[float | None]:
    return [None if q.trim_density >= 1.0 else q.trim_density for q in group.params]


def _rescaled(group: TensorGroup, p: DareTiesParams, i: int, stats: Any | None, weight: float = 1.0) -> torch.Tensor:
    density = group.params[i].density
    return scaled_(kept_delta(group, i, density), weight * rescale_factor(p.rescale, density, i, stats))
