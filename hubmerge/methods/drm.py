"""Decom-Renorm-Merge: express all deltas in one basis of singular vectors, renormalise, trim, elect, and average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from hubmerge.arithmetic import onto_base
from hubmerge.linalg import Delta, averaged, delta_of, is_matrix, joint_svd
from hubmerge.spec import LowRank, Method, Params, TensorGroup
from hubmerge.topk import keep_largest_

_COLUMNS = 1 << 15
"""So many at once stay in a processor's cache."""


class DrmParams(Params):
    """Parameters of ``drm``."""

    scale: float = 1.0
    """λ, which multiplies the merged delta."""
    direction: Literal["horizontal", "vertical"] = "horizontal"
    """Deltas side by side share left singular vectors (horizontal); on top of one another, right ones (vertical)."""
    density: float = Field(0.2, ge=0.0, le=1.0)
    """Fraction of the entries of all models' singular vectors together that is kept: the largest magnitudes."""
    renormalize: bool = True
    """Bring each model's part of a singular vector to length 1 before its entries are compared with the others'."""
    cutoff: float = Field(0.01, ge=0.0, lt=1.0)
    """Leave out singular values up to this fraction of the largest."""
    vectors: Literal["mean", "elect"] = "mean"
    """What becomes of tensors other than linear weights: the mean of their deltas, or the mean of agreeing entries."""
    rule: Literal["exact", "published"] = "exact"
    """How many of n entries are kept.

    exact: floor(density × n), ties by position. published: the nearest whole number to density × n, one entry more, and
    all that equal it.
    """


class Drm(Method):
    """``W0 + λ U Y`` where ``[Δ₁ … Δₜ] = U S [V₁ … Vₜ]`` and Y merges the trimmed ``S Vᵢ`` by sign election."""

    name = "drm"
    summary = (
        "Express all deltas in the singular vectors they share, keep the largest entries, elect signs, and average."
    )
    paper = (
        "Decom-Renorm-Merge: Model Merging on the Right Space Improves Multitasking, Chaichana et al., 2025, "
        "arXiv 2505.23117"
    )
    parameters = DrmParams
    unit = "matrix"

    def rank_problem(self, p: DrmParams, weights: Sequence[float]) -> None:
        """At most the sum of the deltas' ranks."""

    def merge(self, group: TensorGroup, p: DrmParams, stats: Any | None) -> torch.Tensor | LowRank:
        """The merged delta of a linear layer, (out, in), in factors; any other tensor with its base, as stored."""
        if is_matrix(group):
            deltas = [delta_of(group, i) for i in range(len(group))]
            if p.direction == "horizontal":
                return _side_by_side(deltas, group.weights, p)
            return _side_by_side([d.T for d in deltas], group.weights, p).T
        if p.vectors == "mean":
            return averaged(group, p.scale)
        elected = _average_of_elected(torch.stack([group.delta(i) for i in range(len(group))]), group.weights)
        return onto_base(group.base(), elected, p.scale)


def _side_by_side(deltas: Sequence[Delta], weights: Sequence[float], p: DrmParams) -> LowRank:
    """The merged delta, (m, n), of deltas (m, n).

    Source: arXiv 2505.23117, section 4, with the released code's joint trim and its cut of small singular values.
    """
    found = joint_svd(deltas, p.cutoff)
    left, rows = found.left, found.right
    lengths = found.values[:, None].expand(len(deltas), -1, 1)
    del found  # frees the memory of what is overwritten below
    if p.renormalize:
        norms = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
        rows.div_(torch.where(norms == 0, 1.0, norms))
        lengths = lengths * norms
    rows = keep_largest_(rows, _kept(p, rows.numel()), all_ties=p.rule == "published").mul_(lengths)
    return LowRank(left, _average_of_elected(rows, weights), p.scale)


def _kept(p: DrmParams, size: int) -> int:
    return round(p.density * size) + 1 if p.rule == "published" else int(p.density * size)


def _average_of_elected(values: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Weighted mean, (...), of the entries of (t, ...) whose sign is that of their unweighted sum.

    Entries that cancel exactly elect no sign and give 0: in a basis of singular vectors, whose signs are arbitrary,
    a majority over other entries would be arbitrary too.
    """
    flat, merged = values.view(len(values), -1), torch.empty_like(values[0])
    factors = torch.tensor(weights, dtype=values.dtype).to(values.device).view(-1, 1)
    step = _COLUMNS if values.device.type == "cpu" else flat.shape[1]
    for part, out in zip(torch.split(flat, step, dim=1), torch.split(merged.view(-1), step), strict=True):
        sign = part.sum(dim=0).sign_()
        agreeing = part.mul_(sign).relu_().mul_(factors)
        counts = (agreeing != 0).sum(dim=0).clamp_(min=1)
        torch.sum(agreeing, dim=0, out=out).div_(counts).mul_(sign)
    return merged
