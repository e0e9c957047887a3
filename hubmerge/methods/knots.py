"""KnOTS: express all deltas in one basis of singular vectors, and merge them there as TIES does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from hubmerge.arithmetic import Aggregate, elect_and_merge, scaled_
from hubmerge.linalg import averaged, delta_of, dtype_of, is_matrix, joint_svd, rank_tolerance, shape_of
from hubmerge.spec import LowRank, Method, Params, Scope, TensorGroup
from hubmerge.topk import Selection, keep_largest_


class KnotsParams(Params):
    """Parameters of ``knots``."""

    scale: float = 0.6
    """λ, which multiplies the merged delta. Released settings: 0.6 for ViT-B/32, 0.5 for ViT-L/14 and Llama-3-8B."""
    density: float = Field(0.2, ge=0.0, le=1.0, json_schema_extra={"per_model": True})
    """Fraction of a model's entries in the shared basis that is kept: its largest magnitudes. Released settings: 0.2
    for ViT, 1 for Llama-3-8B."""
    cutoff: float = Field(0.0, ge=0.0, lt=1.0)
    """Leave out singular values up to this fraction of the largest; what may be rounding errors is left out anyway."""
    trim: Scope = "model"
    """What the density is about: all matrices of the model together (as published) or each by itself. Of full
    checkpoints, the former decomposes every matrix three times, in float64 five times, and the latter once."""
    aggregate: Aggregate = "mean"
    """What becomes of the agreeing entries: their mean, their sum, or their sum divided by the sum of their weights."""


class Knots(Method):
    """``W0 + λ U Y`` where ``[Δ₁ … Δₜ] = U S [V₁ … Vₜ]`` and Y is what TIES makes of the ``S Vᵢ``.

    Weights multiply the trimmed ``S Vᵢ`` before signs are elected, as in ``ties``; the basis is that of the deltas
    without them. Entries that cancel exactly elect no sign: in a basis of singular vectors, whose signs are arbitrary,
    a majority over other entries would be arbitrary too. The released code leaves out singular values up to 1e-5,
    whatever their scale; here the cut is relative, so that a common factor of all deltas comes out.
    """

    name = "knots"
    summary = "Express all deltas in the singular vectors they share; there trim, elect signs and merge as TIES does."
    paper = "Model merging with SVD to tie the Knots (KnOTS), Stoica et al., 2025, arXiv 2410.19735"
    parameters = KnotsParams
    unit = "matrix"

    def scope(self, p: KnotsParams) -> Scope:
        """As ``trim`` says."""
        return p.trim

    def begin(self, p: KnotsParams) -> Selection | None:
        """Nothing is known yet; one matrix by itself needs no pass."""
        return Selection(sampling=False) if p.trim == "model" else None

    def observe(self, group: TensorGroup, p: KnotsParams, stats: Selection) -> Selection:
        """The matrix's part of the thresholds' counts."""
        densities = _densities(group)
        if not is_matrix(group) or all(d is None for d in densities):
            return Selection()
        _, rows = _in_shared_basis(group, p.cutoff)
        return stats.observe(group, densities, lambda i: rows[i].view(-1).cpu())

    def settle(self, stats: Selection, total: Selection, p: KnotsParams) -> Selection:
        """The next windows, or the thresholds."""
        return stats.settle(total, lambda density, n: (int(density * n),))

    def rank_problem(self, p: KnotsParams, weights: Sequence[float]) -> None:
        """At most the sum of the deltas' ranks."""

    def merge(self, group: TensorGroup, p: KnotsParams, stats: Any | None) -> torch.Tensor | LowRank:
        """The merged delta of a linear layer, (out, in), in factors; any other tensor with its base, as stored."""
        if not is_matrix(group):
            return averaged(group, p.scale)
        left, rows = _in_shared_basis(group, p.cutoff)
        merged = elect_and_merge(_trimmed(group, rows, stats), group.weights, aggregate=p.aggregate)
        return LowRank(left, merged, p.scale)


def _densities(group: TensorGroup) -> list[float | None]:
    return [None if q.density >= 1.0 else q.density for q in group.params]


def _trimmed(group: TensorGroup, rows: torch.Tensor, selection: Selection | None) -> list[torch.Tensor]:
    parts = []
    for i, (density, weight) in enumerate(zip(_densities(group), group.weights, strict=True)):
        flat = rows[i].view(-1)
        if density is not None and selection is not None:
            selection.trim_(group, i, density, flat)
        elif density is not None:
            keep_largest_(flat, int(density * len(flat)))
        parts.append(scaled_(rows[i], weight))
    return parts


def _in_shared_basis(group: TensorGroup, cutoff: float) -> tuple[torch.Tensor, torch.Tensor]:
    """An orthonormal basis of the deltas' columns, (m, q), and the deltas in it, ``S Vᵢ``, (t, q, n).

    Both have the data's dtype: ranking float64 takes twice the passes.

    Source: arXiv 2410.19735, figure 1, and the released code, which puts the singular values on the tasks' side.
    """
    deltas = [delta_of(group, i) for i in range(len(group))]
    found = joint_svd(deltas, cutoff)
    rows = found.right.mul_(found.values[:, None])
    if len(found.values):
        # In a mean every agreeing entry counts, so those that are 0 but for the decomposition's rounding must be 0.
        m, n = shape_of(deltas[0])
        error = rank_tolerance((m, n * len(deltas)), torch.float64) * float(found.values[0])
        torch.hardshrink(rows, error, out=rows)
    dtype = dtype_of(deltas[0])
    return found.left.to(dtype), rows.to(dtype)
