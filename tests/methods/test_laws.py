"""Laws and hand-worked examples of the element-wise methods."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hubmerge.memory import merge_tensors

from .chunked import added, merge_model, random_model

ELEMENT = ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs"]
SIGN_SYMMETRIC = ["task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs"]

law = settings(deadline=None, derandomize=True)

grid = st.integers(-64, 64).map(lambda n: n / 16)


def vectors(count: int = 3, *, size: int = 40) -> st.SearchStrategy[list[torch.Tensor]]:
    """Several vectors of one length with values that float32 adds exactly."""
    return st.integers(1, size).flatmap(
        lambda n: st.lists(st.lists(grid, min_size=n, max_size=n).map(torch.tensor), min_size=count, max_size=count)
    )


def delta_of(method: str, deltas: list[torch.Tensor], **parameters: Any) -> torch.Tensor:
    """The merged delta on a base of zeros."""
    weights = parameters.pop("weights", None)
    return merge_tensors(method, torch.zeros_like(deltas[0]), deltas, weights=weights, parameters=parameters)


# --- averages and sums ------------------------------------------------------------------------------------------


@law
@given(vectors(1))
def test_average_of_equal_models_is_the_model(models: list[torch.Tensor]) -> None:
    model = models[0]
    assert torch.equal(merge_tensors("linear", None, [model] * 4), model)
    torch.testing.assert_close(merge_tensors("linear", None, [model] * 3), model)


@law
@given(vectors(), st.permutations([0, 1, 2]))
def test_averages_and_sums_do_not_depend_on_the_order(models: list[torch.Tensor], order: list[int]) -> None:
    for method in ("linear", "task_arithmetic", "ties"):
        parameters = {} if method == "linear" else {"scale": 1.0}
        one = merge_tensors(method, models[0] * 0, models, parameters=parameters)
        other = merge_tensors(method, models[0] * 0, [models[i] for i in order], parameters=parameters)
        if method == "linear":  # computed relative to the first model, so each order rounds differently
            largest = max(float(m.abs().max()) for m in models)
            torch.testing.assert_close(one, other, rtol=0, atol=2**-22 * largest)
        else:
            assert torch.equal(one, other)


@law
@given(vectors(4))
def test_task_arithmetic_goes_from_the_base_to_the_average(tensors: list[torch.Tensor]) -> None:
    base, *models = tensors
    assert torch.equal(merge_tensors("task_arithmetic", base, models, parameters={"scale": 0.0}), base)
    average = merge_tensors("linear", None, models)
    shared = merge_tensors("task_arithmetic", base, models, parameters={"scale": 1 / 3})
    torch.testing.assert_close(shared, average)
    normalized = merge_tensors("task_arithmetic", base, models, parameters={"scale": 1.0, "normalize": True})
    torch.testing.assert_close(normalized, average)


def test_task_arithmetic_multiplies_deltas_by_weight_and_scale() -> None:
    merged = merge_tensors(
        "task_arithmetic", torch.tensor([1.0]), [torch.tensor([3.0]), torch.tensor([2.0])], weights=[0.5, 2.0]
    )
    torch.testing.assert_close(merged, torch.tensor([1 + 0.3 * (0.5 * 2 + 2 * 1)]))


# --- TIES -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trim", ["model", "tensor"])
@law
@given(tensors=vectors(), density=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_flipping_every_sign_flips_the_result(trim: str, tensors: list[torch.Tensor], density: float) -> None:
    for aggregate in ("mean", "sum", "weighted"):
        parameters = {"density": density, "aggregate": aggregate, "trim": trim}
        merged = delta_of("ties", tensors, **parameters)
        flipped = delta_of("ties", [-t for t in tensors], **parameters)
        assert torch.equal(flipped, -merged)


@law
@given(vectors())
def test_ties_of_agreeing_deltas_is_their_mean(tensors: list[torch.Tensor]) -> None:
    deltas = [t.abs() + 1 for t in tensors]
    torch.testing.assert_close(delta_of("ties", deltas, density=1.0), torch.stack(deltas).mean(0))


@law
@given(vectors(1), st.floats(0, 1))
def test_ties_of_one_model_is_its_trimmed_delta(tensors: list[torch.Tensor], density: float) -> None:
    delta = tensors[0]
    kept = delta.abs().sort(descending=True, stable=True).indices[: int(density * len(delta))]
    expected = torch.zeros_like(delta)
    expected[kept] = delta[kept]
    assert torch.equal(delta_of("ties", [delta], density=density), expected)


@law
@given(vectors(), st.lists(st.sampled_from([-1.0, -0.5, 0.5, 1.0, 2.0]), min_size=3, max_size=3))
def test_ties_agrees_with_a_naive_loop(tensors: list[torch.Tensor], weights: list[float]) -> None:
    for rule, zero in (("exact", 0.0), ("mergekit", 1.0)):
        for aggregate in ("mean", "sum", "weighted"):
            merged = delta_of("ties", tensors, weights=weights, density=1.0, aggregate=aggregate, rule=rule)
            for j, got in enumerate(merged.tolist()):
                entries = [(w * t[j].item(), w) for w, t in zip(weights, tensors, strict=True)]
                total = math.fsum(e for e, _ in entries)
                sign = math.copysign(1.0, total) if total else zero
                agreeing = [(e, w) for e, w in entries if e * sign > 0]
                divisor = {"sum": 1.0, "mean": float(len(agreeing)), "weighted": sum(w for _, w in agreeing)}[aggregate]
                assert got == pytest.approx(sum(e for e, _ in agreeing) / (divisor or 1.0), rel=1e-5, abs=1e-6)


def test_ties_by_hand() -> None:
    deltas = [torch.tensor([3.0, -1.0]), torch.tensor([1.0, 2.0])]
    assert delta_of("ties", deltas, density=1.0).tolist() == [2.0, 2.0]
    assert delta_of("ties", deltas, density=1.0, aggregate="sum").tolist() == [4.0, 2.0]


def test_where_deltas_cancel_the_rules_differ() -> None:
    deltas = [torch.tensor([1.0, -3.0, -5.0]), torch.tensor([-1.0, -3.0, 2.0])]
    assert delta_of("ties", deltas, density=1.0).tolist() == [0.0, -3.0, -5.0]
    assert delta_of("ties", deltas, density=1.0, rule="mergekit").tolist() == [1.0, -3.0, -5.0]
    assert delta_of("ties", deltas, density=1.0, rule="published").tolist() == [-1.0, -3.0, -5.0]
    flipped = [-d for d in deltas]
    assert delta_of("ties", flipped, density=1.0, rule="published").tolist() == [1.0, 3.0, 5.0]
    undecided = [torch.tensor([1.0, -3.0, 4.0]), torch.tensor([-1.0, -3.0, 4.0])]
    assert delta_of("ties", undecided, density=1.0, rule="published").tolist() == [-1.0, -3.0, 4.0]


def test_each_rule_keeps_its_own_number_of_entries() -> None:
    delta = torch.tensor([4.0, 1.0, 2.0, 2.0, 2.0, 3.0, 0.5, 0.25])
    assert delta_of("ties", [delta], density=0.5).tolist() == [4.0, 0.0, 2.0, 2.0, 0.0, 3.0, 0.0, 0.0]
    published = delta_of("ties", [delta], density=0.25, rule="published")
    assert published.tolist() == [4.0, 0.0, 2.0, 2.0, 2.0, 3.0, 0.0, 0.0]
    assert delta_of("ties", [delta], density=0.01).count_nonzero() == 0
    assert delta_of("ties", [delta], density=0.01, rule="mergekit").tolist() == [4.0, *[0.0] * 7]
    assert torch.equal(delta_of("ties", [delta], density=1.0, rule="published"), delta)


def test_a_model_wide_trim_ranks_over_all_tensors() -> None:
    base = {"a": torch.zeros(3), "b": torch.zeros(2)}
    model = {"a": torch.tensor([5.0, 1.0, 4.0]), "b": torch.tensor([2.0, 3.0])}
    whole = merge_model("ties", base, [model], parameters={"density": 0.6})
    assert (whole["a"].tolist(), whole["b"].tolist()) == ([5.0, 0.0, 4.0], [0.0, 3.0])
    each = merge_model("ties", base, [model], parameters={"density": 0.5, "trim": "tensor"})
    assert (each["a"].tolist(), each["b"].tolist()) == ([5.0, 0.0, 0.0], [0.0, 3.0])


def test_equal_magnitudes_are_kept_by_tensor_then_by_position() -> None:
    base = {"a": torch.zeros(3), "b": torch.zeros(70_000)}
    model = {"a": torch.tensor([1.0, -1.0, 1.0]), "b": torch.ones(70_000)}
    merged = merge_model("ties", base, [model], parameters={"density": 0.7}, chunk_size=32768, shuffle=1)
    kept = int(0.7 * 70_003) - 3
    assert merged["a"].tolist() == [1.0, -1.0, 1.0]
    assert torch.equal(merged["b"], (torch.arange(70_000) < kept).float())


# --- DARE -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_dropping_nothing_is_the_identity(method: str, rescale: str) -> None:
    delta = torch.randn(500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(delta_of(method, [delta], density=1.0, rescale=rescale, scale=1.0), delta)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_the_expectation_of_dare_is_the_delta(density: float) -> None:
    delta = torch.ones(400_000)
    merged = delta_of("dare_linear", [delta], density=density, scale=1.0)
    assert merged.mean().item() == pytest.approx(1.0, abs=5 * ((1 - density) / density / len(delta)) ** 0.5)
    assert len(merged.unique()) == 2


def test_l1_rescale_restores_the_norm() -> None:
    delta = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    merged = delta_of("dare_linear", [delta], density=0.3, rescale="l1", scale=1.0)
    assert merged.abs().sum(dtype=torch.float64).item() == pytest.approx(
        delta.abs().sum(dtype=torch.float64).item(), rel=1e-6
    )
    assert delta_of("dare_linear", [torch.zeros(9)], rescale="l1").tolist() == [0.0] * 9


def test_random_bits_depend_on_names_and_seed_alone() -> None:
    sizes = {"x": (70_000,), "y": (300,)}
    base = random_model(sizes, 0)
    models = [added(base, random_model(sizes, i)) for i in (1, 2)]

    def merged(order: list[str], **how: Any) -> dict[str, torch.Tensor]:
        shown = [{n: m[n] for n in order} for m in models]
        return merge_model("dare_linear", {n: base[n] for n in order}, shown, names=["p", "q"], **how)

    one = merged(["x", "y"])
    for tensor, value in merged(["y", "x"]).items():
        assert torch.equal(value, one[tensor])
    assert not torch.equal(merged(["x", "y"], seed=1)["x"], one["x"])
    swapped = merge_model("dare_linear", base, models[::-1], names=["q", "p"])
    torch.testing.assert_close(swapped["x"], one["x"])
    renamed = merge_model("dare_linear", base, models, names=["p", "r"])
    assert not torch.equal(renamed["x"], one["x"])


def test_models_drop_independently() -> None:
    delta = torch.ones(200_000)
    merged = delta_of("dare_linear", [delta, 2 * delta], density=0.5, rescale="none", scale=1.0)
    shares = [(merged == v).double().mean().item() for v in (0.0, 1.0, 2.0, 3.0)]
    assert shares == pytest.approx([0.25] * 4, abs=0.006)


def test_trim_after_keeps_the_largest_of_what_was_left() -> None:
    delta = torch.randn(50_000, generator=torch.Generator().manual_seed(2))
    dropped = delta_of("dare_ties", [delta], density=0.5)
    trimmed = delta_of("dare_ties", [delta], density=0.5, trim_after=True, trim_density=0.1)
    kept = dropped.abs().sort(descending=True, stable=True).indices[:5000]
    expected = torch.zeros_like(delta)
    expected[kept] = dropped[kept]
    assert torch.equal(trimmed, expected)


# --- breadcrumbs ------------------------------------------------------------------------------------------------


@law
@given(vectors(1), st.sampled_from([0.0, 0.1, 0.3, 1.0]), st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
def test_breadcrumbs_keeps_a_band_of_magnitudes(tensors: list[torch.Tensor], gamma: float, density: float) -> None:
    delta = tensors[0]
    order = delta.abs().sort(descending=True, stable=True).indices
    kept = int(density * len(delta))
    top = min(int(gamma * len(delta)), len(delta) - kept)
    expected = torch.zeros_like(delta)
    expected[order[top : top + kept]] = delta[order[top : top + kept]]
    assert torch.equal(delta_of("breadcrumbs", tensors, gamma=gamma, density=density, scale=1.0), expected)


def test_breadcrumbs_with_election_merges_what_agrees() -> None:
    deltas = [torch.tensor([9.0, 2.0, -1.0, 0.1]), torch.tensor([9.0, -1.0, -2.0, 0.1])]
    shared = {"gamma": 0.25, "density": 0.5, "scale": 1.0}
    assert delta_of("breadcrumbs", deltas, **shared).tolist() == [0.0, 1.0, -3.0, 0.0]
    assert delta_of("breadcrumbs", deltas, **shared, elect_sign=True).tolist() == [0.0, 2.0, -3.0, 0.0]
    assert delta_of("breadcrumbs", deltas, **shared, normalize=True).tolist() == [0.0, 0.5, -1.5, 0.0]


# --- model stock and slerp --------------------------------------------------------------------------------------


def test_model_stock_by_hand() -> None:
    deltas = [torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])]
    torch.testing.assert_close(delta_of("model_stock", deltas), 0.75 * torch.tensor([0.8, 0.4]))


@law
@given(vectors(1))
def test_model_stock_of_orthogonal_and_of_identical_deltas(tensors: list[torch.Tensor]) -> None:
    delta = tensors[0]
    assume(bool(delta.any()))
    zeros = torch.zeros_like(delta)
    orthogonal = [torch.cat([delta, zeros]), torch.cat([zeros, delta])]
    assert not delta_of("model_stock", orthogonal).any()
    torch.testing.assert_close(delta_of("model_stock", [delta] * 3), delta)
    assert not delta_of("model_stock", [delta, zeros]).any()


def test_model_stock_keeps_the_base_where_the_formula_has_no_answer() -> None:
    delta = torch.tensor([1.0, 2.0])
    assert delta_of("model_stock", [delta, -delta]).tolist() == [0.0, 0.0]


@law
@given(vectors(2), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_slerp_ends_at_base_and_model(tensors: list[torch.Tensor], t: float) -> None:
    base, model = tensors
    assume(base.norm() > 0 and model.norm() > 0)
    torch.testing.assert_close(merge_tensors("slerp", base, [model], parameters={"t": 0.0}), base, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        merge_tensors("slerp", base, [model], parameters={"t": 1.0}), model, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(merge_tensors("slerp", base, [base], parameters={"t": t}), base)


def test_slerp_keeps_unit_vectors_on_the_circle() -> None:
    merged = merge_tensors("slerp", torch.tensor([1.0, 0.0]), [torch.tensor([0.0, 1.0])], parameters={"t": 1 / 3})
    torch.testing.assert_close(merged, torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))


def test_slerp_of_nearly_parallel_vectors_is_a_line() -> None:
    base, model = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.001])
    torch.testing.assert_close(merge_tensors("slerp", base, [model]), (base + model) / 2)


# --- precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
@pytest.mark.parametrize("weights", [[0.7, 1.1, 0.9], [0.5, 0.3, 0.2], [0.3, 0.3, 0.3], [1.0, 1.0, 1.0]])
def test_bfloat16_results_are_correctly_rounded(method: str, weights: list[float]) -> None:
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(200_000, generator=generator) * 0.02).bfloat16()
    models = [(base.float() + 3e-4 * torch.randn(200_000, generator=generator)).bfloat16() for _ in range(3)]
    merged = merge_tensors(method, base, models, weights=weights)
    exact = merge_tensors(method, base.double(), [m.double() for m in models], weights=weights)
    assert (merged == exact.to(torch.bfloat16)).double().mean().item() >= 0.999
