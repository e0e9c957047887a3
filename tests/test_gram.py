"""Subspaces and polar factors through Gram matrices: accuracy, honest estimates, and when there is no result."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.gram import Subspaces, gram_matrix, leading_subspaces, polar_factor

law = settings(deadline=None, derandomize=True, max_examples=25)
EPS32 = torch.finfo(torch.float32).eps
BEYOND = 1e-12
"""What the singular vectors in float64 that results are compared with do not tell."""
SHAPES = [(300, 300), (260, 400), (420, 256)]


def orthonormal(m: int, n: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(m, n, generator=rng, dtype=torch.float64)).Q


def with_spectrum(shape: tuple[int, int], values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    r = len(values)
    return (orthonormal(shape[0], r, seed) * values @ orthonormal(shape[1], r, seed + 1).T).float()


def ramp(r: int, outlier: float = 1.0) -> torch.Tensor:
    """Singular values from 1 to 0.1, but the first eight, which are up to ``outlier`` times larger."""
    values = torch.linspace(1.0, 0.1, r, dtype=torch.float64)
    values[:8] *= torch.linspace(outlier, 0.3 * outlier + 0.7, 8)
    return values


SPECTRA = {
    "flat": lambda r: torch.linspace(1.0, 0.5, r, dtype=torch.float64),
    "power": lambda r: (1 + torch.arange(r, dtype=torch.float64) / 16) ** -0.5,
    "ramp": ramp,
    "outliers": lambda r: ramp(r, 30.0),
    "far outliers": lambda r: ramp(r, 300.0),
    "six decades": lambda r: torch.logspace(0, -6, r, dtype=torch.float64),
}


def deviation(rows: torch.Tensor) -> float:
    """How far rows are from orthonormal: root mean square, over them, of the length of what is wrong."""
    return float((rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).norm()) / len(rows) ** 0.5


def outside(rows: torch.Tensor, space: torch.Tensor) -> float:
    """Root mean square, over rows, of their parts outside the span of orthonormal rows."""
    return float((rows - rows @ space.T @ space).norm()) / len(rows) ** 0.5


@law
@given(st.integers(0, 20), st.integers(0, 40), st.sampled_from([torch.float32, torch.float64]))
def test_a_gram_matrix_is_the_product(m: int, n: int, dtype: torch.dtype) -> None:
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(m + n), dtype=dtype)
    torch.testing.assert_close(gram_matrix(matrix), matrix.T @ matrix)


# --- leading subspaces ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [37, 100])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_leading_subspaces_are_as_accurate_as_they_say(spectrum: str, shape: tuple[int, int], k: int) -> None:
    matrix = with_spectrum(shape, SPECTRA[spectrum](min(shape)))
    found = leading_subspaces(matrix, k)
    assert isinstance(found, Subspaces)
    assert found.left.dtype == found.core.dtype == found.right.dtype == torch.float32
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    estimate = float(found.errors.double().square().mean().sqrt())
    assert outside(found.right.double(), right[:k]) <= 2 * estimate
    assert outside(found.left.T.double(), left[:, :k].T) <= 2 * estimate
    assert estimate <= (1e-3 if spectrum in {"far outliers", "six decades"} else 1e-4)
    assert deviation(found.left.T.double()) <= max(100 * EPS32, estimate)
    assert deviation(found.right.double()) <= max(100 * EPS32, estimate)
    product = found.left.double() @ found.core.double() @ found.right.double()
    projected = matrix.double() @ found.right.T.double() @ found.right.double()
    projected = projected if shape[0] >= shape[1] else found.left.double() @ found.left.T.double() @ matrix.double()
    assert float((product - projected).norm()) <= 30 * EPS32 * float(values[:k].norm())


def test_outliers_do_not_cost_accuracy() -> None:
    shape = (300, 300)
    plain, far = (leading_subspaces(with_spectrum(shape, ramp(300, size)), 100) for size in (1.0, 100.0))
    assert plain is not None
    assert far is not None
    assert float(far.errors.norm()) <= 10 * float(plain.errors.norm())


@pytest.mark.parametrize(
    ("values", "k"),
    [
        (torch.linspace(1, 0.5, 50, dtype=torch.float64), 60),  # null directions are among the wanted ones
        (torch.linspace(1, 0.5, 50, dtype=torch.float64), 8),  # too few to judge by
        (torch.logspace(0, -6, 256, dtype=torch.float64), 200),
        (torch.zeros(256, dtype=torch.float64), 30),
    ],
)
def test_what_float32_does_not_tell_is_not_told(values: torch.Tensor, k: int) -> None:
    assert leading_subspaces(with_spectrum((300, 256), values), k) is None


def test_a_cut_between_equal_values_is_known_to_be_arbitrary() -> None:
    values = torch.linspace(1, 0.5, 256, dtype=torch.float64)
    values[40] = values[39]
    found = leading_subspaces(with_spectrum((300, 256), values), 40)
    assert found is not None
    assert float(found.errors[-1]) > 1e-2
    assert float(found.errors[:-1].max()) < 1e-3


# --- polar factor -----------------------------------------------------------------------------------------------


def bases(m: int, count: int, k: int, seed: int = 0) -> torch.Tensor:
    """Orthonormal bases of random subspaces side by side, (m, count · k)."""
    return torch.cat([orthonormal(m, k, seed + i) for i in range(count)], dim=1)


def exact_polar(matrix: torch.Tensor, tolerance: float) -> torch.Tensor:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    r = int((values > tolerance * values[0]).sum())
    return left[:, :r] @ right[:r]


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "count", "k"), [(300, 3, 100), (300, 8, 37), (400, 3, 85), (256, 3, 120)])
def test_the_polar_factor_of_subspaces_put_together(m: int, count: int, k: int, dtype: torch.dtype) -> None:
    matrix = bases(m, count, k).to(dtype)
    exact = exact_polar(matrix, 1e-6)
    for given_, expected in ((matrix, exact), (matrix.T, exact.T)):
        found = polar_factor(given_, torch.zeros((), dtype=dtype), 1e-6)
        assert found is not None
        factor, error = found
        assert factor.dtype == dtype
        assert relative(factor, expected) <= error + BEYOND <= (2e-5 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shared_and_almost_shared_directions(dtype: torch.dtype) -> None:
    matrix = bases(300, 3, 90)
    matrix[:, 90:110] = matrix[:, :20]  # null directions
    nearly = matrix[:, 20:25] + 1e-3 * orthonormal(300, 5, 9)
    matrix[:, 110:115] = nearly / nearly.norm(dim=0)
    matrix = matrix.to(dtype)
    found = polar_factor(matrix, torch.zeros((), dtype=dtype), 1e-6)
    assert found is not None
    limit = 1e-4 if dtype == torch.float32 else 1e-9
    assert relative(found[0], exact_polar(matrix, 1e-6)) <= found[1] + BEYOND <= limit
    assert float(found[0].double().square().sum()) == pytest.approx(250, abs=1e-2)


@pytest.mark.parametrize(("count", "k"), [(3, 80), (8, 37)])
@pytest.mark.parametrize("size", [1e-5, 1e-4])
def test_errors_of_columns_show_as_estimated(count: int, k: int, size: float) -> None:
    matrix = bases(300, count, k)
    errors = size * torch.linspace(0, 2, count * k, dtype=torch.float64)
    noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    moved = exact_polar(matrix + noise / noise.norm(dim=0) * errors, 1e-6)
    found = polar_factor(matrix, errors, 1e-6)
    assert found is not None
    assert 0.3 <= relative(moved, exact_polar(matrix, 1e-6)) / found[1] <= 1.5


def test_mostly_weak_directions_are_left_to_others() -> None:
    same = orthonormal(300, 90, 0)
    nearly = torch.cat([same + 1e-2 * orthonormal(300, 90, i) for i in (1, 2, 3)], dim=1)
    zero = torch.zeros(())
    assert polar_factor(nearly.float(), zero, 1e-6) is None
    assert polar_factor(torch.zeros(300, 290), zero, 1e-6) is None
    found = polar_factor(nearly, zero, 1e-6)  # in float64 they are strong enough
    assert found is not None
    assert relative(found[0], exact_polar(nearly, 1e-6)) <= found[1] <= 1e-8
