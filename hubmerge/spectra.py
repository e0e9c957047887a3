"""The singular values of task vectors, and how much their leading singular subspaces get in one another's way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hubmerge.gram import gram_matrix
from hubmerge.lapack import eigenpairs
from hubmerge.linalg import Delta, Svd, dtype_of, numerical_rank, rank_tolerance, shape_of, truncated_svd
from hubmerge.spec import LowRank
from hubmerge.sums import Doubles

SMALL = 256
"""Rows or columns up to which a matrix is decomposed itself, and not through its Gram matrix."""
_ROWS = 1024
_BLURRED = 1e-4
"""Of the smallest squared singular value that is kept: what the Gram matrix's rounding may be, at the very most."""
_DIGITS = 7


@dataclass(frozen=True, slots=True)
class Spectra:
    """The singular values of T deltas of one weight, and how much their leading singular subspaces share."""

    ranks: tuple[int, ...]
    """1, 2, 4, … up to the smaller side of the matrix."""
    squares: Doubles
    """Sums of the squares of so many of the largest singular values, (T, len(ranks))."""
    kept: int
    """Triplets of each delta that are compared: the smaller side divided by T, what ``tsv_merge`` keeps."""
    interference: float
    """Singular task interference ``‖(UᵀU - I) Σ (VᵀV - I)‖₁``, entrywise."""
    induced: float
    """The same with the matrix norm that the 1-norm of vectors induces: the largest sum of a column."""
    nuclear: float
    """Sum of the singular values compared."""

    @property
    def energy(self) -> Doubles:
        """Fractions of each delta's squared length in its best approximation of each rank, (T, len(ranks))."""
        with np.errstate(invalid="ignore"):
            found: Doubles = self.squares / self.squares[:, -1:]
        return found

    @property
    def relative_interference(self) -> float:
        """Interference over the sum of the singular values in it: the deltas' lengths cancel; NaN if all are 0."""
        return self.interference / self.nuclear if self.nuclear else math.nan

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "ranks": list(self.ranks),
            "energy": [numbers(row) for row in self.energy],
            "compared_rank": self.kept,
            "interference": number(self.interference),
            "interference_induced": number(self.induced),
            "interference_relative": number(self.relative_interference),
        }


def measure_spectra(deltas: Iterable[Delta], count: int) -> Spectra:
    """Decompose the deltas of one weight, one after the other, and compare them.

    Directions that a delta numerically does not have take no part.

    Args:
        deltas: Matrices (out, in), or factors; each is asked for when the one before is done with.
        count: How many they are.

    Source: Task Singular Vectors, Gargiulo et al., 2025, arXiv 2412.00081, section 3.2; the norm is not said there.
    """
    kept, squares, found = 0, [], []
    ranks: tuple[int, ...] = ()
    for delta in deltas:
        smaller = min(shape_of(delta))
        kept = max(1, smaller // count)
        ranks = _doubling(smaller)
        energies, leading = decomposed(delta, kept)
        sums = np.cumsum(energies)
        squares.append([sums[min(r, len(sums)) - 1] if len(sums) else 0.0 for r in ranks])
        found.append(leading)
        del delta
    left = _apart([f.left.T for f in found])
    right = _apart([f.right for f in found])
    values = torch.cat([f.values for f in found])
    scores = (left.mul_(values) @ right).abs_()
    return Spectra(
        ranks=ranks,
        squares=np.array(squares),
        kept=kept,
        interference=float(scores.sum()),
        induced=float(scores.sum(0).max()) if scores.numel() else 0.0,
        nuclear=float(values.sum()),
    )


def _doubling(most: int) -> tuple[int, ...]:
    return (*(1 << i for i in range((most - 1).bit_length())), most)


def _apart(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inner products of all rows of the parts, (r, n) each, minus the identity: exact zeros within a part."""
    rows = []
    for i, a in enumerate(parts):
        # Within a part the vectors are orthonormal; what a product leaves there is rounding.
        rows.append(torch.cat([a.new_zeros(len(a), len(b)) if i == j else a @ b.T for j, b in enumerate(parts)], dim=1))
    return torch.cat(rows)


def decomposed(delta: Delta, k: int) -> tuple[Doubles, Svd]:
    """All squared singular values, in descending order, and the k leading triplets, without null ones.

    Small matrices, factors and float64 data are decomposed in float64. Large float32 ones go through the Gram matrix,
    in float64, unless its rounding could blur the triplets.
    """
    shape, precision = shape_of(delta), dtype_of(delta)
    tolerance = rank_tolerance(shape, precision)
    if not isinstance(delta, LowRank) and precision == torch.float32 and min(shape) > SMALL:
        found = _through_gram(delta, k, tolerance) if shape[0] >= shape[1] else None
        if shape[0] < shape[1] and (turned := _through_gram(delta.T, k, tolerance)) is not None:
            found = turned[0], turned[1].T
        if found is not None:
            return found
    whole = truncated_svd(delta, tolerance=0.0, precision=torch.float64)
    top = whole.top(min(k, numerical_rank(whole.values, tolerance)))
    return whole.values.square().numpy(), top


def _through_gram(matrix: torch.Tensor, k: int, tolerance: float) -> tuple[Doubles, Svd] | None:
    """As ``decomposed``, for (m, n) with m ≥ n; the matrix is never held in float64."""
    blocks = [matrix[i : i + _ROWS] for i in range(0, len(matrix), _ROWS)]
    gram = gram_matrix(blocks[0].double())
    for block in blocks[1:]:
        gram += gram_matrix(block.double())
    if not bool(torch.isfinite(gram).all()):
        return None
    error = sum(matrix.shape) * torch.finfo(torch.float64).eps * float(gram.trace())
    squares, vectors = eigenpairs(gram)
    del gram
    squares = squares.clamp(min=0.0)
    values = squares[:k].sqrt()
    values = values[: numerical_rank(values, tolerance)]
    if len(values) and error > _BLURRED * float(values[-1]) ** 2:
        return None
    right = vectors[:, : len(values)].contiguous()
    left = torch.cat([block.double() @ right for block in blocks]).div_(values)
    return squares.numpy(), Svd(left, values, right.T)


def numbers(values: Iterable[float]) -> list[float | None]:
    """Seven digits of each, None for NaN."""
    return [number(value) for value in values]


def number(value: float) -> float | None:
    """Seven digits of it, None for NaN and infinity: what JSON can say."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
