"""Iso-CTS: leading directions of the summed deltas, joined by directions of each delta, with equal singular values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from hubmerge.linalg import (
    Delta,
    Svd,
    averaged,
    delta_of,
    dtype_of,
    is_matrix,
    polar_factor,
    rank_tolerance,
    shape_of,
    summed,
    truncated_svd,
)
from hubmerge.spec import LowRank, Method, Params, TensorGroup


class IsoCtsParams(Params):
    """Parameters of ``iso_cts``."""

    scale: float = 1.0
    """α, which multiplies the merged delta."""
    common_fraction: float = Field(0.8, ge=0.0, le=1.0)
    """Part of the directions that is taken from the sum of the deltas; the models share the rest equally."""


class IsoCts(Method):
    """``W0 + α mean(S) P(U) P(V)ᵀ`` where U, S, V hold triplets of the sum and of what it leaves of each delta."""

    name = "iso_cts"
    summary = (
        "Join leading singular vectors of the summed deltas with some of each delta, made orthogonal and equally long."
    )
    paper = (
        "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, Marczak et al., 2025, "
        "arXiv 2502.04959"
    )
    parameters = IsoCtsParams
    unit = "matrix"

    def rank_problem(self, p: IsoCtsParams, weights: Sequence[float]) -> None:
        """That of the sum."""

    def merge(self, group: TensorGroup, p: IsoCtsParams, stats: Any | None) -> torch.Tensor | LowRank:
        """The merged delta of a linear layer, (out, in), in factors; any other tensor with its base, as stored."""
        return _isotropic(group, p) if is_matrix(group) else averaged(group, p.scale)


def _isotropic(group: TensorGroup, p: IsoCtsParams) -> LowRank:
    """The merged delta, (out, in).

    Source: arXiv 2502.04959, algorithm 2. Directions are counted up to the rank of the sum, and null ones are left
    out; the released code counts up to the smaller side and gives null directions a share.
    """
    total = summed(group)
    whole = truncated_svd(total)
    own = directions_per_model(whole.rank, len(group), p.common_fraction)
    common = whole.top(whole.rank - own * len(group))
    parts = [common]
    if own:
        parts += [_rest(delta_of(group, i, w), common, own) for i, w in enumerate(group.weights)]
    values = torch.cat([part.values for part in parts])
    left = polar_factor(torch.cat([part.left for part in parts], dim=1), dtype_of(total))
    right = polar_factor(torch.cat([part.right for part in parts], dim=0), dtype_of(total))
    return LowRank(left, right, p.scale * float(values.mean()) if len(values) else 0.0)


def directions_per_model(rank: int, models: int, common_fraction: float) -> int:
    """How many directions each model contributes, so that with the common ones there are ``rank``."""
    return min(round((rank - int(rank * common_fraction)) / models), rank // models)


def _rest(delta: Delta, common: Svd, count: int) -> Svd:
    """The leading triplets of what the common left singular vectors leave of a delta, (out, in)."""
    rest: Delta
    if isinstance(delta, LowRank):
        up = delta.up.double()
        rest = LowRank(up - common.left @ (common.left.T @ up), delta.down.double(), delta.scale)
        size = float(truncated_svd(delta).values.norm())
    else:
        exact = delta.double()
        rest = exact - common.left @ (common.left.T @ exact)
        size = float(torch.linalg.vector_norm(exact))
    found = truncated_svd(rest, count, precision=dtype_of(delta))
    # What is small beside the delta itself is a rounding error, even if it is all that is left.
    floor = rank_tolerance(shape_of(delta), dtype_of(delta)) * size
    return found.top(int((~(found.values <= floor)).sum()))
