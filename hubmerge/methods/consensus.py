"""Consensus merging: add up the deltas, and keep only the entries that several of the models rely on."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from hubmerge.arithmetic import onto_base, scaled_, sum_all
from hubmerge.masks import tall_mask
from hubmerge.spec import Method, Params, TensorGroup


class ConsensusParams(Params):
    """Parameters of ``consensus``."""

    scale: float = 0.3
    """λ, which multiplies the merged delta; 0.3 as for task arithmetic, of which this keeps a part of the entries."""
    mask_lambda: float = Field(0.4, ge=0.0, json_schema_extra={"per_model": True})
    """A model relies on an entry if its own delta exceeds this multiple of what the others add up to there.

    0.4 is the middle of the values searched for the paper, 0.2 to 0.6.
    """
    min_tasks: int = Field(2, ge=0)
    """An entry is kept if at least so many models rely on it: 2 drops what serves nobody or a single model.

    1 drops only what serves nobody, 0 nothing (task arithmetic); more than there are models leaves the base.
    """


class Consensus(Method):
    """``W0 + λ [Σ mᵢ ≥ k] ⊙ Σ wᵢ Δᵢ`` with masks mᵢ of the entries where ``|wᵢ Δᵢ| > λᵢ |Σⱼ wⱼ Δⱼ − wᵢ Δᵢ|``."""

    name = "consensus"
    summary = "Add up the weighted deltas and keep the entries that at least two models rely on."
    paper = (
        "Localizing Task Information for Improved Model Merging and Compression (TALL-masks), Wang et al., 2024, "
        "arXiv 2405.07813"
    )
    parameters = ConsensusParams

    def merge(self, group: TensorGroup, p: ConsensusParams, stats: Any | None) -> torch.Tensor:
        """The merged chunk, (n,).

        Source: arXiv 2405.07813, section 5.
        """
        deltas = [scaled_(group.delta(i), w) for i, w in enumerate(group.weights)]
        total = sum_all(deltas)
        relying = torch.zeros_like(total, dtype=torch.int16)
        for delta, q in zip(deltas, group.params, strict=True):
            relying += tall_mask(delta, total, q.mask_lambda)
        return onto_base(group.base(), total.mul_(relying >= p.min_tasks), p.scale)
