"""What every merge method must do; element-wise methods must also give the same bits however a tensor is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from hubmerge.memory import merge_tensors
from hubmerge.methods import all_methods, get_method
from hubmerge.spec import Method, Params

from .chunked import GRAIN, added, merge_model, random_model

METHODS = all_methods()
IDS = [m.name for m in METHODS]
ELEMENT_METHODS = [m for m in METHODS if m.unit == "element"]

# Settings that take another path through a method than its defaults do.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"normalize": False}),
    ("task_arithmetic", {"normalize": True, "scale": 0.7}),
    ("ties", {"trim": "tensor", "rule": "mergekit", "aggregate": "weighted", "density": 0.5}),
    ("ties", {"rule": "published", "aggregate": "sum"}),
    ("ties", {"density": [0.1, 0.4, 1.0]}),
    ("dare_linear", {"rescale": "l1", "density": 0.3}),
    ("dare_ties", {"rescale": "l1"}),
    ("dare_ties", {"trim_after": True, "density": 0.5}),
    ("dare_ties", {"trim_after": True, "density": 0.5, "trim": "tensor", "rescale": "none"}),
    ("breadcrumbs", {"elect_sign": True, "density": 0.5, "gamma": [0.0, 0.1, 0.2]}),
    ("model_stock", {"rule": "mergekit"}),
]
CASES = [(m.name, {}) for m in ELEMENT_METHODS] + VARIANTS

SIZES = {"a": (3 * GRAIN + 1000,), "b": (7,), "c": (GRAIN, 3), "d": (2, 3, 4)}


def _count(method: Method) -> int:
    return 3 if method.max_models is None else min(3, method.max_models)


def _weights(method: Method) -> list[float]:
    weights = [1.0, 0.8, 0.6][: _count(method)]
    return weights if method.problem(method.parameters(), weights) is None else [1.0] * _count(method)


def _models(count: int, *, coarse: bool) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    base = random_model(SIZES, 0)
    return base, [added(base, random_model(SIZES, i + 1, coarse=coarse)) for i in range(count)]


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_every_method_and_every_parameter_is_described(method: Method) -> None:
    assert method.summary.endswith(".")
    assert "\n" not in method.summary
    assert any(mark in method.paper for mark in ("arXiv", "doi"))
    assert issubclass(method.parameters, Params)
    json.dumps(method.parameters.model_json_schema())
    for name, field in method.parameters.model_fields.items():
        assert field.description, f"{method.name}.{name} has no description"
        assert not field.is_required(), f"{method.name}.{name} has no default"
    assert "weight" not in method.parameters.model_fields


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_zero_deltas_give_the_base(method: Method) -> None:
    base = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    models = [base.clone() for _ in range(_count(method))]
    merged = merge_tensors(method.name, base, models)
    torch.testing.assert_close(merged, base, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_inputs_are_untouched_and_the_dtype_is_kept(method: Method, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 24, generator=generator).to(dtype)
    models = [(base.float() + 0.1 * torch.randn(40, 24, generator=generator)).to(dtype) for _ in range(_count(method))]
    before = [t.clone() for t in (base, *models)]
    merged = merge_tensors(method.name, base, models, weights=_weights(method))
    assert merged.dtype == dtype
    assert merged.shape == base.shape
    assert bool(torch.isfinite(merged).all())
    assert all(torch.equal(a, b) for a, b in zip(before, (base, *models), strict=True))


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_one_float64_input_makes_the_result_float64(method: Method) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 24, generator=generator)
    models = [base + torch.randn(40, 24, generator=generator) for _ in range(_count(method))]
    models[-1] = models[-1].double()
    assert merge_tensors(method.name, base, models).dtype == torch.float64


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_twice_is_the_same(method: Method) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 24, generator=generator)
    models = [base + torch.randn(40, 24, generator=generator) for _ in range(_count(method))]
    assert torch.equal(merge_tensors(method.name, base, models), merge_tensors(method.name, base, models))


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_a_tensor_without_elements_stays_one(method: Method) -> None:
    base = torch.empty(0, 24)
    merged = merge_tensors(method.name, base, [base] * _count(method), kind="vector")
    assert merged.shape == (0, 24)


@pytest.mark.parametrize(("name", "parameters"), CASES, ids=[f"{n}-{json.dumps(p)}" for n, p in CASES])
@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "repeating"])
def test_bits_do_not_depend_on_chunks_their_order_or_threads(
    name: str, parameters: dict[str, Any], coarse: bool
) -> None:
    method = get_method(name)
    base, models = _models(_count(method), coarse=coarse)

    def merged(**how: int) -> dict[str, torch.Tensor]:
        return merge_model(name, base, models, weights=_weights(method), parameters=parameters, **how)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = merged(chunk_size=1 << 40)
        runs = [merged(chunk_size=GRAIN * n, shuffle=n) for n in (1, 2, 8)]
        torch.set_num_threads(2)
        runs.append(merged(chunk_size=1 << 40, shuffle=9))
    finally:
        torch.set_num_threads(threads)
    for run in runs:
        for tensor in SIZES:
            assert torch.equal(run[tensor], expected[tensor]), tensor


def test_linear_never_looks_at_the_base() -> None:
    models = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]
    assert not get_method("linear").uses_base
    assert merge_tensors("linear", None, models).tolist() == [2.0, 4.0]
    assert merge_tensors("linear", torch.full((2,), float("nan")), models).tolist() == [2.0, 4.0]
