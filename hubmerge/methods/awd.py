"""Adaptive weight disentanglement: take off each task vector what they all share, until they are nearly orthogonal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from hubmerge.arithmetic import onto_base, scaled_, weighted_sum
from hubmerge.disentangle import inner_products_of_factors, multipliers, shared_by_adam
from hubmerge.linalg import averaged, concatenated, is_matrix
from hubmerge.spec import LowRank, Method, Params, Scope, TensorGroup
from hubmerge.sums import Sums, inner_products


class AwdParams(Params):
    """Parameters of ``awd``."""

    scale: float = 0.3
    """λ, which multiplies the merged delta; 0.3 suits eight tasks, the paper searches 0.3 to 1 on validation data."""
    alpha: float = Field(1e-4, ge=0.0)
    """How much the length of the shared part weighs against the cosines; 1e-4 is the middle of the paper's values."""
    solver: Literal["gram", "adam"] = "gram"
    """How the shared part is found.

    gram: by gradient descent, which needs only the task vectors' inner products and has the same result as on the
    vectors themselves; what is merged is a sum of deltas, each with a factor of its own. adam: by Adam, entry by entry.
    """
    granularity: Literal["model", "tensor", None] = None
    """Disentangle the model as a whole (published, default of gram) or each tensor by itself (default of adam)."""
    rest: Literal["base", "mean"] = "base"
    """What becomes of tensors other than linear weights of layers: the base's (published), or the deltas' mean."""
    steps: int = Field(1000, ge=0)
    """Steps of the descent, at most; gram ends earlier where no step lowers the objective any more."""
    learning_rate: float | None = Field(None, gt=0.0)
    """The step; by default 1e-4 for adam, and for gram a quarter of the task vectors' mean squared length.

    gram takes shorter steps where that one would raise the objective.
    """


@dataclass(frozen=True, slots=True)
class AwdStats:
    """The task vectors' inner products, then what each of them is multiplied by."""

    products: Sums
    multipliers: tuple[float, ...] = ()
    done: bool = False

    def __add__(self, other: AwdStats) -> AwdStats:
        return AwdStats(self.products + other.products)

    def wants(self, name: str, start: int = 0, stop: int | None = None) -> bool:
        """A name does not tell what it is; of tensors that do not count, nothing is read."""
        return True


class Awd(Method):
    """``W0 + λ Σ (wᵢ Δᵢ - δ)`` with the δ for which the ``wᵢ Δᵢ - δ`` are nearly orthogonal."""

    name = "awd"
    summary = (
        "Take off each delta what all share, so that the rest is nearly orthogonal, and add up; linear weights only."
    )
    paper = "Multi-Task Model Merging via Adaptive Weight Disentanglement, Xiong et al., 2024, arXiv 2411.18729"
    parameters = AwdParams

    def whole(self, p: AwdParams) -> bool:
        """Adam works on all entries of a tensor at once."""
        return p.solver == "adam"

    def exact(self, p: AwdParams) -> bool:
        """The inner products and what follows from them are; Adam's are not."""
        return p.solver == "gram"

    def scope(self, p: AwdParams) -> Scope:
        """As the granularity says."""
        return p.granularity or ("tensor" if p.solver == "adam" else "model")

    def problem(self, p: AwdParams, weights: Sequence[float]) -> str | None:
        """Adam would have to hold the whole model, once for every task."""
        if p.solver != "adam" or p.granularity != "model":
            return None
        return (
            "solver adam moves every entry of the shared part and cannot hold a whole model, but granularity is "
            "'model'; set granularity: tensor, or solver: gram"
        )

    def needs_layers(self, p: AwdParams) -> bool:
        """Unless the rest is averaged."""
        return p.rest == "base"

    def rank_problem(self, p: AwdParams, weights: Sequence[float]) -> str | None:
        """A sum of low-rank deltas is of low rank; Adam's shared part is not."""
        return None if p.solver == "gram" else "solver adam finds a shared part of full rank; solver gram does not"

    def begin(self, p: AwdParams) -> AwdStats | None:
        """Nothing is known yet."""
        return AwdStats(Sums()) if p.solver == "gram" else None

    def observe(self, group: TensorGroup, p: AwdParams, stats: AwdStats) -> AwdStats:
        """The part of the task vectors' inner products that lies in the chunk, or in the tensor if it is in factors."""
        if not _counts(group):
            return AwdStats(Sums())
        if (factors := group.all_factors()) is not None:
            found = inner_products_of_factors(factors)
        else:
            found = inner_products([group.delta(i) for i in range(len(group))])
        weights = [a * b for a, b in combinations_with_replacement(group.weights, 2)]
        return AwdStats(Sums(tuple(rows * weights for rows in found.rows)))

    def settle(self, stats: AwdStats, total: AwdStats, p: AwdParams) -> AwdStats:
        """Solve the problem of as many unknowns as there are models."""
        if not total.products.rows:
            return AwdStats(Sums(), done=True)
        products = total.products.settled().totals
        count = int((2 * len(products)) ** 0.5)
        gram = np.zeros((count, count))
        gram[np.triu_indices(count)] = products
        gram += np.triu(gram, 1).T
        return AwdStats(Sums(), multipliers(gram, p.alpha, p.steps, p.learning_rate), done=True)

    def merge(self, group: TensorGroup, p: AwdParams, stats: Any | None) -> torch.Tensor | LowRank:
        """The merged chunk, (n,); whole tensors as they come, and the delta as factors if all deltas are."""
        if not _counts(group):
            return averaged(group, p.scale) if p.rest == "mean" else _unchanged(group)
        if p.solver == "adam":
            return onto_base(group.base(), _disentangled_by_adam(group, p), p.scale)
        assert isinstance(stats, AwdStats)
        weights = [w * m for w, m in zip(group.weights, stats.multipliers, strict=True)]
        if (factors := group.all_factors()) is not None:
            return concatenated(factors, [w * p.scale for w in weights])
        return onto_base(group.base(), weighted_sum(group.delta, weights), p.scale)


def _counts(group: TensorGroup) -> bool:
    """Whether the tensor is a linear weight of a layer: the others' deltas say little about tasks.

    Source: arXiv 2411.18729, section 4.2.
    """
    return is_matrix(group) and group.layer is not None


def _unchanged(group: TensorGroup) -> torch.Tensor | LowRank:
    if (factors := group.all_factors()) is not None:
        return LowRank(factors[0].up[:, :0], factors[0].down[:0])
    return group.base()


def _disentangled_by_adam(group: TensorGroup, p: AwdParams) -> torch.Tensor:
    """Σ (wᵢ Δᵢ - δ) over the deltas that are not zero, (out, in)."""
    deltas = [scaled_(group.delta(i), w) for i, w in enumerate(group.weights)]
    vectors = [d.reshape(-1) for d in deltas if bool(d.any())]
    if not vectors:
        return deltas[0]
    shared = shared_by_adam(vectors, p.alpha, p.steps, p.learning_rate)
    total = weighted_sum(lambda i: vectors[i], [1.0] * len(vectors))
    return total.sub_(shared, alpha=len(vectors)).view(deltas[0].shape)
