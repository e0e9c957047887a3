"""Truncated singular value decomposition and polar factor: accuracy, null directions, when the short cut is left."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge import linalg
from hubmerge.linalg import polar_factor, truncated_svd

law = settings(deadline=None, derandomize=True, max_examples=40)
EPS32 = torch.finfo(torch.float32).eps


def orthonormal(m: int, n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64)).Q


def with_spectrum(m: int, n: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """An (m, n) float64 matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    r = len(values)
    return orthonormal(m, r, generator) * values @ orthonormal(n, r, generator).T


def deviation(vectors: torch.Tensor) -> float:
    """How far the columns are from orthonormal, as a spectral norm."""
    r = vectors.shape[1]
    return float(torch.linalg.matrix_norm(vectors.T @ vectors - torch.eye(r, dtype=vectors.dtype), ord=2))


@law
@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(0, 30),
    st.floats(0.0, 12.0),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 9),
)
def test_triplets_are_as_accurate_as_promised(
    m: int, n: int, rank: int, decades: float, dtype: torch.dtype, seed: int
) -> None:
    r = min(m, n, rank)
    matrix = with_spectrum(m, n, torch.logspace(0, -decades, r, dtype=torch.float64), seed).to(dtype)
    exact = torch.linalg.svdvals(matrix.double())
    found = truncated_svd(matrix)
    tolerance = max(m, n) * torch.finfo(dtype).eps
    assert found.rank == int((exact > tolerance * (exact[0] if len(exact) else 0)).sum())
    assert found.left.dtype == found.values.dtype == found.right.dtype == torch.float64
    lapack = 100 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(found.values, exact[: found.rank], rtol=tolerance, atol=lapack)
    assert deviation(found.left) <= tolerance + lapack
    assert deviation(found.right.T) <= tolerance + lapack
    rebuilt = found.left * found.values @ found.right
    left_out = float(exact[found.rank]) if found.rank < len(exact) else 0.0
    if r:
        assert float(torch.linalg.matrix_norm(rebuilt - matrix, ord=2)) <= left_out + 2 * tolerance + lapack


@law
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 14))
def test_at_most_k_triplets_and_they_are_the_largest(m: int, n: int, k: int) -> None:
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(m * n))
    found = truncated_svd(matrix, k)
    assert found.rank == min(k, m, n)
    torch.testing.assert_close(found.values.float(), torch.linalg.svdvals(matrix)[:k])


def test_a_tolerance_of_the_callers_cuts_the_spectrum() -> None:
    matrix = with_spectrum(20, 12, torch.tensor([4.0, 2.0, 0.05, 0.03], dtype=torch.float64))
    for dtype in (torch.float32, torch.float64):
        assert truncated_svd(matrix.to(dtype), tolerance=0.01).rank == 3


@pytest.mark.parametrize(
    ("values", "dtype", "short"),
    [
        ([1.0, 0.5, 0.1], torch.float32, True),
        ([1.0, 1e-3], torch.float32, True),
        ([1.0, 1e-6], torch.float32, False),
        ([1.0, 0.5], torch.float64, False),
    ],
)
def test_the_gram_matrix_serves_where_it_is_accurate(
    values: list[float], dtype: torch.dtype, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = []
    svd = torch.linalg.svd
    monkeypatch.setattr(linalg.torch.linalg, "svd", lambda *a, **k: full.append(1) or svd(*a, **k))
    matrix = with_spectrum(40, 30, torch.tensor(values, dtype=torch.float64)).to(dtype)
    found = truncated_svd(matrix, len(values), tolerance=1e-7)
    assert bool(full) is not short
    torch.testing.assert_close(found.values, torch.tensor(values).double(), rtol=0, atol=40 * EPS32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_visible(bad: float) -> None:
    matrix = torch.ones(3, 4)
    matrix[1, 2] = bad
    found = truncated_svd(matrix)
    assert bool((found.left * found.values @ found.right).isnan().all())
    assert bool(polar_factor(matrix.double(), torch.float32).isnan().all())


@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (3, 0)])
def test_nothing_has_rank_zero(shape: tuple[int, int]) -> None:
    found = truncated_svd(torch.zeros(shape))
    assert found.rank == 0
    assert torch.equal(found.left * found.values @ found.right, torch.zeros(shape).double())
    assert torch.equal(polar_factor(torch.zeros(shape).double(), torch.float32), torch.zeros(shape).double())


@law
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 9))
def test_the_polar_factor_is_a_partial_isometry(m: int, n: int, rank: int, seed: int) -> None:
    r = min(m, n, rank)
    matrix = with_spectrum(m, n, torch.linspace(1, 3, r, dtype=torch.float64), seed)
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 12 * EPS32)):
        factor = polar_factor(matrix.to(dtype).double(), dtype)
        torch.testing.assert_close(factor @ factor.T @ factor, factor, rtol=0, atol=atol)
        assert float(factor.square().sum()) == pytest.approx(r, abs=1e-4)  # its rank: null directions get nothing
        stretch = factor.T @ matrix
        torch.testing.assert_close(stretch, stretch.T, rtol=0, atol=30 * atol)
        torch.testing.assert_close(factor @ stretch, matrix, rtol=0, atol=30 * atol)


def test_the_polar_factor_of_repeated_columns_shares_them() -> None:
    column = torch.tensor([[0.6], [0.8], [0.0]], dtype=torch.float64)
    factor = polar_factor(torch.cat([column, column], dim=1), torch.float64)
    torch.testing.assert_close(factor, torch.cat([column, column], dim=1) / 2**0.5)
