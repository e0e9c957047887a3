"""Eigenvectors by SciPy's LAPACK: accuracy, other threads meanwhile, the library's threads, and torch's way."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge import lapack
from hubmerge.lapack import eigenpairs

law = settings(deadline=None, derandomize=True, max_examples=40)
dtypes = st.sampled_from([torch.float32, torch.float64])


def symmetric(n: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return matrix + matrix.T


def assert_largest_eigenpairs(matrix: torch.Tensor, k: int, values: torch.Tensor, vectors: torch.Tensor) -> None:
    exact = torch.linalg.eigvalsh(matrix.double()).flip(0)[:k]
    assert values.shape == (k,)
    assert vectors.shape == (len(matrix), k)
    assert values.dtype == vectors.dtype == matrix.dtype
    rounding = 10 * len(matrix) ** 0.5 * torch.finfo(matrix.dtype).eps
    size = float(torch.linalg.matrix_norm(matrix.double(), ord=2))
    torch.testing.assert_close(values.double(), exact, rtol=0, atol=rounding * size)
    found = vectors.double()
    assert float((matrix.double() @ found - found * values.double()).norm()) <= rounding * size * k**0.5
    assert float((found.T @ found - torch.eye(k, dtype=torch.float64)).norm()) <= rounding * k**0.5


@law
@given(st.integers(1, 40), st.integers(1, 40), dtypes, st.integers(0, 9))
def test_the_largest_eigenpairs_come_first(n: int, k: int, dtype: torch.dtype, seed: int) -> None:
    matrix = symmetric(n, seed, dtype)
    before = matrix.clone()
    assert_largest_eigenpairs(matrix, min(k, n), *eigenpairs(matrix, min(k, n)))
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 90, 200, 300])
def test_matrices_of_more_than_one_block(k: int, dtype: torch.dtype) -> None:
    matrix = symmetric(300, 0, dtype)
    assert_largest_eigenpairs(matrix, k, *eigenpairs(matrix, k))


@pytest.mark.parametrize("k", [3, 10])
def test_equal_eigenvalues_have_orthonormal_vectors(k: int) -> None:
    matrix = torch.diag(torch.tensor([2.0] * 4 + [0.0] * 4 + [-1.0] * 2, dtype=torch.float64))
    assert_largest_eigenpairs(matrix, k, *eigenpairs(matrix, k))


@pytest.mark.parametrize("k", [2, 12])
def test_strided_matrices_and_those_too_large_for_the_workspace(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    strided = symmetric(24, 1)[::2, ::2]
    assert_largest_eigenpairs(strided, k, *eigenpairs(strided, k))
    monkeypatch.setattr(lapack, "_LARGEST", 11)
    assert_largest_eigenpairs(strided, k, *eigenpairs(strided, k))


@pytest.mark.parametrize("k", [100, 700])
def test_other_threads_run_meanwhile(k: int) -> None:
    matrix = symmetric(700, 0)
    eigenpairs(matrix[:9, :9])  # imports what it needs
    ticks, stop = [], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    other = threading.Thread(target=tick)
    other.start()
    started = time.perf_counter()
    eigenpairs(matrix, k)
    ended = time.perf_counter()
    stop.set()
    other.join()
    assert sum(started < t < ended for t in ticks) >= 10


def test_the_library_uses_as_many_threads_as_torch_while_anyone_computes() -> None:
    eigenpairs(symmetric(4, 0))
    threads = lapack._openblas("get")
    before, inside = threads(), []
    meeting = threading.Barrier(3)

    def work() -> None:
        torch.set_num_threads(1)
        with lapack._THREADS:
            meeting.wait()
            inside.append(threads())
            meeting.wait()

    own = torch.get_num_threads()
    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(own)
    assert inside == [min(before, 1)] * 3  # 0 where the library is not OpenBLAS
    assert threads() == before
