"""Laws and hand-worked examples of adaptive weight disentanglement, and its solvers against plain loops."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import hubmerge
from hubmerge.disentangle import Objective, descend, inner_products_of_factors, multipliers, shared_by_adam
from hubmerge.errors import UsageError
from hubmerge.memory import MemoryGroup, chunks, gather, join, merge_tensors, model_params
from hubmerge.methods import get_method
from hubmerge.spec import LowRank
from hubmerge.sums import inner_products
from tests.end_to_end import support

from .chunked import GRAIN, merge_model

law = settings(deadline=None, derandomize=True, max_examples=25)

seeds = st.integers(0, 10**6)
counts = st.integers(2, 6)
alphas = st.sampled_from([0.0, 1e-6, 1e-4, 1e-2, 1.0])
SHAPE = (6, 9)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def related(count: int, seed: int, *, common: float = 0.7) -> list[torch.Tensor]:
    """Matrices of different lengths that have something in common."""
    rng = generator(seed)
    shared = normal(*SHAPE, rng=rng)
    lengths = (0.3 * normal(count, rng=rng)).exp()
    return [length * (common * shared + normal(*SHAPE, rng=rng)) for length in lengths.tolist()]


def merge(deltas: Sequence[torch.Tensor], weights: list[float] | None = None, **parameters: Any) -> torch.Tensor:
    """The merged delta on a base of zeros, at scale 1."""
    kind, base = parameters.pop("kind", "linear"), torch.zeros_like(deltas[0])
    return merge_tensors("awd", base, deltas, weights=weights, parameters={"scale": 1.0, **parameters}, kind=kind)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    """Equal up to a fraction of the expected tensor's norm, or of 1 if that is smaller."""
    assert float((found - expected).norm()) <= tolerance * max(float(expected.norm()), 1.0)


def gram_of(vectors: Sequence[torch.Tensor]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([[float((a * b).sum()) for b in vectors] for a in vectors])


def combined(coefficients: np.ndarray[Any, np.dtype[np.float64]], vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    return sum((c * v for c, v in zip(coefficients.tolist(), vectors, strict=True)), torch.zeros_like(vectors[0]))


def objective(vectors: Sequence[torch.Tensor], delta: torch.Tensor, alpha: float) -> torch.Tensor:
    """The paper's, from whole vectors: equations 11 to 14."""
    apart = torch.stack([(v - delta).flatten() for v in vectors])
    units = apart / torch.linalg.vector_norm(apart, dim=1, keepdim=True)
    pairs = ~torch.eye(len(vectors), dtype=torch.bool)
    return (units @ units.T)[pairs].abs().mean() + alpha * torch.linalg.vector_norm(delta)


# --- gradient descent -------------------------------------------------------------------------------------------


@law
@given(counts, seeds, alphas, st.sampled_from([None, 3.0]))
def test_descent_on_coefficients_is_descent_on_whole_vectors(
    count: int, seed: int, alpha: float, learning_rate: float | None
) -> None:
    vectors = related(count, seed)
    found = descend(Objective(gram_of(vectors), alpha), 1000, learning_rate)
    delta, values = torch.zeros_like(vectors[0], requires_grad=True), []
    for size in found.step_sizes:
        here = objective(vectors, delta, alpha)
        (gradient,) = torch.autograd.grad(here, delta)
        delta = (delta - size * gradient).detach().requires_grad_()
        values.append(float(here.detach()))
    assert len(found.step_sizes) > 5 or alpha == 1.0  # then no step is worth the length
    delta = delta.detach()
    values.append(float(objective(vectors, delta, alpha)))
    np.testing.assert_allclose(found.values, values, rtol=1e-9, atol=1e-12)
    close(combined(found.coefficients, vectors), delta)
    expected = sum(vectors, torch.zeros(SHAPE)) - count * delta
    close(merge(vectors, alpha=alpha, learning_rate=learning_rate), expected)


@law
@given(st.integers(2, 20), seeds, alphas, st.sampled_from([None, 1e-3, 1.0, 1e6]))
def test_the_objective_never_increases(count: int, seed: int, alpha: float, learning_rate: float | None) -> None:
    found = descend(Objective(gram_of(related(count, seed)), alpha), 1000, learning_rate)
    assert all(later < earlier for earlier, later in zip(found.values, found.values[1:], strict=False))
    assert len(found.values) == len(found.step_sizes) + 1
    assert max(found.step_sizes, default=0.0) <= (learning_rate or math.inf)


@law
@given(seeds)
def test_two_task_vectors_become_orthogonal(seed: int) -> None:
    vectors = related(2, seed)
    found = descend(Objective(gram_of(vectors), 0.0), 1000)
    assert float(objective(vectors, combined(found.coefficients, vectors), 0.0)) <= 1e-9


@law
@given(counts, seeds)
def test_fewer_steps_are_the_beginning_of_more(count: int, seed: int) -> None:
    problem = Objective(gram_of(related(count, seed)), 1e-4)
    few, many = descend(problem, 4), descend(problem, 40)
    assert few.values == many.values[:5]
    assert descend(problem, 0).coefficients.tolist() == [0.0] * count


def test_twenty_tasks_are_solved_within_a_second() -> None:
    gram = gram_of(related(20, 0, common=0.5))
    began = time.process_time()
    multipliers(gram, 1e-4, 1000)
    assert time.process_time() - began < 1.0


def test_a_part_that_equals_a_task_vector_leaves_one_without_direction() -> None:
    # δ is the first vector: the cosines with what is left of it count as 0.
    gram = np.array([[4.0, 2.0, 0.0], [2.0, 5.0, 1.0], [0.0, 1.0, 3.0]])
    slope = Objective(gram, 0.0).at(gram[0], 4.0)
    apart = gram[1:, 1:] - gram[0, 1:, None] - gram[0, 1:] + 4.0
    assert slope.value == pytest.approx(abs(apart[0, 1]) / math.sqrt(apart[0, 0] * apart[1, 1]) / 3)
    assert slope.pulls[0] == 0.0
    assert np.isfinite(slope.pulls).all()


# --- the method -------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    one, other = (torch.tensor([row], dtype=torch.float64) for row in ([2.0, 0.0], [1.2, 1.6]))
    # Orthogonal without (0.8, 0.4): what is left is (1.2, -0.4) and (0.4, 1.2).
    expected = torch.tensor([[1.6, 0.8]], dtype=torch.float64)
    close(merge([one, other], alpha=0.0), expected)
    close(merge([one, other], alpha=1e-6), expected, 1e-5)
    close(merge([one, other], alpha=0.0, scale=0.5), 0.5 * expected)
    # Weights multiply the deltas before anything else.
    close(merge([one / 4, -other], [4.0, -1.0], alpha=0.0), expected)
    # Without a cosine to lower, the length of the shared part keeps it at 0.
    close(merge([one, other], alpha=100.0), one + other)


@law
@given(counts, seeds, st.permutations(range(6)))
def test_the_order_of_models_does_not_matter(count: int, seed: int, order: list[int]) -> None:
    deltas, weights = related(count, seed), [1.0, 0.5, -2.0, 1.0, 0.3, 1.7][:count]
    order = [i for i in order if i < count]
    expected = merge(deltas, weights)
    close(merge([deltas[i] for i in order], [weights[i] for i in order]), expected, 1e-7)


@law
@given(counts, seeds, st.sampled_from([0.01, 0.5, 1000.0]))
def test_a_common_factor_comes_out(count: int, seed: int, factor: float) -> None:
    deltas = related(count, seed)
    # A length counts as many times less as it is longer.
    found = merge([factor * d for d in deltas], alpha=1e-4 / factor)
    close(found / factor, merge(deltas, alpha=1e-4), 1e-7)
    close(merge(deltas, scale=factor), factor * merge(deltas))
    close(merge([-d for d in deltas]), -merge(deltas))


@law
@given(counts, seeds)
def test_rotating_outputs_and_inputs_rotates_the_result(count: int, seed: int) -> None:
    deltas = related(count, seed)
    q, p = (torch.linalg.qr(normal(n, n, rng=generator(seed + n))).Q for n in SHAPE)
    close(merge([q @ d @ p for d in deltas]), q @ merge(deltas) @ p, 1e-7)
    close(merge([d.T.contiguous() for d in deltas]), merge(deltas).T, 1e-7)


@law
@given(seeds, st.integers(1, 3), alphas)
def test_orthogonal_deltas_share_nothing(seed: int, count: int, alpha: float) -> None:
    rng = generator(seed)
    # Apart in the entries they change, hence exactly orthogonal.
    deltas = [torch.zeros(SHAPE).double() for _ in range(count)]
    for i, delta in enumerate(deltas):
        delta[2 * i : 2 * i + 2] = normal(2, SHAPE[1], rng=rng)
    for solver in ("gram", "adam"):
        assert torch.equal(merge(deltas, alpha=alpha, solver=solver, steps=20), sum(deltas[1:], deltas[0]))


@law
@given(counts, seeds, st.sampled_from(["gram", "adam"]))
def test_one_model_equal_models_and_opposite_ones_are_just_added(count: int, seed: int, solver: str) -> None:
    delta = related(1, seed)[0]
    settings_ = {"solver": solver, "steps": 20}
    assert torch.equal(merge([delta], **settings_), delta)
    # No shared part makes parallel vectors less parallel.
    close(merge([delta] * count, **settings_), count * delta)
    close(merge([delta, -delta], **settings_), torch.zeros(SHAPE))


@law
@given(counts, seeds, st.sampled_from(["gram", "adam"]))
def test_a_model_that_is_the_base_is_as_good_as_absent(count: int, seed: int, solver: str) -> None:
    deltas = related(count, seed)
    settings_ = {"solver": solver, "steps": 20}
    expected = merge(deltas, **settings_)
    close(merge([torch.zeros(SHAPE).double(), *deltas], **settings_), expected)
    weights = [1.0] * count + [0.0]
    close(merge([*deltas, deltas[0].flip(0)], weights, **settings_), expected)


@pytest.mark.parametrize("solver", ["gram", "adam"])
def test_without_deltas_the_base_stays(solver: str) -> None:
    base = normal(*SHAPE, rng=generator(0)).float()
    for count in (1, 3):
        merged = merge_tensors("awd", base, [base.clone() for _ in range(count)], parameters={"solver": solver})
        assert torch.equal(merged, base)
    empty = torch.empty(0, 4)
    assert merge_tensors("awd", empty, [empty, empty], parameters={"solver": solver}).shape == (0, 4)


@pytest.mark.parametrize("solver", ["gram", "adam"])
@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_damaged_values_are_not_hidden(solver: str, damage: float) -> None:
    deltas = related(3, 0)
    deltas[1][2, 3] = damage
    assert not bool(merge(deltas, solver=solver, steps=5).isfinite().all())


def test_float32_agrees_with_float64() -> None:
    base = normal(*SHAPE, rng=generator(7)).float()
    models = [base + 0.1 * d.float() for d in related(4, 0)]
    single = merge_tensors("awd", base, models)
    double = merge_tensors("awd", base.double(), [m.double() for m in models])
    assert single.dtype == torch.float32
    close(single.double(), double, 1e-6)


# --- which tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["gram", "adam"])
@pytest.mark.parametrize(
    ("kind", "shape"), [("vector", (7,)), ("linear", (7,)), ("conv", (4, 3, 2, 2)), ("embedding", (6, 4))]
)
def test_what_is_no_linear_weight_stays_or_is_averaged(solver: str, kind: str, shape: tuple[int, ...]) -> None:
    rng = generator(0)
    base, *deltas = (normal(*shape, rng=rng) for _ in range(4))
    weights = [1.0, 0.5, 2.0]

    def merged(rest: str) -> torch.Tensor:
        parameters = {"scale": 0.7, "rest": rest, "solver": solver}
        models = [base + d for d in deltas]
        return merge_tensors("awd", base, models, weights=weights, parameters=parameters, kind=kind)  # type: ignore[arg-type]

    assert torch.equal(merged("base"), base)
    mean = sum((w * d for w, d in zip(weights, deltas, strict=True)), torch.zeros(shape)) / 3
    torch.testing.assert_close(merged("mean"), base + 0.7 * mean, rtol=1e-12, atol=1e-12)


class Unread(MemoryGroup):
    """Tensors that must not be looked at."""

    def model(self, i: int) -> torch.Tensor:
        raise AssertionError(f"model {i} was read")

    base = delta = model  # type: ignore[assignment]

    def chunk(self, start: int, stop: int) -> MemoryGroup:
        return self


def group_of(models: Sequence[torch.Tensor | LowRank], kind: type[MemoryGroup] = MemoryGroup, **rest: Any) -> Any:
    count = len(models)
    _, each = model_params(get_method("awd"), {}, count)
    return kind(
        torch.zeros(models[0].shape).double(),
        models,
        **{"tasks": [str(i) for i in range(count)], "weights": [1.0] * count, "params": each, **rest},
    )


def run(parameters: dict[str, Any], *groups: MemoryGroup) -> list[torch.Tensor]:
    """The merged deltas of a model's tensors, at scale 1."""
    method, count = get_method("awd"), len(groups[0])
    p, _ = model_params(method, {"scale": 1.0, **parameters}, count)
    assert method.problem(p, groups[0].weights) is None
    parts = [[g] if g.all_factors() else list(chunks(method, p, g)) for g in groups]
    if method.scope(p) == "model":
        shared = gather(method, p, [part for some in parts for part in some])
        stats = [shared for _ in groups]
    else:
        stats = [gather(method, p, some) for some in parts]
    return [join(method, p, *of_one) for of_one in zip(groups, parts, stats, strict=True)]


def test_linear_weights_outside_layers_are_not_even_read() -> None:
    inside, outside = related(3, 0), related(3, 1)
    head = group_of(outside, Unread, name="classifier.weight", layer=None)
    # Reading the base is all there is to do.
    head.base = lambda: torch.full(SHAPE, 5.0)
    for granularity in ("model", "tensor"):
        both = run({"granularity": granularity}, group_of(inside), head)
        close(both[0], merge(inside))
        assert both[1].unique().tolist() == [5.0]


def test_the_model_is_one_vector_or_each_tensor_is() -> None:
    ups, downs = related(3, 0), [10 * d for d in related(3, 1)]
    groups = [group_of(tensors) for tensors in (ups, downs)]
    whole = merge([torch.cat(pair) for pair in zip(ups, downs, strict=True)]).split(SHAPE[0])
    for found, expected in zip(run({}, *groups), whole, strict=True):
        close(found, expected)
    for found, tensors in zip(run({"granularity": "tensor"}, *groups), (ups, downs), strict=True):
        close(found, merge(tensors))
        assert float((found - merge(tensors, alpha=0.5)).norm()) > 0.1
    # Settings of one tensor that change its weights change its vectors.
    heavy = group_of(ups, weights=[2.0, 1.0, 0.5])
    found = run({}, heavy, groups[1])[0]
    weighted = [w * u for w, u in zip([2.0, 1.0, 0.5], ups, strict=True)]
    close(found, run({}, group_of(weighted), groups[1])[0])


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_bits_do_not_depend_on_chunks(granularity: str) -> None:
    rng = generator(0)
    sizes = {"a": (GRAIN + 7, 3), "b": (GRAIN, 2)}
    base = {n: torch.randn(s, generator=rng) for n, s in sizes.items()}
    models = [{n: b + 0.1 * torch.randn(b.shape, generator=rng) for n, b in base.items()} for _ in range(3)]
    parameters = {"granularity": granularity, "rest": "mean"}
    runs = [
        merge_model("awd", base, models, parameters=parameters, chunk_size=n * GRAIN, shuffle=n) for n in (1, 2, 64)
    ]
    for name in sizes:
        assert torch.equal(runs[0][name], runs[2][name])
        assert torch.equal(runs[1][name], runs[2][name])


def test_a_checkpoint_is_disentangled_in_its_layers(tmp_path: Path) -> None:
    folders = [support.save(tmp_path / str(seed), support.tensors(seed)) for seed in range(4)]
    models = [f"{folder}:{weight}" for folder, weight in zip(folders[1:], [1.0, 0.5, 1.5], strict=True)]
    hubmerge.merge(hubmerge.Recipe.from_flags("awd", str(folders[0]), models, []), tmp_path / "out")
    base, *tuned, merged = (load_file(f / "model.safetensors") for f in (*folders, tmp_path / "out"))
    inside = [name for name in base if ".layers." in name]
    vectors = [
        weight * torch.cat([(model[name].double() - base[name].double()).flatten() for name in inside])
        for weight, model in zip([1.0, 0.5, 1.5], tuned, strict=True)
    ]
    expected = 0.3 * combined(np.array(multipliers(gram_of(vectors), 1e-4, 1000)), vectors)
    close(torch.cat([(merged[name].double() - base[name].double()).flatten() for name in inside]), expected, 1e-5)
    assert len(inside) == 4
    for name in set(base) - set(inside):
        assert torch.equal(merged[name], base[name]), name


# --- factors ----------------------------------------------------------------------------------------------------


def factors_of(seed: int, ranks: Sequence[int]) -> list[LowRank]:
    """Adapters whose ranks and scales differ, and whose rows overlap."""
    rng = generator(seed)
    shared = normal(1, SHAPE[1], rng=rng)
    found = []
    for rank in ranks:
        down = normal(rank, SHAPE[1], rng=rng) + shared
        scale = 8 / math.sqrt(max(rank, 1))  # as rsLoRA scales
        found.append(LowRank(normal(SHAPE[0], rank, rng=rng) + 0.5, down, scale))
    return found


@law
@given(seeds, st.lists(st.integers(0, 7), min_size=1, max_size=5))
def test_inner_products_of_factors_are_those_of_the_deltas(seed: int, ranks: list[int]) -> None:
    factors = factors_of(seed, ranks)
    found = inner_products_of_factors(factors).settled().totals
    expected = inner_products([f.dense().reshape(-1) for f in factors]).settled().totals
    largest = max(map(abs, expected))
    assert len(found) == len(expected)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-9 * largest


@law
@given(seeds, st.lists(st.integers(0, 7), min_size=1, max_size=5), st.sampled_from(["model", "tensor"]))
def test_factors_give_what_dense_deltas_give_without_forming_them(
    seed: int, ranks: list[int], granularity: str
) -> None:
    factors = factors_of(seed, ranks)
    if len(ranks) > 2:
        factors[0] = LowRank(torch.zeros_like(factors[0].up), factors[0].down, 4.0)  # an adapter as it is initialised
    weights = [1.0, 0.5, -2.0, 1.0, 0.3][: len(ranks)]
    method, parameters = get_method("awd"), {"scale": 0.6, "granularity": granularity}
    p, _ = model_params(method, parameters, len(ranks))
    assert method.rank_problem(p, weights) is None
    group = group_of(factors, Unread, weights=weights)
    delta = method.merge(group, p, gather(method, p, [group]))
    assert isinstance(delta, LowRank)
    assert delta.rank == sum(ranks)
    dense = [f.dense() for f in factors]
    close(delta.dense(), merge(dense, weights, **parameters), 1e-9)
    for rest, rank in (("base", 0), ("mean", sum(ranks))):
        p, _ = model_params(method, {"scale": 0.6, "rest": rest}, len(ranks))
        outside = group_of(factors, Unread, weights=weights, layer=None)
        delta = method.merge(outside, p, gather(method, p, [outside]))
        assert isinstance(delta, LowRank)
        assert delta.rank == rank
        close(delta.dense(), merge(dense, weights, scale=0.6, rest=rest, kind="embedding"), 1e-9)


def test_factors_and_dense_deltas_count_together() -> None:
    factors, dense = factors_of(0, [2, 3, 1]), related(3, 0)
    mixed = run({}, group_of(factors), group_of(dense))
    for found, expected in zip(mixed, run({}, group_of([f.dense() for f in factors]), group_of(dense)), strict=True):
        close(found, expected)


# --- Adam -------------------------------------------------------------------------------------------------------


@law
@given(counts, seeds, st.sampled_from([0.0, 1e-4, 0.1]), st.sampled_from([1e-3, 1e-2]))
def test_adam_is_adam_on_whole_vectors(count: int, seed: int, alpha: float, learning_rate: float) -> None:
    vectors, steps = [0.1 * v for v in related(count, seed)], 20
    delta = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=learning_rate)
    way = []
    for _ in range(steps + 1):
        adam.zero_grad()
        here = objective(vectors, delta, alpha)
        way.append((float(here.detach()), delta.detach().clone()))
        here.backward()
        adam.step()
    best = min(way, key=lambda point: point[0])[1]
    found = shared_by_adam([v.reshape(-1) for v in vectors], alpha, steps, learning_rate)
    close(found.view(SHAPE), best)
    merged = merge(vectors, solver="adam", alpha=alpha, steps=steps, learning_rate=learning_rate)
    close(merged, sum(vectors, torch.zeros(SHAPE)) - count * best)


@law
@given(counts, seeds, st.sampled_from([None, 1e-3, 1.0]))
def test_adam_never_ends_above_where_it_began(count: int, seed: int, learning_rate: float | None) -> None:
    vectors = related(count, seed)
    found = shared_by_adam([v.reshape(-1) for v in vectors], 1e-4, 30, learning_rate).view(SHAPE)
    assert float(objective(vectors, found, 1e-4)) < float(objective(vectors, torch.zeros(SHAPE), 1e-4))


def test_adam_works_on_whole_tensors_one_by_one() -> None:
    method = get_method("awd")
    for solver, whole, scope in (("gram", False, "model"), ("adam", True, "tensor")):
        p, _ = model_params(method, {"solver": solver}, 2)
        assert (method.whole(p), method.exact(p), method.scope(p)) == (whole, not whole, scope)
        assert (method.rank_problem(p, [1.0, 1.0]) is None) is not whole
    with pytest.raises(UsageError, match="set granularity: tensor, or solver: gram"):
        merge(related(2, 0), solver="adam", granularity="model")
    assert torch.equal(
        merge(related(2, 0), solver="adam", granularity="tensor", steps=3), merge(related(2, 0), solver="adam", steps=3)
    )


def test_adam_leaves_the_span_of_the_task_vectors() -> None:
    vectors = [v.reshape(-1) for v in related(3, 0)]
    found = shared_by_adam(vectors, 1e-4, 50, 1e-2)
    basis = torch.linalg.qr(torch.stack(vectors).T).Q
    outside = found - basis @ (basis.T @ found)
    assert float(outside.norm()) > 0.1 * float(found.norm())
