"""``merge_tensors``: the fixed contract of merging one tensor in memory, and what it says when it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hubmerge
from hubmerge.errors import UnknownMethodError, UsageError
from hubmerge.memory import merge_tensors

BASE = torch.zeros(2, 2)
MODELS = [torch.ones(2, 2), torch.full((2, 2), 3.0)]


def test_it_is_exported() -> None:
    assert hubmerge.merge_tensors is merge_tensors


def test_shape_and_dtype_are_those_of_the_base() -> None:
    merged = merge_tensors("linear", BASE.half(), MODELS)
    assert merged.dtype == torch.float16
    assert merged.tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_without_a_base_they_are_those_of_the_first_model() -> None:
    assert merge_tensors("linear", None, [MODELS[0].bfloat16(), MODELS[1]]).dtype == torch.bfloat16


def test_views_are_read_in_their_logical_order() -> None:
    base = torch.arange(6.0).view(2, 3).T
    model = base + torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    merged = merge_tensors("task_arithmetic", base, [model], parameters={"scale": 1.0})
    assert torch.equal(merged, model)


def test_a_scalar_tensor_merges() -> None:
    merged = merge_tensors("linear", None, [torch.tensor(1.0), torch.tensor(2.0)])
    assert merged.shape == ()
    assert merged.item() == 1.5


def test_parameters_that_need_gradients_do_not_record_any() -> None:
    merged = merge_tensors("linear", None, [torch.nn.Parameter(m) for m in MODELS])
    assert not merged.requires_grad


def test_parameters_may_differ_between_models() -> None:
    deltas = [torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])]
    parameters = {"density": [0.25, 0.5], "aggregate": "sum"}
    assert merge_tensors("ties", torch.zeros(4), deltas, parameters=parameters).tolist() == pytest.approx(
        [4.0, 0.0, 0.3, 0.4]
    )


def test_the_seed_decides_random_methods() -> None:
    base, model = torch.zeros(1000), torch.ones(1000)
    runs = [merge_tensors("dare_linear", base, [model], seed=s) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], merge_tensors("dare_linear", base, [model], names=["other"]))


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("linear", {"weights": [1.0, -1.0]}, "add up to 0"),
        ("task_arithmetic", {"weights": [1.0, -1.0], "parameters": {"normalize": True}}, "add up to 0"),
        ("linear", {"weights": [1.0]}, "weights has 1 entries for 2 models"),
        ("linear", {"names": ["a"]}, "names has 1 entries for 2 models"),
        ("ties", {"parameters": {"density": [0.5]}}, "density has 1 entries for 2 models"),
        ("ties", {"parameters": {"densty": 0.5}}, "did you mean 'density'?"),
        ("ties", {"parameters": {"density": 20}}, "density = 20"),
        ("ties", {"parameters": {"trim": "layer"}}, "trim = 'layer'"),
        ("ties", {"parameters": {"trim": ["model", "model"]}}, "trim = "),
        ("dare_ties", {"parameters": {"trim_after": True, "rescale": "l1"}}, "trim_after cannot be combined"),
        ("model_stock", {"weights": [1.0, 2.0]}, "takes no weights"),
        ("slerp", {}, "1 models, not 2"),
    ],
)
def test_unusable_arguments_are_explained(method: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")) as caught:
        merge_tensors(method, BASE, MODELS, **arguments)
    assert caught.value.exit_code == 2


def test_a_missing_base_and_unfit_tensors_are_explained() -> None:
    with pytest.raises(UsageError, match="ties needs the base"):
        merge_tensors("ties", None, MODELS)
    with pytest.raises(UsageError, match=r"models\[1\] has shape \(2,\), not \(2, 2\)"):
        merge_tensors("linear", BASE, [MODELS[0], torch.zeros(2)])
    with pytest.raises(UsageError, match=r"models\[0\] has dtype torch.int64"):
        merge_tensors("linear", BASE, [BASE.long(), BASE])
    with pytest.raises(UsageError, match="not 0"):
        merge_tensors("linear", BASE, [])
    with pytest.raises(UsageError, match="not 1"):
        merge_tensors("model_stock", BASE, [BASE])


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownMethodError, match="did you mean 'ties'"):
        merge_tensors("tie", BASE, MODELS)
