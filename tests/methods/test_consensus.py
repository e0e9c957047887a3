"""Laws, hand-worked examples and released masks of consensus merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from hubmerge.masks import tall_mask
from hubmerge.memory import merge_tensors

ORACLES = Path(__file__).parent.parent / "data" / "oracles" / "tall_masks.safetensors"

law = settings(deadline=None, derandomize=True, max_examples=25)

grid = st.integers(-64, 64).map(lambda n: n / 16)
lambdas = st.sampled_from([0.0, 0.2, 0.4, 1.0, 2.0])


def vectors(count: int = 3, *, size: int = 40) -> st.SearchStrategy[list[torch.Tensor]]:
    """Several vectors of one length with values that float64 adds exactly."""
    rows = st.integers(1, size).flatmap(
        lambda n: st.lists(st.lists(grid, min_size=n, max_size=n), min_size=count, max_size=count)
    )
    return rows.map(lambda rows: [torch.tensor(row, dtype=torch.float64) for row in rows])


def merge(deltas: list[torch.Tensor], weights: list[float] | None = None, **parameters: Any) -> torch.Tensor:
    """The merged delta on a base of zeros, at scale 1."""
    parameters = {"scale": 1.0, **parameters}
    return merge_tensors("consensus", torch.zeros_like(deltas[0]), deltas, weights=weights, parameters=parameters)


def _cases() -> list[Any]:
    with safe_open(ORACLES, "pt") as opened:
        return [pytest.param(c, id=c["id"]) for c in json.loads(opened.metadata()["hubmerge_oracle"])["cases"]]


@pytest.mark.parametrize("case", _cases())
def test_released_masks(case: dict[str, Any]) -> None:
    with safe_open(ORACLES, "pt") as opened:
        base, masks = (opened.get_tensor(f"{case['key']}/{part}") for part in ("base", "expected.mask"))
        models = [opened.get_tensor(f"{case['key']}/task.{i}") for i in range(case["tasks"])]
    deltas = [m - base for m in models]
    total, mask_lambda = torch.stack(deltas).sum(0), case["params"]["mask_lambda"]
    for delta, mask in zip(deltas, masks, strict=True):
        assert torch.equal(tall_mask(delta, total, mask_lambda), mask.bool())
    relying = masks.sum(0)
    assert len(relying.unique()) >= 3  # or the minimum would not matter
    for min_tasks in range(case["tasks"] + 2):
        parameters = {"mask_lambda": mask_lambda, "min_tasks": min_tasks, "scale": 0.7}
        merged = merge_tensors("consensus", base, models, parameters=parameters)
        torch.testing.assert_close(merged, base + 0.7 * total * (relying >= min_tasks), rtol=1e-12, atol=1e-14)


@law
@given(vectors(), lambdas, st.permutations([0, 1, 2]), st.integers(0, 4))
def test_the_order_of_models_does_not_matter(
    deltas: list[torch.Tensor], mask_lambda: float, order: list[int], min_tasks: int
) -> None:
    weights, settings_ = [1.0, 0.5, -2.0], {"mask_lambda": mask_lambda, "min_tasks": min_tasks}
    expected = merge(deltas, weights, **settings_)
    assert torch.equal(merge([deltas[i] for i in order], [weights[i] for i in order], **settings_), expected)


@law
@given(vectors(4), lambdas, st.sampled_from([0.3, 1.0]))
def test_without_a_minimum_it_is_task_arithmetic_and_beyond_all_models_the_base(
    tensors: list[torch.Tensor], mask_lambda: float, scale: float
) -> None:
    base, *models = tensors
    shared = {"weights": [1.0, 0.5, -2.0]}
    everything = {"mask_lambda": mask_lambda, "min_tasks": 0, "scale": scale}
    expected = merge_tensors("task_arithmetic", base, models, **shared, parameters={"scale": scale})
    assert torch.equal(merge_tensors("consensus", base, models, **shared, parameters=everything), expected)
    nothing = {"mask_lambda": mask_lambda, "min_tasks": 4, "scale": scale}
    assert torch.equal(merge_tensors("consensus", base, models, **shared, parameters=nothing), base)


@law
@given(vectors(2), lambdas)
def test_one_model_relies_on_all_its_entries(tensors: list[torch.Tensor], mask_lambda: float) -> None:
    base, model = tensors
    one = {"mask_lambda": mask_lambda, "scale": 1.0, "min_tasks": 1}
    assert torch.equal(merge_tensors("consensus", base, [model], parameters=one), model)
    assert torch.equal(merge_tensors("consensus", base, [model], parameters={**one, "min_tasks": 2}), base)


@law
@given(vectors(1), st.integers(2, 4))
def test_equal_models_agree_on_every_entry(tensors: list[torch.Tensor], count: int) -> None:
    # Each faces the sum of count - 1 others.
    same = [tensors[0]] * count
    assert torch.equal(merge(same, mask_lambda=0.9 / (count - 1)), count * tensors[0])
    assert not merge(same, mask_lambda=1.1 / (count - 1)).any()


@law
@given(vectors(), st.lists(lambdas, min_size=3, max_size=3), st.integers(0, 4))
def test_it_agrees_with_a_naive_loop(deltas: list[torch.Tensor], each: list[float], min_tasks: int) -> None:
    weights = [1.0, -0.5, 2.0]
    merged = merge(deltas, weights, mask_lambda=each, min_tasks=min_tasks)
    for j, got in enumerate(merged.tolist()):
        entries = [w * float(d[j]) for w, d in zip(weights, deltas, strict=True)]
        relying = sum(abs(e) > q * abs(sum(entries) - e) for e, q in zip(entries, each, strict=True))
        assert got == (sum(entries) if relying >= min_tasks else 0.0)


@law
@given(vectors(), lambdas)
def test_flipping_every_sign_flips_the_result(deltas: list[torch.Tensor], mask_lambda: float) -> None:
    merged = merge(deltas, mask_lambda=mask_lambda)
    assert torch.equal(merge([-d for d in deltas], mask_lambda=mask_lambda), -merged)


def test_a_model_that_is_the_base_relies_on_nothing() -> None:
    deltas = [torch.tensor([3.0, 2.0]).double(), torch.tensor([1.0, 2.0]).double()]
    zero = torch.zeros(2).double()
    for rest in ({}, {"mask_lambda": 0.0}, {"min_tasks": 1}):
        assert torch.equal(merge([*deltas, zero], **rest), merge(deltas, **rest))
        assert torch.equal(merge([*deltas, deltas[0]], [1.0, 1.0, 0.0], **rest), merge(deltas, **rest))


def test_by_hand() -> None:
    deltas = [torch.tensor([3.0, 2.0, -1.0]).double(), torch.tensor([1.0, 2.0, 0.25]).double()]
    # The first relies on every entry; the second's 1 is not above 0.4 · 3, its 0.25 not above 0.4 · 1.
    assert merge(deltas).tolist() == [0.0, 4.0, 0.0]
    assert merge(deltas, min_tasks=1).tolist() == [4.0, 4.0, -0.75]
    assert merge(deltas, mask_lambda=[0.4, 0.3]).tolist() == [4.0, 4.0, 0.0]
    # At four times its weight the second relies on the first entry too, and the first no longer on the second.
    assert merge(deltas, [1.0, 4.0]).tolist() == [7.0, 0.0, 0.0]
    assert merge(deltas, scale=0.5).tolist() == [0.0, 2.0, 0.0]


def test_damaged_values_are_not_hidden() -> None:
    damaged = torch.tensor([float("nan"), float("inf"), 1.0])
    merged = merge([damaged, torch.ones(3)], min_tasks=3)
    assert merged.isfinite().tolist() == [False, False, True]
