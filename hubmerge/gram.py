"""Subspaces and polar factors through Gram matrices: a fraction of what the singular value decomposition costs.

A Gram matrix squares singular values and so loses small ones. What is computed here comes with an estimate of its
error, or not at all; who calls has a slower way. The estimates are of first order, and no bounds: rounding is taken to
change a Gram matrix by little, and to couple directions on the two sides of a cut as it is measured to couple those
before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hubmerge.lapack import eigenpairs

_BLOCKS = 8
_OUTLIERS = 32
"""How many of the largest directions are looked at for outliers."""
_STEPS = 6
_APART = 4.0
"""Outliers are at least this many times larger than the last of those: so many steps find them to 4⁻¹² = 6e-8."""
_NEAR = 8
"""The last eighth of the kept directions, and no fewer than these, stand for what lies around the cut."""
_LEAST = 1e-5
"""Squares below this fraction of the largest are little else than rounding, in float32."""
_ROUNDING = 8
"""How many eps there are in what is called rounded; generous."""
_SAMPLE = 64
"""Columns of a polar factor by which it is judged."""
_WEAK = {torch.float32: 0.1, torch.float64: 1e-3}
"""Fraction of the largest singular value below which the Gram matrix is not relied on."""


@dataclass(frozen=True, slots=True)
class Subspaces:
    """``left @ core @ right``: the part of a matrix between its leading left and right singular subspaces.

    Shapes: left (m, r), core (r, r), right (r, n); r may be 0. Left's columns and right's rows are orthonormal up to
    ``errors``.
    """

    left: torch.Tensor
    core: torch.Tensor
    right: torch.Tensor
    errors: torch.Tensor
    """Of each direction, the length of the part outside the true subspace, by estimate."""


def gram_matrix(matrix: torch.Tensor) -> torch.Tensor:
    """``matrix.T @ matrix``, for little more than half of the operations."""
    n = matrix.shape[1]
    found = matrix.new_empty(n, n)
    step = max(-(-n // _BLOCKS), 1)
    for a in range(0, n, step):
        b = min(a + step, n)
        found[a:, a:b] = matrix[:, a:].T @ matrix[:, a:b]
        found[a:b, b:] = found[b:, a:b].T
    return found


def roots(gram: torch.Tensor, m: int, most: int, tolerance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The singular values and vectors that a Gram matrix tells with float32 accuracy, or none.

    Args:
        gram: (n, n), float64, of a matrix (m, n) with m ≥ n.
        m: The longer side.
        most: So many at most.
        tolerance: Leave out σ ≤ tolerance · σ_max.
    """
    n = len(gram)
    error = (m + n) * torch.finfo(torch.float64).eps * float(gram.trace())
    squares, vectors = eigenpairs(gram, most)
    floor = tolerance**2 * float(squares[0])
    r = int((squares > floor).sum())
    blurred = r < most and error > floor
    if r and (blurred or error > m * torch.finfo(torch.float32).eps * float(squares[r - 1])):
        r = 0
    return squares[:r].sqrt(), vectors[:, :r]


def leading_subspaces(matrix: torch.Tensor, k: int) -> Subspaces | None:
    """The k leading singular directions of a float32 matrix, in float32; None where they are known to be inaccurate.

    The right ones are eigenvectors of the Gram matrix. Outliers are taken out first: rounding is relative to the
    largest square. The left ones are an orthonormal basis of the images of the right ones, and the core is what makes
    the product those images, whatever the directions are. What remains is that directions mix across the cut, by e /
    (λᵢ - λⱼ) if rounding couples them by e, with squared singular values λ.

    Args:
        matrix: (m, n), float32, finite.
        k: At least 1, at most min(m, n). None is returned if that leaves fewer than 9 beside the outliers.
    """
    if matrix.shape[0] < matrix.shape[1]:
        found = leading_subspaces(matrix.T, k)
        return None if found is None else Subspaces(found.right.T, found.core.T, found.left.T, found.errors)
    outliers = _outliers(matrix, k)
    rest = matrix - (matrix @ outliers) @ outliers.T if outliers.shape[1] else matrix
    wanted = k - outliers.shape[1]
    if wanted <= _NEAR:
        return None
    squares, vectors = eigenpairs(gram_matrix(rest), min(wanted + 1, matrix.shape[1]))
    del rest
    if not float(squares[wanted - 1]) > _LEAST * float(squares[0]):
        return None
    right = torch.cat([outliers, vectors[:, :wanted]], dim=1)
    images = matrix @ right
    lengths = torch.linalg.vector_norm(images, dim=0)
    overlaps = gram_matrix(images.div_(lengths))
    skew = gram_matrix(right)
    skew.diagonal().sub_(1.0)
    upper, failed = torch.linalg.cholesky_ex(overlaps, upper=True)
    if int(failed):
        return None
    overlaps.diagonal().sub_(1.0)
    errors = skew.square().sum(dim=0)
    if k < matrix.shape[1]:
        errors += _mixing(lengths.square(), squares[wanted], overlaps, skew).square()
    left = torch.linalg.solve_triangular(upper, images, upper=True, left=False)
    return Subspaces(left, upper.mul_(lengths), right.T, errors.sqrt_())


def _outliers(matrix: torch.Tensor, k: int) -> torch.Tensor:
    """Orthonormal right singular vectors (n, h), h < k, of singular values far above most others; h may be 0."""
    n = matrix.shape[1]
    basis = torch.randn(n, min(_OUTLIERS, n), generator=torch.Generator().manual_seed(0)).to(matrix)
    for _ in range(_STEPS):
        basis = torch.linalg.qr(matrix.T @ (matrix @ basis)).Q
    _, values, rotation = torch.linalg.svd(matrix @ basis, full_matrices=False)
    h = min(int((values > _APART * values[-1]).sum()), k - 1)
    found: torch.Tensor = basis @ rotation[:h].T
    return found


def _mixing(squares: torch.Tensor, behind: torch.Tensor, overlaps: torch.Tensor, skew: torch.Tensor) -> torch.Tensor:
    """What each direction before the cut has of those behind it, (k,).

    Args:
        squares: Squared singular values of the kept directions, (k,).
        behind: That of the first one that is not kept.
        overlaps: (k, k), of the kept directions' images of length 1, minus the identity.
        skew: (k, k), of the kept directions, minus the identity.
    """
    b = max(len(squares) // _NEAR, _NEAR)
    last = squares[-b:]
    coupling = overlaps[-b:, -b:] * (last.sqrt() * last.sqrt()[:, None]) - skew[-b:, -b:] * (last + last[:, None]) / 2
    coupling.diagonal().zero_()
    e = coupling.norm() / (b * (b - 1)) ** 0.5
    # At even distances s behind the cut, the sum of 1 / distance² from a direction d before it is about 1 / (s d).
    tiny = torch.finfo(squares.dtype).tiny
    spacing, before = ((last[0] - last[-1]) / (b - 1)).clamp(min=tiny), (squares - behind).clamp_(min=tiny)
    squared = (spacing * before).reciprocal_()
    squared[-1] += before[-1] ** -2
    return squared.sqrt_().mul_(e)


def polar_factor(matrix: torch.Tensor, errors: torch.Tensor, tolerance: float) -> tuple[torch.Tensor, float] | None:
    """The orthogonal factor of the polar decomposition, zero on null directions, and an estimate of its error.

    The matrix times the inverse root of its Gram matrix. Rounding moves that by e / σ², relatively, for a direction of
    singular value σ and e ≈ eps · σ_max²; so the weak directions, up to 1/10 (float32) or 1/1000 (float64) of the
    largest, are left to a decomposition of what the matrix makes of them, in float64 and orthogonal to all others.
    The two do not mix but by e / σ² of the least strong one.

    Args:
        matrix: (m, n), float32 or float64, finite, not all zero.
        errors: Lengths of its columns' errors (of its rows', if those are longer), besides rounding.
        tolerance: Singular values up to this fraction of the largest count as null.

    Returns:
        The factor, of the matrix's shape and dtype, and its relative error in the Frobenius norm: what comes of the
        matrix's errors, by estimate, and of rounding, as measured. None if a quarter of the directions is weak.
    """
    if matrix.shape[0] < matrix.shape[1]:
        found = polar_factor(matrix.T, errors, tolerance)
        return None if found is None else (found[0].T, found[1])
    gram = gram_matrix(matrix)
    errors = torch.hypot(errors, _ROUNDING * torch.finfo(matrix.dtype).eps * gram.diagonal().sqrt())
    squares, vectors = eigenpairs(gram)
    del gram
    largest = float(squares[0]) ** 0.5
    strong = int((squares > (_WEAK[matrix.dtype] * largest) ** 2).sum())
    if strong < 0.75 * len(squares):
        return None
    roots = vectors[:, :strong] * squares[:strong] ** -0.25
    factor = matrix @ gram_matrix(roots.T)
    values = squares[:strong].sqrt()
    if strong < len(squares):
        part, weak, others = _weak_part(matrix, factor, vectors[:, strong:], tolerance * largest)
        factor.addmm_(part, weak.T)
        values, vectors = torch.cat([values, others]), torch.cat([vectors[:, :strong], weak], dim=1)
    return factor, _inherited_error(values, vectors, errors) + _defect(factor)


def _weak_part(
    matrix: torch.Tensor, factor: torch.Tensor, weak: torch.Tensor, null: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular triplets (m, r), (n, r), (r,) of directions (n, s), for what ``factor``, of the others, leaves."""
    images = matrix.double() @ weak.double()
    for _ in range(2):
        images -= factor @ (factor.T @ images.to(factor.dtype))
    left, values, right = torch.linalg.svd(images, full_matrices=False)
    kept = int((values > null).sum())
    return left[:, :kept].to(weak.dtype), weak @ right[:kept].T.to(weak.dtype), values[:kept].to(weak.dtype)


def _defect(factor: torch.Tensor) -> float:
    """How far P Pᵀ P is from P, relatively, as measured for some columns spread over the matrix."""
    some = factor[:, :: max(factor.shape[1] // _SAMPLE, 1)]
    defect = torch.linalg.vector_norm(factor @ (factor.T @ some) - some)
    return float(defect / torch.linalg.vector_norm(some))


def _inherited_error(values: torch.Tensor, vectors: torch.Tensor, errors: torch.Tensor) -> float:
    """What errors in a matrix's columns do to its polar factor, relatively.

    With singular values σ and errors A between left and right singular vectors it moves by (Aᵢⱼ - Aⱼᵢ) / (σᵢ + σⱼ).
    A column's error is taken to have no direction of its own.

    Args:
        values: Singular values (r,).
        vectors: Right singular vectors (n, r).
        errors: Lengths (n,).
    """
    squared = vectors.square().T @ errors.square()
    pairs = (squared[:, None] + squared) / (values[:, None] + values).square()
    pairs.diagonal().zero_()
    return math.sqrt(float(pairs.sum())) / max(len(values), 1)
