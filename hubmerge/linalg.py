"""The matrix kernels that cost time: singular value decompositions and polar factors, in float64 unless they say not.

All leave out numerically null directions. Singular vectors of null directions are arbitrary, and a method that
gave them energy would add noise of the size of its result.

A delta is a matrix, or a ``LowRank`` whose product is never formed: its decompositions are those of a core between the
orthonormal factors of its two sides (as in Core Space, arXiv 2509.17786), exact and thousands of times cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hubmerge import gram
from hubmerge.arithmetic import onto_base, scaled_, weighted_sum
from hubmerge.gram import Subspaces, gram_matrix, roots
from hubmerge.spec import LowRank, TensorGroup

Delta = torch.Tensor | LowRank
"""A matrix (out, in), or its factors."""
ACCURACY = 7e-5
"""Relative error, as estimated, that is accepted of results for float32 data: less than 1e-4 by a margin."""
_LARGE = 256
"""Rows and columns; what is smaller takes a moment, and is computed to all digits."""
_NULL = {torch.float32: 1e-6, torch.float64: 1e-10}
"""Directions of subspaces put together that count as shared: fractions of the largest singular value."""


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

    @property
    def T(self) -> Svd:  # noqa: N802 - torch's name
        """Of the transposed matrix."""
        return Svd(self.right.T, self.values, self.left.T)

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
    matrix: Delta, k: int | None = None, *, tolerance: float | None = None, precision: torch.dtype | None = None
) -> Svd:
    """The largest singular triplets of a matrix.

    Everything is computed in float64. Float32 data goes through the Gram matrix of the smaller side, which is faster
    than decomposing the matrix, by a factor of 1.5 to 5, but squares the singular values: rounding moves each square
    by up to e = (m + n) · eps(float64) · Σσ², and the value σ and its vectors' inner products, relatively, by up to
    e / σ². The result is taken if that is at most max(m, n) · eps(float32), what a decomposition in float32 promises,
    for the smallest σ that is kept, and if e cannot blur which σ exceed the tolerance. Otherwise, and always for
    float64 data, the matrix itself is decomposed.

    Args:
        matrix: (m, n), float32 or float64; or its factors. If it holds NaN or infinity, one triplet of NaN is returned.
        k: At most so many triplets; all by default.
        tolerance: Leave out σ ≤ tolerance · σ_max; by default, what may be rounding errors of the data.
        precision: Of the data, float32 or float64; by default, the matrix's dtype.
    """
    if isinstance(matrix, LowRank):
        return _svd_of_factors(matrix, k, tolerance, precision or matrix.up.dtype)
    shape, precision = (matrix.shape[0], matrix.shape[1]), precision or matrix.dtype
    matrix = matrix.double()
    most = min(shape) if k is None else min(k, *shape)
    tolerance = rank_tolerance(shape, precision) if tolerance is None else tolerance
    if not bool(torch.isfinite(matrix).all()):
        return _empty(matrix, shape, 1, torch.nan)
    if most == 0 or not bool(matrix.any()):
        return _empty(matrix, shape, 0)
    found = _through_gram(matrix, most, tolerance) if precision == torch.float32 else None
    if found is not None:
        return found
    found = Svd(*torch.linalg.svd(matrix, full_matrices=False))
    return found.top(min(most, numerical_rank(found.values, tolerance)))


def _empty(like: torch.Tensor, shape: tuple[int, int], rank: int, value: float = 0.0) -> Svd:
    m, n = shape
    return Svd(*(like.new_full(s, value, dtype=torch.float64) for s in ((m, rank), (rank,), (rank, n))))


def _svd_of_factors(factors: LowRank, k: int | None, tolerance: float | None, precision: torch.dtype) -> Svd:
    """The triplets of a product from those of the core between its sides' orthonormal bases."""
    up, down, shape = factors.up.double(), factors.down.double(), factors.shape
    tolerance = rank_tolerance(shape, precision) if tolerance is None else tolerance
    if not bool(torch.isfinite(up).all() & torch.isfinite(down).all()):
        return _empty(up, shape, 1, torch.nan)
    if min(up.shape) == 0 or min(down.shape) == 0:
        return _empty(up, shape, 0)
    left, outer = torch.linalg.qr(up)
    right, inner = torch.linalg.qr(down.T)
    core = Svd(*torch.linalg.svd((outer @ inner.T).mul_(factors.scale), full_matrices=False))
    if not bool(core.values.any()):
        return _empty(up, shape, 0)
    kept = numerical_rank(core.values, tolerance)
    core = core.top(kept if k is None else min(kept, k))
    return Svd(left @ core.left, core.values, core.right @ right.T)


def _through_gram(matrix: torch.Tensor, most: int, tolerance: float) -> Svd | None:
    """The triplets with float32 accuracy; None if the Gram matrix does not tell them accurately enough."""
    if matrix.shape[0] < matrix.shape[1]:
        found = _through_gram(matrix.T, most, tolerance)
        return None if found is None else found.T
    values, right = roots(gram_matrix(matrix), matrix.shape[0], most, tolerance)
    return Svd((matrix @ right).div_(values), values, right.T) if len(values) else None


def polar_factor(matrix: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """The orthogonal factor of the polar decomposition, as a partial isometry: zero on null directions.

    Large ones of float32 data are computed from the Gram matrix, in float32 or, if that is not as accurate as
    ``ACCURACY`` says, in float64; all others are singular vectors.

    Args:
        matrix: (m, n), its columns or rows may be linearly dependent.
        precision: Of the data behind it: σ up to 1e-6 (float32) or 1e-10 (float64) of the largest counts as null.

    Returns:
        (m, n), float32 or float64: orthonormal columns if m ≥ n and the rank is full, orthonormal rows if m ≤ n.
    """
    if precision == torch.float32 and _is_large(matrix):
        for dtype in (torch.float32, torch.float64):
            found = gram.polar_factor(matrix.to(dtype), matrix.new_zeros((), dtype=dtype), _NULL[precision])
            if found is not None and found[1] <= ACCURACY / 2:
                return found[0]
    exact = truncated_svd(matrix.double(), tolerance=_NULL[precision], precision=precision)
    return exact.left @ exact.right


def joined_subspaces(deltas: Sequence[Delta], k: int) -> tuple[list[Subspaces], torch.Tensor, torch.Tensor]:
    """Leading singular subspaces of matrices, and what makes all of them orthogonal to one another.

    Large float32 matrices are worked on in float32, if by the estimates of ``gram`` that moves the two polar factors,
    relatively, by no more than ``ACCURACY`` together, and if there is room for all directions beside each other.

    Args:
        deltas: Matrices (m, n), or factors.
        k: Directions of each; null ones are left out.

    Returns:
        The subspaces, and the polar factors (m, q) of their left sides and (q, n) of their right sides, all together.
    """
    precision = dtype_of(deltas[0])
    found = [_leading_subspaces(d, k) for d in deltas]
    errors = torch.cat([f.errors for f in found]).float()
    if bool(errors.any()) and len(errors) <= min(shape_of(deltas[0])):
        left, right = (gram.polar_factor(x.float(), errors, _NULL[precision]) for x in _sides(found))
        if left is not None and right is not None and left[1] + right[1] <= ACCURACY:
            return found, left[0], right[0]
    if bool(errors.any()):
        found = [_exact_subspaces(d, k) for d in deltas]
    left_side, right_side = _sides(found)
    return found, polar_factor(left_side, precision), polar_factor(right_side, precision)


def _sides(parts: Sequence[Subspaces]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([p.left for p in parts], dim=1), torch.cat([p.right for p in parts], dim=0)


def _leading_subspaces(delta: Delta, k: int) -> Subspaces:
    if isinstance(delta, LowRank) or delta.dtype != torch.float32 or not _is_large(delta):
        return _exact_subspaces(delta, k)
    return gram.leading_subspaces(delta, min(k, *delta.shape)) or _exact_subspaces(delta, k)


def _exact_subspaces(delta: Delta, k: int) -> Subspaces:
    found = truncated_svd(delta, k)
    return Subspaces(found.left, found.values.diag(), found.right, torch.zeros_like(found.values))


def _is_large(matrix: torch.Tensor) -> bool:
    """Whether it is worth while to be content with less than all digits; nor is it done for damaged matrices."""
    return min(matrix.shape) >= _LARGE and bool(torch.isfinite(matrix).all() & matrix.any())


def is_matrix(group: TensorGroup, *, embeddings: bool = False) -> bool:
    """Whether a matrix method treats the tensor as a matrix: a linear layer's 2-D weight, on request an embedding."""
    return len(group.shape) == 2 and (group.kind == "linear" or (embeddings and group.kind == "embedding"))


# --- deltas as matrices or as factors ---------------------------------------------------------------------------


def delta_of(group: TensorGroup, i: int, weight: float = 1.0) -> Delta:
    """``weight`` times model i's delta: as factors where it is known so, else as a matrix."""
    found = group.factors(i)
    if found is not None:
        return LowRank(found.up, found.down, found.scale * weight)
    return scaled_(group.delta(i), weight)


def shape_of(delta: Delta) -> tuple[int, int]:
    """(out, in)."""
    return delta.shape if isinstance(delta, LowRank) else (delta.shape[0], delta.shape[1])


def dtype_of(delta: Delta) -> torch.dtype:
    """The dtype of the data."""
    return delta.up.dtype if isinstance(delta, LowRank) else delta.dtype


def concatenated(deltas: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """``Σ wᵢ Δᵢ`` as factors side by side: exact, and of rank Σ rᵢ."""
    up = torch.cat([d.up * (d.scale * w) for d, w in zip(deltas, weights, strict=True)], dim=1)
    return LowRank(up, torch.cat([d.down for d in deltas], dim=0))


def summed(group: TensorGroup) -> Delta:
    """``Σ wᵢ Δᵢ``, as factors if all deltas are."""
    if (factors := group.all_factors()) is not None:
        return concatenated(factors, group.weights)
    total: torch.Tensor | None = None
    for i, weight in enumerate(group.weights):
        delta = delta_of(group, i, weight)
        if total is None:
            total = delta.dense() if isinstance(delta, LowRank) else delta
        elif isinstance(delta, LowRank):
            total.addmm_(delta.up, delta.down, alpha=delta.scale)
        else:
            total.add_(delta)
    assert total is not None
    return total


def averaged(group: TensorGroup, scale: float) -> torch.Tensor | LowRank:
    """What a matrix method makes of any other tensor: base + scale · mean wᵢ Δᵢ; of factors, the delta as factors."""
    if (factors := group.all_factors()) is not None:
        return concatenated(factors, [w * scale / len(group) for w in group.weights])
    return onto_base(group.base(), weighted_sum(group.delta, group.weights).div_(len(group)), scale)


def of_rank(delta: LowRank, rank: int) -> tuple[LowRank, float, float]:
    """The nearest product of factors with exactly ``rank`` columns (Eckart-Young), and what it costs.

    Returns:
        The factors, float64 and without a scale, columns beyond the delta's own rank zero; the squared Frobenius norms
        of what is left out and of the delta.
    """
    up, down = delta.up.double() * delta.scale, delta.down.double()
    total = float(((up.T @ up) * (down @ down.T)).sum())
    if delta.rank <= rank:
        missing = rank - delta.rank
        padded = torch.nn.functional.pad(up, (0, missing)), torch.nn.functional.pad(down, (0, 0, 0, missing))
        return LowRank(*padded), 0.0, total
    whole = truncated_svd(LowRank(up, down), tolerance=0.0, precision=torch.float64)
    kept = whole.top(rank)
    left_out = float(whole.values[rank:].square().sum())
    found, _, _ = of_rank(LowRank(kept.left * kept.values, kept.right), rank)
    return found, left_out, total


@dataclass(frozen=True, slots=True)
class JointSvd:
    """``[Δ₁ … Δₜ] = left @ diag(values) @ [right₁ … rightₜ]``, all float64.

    Shapes: left (m, q), values (q,), right (t, q, n).
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


def joint_svd(deltas: Sequence[Delta], cutoff: float) -> JointSvd:
    """The singular triplets of matrices side by side, without those up to ``cutoff`` of the largest value.

    A delta with factors takes part with as many columns as it has rank: Δ = C Qᵀ with orthonormal Q, and the singular
    vectors of [… C …] times Q are those of [… Δ …].

    Args:
        deltas: Matrices (m, n), or factors.
        cutoff: Fraction of the largest singular value; at least what may be rounding errors of the data is left out.
    """
    thin = [_columns(d) for d in deltas]
    m, n = shape_of(deltas[0])
    precision = dtype_of(deltas[0])
    tolerance = max(cutoff, rank_tolerance((m, n * len(deltas)), precision))
    left, values, write = _side_by_side([columns for columns, _ in thin], tolerance, precision)
    noise = rank_tolerance((m, n * len(deltas)), torch.float64) * values[:1] / values
    rows = left.new_empty(len(deltas), len(values), n)
    for i, (row, (columns, basis)) in enumerate(zip(rows, thin, strict=True)):
        part = row if basis is None else left.new_empty(len(values), columns.shape[1])
        write(i, part)
        # A delta that has no part in a vector gets exact zeros there: renormalised, rounding errors would count.
        part[torch.linalg.vector_norm(part, dim=1) <= noise] = 0.0
        if basis is not None:
            torch.mm(part, basis.T, out=row)
    return JointSvd(left, values, rows)


def _side_by_side(
    blocks: Sequence[torch.Tensor], tolerance: float, precision: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, Callable[[int, torch.Tensor], object]]:
    """Left vectors and values of ``[… block …]``, and what writes block i's part of the right ones into (q, c).

    As ``truncated_svd`` does it; through the Gram matrix, the blocks need not be put together in float64.
    """
    m, width = blocks[0].shape[0], sum(b.shape[1] for b in blocks)
    if precision == torch.float32 and 0 < m <= width and all(bool(torch.isfinite(b).all()) for b in blocks):
        total = blocks[0].new_zeros(m, m, dtype=torch.float64)
        for block in blocks:
            total += gram_matrix(block.double().T)
        values, left = roots(total, width, m, tolerance)
        if len(values):
            onto = (left / values).T
            return left, values, lambda i, out: torch.mm(onto, blocks[i].double(), out=out)
    stacked = torch.cat([b.double() for b in blocks], dim=1)
    found = truncated_svd(stacked, tolerance=tolerance, precision=precision)
    parts = torch.split(found.right, [b.shape[1] for b in blocks], dim=1)
    return found.left, found.values, lambda i, out: out.copy_(parts[i])


def _columns(delta: Delta) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A matrix (m, c) and an orthonormal (n, c), None for the identity, whose product C Qᵀ is the delta."""
    if not isinstance(delta, LowRank):
        return delta, None
    if not bool(torch.isfinite(delta.down).all()):  # QR would not let them through
        return delta.up.double() * torch.nan, torch.zeros_like(delta.down.T, dtype=torch.float64)
    basis, inner = torch.linalg.qr(delta.down.double().T)
    return (delta.up.double() @ inner.T).mul_(delta.scale), basis
