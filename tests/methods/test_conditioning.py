"""Float32 data give what float64 arithmetic gives of them, also where singular values span six decades."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hubmerge.memory import merge_tensors

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("tsv_merge", {}),
    ("drm", {}),
    ("drm", {"direction": "vertical"}),
    ("iso_c", {}),
    ("iso_cts", {}),
    ("knots", {}),
    ("awd", {}),
]


def with_condition(shape: tuple[int, int], decades: float, seed: int) -> torch.Tensor:
    """A float32 matrix whose singular values go from 1 to 10 to the power -decades."""
    rng, r = torch.Generator().manual_seed(seed), min(shape)
    left, right = (torch.linalg.qr(torch.randn(n, r, generator=rng, dtype=torch.float64)).Q for n in shape)
    return (left * torch.logspace(0, -decades, r, dtype=torch.float64) @ right.T).float()


@pytest.mark.parametrize("decades", [2, 4, 6])
@pytest.mark.parametrize("shape", [(48, 32), (40, 64), (96, 96), (33, 257)])
@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_single_precision_is_enough(
    method: str, parameters: dict[str, Any], shape: tuple[int, int], decades: float
) -> None:
    deltas = [with_condition(shape, decades, seed) for seed in range(3)]
    single = merge_tensors(method, torch.zeros(shape), deltas, parameters=parameters)
    double = merge_tensors(method, torch.zeros(shape).double(), [d.double() for d in deltas], parameters=parameters)
    assert single.dtype == torch.float32
    assert float((single.double() - double).norm()) <= 1e-4 * float(double.norm())


@pytest.mark.parametrize("decades", [0.3, 2, 6])
@pytest.mark.parametrize(
    ("method", "parameters", "shape"),
    [
        ("tsv_merge", {}, (300, 300)),
        ("tsv_merge", {}, (256, 420)),
        ("tsv_merge", {}, (420, 288)),
        ("tsv_merge", {"rank": 110}, (256, 290)),
        ("iso_cts", {}, (256, 280)),
    ],
)
def test_so_it_is_for_matrices_large_enough_to_be_computed_in_single_precision(
    method: str, parameters: dict[str, Any], shape: tuple[int, int], decades: float
) -> None:
    test_single_precision_is_enough(method, parameters, shape, decades)
