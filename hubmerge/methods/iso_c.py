"""Iso-C: the sum of the deltas with all its singular values made equal."""

from __future__ import annotations

from typing import Any

import torch

from hubmerge.arithmetic import onto_base, weighted_sum
from hubmerge.linalg import is_matrix, truncated_svd
from hubmerge.spec import Method, Params, TensorGroup


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

    def merge(self, group: TensorGroup, p: IsoCParams, stats: Any | None) -> torch.Tensor:
        """The merged tensor: (out, in) for a linear layer, else as stored."""
        total = weighted_sum(group.delta, group.weights)
        if not is_matrix(group):
            return onto_base(group.base(), total.div_(len(group)), p.scale)
        # Null directions get no share: the released code gives them one, and so adds noise to low-rank deltas.
        found = truncated_svd(total)
        merged = (found.left @ found.right).mul_(found.values.mean()) if found.rank else torch.zeros_like(total)
        return onto_base(group.base(), merged.to(total.dtype), p.scale)
