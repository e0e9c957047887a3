"""Iso-CTS: leading directions of the summed deltas, joined by directions of each delta, with equal singular values."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from hubmerge.arithmetic import onto_base, scaled_, weighted_sum
from hubmerge.linalg import Svd, is_matrix, polar_factor, rank_tolerance, truncated_svd
from hubmerge.spec import Method, Params, TensorGroup


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

    def merge(self, group: TensorGroup, p: IsoCtsParams, stats: Any | None) -> torch.Tensor:
        """The merged tensor: (out, in) for a linear layer, else as stored."""
        total = weighted_sum(group.delta, group.weights)
        merged = _isotropic(group, total, p.common_fraction) if is_matrix(group) else total.div_(len(group))
        return onto_base(group.base(), merged, p.scale)


def _isotropic(group: TensorGroup, total: torch.Tensor, common_fraction: float) -> torch.Tensor:
    """The merged delta, (out, in), of deltas whose weighted sum is ``total``.

    Source: arXiv 2502.04959, algorithm 2. Directions are counted up to the rank of the sum, and null ones are left
    out; the released code counts up to the smaller side and gives null directions a share.
    """
    whole = truncated_svd(total)
    own = directions_per_model(whole.rank, len(group), common_fraction)
    common = whole.top(whole.rank - own * len(group))
    parts = [common]
    if own:
        parts += [_rest(scaled_(group.delta(i), w), common, own) for i, w in enumerate(group.weights)]
    values = torch.cat([part.values for part in parts])
    if not len(values):
        return torch.zeros_like(total)
    left = polar_factor(torch.cat([part.left for part in parts], dim=1), total.dtype)
    right = polar_factor(torch.cat([part.right for part in parts], dim=0), total.dtype)
    return (left @ right).mul_(values.mean()).to(total.dtype)


def directions_per_model(rank: int, models: int, common_fraction: float) -> int:
    """How many directions each model contributes, so that with the common ones there are ``rank``."""
    return min(round((rank - int(rank * common_fraction)) / models), rank // models)


def _rest(delta: torch.Tensor, common: Svd, count: int) -> Svd:
    """The leading triplets of what the common left singular vectors leave of a delta, (out, in)."""
    exact = delta.double()
    rest = exact - common.left @ (common.left.T @ exact)
    found = truncated_svd(rest, count, precision=delta.dtype)
    # What is small beside the delta itself is a rounding error, even if it is all that is left.
    floor = rank_tolerance(tuple(delta.shape), delta.dtype) * float(torch.linalg.vector_norm(exact))
    return found.top(int((~(found.values <= floor)).sum()))
