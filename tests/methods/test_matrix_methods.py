"""Laws, hand-worked examples and released numbers of the matrix methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from hubmerge.memory import merge_tensors
from hubmerge.methods import all_methods

ORACLES = Path(__file__).parent.parent / "data" / "oracles"
MATRIX = [m.name for m in all_methods() if m.unit == "matrix"]
EQUIVARIANT = [m for m in MATRIX if m not in {"drm", "knots"}]

law = settings(deadline=None, derandomize=True, max_examples=25)

shapes = st.sampled_from([(6, 6), (9, 5), (5, 9), (12, 3), (1, 4), (4, 1)])
seeds = st.integers(0, 10**6)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def deltas_of(shape: tuple[int, int], count: int, seed: int, rank: int | None = None) -> list[torch.Tensor]:
    """Random float64 matrices, of full or of low rank."""
    rng = generator(seed)
    m, n = shape
    if rank is None:
        return [normal(m, n, rng=rng) for _ in range(count)]
    return [normal(m, rank, rng=rng) @ normal(rank, n, rng=rng) for _ in range(count)]


def rotation(n: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(normal(n, n, rng=generator(seed))).Q


def merge(method: str, deltas: list[torch.Tensor], **parameters: Any) -> torch.Tensor:
    """The merged delta on a base of zeros."""
    weights, kind = parameters.pop("weights", None), parameters.pop("kind", "linear")
    base = torch.zeros_like(deltas[0])
    return merge_tensors(method, base, deltas, weights=weights, parameters=parameters, kind=kind)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    """Equal up to a fraction of the expected matrix's norm, or of 1 if that is smaller."""
    assert float((found - expected).norm()) <= tolerance * max(float(expected.norm()), 1.0)


def outer(u: list[float], v: list[float]) -> torch.Tensor:
    return torch.outer(torch.tensor(u, dtype=torch.float64), torch.tensor(v, dtype=torch.float64))


# Entries of equal magnitude are kept by position; where all are kept, laws hold for every shape.
WHOLE: dict[str, dict[str, Any]] = {"drm": {"density": 1.0}}


# --- all matrix methods -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", MATRIX)
@law
@given(shapes, seeds, st.permutations([0, 1, 2]))
def test_the_order_of_models_does_not_matter(method: str, shape: tuple[int, int], seed: int, order: list[int]) -> None:
    deltas, weights = deltas_of(shape, 3, seed), [1.0, 0.5, -2.0]
    rest = WHOLE.get(method, {})
    expected = merge(method, deltas, weights=weights, **rest)
    close(merge(method, [deltas[i] for i in order], weights=[weights[i] for i in order], **rest), expected)


@pytest.mark.parametrize("method", EQUIVARIANT)
@law
@given(shapes, seeds)
def test_rotating_outputs_and_inputs_rotates_the_result(method: str, shape: tuple[int, int], seed: int) -> None:
    deltas = deltas_of(shape, 2, seed)
    q, p = rotation(shape[0], seed + 1), rotation(shape[1], seed + 2)
    close(merge(method, [q @ d @ p for d in deltas]), q @ merge(method, deltas) @ p, 1e-7)


@pytest.mark.parametrize("method", [m for m in EQUIVARIANT if m != "iso_cts"])
@law
@given(shapes, seeds)
def test_transposed_matrices_give_the_transposed_result(method: str, shape: tuple[int, int], seed: int) -> None:
    deltas = deltas_of(shape, 3, seed)
    close(merge(method, [d.T.contiguous() for d in deltas]), merge(method, deltas).T, 1e-8)


@pytest.mark.parametrize("method", MATRIX)
@law
@given(shapes, seeds, st.sampled_from([-1.0, 0.25, 3.0]))
def test_a_common_factor_comes_out(method: str, shape: tuple[int, int], seed: int, factor: float) -> None:
    deltas, rest = deltas_of(shape, 2, seed), WHOLE.get(method, {})
    expected = factor * merge(method, deltas, scale=1.0, **rest)
    close(merge(method, [factor * d for d in deltas], scale=1.0, **rest), expected)
    close(merge(method, deltas, scale=factor, **rest), expected)


@pytest.mark.parametrize("method", MATRIX)
def test_float32_agrees_with_float64(method: str) -> None:
    for shape in ((48, 32), (32, 48), (40, 40)):
        base = normal(*shape, rng=generator(7)).float()
        models = [base + 0.1 * d.float() for d in deltas_of(shape, 3, 0)]
        single = merge_tensors(method, base, models)
        double = merge_tensors(method, base.double(), [m.double() for m in models])
        assert single.dtype == torch.float32
        close(single.double() - base.double(), double - base.double(), 2e-5)


@pytest.mark.parametrize("method", MATRIX)
@pytest.mark.parametrize(
    ("kind", "shape"), [("vector", (7,)), ("linear", (7,)), ("conv", (4, 3, 2, 2)), ("embedding", (6, 4))]
)
def test_what_is_no_matrix_is_averaged(method: str, kind: str, shape: tuple[int, ...]) -> None:
    rng = generator(0)
    base, *deltas = (normal(*shape, rng=rng) for _ in range(4))
    weights = [1.0, 0.5, 2.0]
    merged = merge_tensors(
        method, base, [base + d for d in deltas], weights=weights, parameters={"scale": 0.7}, kind=kind  # type: ignore[arg-type]
    )  # fmt: skip
    mean = sum((w * d for w, d in zip(weights, deltas, strict=True)), torch.zeros(())) / 3
    torch.testing.assert_close(merged, base + 0.7 * mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", MATRIX)
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0)])
def test_without_deltas_or_elements_the_base_stays(method: str, shape: tuple[int, int]) -> None:
    base = normal(*shape, rng=generator(0)).float()
    assert torch.equal(merge_tensors(method, base, [base, base.clone()]), base)


@pytest.mark.parametrize("method", MATRIX)
@pytest.mark.parametrize("count", [1, 2])
def test_damaged_values_are_not_hidden(method: str, count: int) -> None:
    deltas = deltas_of((4, 3), count, 0)
    deltas[-1][2, 1] = float("nan")
    assert bool(merge(method, deltas).isnan().any())


# --- released numbers -------------------------------------------------------------------------------------------


def _cases(file: str) -> list[Any]:
    with safe_open(ORACLES / f"{file}.safetensors", "pt") as opened:
        cases = json.loads(opened.metadata()["hubmerge_oracle"])["cases"]
    return [pytest.param(case, id=case["id"]) for case in cases]


def _tensors(file: str, case: dict[str, Any], part: str = "") -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    key = case["key"]
    with safe_open(ORACLES / f"{file}.safetensors", "pt") as opened:
        models = [opened.get_tensor(f"{key}/task.{i}") for i in range(case["tasks"])]
        return opened.get_tensor(f"{key}/base"), models, opened.get_tensor(f"{key}/expected{part}")


def assert_same_delta(merged: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> None:
    """The merged deltas agree to 1e-9 of their norm."""
    assert float((merged - expected).norm()) <= 1e-9 * float((expected - base).norm())


@pytest.mark.parametrize("case", _cases("tsv_merge"))
def test_released_tsv_merge(case: dict[str, Any]) -> None:
    base, models, expected = _tensors("tsv_merge", case)
    merged = merge_tensors("tsv_merge", base, models, parameters={"scale": case["params"]["alpha"]})
    assert_same_delta(merged, expected, base)


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
@pytest.mark.parametrize("case", _cases("drm"))
def test_released_drm(case: dict[str, Any], direction: str) -> None:
    base, models, expected = _tensors("drm", case, f".{direction}")
    kept = {"density": case["params"]["keep_fraction"], "rule": "published"}
    parameters = {"direction": direction, "scale": case["params"]["scale"], **kept}
    assert_same_delta(merge_tensors("drm", base, models, parameters=parameters), expected, base)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
@pytest.mark.parametrize("case", _cases("iso"))
def test_released_iso(case: dict[str, Any], method: str) -> None:
    base, models, expected = _tensors("iso", case, f".{method}")
    parameters = {"scale": case["params"]["alpha"]}
    if method == "iso_cts":
        parameters["common_fraction"] = case["params"]["common_fraction"]
    assert_same_delta(merge_tensors(method, base, models, parameters=parameters), expected, base)


# --- TSV-Merge --------------------------------------------------------------------------------------------------


@law
@given(shapes, seeds)
def test_tsv_of_one_model_is_that_model(shape: tuple[int, int], seed: int) -> None:
    deltas = deltas_of(shape, 1, seed)
    close(merge("tsv_merge", deltas), deltas[0])


@law
@given(shapes, seeds, st.integers(1, 3), st.integers(1, 4))
def test_tsv_counts_what_models_share_once(shape: tuple[int, int], seed: int, rank: int, count: int) -> None:
    delta = deltas_of(shape, 1, seed, rank)[0]
    close(merge("tsv_merge", [delta] * count, rank=rank), delta, 1e-8)


@law
@given(shapes, seeds)
def test_tsv_of_opposite_deltas_is_nothing(shape: tuple[int, int], seed: int) -> None:
    delta = deltas_of(shape, 1, seed)[0]
    close(merge("tsv_merge", [delta, -delta]), torch.zeros(shape))


@law
@given(shapes, seeds, st.integers(1, 2), st.integers(2, 3))
def test_tsv_adds_up_deltas_of_orthogonal_spaces(shape: tuple[int, int], seed: int, rank: int, count: int) -> None:
    rank, count = (rank, count) if rank * count <= min(shape) else (1, 1)
    left, right, rng = rotation(shape[0], seed), rotation(shape[1], seed + 1), generator(seed)
    blocks = [slice(i * rank, (i + 1) * rank) for i in range(count)]
    deltas = [left[:, b] @ normal(rank, rank, rng=rng) @ right[:, b].T for b in blocks]
    close(merge("tsv_merge", deltas), sum(deltas, torch.zeros(shape)))


@law
@given(st.sampled_from([(24, 16), (16, 24), (20, 20)]), seeds, st.integers(1, 3))
def test_tsv_of_low_rank_deltas_is_what_their_factors_give(shape: tuple[int, int], seed: int, rank: int) -> None:
    count = 3
    deltas = deltas_of(shape, count, seed, rank)
    triplets = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
    left = torch.cat([u[:, :rank] for u, _, _ in triplets], dim=1)
    right = torch.cat([v[:rank] for _, _, v in triplets])
    values = torch.cat([s[:rank] for _, s, _ in triplets])
    whitened = [x @ _inverse_root(x.T @ x) for x in (left, right.T)]
    close(merge("tsv_merge", deltas), whitened[0] * values @ whitened[1].T, 1e-7)


def _inverse_root(gram: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors / values.sqrt() @ vectors.T


@law
@given(shapes, seeds)
def test_tsv_of_more_models_than_dimensions(shape: tuple[int, int], seed: int) -> None:
    count = min(shape) + 3
    deltas = deltas_of(shape, count, seed)
    merged = merge("tsv_merge", deltas)
    close(merge("tsv_merge", deltas, rank=1), merged)
    tops = [torch.linalg.svdvals(d)[0] for d in deltas]
    assert float(torch.linalg.matrix_norm(merged, ord=2)) <= float(max(tops)) * (1 + 1e-9)


@law
@given(shapes, seeds)
def test_a_model_that_is_the_base_adds_no_direction(shape: tuple[int, int], seed: int) -> None:
    deltas = deltas_of(shape, 2, seed)
    expected = merge("tsv_merge", deltas, rank=1)
    close(merge("tsv_merge", [*deltas, torch.zeros(shape, dtype=torch.float64)], rank=1), expected)
    close(merge("tsv_merge", [*deltas, deltas[0].T.reshape(shape)], weights=[1, 1, 0], rank=1), expected)


def test_tsv_by_hand() -> None:
    merged = merge("tsv_merge", [outer([1, 0], [1, 0]), outer([0.6, 0.8], [0, 1])])
    root = 10**-0.5
    close(merged, torch.tensor([[3 * root, root], [-root, 3 * root]], dtype=torch.float64))
    shared = outer([1, 0], [0, 2])
    close(merge("tsv_merge", [shared, shared]), shared)
    # As task singular vectors: weights multiply deltas, and singular values follow.
    close(merge("tsv_merge", [outer([1, 0], [1, 0]), outer([0, 1], [0, 1])], weights=[2, -0.5]),
          torch.diag(torch.tensor([2.0, -0.5], dtype=torch.float64)))  # fmt: skip


def test_tsv_keeps_the_smaller_side_over_the_number_of_models() -> None:
    deltas = deltas_of((10, 7), 3, 0)
    close(merge("tsv_merge", deltas), merge("tsv_merge", deltas, rank=2))
    one = deltas_of((10, 7), 1, 0)
    assert int(torch.linalg.matrix_rank(merge("tsv_merge", one, rank=4))) == 4


def test_tsv_decomposes_embeddings_on_request() -> None:
    deltas = deltas_of((8, 6), 2, 0)
    asked = merge("tsv_merge", deltas, kind="embedding", include_embeddings=True)
    close(asked, merge("tsv_merge", deltas))


# --- DRM --------------------------------------------------------------------------------------------------------

thick = st.sampled_from([(6, 6), (9, 5), (5, 9), (12, 3), (3, 12)])
directions = st.sampled_from(["horizontal", "vertical"])


@law
@given(thick, seeds, directions, st.integers(1, 3))
def test_drm_of_one_model_or_of_equal_models_is_that_model(
    shape: tuple[int, int], seed: int, direction: str, count: int
) -> None:
    delta = deltas_of(shape, 1, seed)[0]
    close(merge("drm", [delta] * count, direction=direction, density=1.0, cutoff=0.0), delta)


@law
@given(thick, seeds, st.booleans(), st.sampled_from([0.1, 0.5, 1.0]))
def test_drm_vertical_is_horizontal_of_the_transposed(
    shape: tuple[int, int], seed: int, renormalize: bool, density: float
) -> None:
    deltas = deltas_of(shape, 3, seed)
    rest = {"renormalize": renormalize, "density": density}
    vertical = merge("drm", deltas, direction="vertical", **rest)
    close(vertical, merge("drm", [d.T.contiguous() for d in deltas], **rest).T)


@law
@given(thick, seeds, st.sampled_from([0.2, 0.6, 1.0]))
def test_drm_horizontal_follows_rotated_outputs_and_vertical_rotated_inputs(
    shape: tuple[int, int], seed: int, density: float
) -> None:
    deltas, weights = deltas_of(shape, 3, seed), [1.0, 0.5, 2.0]
    q, p = rotation(shape[0], seed + 1), rotation(shape[1], seed + 2)
    settings_ = {"density": density, "weights": weights}
    close(merge("drm", [q @ d for d in deltas], **settings_), q @ merge("drm", deltas, **settings_), 1e-8)
    settings_["direction"] = "vertical"
    close(merge("drm", [d @ p for d in deltas], **settings_), merge("drm", deltas, **settings_) @ p, 1e-8)


@law
@given(thick, seeds, st.permutations([0, 1, 2]))
def test_drm_at_its_default_density_does_not_depend_on_the_order(
    shape: tuple[int, int], seed: int, order: list[int]
) -> None:
    deltas = deltas_of(shape, 3, seed)
    close(merge("drm", [deltas[i] for i in order]), merge("drm", deltas))


@law
@given(thick, seeds, st.sampled_from([0.0, 0.13, 0.2, 0.77, 1.0]), st.booleans(), st.sampled_from([0.01, 0.3]))
def test_drm_agrees_with_a_naive_loop(
    shape: tuple[int, int], seed: int, density: float, renormalize: bool, cutoff: float
) -> None:
    deltas, weights = deltas_of(shape, 3, seed), [1.0, 0.0, -0.5]
    left, values, right = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    q = int((values > cutoff * values[0]).sum())
    entries = {}
    for t in range(3):
        for j in range(q):
            row = right[j, t * shape[1] : (t + 1) * shape[1]]
            norm = float(row.norm()) if renormalize else 1.0
            for i in range(shape[1]):
                entries[t, j, i] = (float(row[i]) / norm, norm * float(values[j]))
    kept = set(sorted(entries, key=lambda e: -abs(entries[e][0]))[: int(density * len(entries))])
    merged = torch.zeros(q, shape[1], dtype=torch.float64)
    for j in range(q):
        for i in range(shape[1]):
            parts = [entries[t, j, i][0] * entries[t, j, i][1] if (t, j, i) in kept else 0.0 for t in range(3)]
            agreeing = [w * x for w, x in zip(weights, parts, strict=True) if w and x * sum(parts) > 0]
            merged[j, i] = sum(agreeing) / max(len(agreeing), 1)
    found = merge("drm", deltas, weights=weights, density=density, renormalize=renormalize, cutoff=cutoff)
    close(found, left[:, :q] @ merged)


@law
@given(st.sampled_from([(24, 16), (16, 24)]), seeds, st.integers(1, 3), directions)
def test_drm_of_low_rank_deltas_stays_in_the_space_they_span(
    shape: tuple[int, int], seed: int, rank: int, direction: str
) -> None:
    deltas = deltas_of(shape, 3, seed, rank)
    merged = merge("drm", deltas, direction=direction, cutoff=0.0, density=1.0)
    stacked = torch.cat(deltas if direction == "horizontal" else [d.T for d in deltas], dim=1)
    basis = torch.linalg.svd(stacked, full_matrices=False)[0][:, : 3 * rank]
    inside = merged if direction == "horizontal" else merged.T
    close(basis @ (basis.T @ inside), inside, 1e-8)


def test_drm_by_hand() -> None:
    one, other = torch.diag(torch.tensor([3.0, 1.0])).double(), torch.diag(torch.tensor([4.0, -0.5])).double()
    for direction in ("horizontal", "vertical"):
        expected = torch.diag(torch.tensor([3.5, 1.0])).double()
        close(merge("drm", [one, other], density=1.0, direction=direction), expected)
    close(merge("drm", [outer([1, 0], [1, 0]), outer([1, 0], [0, 1])], density=1.0), outer([1, 0], [1, 1]))
    # The singular value 0.03 is below the cut, but not below a smaller one.
    small = torch.diag(torch.tensor([5.0, 0.03])).double()
    close(merge("drm", [small], density=1.0), torch.diag(torch.tensor([5.0, 0.0])).double())
    close(merge("drm", [small], density=1.0, cutoff=0.001), small)


def test_drm_keeps_the_largest_entries_of_all_models_together() -> None:
    # Renormalised, the rows are (.6, .8) and (.28, .96): the two largest of the four are .96 and .8.
    deltas = [outer([1, 0], [0.6, 0.8]), outer([1, 0], [2.8, 9.6])]
    close(merge("drm", deltas, density=0.5), outer([1, 0], [0, (0.8 + 9.6) / 2]))
    # As they are, the second model's dominate.
    close(merge("drm", deltas, density=0.5, renormalize=False), outer([1, 0], [2.8, 9.6]))
    # Of equal magnitudes, the first come first.
    equal = [outer([1], [1, 1]), outer([1], [1, 1])]
    close(merge("drm", equal, density=0.5), outer([1], [1, 1]))
    close(merge("drm", equal, density=0.25), outer([1], [1, 0]))


def test_drm_as_published_keeps_one_entry_more_and_all_that_equal_it() -> None:
    # Of .96, .8, .6 and .28, a fraction of .3 is 1.2 entries: exactly one, or the nearest number and one more.
    deltas = [outer([1, 0], [0.6, 0.8]), outer([1, 0], [2.8, 9.6])]
    close(merge("drm", deltas, density=0.3), outer([1, 0], [0, 9.6]))
    close(merge("drm", deltas, density=0.3, rule="published"), outer([1, 0], [0, (0.8 + 9.6) / 2]))
    equal = [outer([1], [1, 1]), outer([1], [1, 1])]
    close(merge("drm", equal, density=0.0, rule="published"), outer([1], [1, 1]))
    close(merge("drm", equal, density=1.0, rule="published"), outer([1], [1, 1]))


def test_drm_of_other_tensors() -> None:
    deltas = [torch.tensor([3.0, -1.0, 1.0]), torch.tensor([1.0, 2.0, -1.0])]
    merged = merge("drm", deltas, kind="vector", vectors="elect", scale=2.0, weights=[1.0, 0.5])
    # 3 and half of 1; half of 2; nothing where they cancel.
    assert merged.tolist() == [2 * 3.5 / 2, 2 * 1.0, 0.0]


# --- isotropic merging ------------------------------------------------------------------------------------------

ISO = ["iso_c", "iso_cts"]


@law
@given(thick, seeds, st.integers(1, 4))
def test_iso_c_makes_the_spectrum_flat_and_keeps_its_sum(shape: tuple[int, int], seed: int, count: int) -> None:
    deltas = deltas_of(shape, count, seed)
    found = torch.linalg.svdvals(merge("iso_c", deltas))
    before = torch.linalg.svdvals(sum(deltas, torch.zeros(shape)))
    close(found, torch.full_like(found, float(before.mean())))


@pytest.mark.parametrize("method", ISO)
@law
@given(shape=thick, seed=seeds, count=st.integers(1, 4), rank=st.sampled_from([None, 1, 2]))
def test_iso_is_flat_on_its_range_and_flattening_again_changes_nothing(
    method: str, shape: tuple[int, int], seed: int, count: int, rank: int | None
) -> None:
    merged = merge(method, deltas_of(shape, count, seed, rank))
    close(merge("iso_c", [merged]), merged, 1e-8)


@law
@given(thick, seeds, st.integers(1, 3), st.integers(1, 2))
def test_iso_c_gives_null_directions_nothing(shape: tuple[int, int], seed: int, count: int, rank: int) -> None:
    deltas = deltas_of(shape, count, seed, rank)
    left, values, right = torch.linalg.svd(sum(deltas, torch.zeros(shape)), full_matrices=False)
    r = min(count * rank, *shape)
    close(merge("iso_c", deltas), left[:, :r] @ right[:r] * values[:r].mean(), 1e-8)


@law
@given(thick, seeds, st.integers(1, 3))
def test_iso_cts_of_common_directions_alone_is_iso_c(shape: tuple[int, int], seed: int, count: int) -> None:
    deltas = deltas_of(shape, count, seed)
    close(merge("iso_cts", deltas, common_fraction=1.0), merge("iso_c", deltas), 1e-8)
    close(merge("iso_cts", deltas[:1]), merge("iso_c", deltas[:1]), 1e-8)


@law
@given(thick, seeds, st.sampled_from([0.0, 0.3, 0.8]))
def test_iso_cts_of_more_models_than_dimensions(shape: tuple[int, int], seed: int, common_fraction: float) -> None:
    deltas = deltas_of(shape, min(shape) + 2, seed)
    # No model gets a direction of its own.
    close(merge("iso_cts", deltas, common_fraction=common_fraction), merge("iso_c", deltas), 1e-8)


@law
@given(st.sampled_from([(20, 12), (12, 20)]), seeds, st.integers(1, 3))
def test_iso_cts_of_low_rank_deltas_stays_in_the_spaces_they_span(shape: tuple[int, int], seed: int, rank: int) -> None:
    deltas = deltas_of(shape, 3, seed, rank)
    merged = merge("iso_cts", deltas, common_fraction=0.5)
    for found, stacked in ((merged, torch.cat(deltas, dim=1)), (merged.T, torch.cat(deltas).T)):
        basis = torch.linalg.svd(stacked, full_matrices=False)[0][:, : 3 * rank]
        close(basis @ (basis.T @ found), found, 1e-8)


def test_iso_cts_shares_out_directions_evenly() -> None:
    from hubmerge.methods.iso_cts import directions_per_model

    found = [directions_per_model(n, t, f) for n, t, f in ((40, 4, 0.8), (10, 4, 0.8), (10, 4, 0.0), (0, 3, 0.8))]
    # 8 of 40 for four models; 2 of 10 round to none each; 10 for four models round to 2 each (2.5).
    assert found == [2, 0, 2, 0]


@pytest.mark.parametrize("method", ISO)
def test_iso_by_hand(method: str) -> None:
    diagonal = torch.diag(torch.tensor([3.0, 1.0])).double()
    close(merge(method, [diagonal]), 2 * torch.eye(2).double())
    close(merge(method, [diagonal, -diagonal]), torch.zeros(2, 2).double())
    close(merge(method, [outer([0.6, 0.8], [0, 5])]), outer([0.6, 0.8], [0, 5]))


def test_iso_c_multiplies_deltas_by_their_weights_before_it_adds_them() -> None:
    deltas = [outer([1, 0], [1, 0]), outer([0, 1], [0, 1])]
    close(merge("iso_c", deltas, weights=[3.0, -1.0]), torch.diag(torch.tensor([2.0, -2.0])).double())


def test_iso_cts_takes_directions_of_models_from_what_the_sum_leaves() -> None:
    # The sum's first direction is e1, and what it leaves of the models is e2e2ᵀ and e3e3ᵀ.
    deltas = [torch.diag(torch.tensor([4.0, 2.0, 0.0])).double(), torch.diag(torch.tensor([4.0, 0.0, 1.0])).double()]
    close(merge("iso_cts", deltas, common_fraction=0.34), torch.eye(3).double() * (8 + 2 + 1) / 3)
