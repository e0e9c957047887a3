"""Bundles in memory: what arguments have to be, and what the errors say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hubmerge
from hubmerge.coding import add_task, decode_tensors, encode_tensors, remove_task
from hubmerge.errors import UsageError

from .models import Model, assert_same, random_models

NAME = "encoder.layers.1.attn.q.weight"


def test_the_package_exports_both_directions() -> None:
    base, models = random_models(2, dtype=torch.bfloat16)
    encoded = hubmerge.encode_tensors("superposition", base, models, names=["a", "b"], seed=4)
    found = hubmerge.decode_tensors(encoded, base, "b")
    assert {n: t.dtype for n, t in found.items()} == dict.fromkeys(base, torch.bfloat16)
    assert [t.id for t in encoded.tasks.values()] == [0, 1]


def without(model: Model) -> Model:
    return {n: t for n, t in model.items() if n != NAME}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, rf"1: tensor '{NAME}' is missing"),
        (lambda m: {**m, "classifier.weight": torch.zeros(3)}, r"1: the base has no 'classifier\.weight' \(1 such"),
        (lambda m: {**m, NAME: m[NAME][:5]}, r"shape \(5, 24\), not \(24, 24\)"),
        (lambda m: {**m, NAME: m[NAME].to(torch.int64)}, r"dtype torch\.int64"),
    ],
)
def test_models_have_to_be_of_the_base(change: Any, message: str) -> None:
    base, models = random_models(2)
    wrong = change(models[1])
    with pytest.raises(UsageError, match=message):
        encode_tensors("superposition", base, [models[0], wrong])
    encoded = encode_tensors("superposition", base, models, names=["a", "b"])
    with pytest.raises(UsageError, match=message):
        add_task(encoded, base, wrong, name="1")
    with pytest.raises(UsageError, match=message.replace("1:", "b:")):
        remove_task(encoded, base, wrong, name="b")


def test_the_base_has_to_be_the_same() -> None:
    base, models = random_models(2)
    encoded = encode_tensors("superposition", base, models)
    with pytest.raises(UsageError, match=f"the base: tensor '{NAME}' is missing"):
        decode_tensors(encoded, without(base), "0")


@pytest.mark.parametrize("names", [[], ["a"], ["a", "a"]])
def test_every_model_has_a_name_of_its_own(names: list[str]) -> None:
    base, models = random_models(2)
    with pytest.raises(UsageError, match="for 2 models"):
        encode_tensors("superposition", base, models, names=names)
    with pytest.raises(UsageError, match="for 0 models"):
        encode_tensors("superposition", base, [])


def test_tasks_are_known_by_name() -> None:
    base, models = random_models(2)
    encoded = encode_tensors("superposition", base, models, names=["a", "b"])
    with pytest.raises(UsageError, match=r"no task 'c'\n.*a, b"):
        decode_tensors(encoded, base, "c")
    with pytest.raises(UsageError, match="no task 'c'"):
        remove_task(encoded, base, models[0], name="c")
    with pytest.raises(UsageError, match="has a task 'a' already"):
        add_task(encoded, base, models[0], name="a")


def test_unknown_parameters_are_errors() -> None:
    base, models = random_models(2)
    with pytest.raises(UsageError, match="unknown parameter 'sign'; did you mean 'signs'"):
        encode_tensors("superposition", base, models, parameters={"sign": True})
    with pytest.raises(UsageError, match="storage = 'int3'"):
        encode_tensors("superposition", base, models, parameters={"storage": "int3"})


def test_bundles_are_values() -> None:
    base, models = random_models(3)
    encoded, twin = (encode_tensors("superposition", base, models) for _ in range(2))
    add_task(encoded, base, models[0], name="new")
    remove_task(encoded, base, models[0], name="0")
    assert_same(encoded, twin)
