"""KnOTS: laws, a naive loop over two layers, deltas in factors, and what its passes cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.linalg import Delta, dtype_of
from hubmerge.memory import MemoryGroup, gather, merge_tensors, model_params
from hubmerge.methods import get_method, knots
from hubmerge.spec import LowRank

from .chunked import merge_model

law = settings(deadline=None, derandomize=True, max_examples=25)

shapes = st.sampled_from([(6, 6), (9, 5), (5, 9), (12, 3), (3, 12)])
seeds = st.integers(0, 10**6)
densities = st.sampled_from([0.0, 0.13, 0.2, 0.77, 1.0])
trims = st.sampled_from(["model", "tensor"])
aggregates = st.sampled_from(["mean", "sum", "weighted"])

Deltas = Mapping[str, Sequence[Delta]]
"""Per layer the models' deltas."""
LAYERS = {"first": (8, 5), "second": (4, 11)}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deltas_of(shape: tuple[int, int], count: int, seed: int) -> list[torch.Tensor]:
    return list(normal(count, *shape, seed=seed))


def rotation(n: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(normal(n, n, seed=seed)).Q


def merge(deltas: Sequence[torch.Tensor], **parameters: Any) -> torch.Tensor:
    """The merged delta on a base of zeros; unlike by default, not scaled."""
    weights = parameters.pop("weights", None)
    chosen = {"scale": 1.0, **parameters}
    return merge_tensors("knots", torch.zeros_like(deltas[0]), deltas, weights=weights, parameters=chosen)


def merge_layers(layers: Deltas, **parameters: Any) -> dict[str, torch.Tensor]:
    """The merged deltas of a model with several layers, on a base of zeros."""
    weights, shuffle = parameters.pop("weights", None), parameters.pop("shuffle", None)
    base = {name: torch.zeros(deltas[0].shape, dtype=dtype_of(deltas[0])) for name, deltas in layers.items()}
    models = [dict(zip(layers, some, strict=True)) for some in zip(*layers.values(), strict=True)]
    chosen = {"scale": 1.0, **parameters}
    return merge_model("knots", base, models, weights=weights, parameters=chosen, shuffle=shuffle)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    """Equal up to a fraction of the expected matrix's norm, or of 1 if that is smaller."""
    assert float((found - expected).norm()) <= tolerance * max(float(expected.norm()), 1.0)


def outer(u: list[float], v: list[float]) -> torch.Tensor:
    return torch.outer(torch.tensor(u, dtype=torch.float64), torch.tensor(v, dtype=torch.float64))


# --- laws -------------------------------------------------------------------------------------------------------


@law
@given(shapes, seeds, trims, aggregates)
def test_one_model_whose_entries_are_all_kept_is_itself(
    shape: tuple[int, int], seed: int, trim: str, aggregate: str
) -> None:
    delta = deltas_of(shape, 1, seed)
    close(merge(delta, density=1.0, trim=trim, aggregate=aggregate), delta[0])


@law
@given(shapes, seeds, st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=1, max_size=4))
def test_deltas_of_one_direction_add_up_or_have_a_mean(shape: tuple[int, int], seed: int, factors: list[float]) -> None:
    delta = deltas_of(shape, 1, seed)[0]
    deltas = [f * delta for f in factors]
    close(merge(deltas, density=1.0, aggregate="sum"), sum(factors) * delta)
    close(merge(deltas, density=1.0), sum(factors) / len(factors) * delta)


@law
@given(st.sampled_from([(12, 5), (12, 12), (9, 20)]), seeds, st.integers(1, 3), st.sampled_from([-2.0, 0.5]))
def test_deltas_of_orthogonal_outputs_add_up(shape: tuple[int, int], seed: int, rank: int, weight: float) -> None:
    # Each has singular vectors of its own, so no signs conflict.
    basis, weights = rotation(shape[0], seed), [1.0, weight, 0.25]
    deltas = [basis[:, i * rank : (i + 1) * rank] @ normal(rank, shape[1], seed=seed + i) for i in range(3)]
    expected = sum((w * d for w, d in zip(weights, deltas, strict=True)), torch.zeros(()))
    close(merge(deltas, density=1.0, aggregate="sum", weights=weights), expected)


@law
@given(shapes, seeds, densities, aggregates)
def test_rotating_outputs_rotates_the_result(shape: tuple[int, int], seed: int, density: float, aggregate: str) -> None:
    deltas, rest = deltas_of(shape, 3, seed), {"weights": [1.0, 0.5, 2.0], "density": density, "aggregate": aggregate}
    q = rotation(shape[0], seed + 1)
    close(merge([q @ d for d in deltas], **rest), q @ merge(deltas, **rest), 1e-8)


@law
@given(shapes, seeds, st.permutations([0, 1, 2]), densities, trims)
def test_the_order_of_models_does_not_matter(
    shape: tuple[int, int], seed: int, order: list[int], density: float, trim: str
) -> None:
    deltas, weights, each = deltas_of(shape, 3, seed), [1.0, 0.5, -2.0], [density, 0.5, 1.0]
    rest = {"trim": trim}
    swapped = merge(
        [deltas[i] for i in order], weights=[weights[i] for i in order], density=[each[i] for i in order], **rest
    )
    close(swapped, merge(deltas, weights=weights, density=each, **rest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@law
@given(st.sampled_from([(9, 5), (5, 9), (12, 3), (30, 4)]), seeds)
def test_a_model_that_is_the_base_has_no_say_in_the_mean(dtype: torch.dtype, shape: tuple[int, int], seed: int) -> None:
    deltas = [d.to(dtype) for d in deltas_of(shape, 2, seed)]
    found = merge([deltas[0], torch.zeros(shape, dtype=dtype), deltas[1]], density=1.0)
    close(found, merge(deltas, density=1.0), 1e-10 if dtype == torch.float64 else 1e-5)


# --- by definition ----------------------------------------------------------------------------------------------


def naive(layers: Mapping[str, Sequence[torch.Tensor]], p: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The merged deltas, entry by entry as the definition says."""
    weights, each, count = p["weights"], p["density"], len(p["weights"])
    basis, entries = {}, {}
    for name, deltas in layers.items():
        n = deltas[0].shape[1]
        left, values, right = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
        q = int((values > max(p["cutoff"], 1e-13) * values[0]).sum())
        basis[name] = left[:, :q]
        for t in range(count):
            for j in range(q):
                for i in range(n):
                    entries[name, t, j, i] = float(values[j] * right[j, t * n + i])
    kept = set()
    for t in range(count):
        mine = [e for e in entries if e[1] == t]
        pools = [mine] if p["trim"] == "model" else [[e for e in mine if e[0] == name] for name in layers]
        for pool in pools:
            kept |= set(sorted(pool, key=lambda e: -abs(entries[e]))[: int(each[t] * len(pool))])
    merged = {name: torch.zeros(basis[name].shape[1], layers[name][0].shape[1]).double() for name in layers}
    for name, _, j, i in {(name, 0, j, i) for name, _, j, i in entries}:
        parts = [w * entries[name, t, j, i] if (name, t, j, i) in kept else 0.0 for t, w in enumerate(weights)]
        agreeing = [(x, w) for x, w in zip(parts, weights, strict=True) if x * sum(parts) > 0]
        divisor = {"sum": 1.0, "mean": float(len(agreeing)), "weighted": sum(w for _, w in agreeing)}[p["aggregate"]]
        merged[name][j, i] = sum(x for x, _ in agreeing) / (divisor or 1.0)
    return {name: basis[name] @ merged[name] for name in layers}


@law
@given(seeds, st.lists(densities, min_size=3, max_size=3), trims, aggregates, st.sampled_from([0.0, 0.4]))
def test_knots_agrees_with_a_naive_loop_over_two_layers(
    seed: int, each: list[float], trim: str, aggregate: str, cutoff: float
) -> None:
    # The first layer's entries are larger, so trimming both together keeps more of them.
    layers = {name: deltas_of(shape, 3, seed + i) for i, (name, shape) in enumerate(LAYERS.items())}
    layers["first"] = [3 * d for d in layers["first"]]
    chosen = {"trim": trim, "aggregate": aggregate, "cutoff": cutoff, "density": each, "weights": [1.0, 0.5, -0.75]}
    found = merge_layers(layers, **chosen)
    for name, expected in naive(layers, chosen).items():
        close(found[name], expected)


def test_knots_by_hand() -> None:
    # One shared direction: (3, 1) and (1, -2) merge as TIES merges them.
    u = [0.6, 0.8]
    deltas = [outer(u, [3, 1]), outer(u, [1, -2])]
    close(merge(deltas, density=1.0), outer(u, [2, -2]))
    close(merge(deltas, density=1.0, aggregate="sum"), outer(u, [4, -2]))
    close(merge(deltas, density=0.5), outer(u, [3, -2]))
    close(merge(deltas, density=[0.5, 1.0]), outer(u, [2, -2]))
    # Weights come before the election: (0.25, -0.5) does not outvote 1.
    close(merge(deltas, density=1.0, weights=[1, 0.25]), outer(u, [3.25 / 2, 1]))
    close(merge(deltas, density=1.0, weights=[1, 0.25], aggregate="weighted"), outer(u, [3.25 / 1.25, 1]))
    close(merge([outer(u, [3, 1]), outer(u, [1, -1])], density=1.0), outer(u, [2, 0]))


def test_the_cutoff_is_relative_to_the_largest_singular_value() -> None:
    for size in (1e-9, 1.0, 1e9):
        delta = size * torch.diag(torch.tensor([5.0, 0.03])).double()
        assert torch.allclose(merge([delta], density=1.0), delta, rtol=1e-12, atol=0)
        cut = merge([delta], density=1.0, cutoff=0.01)
        assert torch.allclose(cut, size * torch.diag(torch.tensor([5.0, 0.0])).double(), rtol=1e-12, atol=0)


def test_entries_that_are_equal_are_kept_by_layer_then_by_position() -> None:
    layers = {"a": [torch.ones(1, 2)], "b": [torch.ones(1, 3)]}
    found = merge_layers(layers, density=0.8, shuffle=1)
    assert [t.tolist() for t in found.values()] == [[[1.0, 1.0]], [[1.0, 1.0, 0.0]]]
    found = merge_layers(layers, density=0.7, trim="tensor")
    assert [t.tolist() for t in found.values()] == [[[1.0, 0.0]], [[1.0, 1.0, 0.0]]]


def test_only_matrices_are_ranked() -> None:
    layers = {name: deltas_of(shape, 2, i) for i, (name, shape) in enumerate(LAYERS.items())}
    vectors = [normal(7, seed=5), normal(7, seed=6)]
    found = merge_layers({**layers, "norm": [1e6 * v for v in vectors]})
    close(found["norm"], 1e6 * (vectors[0] + vectors[1]) / 2)
    for name, expected in merge_layers(layers).items():
        assert torch.equal(found[name], expected)
    assert torch.equal(merge_layers({"norm": vectors})["norm"], (vectors[0] + vectors[1]) / 2)


# --- deltas in factors ------------------------------------------------------------------------------------------


class NeverDense(MemoryGroup):
    """A group whose dense values nobody may ask for."""

    def base(self) -> torch.Tensor:
        raise AssertionError("the base was read")

    def model(self, i: int) -> torch.Tensor:
        raise AssertionError("a model's dense values were formed")

    def delta(self, i: int) -> torch.Tensor:
        raise AssertionError("a dense delta was formed")


def adapter(shape: tuple[int, int], seed: int) -> list[LowRank]:
    """A model's factors: unequal ranks, a rank-stabilised scale, a B that training left at zero, an untouched layer."""
    out, into = shape
    return [
        LowRank(normal(out, 2, seed=seed), normal(2, into, seed=seed + 1), 8 / 2),
        LowRank(normal(out, 4, seed=seed + 2), normal(4, into, seed=seed + 3), 8 / 4**0.5),
        LowRank(torch.zeros(out, 3).double(), normal(3, into, seed=seed + 4), 2.0),
        LowRank(torch.zeros(out, 0).double(), torch.zeros(0, into).double(), 1.0),
        LowRank(normal(out, 1, seed=seed + 5), normal(1, into, seed=seed + 6), -3.0),
    ]


def merge_factors(layers: Mapping[str, Sequence[LowRank]], weights: list[float], **parameters: Any) -> dict[str, Any]:
    """The merged deltas, as factors, of groups without dense values."""
    method = get_method("knots")
    p, each = model_params(method, {"scale": 1.0, **parameters}, len(weights))
    tasks = [str(i) for i in range(len(weights))]
    groups = [
        NeverDense(None, deltas, tasks=tasks, weights=weights, params=each, name=name, index=index)
        for index, (name, deltas) in enumerate(layers.items())
    ]
    stats = gather(method, p, groups)
    return {group.name: method.merge(group, p, stats) for group in groups}


@law
@given(st.sampled_from([(16, 12), (12, 16), (7, 24)]), seeds, densities, trims, aggregates)
def test_factors_of_two_layers_give_what_dense_deltas_give(
    shape: tuple[int, int], seed: int, density: float, trim: str, aggregate: str
) -> None:
    rest = {"density": density, "trim": trim, "aggregate": aggregate, "weights": [1.0, 0.5, 2.0, -1.0, 0.8]}
    low = {"first": adapter(shape, seed), "second": adapter((9, 14), seed + 20)}
    expected = merge_layers({name: [d.dense() for d in deltas] for name, deltas in low.items()}, **rest)
    mixed = {name: [d.dense() if i % 2 else d for i, d in enumerate(deltas)] for name, deltas in low.items()}
    together = merge_layers(mixed, **rest)
    for name, found in merge_factors(low, **rest).items():
        assert isinstance(found, LowRank)
        assert found.rank <= sum(d.rank for d in low[name])
        close(found.dense(), expected[name], 1e-9)
        close(together[name], expected[name], 1e-9)


# --- passes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "trim", "density", "times"),
    [
        (torch.float32, "model", 0.2, 3),
        (torch.float64, "model", 0.2, 5),
        (torch.float32, "tensor", 0.2, 1),
        (torch.float32, "model", 1.0, 1),
    ],
)
def test_how_often_a_matrix_is_decomposed(
    dtype: torch.dtype, trim: str, density: float, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    decompose = knots.joint_svd
    monkeypatch.setattr(knots, "joint_svd", lambda *given: calls.append(1) or decompose(*given))
    layers = {name: [d.to(dtype) for d in deltas_of(shape, 3, 0)] for name, shape in LAYERS.items()}
    merge_layers(layers, trim=trim, density=density)
    assert len(calls) == times * len(layers)


def test_bits_do_not_depend_on_the_order_in_which_layers_are_seen() -> None:
    layers = {name: [d.float() for d in deltas_of(shape, 3, 0)] for name, shape in LAYERS.items()}
    expected = merge_layers(layers)
    for shuffle in (1, 2, 3):
        found = merge_layers(layers, shuffle=shuffle)
        assert all(torch.equal(found[name], expected[name]) for name in layers)
