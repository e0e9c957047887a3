"""TSV-Merge: keep each delta's leading singular vectors, make them orthogonal across tasks, and add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from hubmerge.linalg import averaged, delta_of, is_matrix, joined_subspaces
from hubmerge.spec import Kind, LowRank, Method, Params, TensorGroup


class TsvMergeParams(Params):
    """Parameters of ``tsv_merge``."""

    scale: float = 1.0
    """α, which multiplies the merged delta."""
    rank: int | None = Field(None, ge=1)
    """Singular vectors kept of each delta; by default the matrix's smaller side divided by the number of models."""
    include_embeddings: bool = False
    """Also decompose embeddings; otherwise their deltas are averaged, as those of all other tensors are."""


class TsvMerge(Method):
    """``W0 + α P(U) Σ P(V)ᵀ`` where U, Σ, V concatenate the deltas' singular triplets and P orthogonalises."""

    name = "tsv_merge"
    summary = (
        "Keep each delta's leading singular vectors and make them orthogonal across models; average what is no matrix."
    )
    paper = (
        "Task Singular Vectors: Reducing Task Interference in Model Merging, Gargiulo et al., 2025, arXiv 2412.00081"
    )
    parameters = TsvMergeParams
    unit = "matrix"

    def matrices(self, p: TsvMergeParams) -> tuple[Kind, ...]:
        """Embeddings too, on request."""
        return ("linear", "embedding") if p.include_embeddings else ("linear",)

    def rank_problem(self, p: TsvMergeParams, weights: Sequence[float]) -> None:
        """At most the sum of the deltas' ranks."""

    def merge(self, group: TensorGroup, p: TsvMergeParams, stats: Any | None) -> torch.Tensor | LowRank:
        """The merged delta of a linear layer, (out, in), in factors; any other tensor with its base, as stored."""
        if is_matrix(group, embeddings=p.include_embeddings):
            return _orthogonalised_sum(group, p)
        return averaged(group, p.scale)


def _orthogonalised_sum(group: TensorGroup, p: TsvMergeParams) -> LowRank:
    """The merged delta, (out, in).

    Source: arXiv 2412.00081, algorithm 1. Directions that tasks share exactly enter once; the released code
    fills the ones that become free with arbitrary vectors.
    """
    k = max(1, min(group.shape) // len(group)) if p.rank is None else p.rank
    found, left, right = joined_subspaces([delta_of(group, i, w) for i, w in enumerate(group.weights)], k)
    parts = torch.split(left, [len(f.core) for f in found], dim=1)
    up = torch.cat([part @ f.core.to(part.dtype) for part, f in zip(parts, found, strict=True)], dim=1)
    return LowRank(up, right.to(up.dtype), p.scale)
