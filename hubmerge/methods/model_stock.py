"""Model Stock: move from the base towards the models' mean as far as the angles between their deltas suggest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import torch

from hubmerge.arithmetic import onto_base, weighted_sum
from hubmerge.spec import Method, Params, TensorGroup
from hubmerge.sums import Sums, inner_products

SMALLEST_DENOMINATOR = 1e-6
"""Below this, the interpolation has no finite answer and the base is kept."""
SMALLEST_NORM_PRODUCT = 1e-6
"""mergekit clamps the product of two deltas' norms to this."""


class ModelStockParams(Params):
    """Parameters of ``model_stock``."""

    rule: Literal["exact", "mergekit"] = "exact"
    """mergekit: norms whose product is below 1e-6 count as if it were 1e-6, which draws tiny tensors to the base."""


class ModelStock(Method):
    """``W0 + t · mean Δᵢ``, per tensor, with t = T c / (1 + (T - 1) c) and c the mean cosine between deltas."""

    name = "model_stock"
    summary = (
        "Interpolate each tensor between base and mean: the smaller the angles between deltas, the nearer the mean."
    )
    paper = "Model Stock: All we need is just a few fine-tuned models, Jang et al., 2024, arXiv 2403.19522"
    parameters = ModelStockParams
    min_models = 2

    def problem(self, p: ModelStockParams, weights: Sequence[float]) -> str | None:
        """The angles decide alone."""
        return None if all(w == 1 for w in weights) else f"takes no weights, but they are {list(weights)}"

    def begin(self, p: ModelStockParams) -> Sums:
        """Nothing is known yet."""
        return Sums()

    def observe(self, group: TensorGroup, p: ModelStockParams, stats: Any) -> Sums:
        """The chunk's part of the deltas' Gram matrix."""
        return inner_products([group.delta(i) for i in range(len(group))])

    def settle(self, stats: Any, total: Sums, p: ModelStockParams) -> Sums:
        """The Gram matrix."""
        return total.settled()

    def merge(self, group: TensorGroup, p: ModelStockParams, stats: Any | None) -> torch.Tensor:
        """The merged chunk, (n,)."""
        assert isinstance(stats, Sums)
        mean = weighted_sum(group.delta, [1.0] * len(group)).div_(len(group))
        floor = SMALLEST_NORM_PRODUCT if p.rule == "mergekit" else 0.0
        return onto_base(group.base(), mean, interpolation(stats.totals, len(group), floor))


def interpolation(gram: Sequence[float], count: int, smallest_norm_product: float = 0.0) -> float:
    """How far to go from the base (0) to the mean (1).

    Args:
        gram: Upper triangle of the deltas' Gram matrix, row by row.
        count: Number of deltas.
        smallest_norm_product: Lower bound of a cosine's denominator; a cosine with a zero delta is 0.
    """
    rows = iter(gram)
    entry = {(i, j): next(rows) for i in range(count) for j in range(i, count)}
    cosines = []
    for i, j in combinations(range(count), 2):
        norms = max(math.sqrt(entry[i, i]) * math.sqrt(entry[j, j]), smallest_norm_product)
        cosines.append(entry[i, j] / norms if norms else 0.0)
    cosine = math.fsum(cosines) / len(cosines)
    denominator = 1.0 + (count - 1) * cosine
    return count * cosine / denominator if abs(denominator) >= SMALLEST_DENOMINATOR else 0.0
