"""Deltas in factors: methods that work on them give what the dense computation gives, and form no product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.linalg import joint_svd, of_rank, truncated_svd
from hubmerge.memory import MemoryGroup, gather, merge_group, model_params
from hubmerge.methods import all_methods, get_method
from hubmerge.spec import Kind, LowRank

law = settings(deadline=None, derandomize=True, max_examples=25)
METHODS = [m.name for m in all_methods() if m.rank_problem(m.parameters(), [1.0, 1.0]) is None]
# Ranking entries by magnitude turns a rounding error into another choice only where two are equal to the last bits.
CASES: list[tuple[str, dict[str, Any]]] = [(m, {}) for m in METHODS] + [
    ("drm", {"direction": "vertical"}),
    ("drm", {"density": 1.0, "renormalize": False}),
    ("iso_cts", {"common_fraction": 0.5}),
    ("tsv_merge", {"rank": 2}),
    ("task_arithmetic", {"normalize": True}),
]
IDS = [f"{m}-{'-'.join(map(str, p.values()))}".rstrip("-") for m, p in CASES]


class FactorsOnly(MemoryGroup):
    """A group whose dense values nobody may ask for."""

    def base(self) -> torch.Tensor:
        raise AssertionError("the base was read")

    def model(self, i: int) -> torch.Tensor:
        raise AssertionError("a model's dense values were formed")

    def delta(self, i: int) -> torch.Tensor:
        one = self._models[i]
        if isinstance(one, LowRank):
            raise AssertionError("a dense delta was formed")
        return one.clone()


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lora(shape: tuple[int, int], rank: int, seed: int, *, alpha: float = 6.0, rslora: bool = False) -> LowRank:
    """Factors as an adapter has them."""
    scale = alpha / (rank**0.5 if rslora else max(rank, 1))
    return LowRank(normal(shape[0], rank, seed=seed), normal(rank, shape[1], seed=seed + 1), scale)


def adapters(shape: tuple[int, int], seed: int) -> list[LowRank]:
    """Unequal ranks, a rank-stabilised scale, a B that training left at zero, and a model without this tensor.

    None of rank 1: renormalised, all its rows are equal, and which of equals DRM keeps would be up to rounding.
    """
    untrained = lora(shape, 3, seed + 30)
    return [
        lora(shape, 2, seed),
        lora(shape, 4, seed + 10, rslora=True),
        LowRank(torch.zeros_like(untrained.up), untrained.down, 2.0),
        lora(shape, 0, seed + 40),
        lora(shape, 3, seed + 50, alpha=-3.0),
    ]


def merged(method: str, parameters: dict[str, Any], deltas: list[Any], *, group: type[MemoryGroup], kind: Kind) -> Any:
    """What the method gives for a base of zeros (or for factors alone), and the group's weights."""
    chosen = get_method(method)
    p, per_model = model_params(chosen, dict(parameters), len(deltas))
    weights = [1.0, 0.5, 2.0, -1.0, 0.8][: len(deltas)]
    names = [str(i) for i in range(len(deltas))]
    made = group(None, deltas, tasks=names, weights=weights, params=per_model, kind=kind, layer=1)
    if group is FactorsOnly:
        return chosen.merge(made, p, gather(chosen, p, [made]))
    return merge_group(chosen, p, made)


shapes = st.sampled_from([(12, 12), (16, 9), (9, 16), (7, 24), (24, 7)])


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=IDS)
@law
@given(shape=shapes, seed=st.integers(0, 10**6))
def test_factors_give_what_dense_deltas_give(
    method: str, parameters: dict[str, Any], shape: tuple[int, int], seed: int
) -> None:
    deltas = adapters(shape, seed)
    dense = merged(method, parameters, [d.dense() for d in deltas], group=MemoryGroup, kind="linear")
    found = merged(method, parameters, deltas, group=FactorsOnly, kind="linear")
    assert isinstance(found, LowRank)
    assert found.rank <= sum(d.rank for d in deltas)
    assert float((found.dense() - dense).norm()) <= 1e-9 * max(float(dense.norm()), 1e-300)


@pytest.mark.parametrize(("method", "parameters"), [c for c in CASES if get_method(c[0]).unit == "matrix"])
@law
@given(shape=shapes, seed=st.integers(0, 10**6))
def test_dense_and_low_rank_deltas_together(
    method: str, parameters: dict[str, Any], shape: tuple[int, int], seed: int
) -> None:
    low = adapters(shape, seed)
    mixed = [low[0], normal(*shape, seed=seed + 70), low[1], low[2], 0.3 * normal(*shape, seed=seed + 71)]
    dense = [d.dense() if isinstance(d, LowRank) else d for d in mixed]
    expected = merged(method, parameters, dense, group=MemoryGroup, kind="linear")
    found = merged(method, parameters, mixed, group=FactorsOnly, kind="linear").dense()
    assert float((found - expected).norm()) <= 1e-9 * float(expected.norm())


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_are_averaged_in_factors_too(method: str) -> None:
    deltas = adapters((10, 6), 0)
    found = merged(method, {}, deltas, group=FactorsOnly, kind="embedding")
    dense = merged(method, {}, [d.dense() for d in deltas], group=MemoryGroup, kind="embedding")
    assert isinstance(found, LowRank)
    torch.testing.assert_close(found.dense(), dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_float32_factors_agree_with_float64(method: str) -> None:
    deltas = adapters((40, 64), 3)
    single = [LowRank(d.up.float(), d.down.float(), d.scale) for d in deltas]
    exact = merged(method, {}, deltas, group=FactorsOnly, kind="linear").dense()
    found = merged(method, {}, single, group=FactorsOnly, kind="linear").dense().double()
    assert float((found - exact).norm()) <= 1e-4 * float(exact.norm())


@pytest.mark.parametrize("method", [m for m in METHODS if get_method(m).unit == "matrix"])
@pytest.mark.parametrize("side", ["up", "down"])
def test_damaged_factors_are_not_hidden(method: str, side: str) -> None:
    deltas = adapters((8, 6), 0)
    getattr(deltas[1], side)[0, 0] = torch.nan
    found = merged(method, {}, deltas, group=FactorsOnly, kind="linear")
    assert bool(found.dense().isnan().any())


@law
@given(shapes, st.integers(0, 30), st.integers(0, 10**6))
def test_the_triplets_of_a_product_are_those_of_its_matrix(shape: tuple[int, int], rank: int, seed: int) -> None:
    factors = lora(shape, rank, seed)
    found, dense = truncated_svd(factors), truncated_svd(factors.dense())
    assert found.rank == dense.rank == min(rank, *shape)
    torch.testing.assert_close(found.values, dense.values, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.left * found.values @ found.right, factors.dense(), rtol=1e-10, atol=1e-10)


@law
@given(shapes, st.integers(0, 10**6))
def test_factors_side_by_side_share_the_singular_vectors_of_the_matrices(shape: tuple[int, int], seed: int) -> None:
    deltas = adapters(shape, seed)
    found, dense = joint_svd(deltas, 0.0), joint_svd([d.dense() for d in deltas], 0.0)
    torch.testing.assert_close(found.values, dense.values, rtol=1e-10, atol=1e-12)
    for part, delta in zip(found.right, deltas, strict=True):
        torch.testing.assert_close(found.left * found.values @ part, delta.dense(), rtol=1e-9, atol=1e-9)


@law
@given(shapes, st.integers(1, 8), st.integers(1, 8), st.integers(0, 10**6))
def test_a_smaller_rank_is_the_nearest_and_says_what_it_costs(
    shape: tuple[int, int], rank: int, wanted: int, seed: int
) -> None:
    delta = lora(shape, rank, seed)
    found, left_out, whole = of_rank(delta, wanted)
    values = torch.linalg.svdvals(delta.dense())
    assert found.up.shape == (shape[0], wanted)
    assert found.down.shape == (wanted, shape[1])
    assert whole == pytest.approx(float(values.square().sum()), rel=1e-10)
    assert left_out == pytest.approx(float(values[wanted:].square().sum()), rel=1e-8, abs=1e-12)
    assert float((found.dense() - delta.dense()).square().sum()) == pytest.approx(left_out, rel=1e-8, abs=1e-12)
