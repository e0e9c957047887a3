"""The matrix kernels that cost time: truncated singular value decomposition and polar factor, in float64.

Both leave out numerically null directions. Singular vectors of null directions are arbitrary, and a method that
gave them energy would add noise of the size of its result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hubmerge.spec import TensorGroup


@dataclass(frozen=True, slots=True)
class Svd:
    """``left @ diag(values) @ right``: singular triplets, the largest first, all float64.

    Shapes: left (m, r), values (r,), right (r, n); r may be 0.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    @property
    def rank(self) -> int:
        """Number of triplets."""
        return len(self.values)

    def top(self, r: int) -> Svd:
        """The first r triplets."""
        return Svd(self.left[:, :r], self.values[:r], self.right[:r])


def rank_tolerance(shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """Singular values up to this fraction of the largest are rounding errors of a matrix of that shape and dtype."""
    return max(shape) * torch.finfo(dtype).eps


def numerical_rank(values: torch.Tensor, tolerance: float) -> int:
    """How many singular values, (n,) in descending order, exceed ``tolerance`` times the largest."""
    return int((values > tolerance * values[0]).sum()) if len(values) else 0


def truncated_svd(
    matrix: torch.Tensor, k: int | None = None, *, tolerance: float | None = None, precision: torch.dtype | None = None
) -> Svd:
    """The largest singular triplets of a matrix.

    Everything is computed in float64. Float32 data goes through the Gram matrix of the smaller side, which is faster
    than decomposing the matrix, by a factor of 1.5 to 5, but squares the singular values: rounding moves each square
    by up to e = (m + n) · eps(float64) · Σσ², and the value σ and its vectors' inner products, relatively, by up to
    e / σ². The result is taken if that is at most max(m, n) · eps(float32), what a decomposition in float32 promises,
    for the smallest σ that is kept, and if e cannot blur which σ exceed the tolerance. Otherwise, and always for
    float64 data, the matrix itself is decomposed.

    Args:
        matrix: (m, n), float32 or float64. If it holds NaN or infinity, one triplet of NaN is returned.
        k: At most so many triplets; all by default.
        tolerance: Leave out σ ≤ tolerance · σ_max; by default, what may be rounding errors of the data.
        precision: Of the data, float32 or float64; by default, the matrix's dtype.
    """
    shape, precision = tuple(matrix.shape), precision or matrix.dtype
    matrix = matrix.double()
    most = min(shape) if k is None else min(k, *shape)
    tolerance = rank_tolerance(shape, precision) if tolerance is None else tolerance
    if not bool(torch.isfinite(matrix).all()):
        return Svd(*(matrix.new_full(s, torch.nan) for s in ((shape[0], 1), (1,), (1, shape[1]))))
    if not bool(matrix.any()):
        return Svd(*(matrix.new_zeros(s) for s in ((shape[0], 0), (0,), (0, shape[1]))))
    found = _through_gram(matrix, most, tolerance) if precision == torch.float32 else None
    if found is not None:
        return found
    found = Svd(*torch.linalg.svd(matrix, full_matrices=False))
    return found.top(min(most, numerical_rank(found.values, tolerance)))


def _through_gram(matrix: torch.Tensor, most: int, tolerance: float) -> Svd | None:
    """The triplets with float32 accuracy; None if the Gram matrix does not tell them accurately enough."""
    if matrix.shape[0] < matrix.shape[1]:
        found = _through_gram(matrix.T, most, tolerance)
        return None if found is None else Svd(found.right.T, found.values, found.left.T)
    m, n = matrix.shape
    gram = matrix.T @ matrix
    total = float(gram.trace())
    squares, vectors = torch.linalg.eigh(gram)
    del gram
    error = (m + n) * torch.finfo(torch.float64).eps * total
    floor = tolerance**2 * float(squares[-1])
    r = min(most, int((squares > floor).sum()))
    blurred = r < most and error > floor
    if r == 0 or blurred or error > m * torch.finfo(torch.float32).eps * float(squares[n - r]):
        return None
    values, right = squares[n - r :].flip(0).sqrt(), vectors[:, n - r :].flip(1)
    return Svd((matrix @ right).div_(values), values, right.T)


def polar_factor(matrix: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """The orthogonal factor of the polar decomposition, as a partial isometry: zero on null directions.

    Args:
        matrix: (m, n), float64; its columns or rows may be linearly dependent.
        precision: Of the data behind it: σ up to 1e-6 (float32) or 1e-10 (float64) of the largest counts as null.

    Returns:
        (m, n): orthonormal columns if m ≥ n and the rank is full, orthonormal rows if m ≤ n.
    """
    tolerance = 1e-6 if precision == torch.float32 else 1e-10
    found = truncated_svd(matrix, tolerance=tolerance, precision=precision)
    return found.left @ found.right


def is_matrix(group: TensorGroup, *, embeddings: bool = False) -> bool:
    """Whether a matrix method treats the tensor as a matrix: a linear layer's 2-D weight, on request an embedding."""
    return len(group.shape) == 2 and (group.kind == "linear" or (embeddings and group.kind == "embedding"))
