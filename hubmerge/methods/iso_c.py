"""Iso-C: the sum of the deltas with all its singular values made equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hubmerge.linalg import averaged, is_matrix, summed, truncated_svd
from hubmerge.spec import LowRank, Method, Params, TensorGroup


class IsoCParams(Params):
    """Parameters of ``iso_c``."""

    scale: float = 1.0
    """α, which multiplies the merged delta."""


class IsoC(Method):
    """``W0 + α mean(S) U Vᵀ`` where ``Σ wᵢ Δᵢ = U S Vᵀ``."""

    name = "iso_c"
    summary = (
        "Add up the weighted deltas and give all singular values of the sum their mean; average what is no matrix."
    )
    paper = (
        "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, Marczak et al., 2025, "
        "arXiv 2502.04959"
    )
    parameters = IsoCParams
    unit = "matrix"

    def rank_problem(self, p: IsoCParams, weights: Sequence[float]) -> None:
        """That of the sum."""

    def merge(self, group: TensorGroup, p: IsoCParams, stats: Any | None) -> torch.Tensor | LowRank:
        """The merged delta of a linear layer, (out, in), in factors; any other tensor with its base, as stored."""
        if not is_matrix(group):
            return averaged(group, p.scale)
        # Null directions get no share: the released code gives them one, and so adds noise to low-rank deltas.
        found = truncated_svd(summed(group))
        return LowRank(found.left, found.right, p.scale * float(found.values.mean()) if found.rank else 0.0)
