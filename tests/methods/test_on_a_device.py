"""Matrix methods where tensors are on another device: they compute there alone, and get the same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.memory import MemoryGroup, merge_tensors
from hubmerge.methods import all_methods, get_method
from hubmerge.spec import Kind, LowRank, Method
from hubmerge.topk import keep_largest_
from tests.elsewhere import ELSEWHERE, Elsewhere, Present, elsewhere

law = settings(deadline=None, derandomize=True, max_examples=25)
ON_DEVICES: list[tuple[Method, dict[str, Any]]] = [(m, {}) for m in all_methods() if m.unit == "matrix"] + [
    (get_method("awd"), {"solver": "adam", "steps": 5}),
    (get_method("drm"), {"direction": "vertical", "rule": "published"}),
    (get_method("drm"), {"renormalize": False, "density": 0.0}),
    (get_method("knots"), {"trim": "tensor", "aggregate": "weighted"}),
    (get_method("tsv_merge"), {"rank": 2, "include_embeddings": True}),
]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("method", "parameters"), ON_DEVICES, ids=lambda x: getattr(x, "name", None) or str(x))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_method_computes_on_the_device_its_tensors_are_on(
    method: Method, parameters: dict[str, Any], dtype: torch.dtype, kind: Kind
) -> None:
    assert method.whole(method.parameters(**parameters))
    base = random(24, 16, seed=0, dtype=torch.float64).to(dtype)
    models = [(base + 0.1 * random(24, 16, seed=i, dtype=torch.float64)).to(dtype) for i in (1, 2, 3)]
    weights = [1.0, 0.5, -2.0]
    expected = merge_tensors(method.name, base, models, weights=weights, parameters=parameters, kind=kind)
    with Present():
        there = [elsewhere(m) for m in models]
        found = merge_tensors(
            method.name, elsewhere(base), there, weights=weights, parameters=parameters, kind=kind
        )  # fmt: skip
    assert isinstance(found, Elsewhere)
    assert torch.equal(found.values, expected)


@pytest.mark.parametrize("method", [m for m in all_methods() if m.unit == "matrix"], ids=lambda m: m.name)
@pytest.mark.parametrize("mixed", [False, True])
def test_factors_stay_on_their_device(method: Method, mixed: bool) -> None:
    p = method.parameters()

    def merged(move: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | LowRank:
        models: list[torch.Tensor | LowRank] = [
            LowRank(move(random(12, r, seed=r)), move(random(r, 10, seed=9 + r)), 0.5) for r in (2, 3)
        ]
        base = random(12, 10, seed=0)
        models += [move(base + random(12, 10, seed=5))] if mixed else []
        names = [str(i) for i in range(len(models))]
        group = MemoryGroup(
            move(base), models, tasks=names, weights=[1.0] * len(models), params=[p] * len(models)
        )  # fmt: skip
        return method.merge(group, p, None)

    expected = merged(lambda t: t)
    with Present():
        found = merged(elsewhere)
    assert isinstance(found, LowRank)
    assert isinstance(expected, LowRank)
    assert isinstance(found.up, Elsewhere)
    assert isinstance(found.down, Elsewhere)
    # Singular vectors may have either sign: another driver computes them there.
    result = LowRank(found.up.values, found.down.values, found.scale).dense()
    torch.testing.assert_close(result, expected.dense(), rtol=1e-12, atol=1e-12)


@law
@given(st.lists(st.integers(-9, 9), min_size=4, max_size=20), st.floats(0, 1), st.booleans())
def test_a_device_keeps_the_same_entries(values: list[int], density: float, all_ties: bool) -> None:
    here, count = torch.tensor(values, dtype=torch.float32), int(density * len(values))
    with Present():
        there = keep_largest_(elsewhere(here), count, all_ties=all_ties)
    assert isinstance(there, Elsewhere)
    assert torch.equal(there.values, keep_largest_(here.clone(), count, all_ties=all_ties))


def test_the_second_device_of_these_tests_is_strict() -> None:
    here = torch.ones(3)
    with Present():
        there = elsewhere(here)
        assert there.device == ELSEWHERE
        assert torch.equal((2 * there).cpu(), torch.full((3,), 2.0))
        with pytest.raises(RuntimeError, match="different devices"):
            there + here
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
