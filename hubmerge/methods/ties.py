"""TIES: trim each task vector, elect a sign per entry, average the entries that agree with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field

from hubmerge.arithmetic import Aggregate, elect_and_merge, elected_sign, onto_base, scaled_
from hubmerge.spec import Method, Params, Scope, TensorGroup
from hubmerge.topk import Selection


class TiesParams(Params):
    """Parameters of ``ties``."""

    scale: float = 1.0
    """λ, which multiplies the merged delta."""
    density: float = Field(0.2, ge=0.0, le=1.0, json_schema_extra={"per_model": True})
    """Fraction of a model's delta that is kept: its largest magnitudes."""
    trim: Scope = "model"
    """What the density is about: the model as a whole (as published) or each tensor by itself."""
    aggregate: Aggregate = "mean"
    """What becomes of the agreeing entries: their mean, their sum, or their sum divided by the sum of their weights."""
    rule: Literal["exact", "published", "mergekit"] = "exact"
    """Details on which implementations differ.

    exact: floor(density × n) entries are kept, ties by position; entries that cancel exactly elect no sign and stay at
    the base. published: one entry more is kept, and all that equal it; where entries cancel, the majority sign of the
    whole vector is elected.
    mergekit: at least one entry is kept; where entries cancel, plus is elected.
    """


@dataclass(frozen=True, slots=True)
class TiesStats:
    """The thresholds, then the majority sign: the sum of all elected signs."""

    selection: Selection
    signs: int | None = None
    done: bool = False

    def __add__(self, other: TiesStats) -> TiesStats:
        signs = None if self.signs is None or other.signs is None else self.signs + other.signs
        return TiesStats(self.selection + other.selection, signs)

    def wants(self, name: str, start: int = 0, stop: int | None = None) -> bool:
        """As the selection says; the signs of everything are needed."""
        return self.selection.done or self.selection.wants(name, start, stop)


def _kept(rule: str, density: float, size: int) -> int:
    kept = int(density * size)
    if rule == "published":
        return kept + 1
    return max(1, kept) if rule == "mergekit" else kept


class Ties(Method):
    """``W0 + λ · aggregate of the trimmed wᵢ Δᵢ whose sign is sgn Σ wᵢ Δᵢ``."""

    name = "ties"
    summary = (
        "Trim every delta to its largest entries, elect a sign per entry, and merge the entries that agree with it."
    )
    paper = "TIES-Merging: Resolving Interference When Merging Models, Yadav et al., 2023, arXiv 2306.01708"
    parameters = TiesParams

    def scope(self, p: TiesParams) -> Scope:
        """As ``trim`` says."""
        return p.trim

    def begin(self, p: TiesParams) -> TiesStats:
        """Nothing is known yet."""
        return TiesStats(Selection())

    def observe(self, group: TensorGroup, p: TiesParams, stats: TiesStats) -> TiesStats:
        """Counts for the thresholds, or the elected signs."""
        if not stats.selection.done:
            return TiesStats(stats.selection.observe(group, _settings(group), group.delta))
        signs = elected_sign(_trimmed(group, stats.selection), 0)
        return TiesStats(Selection(), int(signs.sum(dtype=torch.float64)))

    def settle(self, stats: TiesStats, total: TiesStats, p: TiesParams) -> TiesStats:
        """The next windows; then, under the published rule, the majority."""
        if stats.selection.done:
            return replace(total, selection=stats.selection, done=True)
        found = stats.selection.settle(
            total.selection, lambda density, n: (_kept(p.rule, density, n),), all_ties=p.rule == "published"
        )
        return TiesStats(found, done=found.done and p.rule != "published")

    def merge(self, group: TensorGroup, p: TiesParams, stats: Any) -> torch.Tensor:
        """The merged chunk, (n,)."""
        zero_sign = 1 if p.rule == "mergekit" else 0
        if p.rule == "published":
            # The released code keeps the negative entries where even the majority is undecided.
            zero_sign = 1 if (stats.signs or 0) > 0 else -1
        merged = elect_and_merge(
            _trimmed(group, stats.selection), group.weights, aggregate=p.aggregate, zero_sign=zero_sign
        )
        return onto_base(group.base(), merged, p.scale)


def _settings(group: TensorGroup) -> list[float | None]:
    return [None if q.density >= 1.0 else q.density for q in group.params]


def _trimmed(group: TensorGroup, selection: Selection) -> list[torch.Tensor]:
    parts = []
    for i, (density, weight) in enumerate(zip(_settings(group), group.weights, strict=True)):
        part = group.delta(i)
        if density is not None:
            selection.trim_(group, i, density, part)
        parts.append(scaled_(part, weight))
    return parts
