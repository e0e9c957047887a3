"""Codecs with masks: what released code computed, examples worked by hand, naive loops, and laws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from hubmerge.codec import Target, Task
from hubmerge.codecs import get_codec
from hubmerge.coding import Encoded, add_task, decode_deltas, encode_tensors
from hubmerge.memory import MemoryGroup, merge_tensors
from hubmerge.storage import FORMS

from .models import LONG, assert_same_bits, deltas, energy, random_models

ORACLES = Path(__file__).parent.parent / "data" / "oracles"

law = settings(deadline=None, derandomize=True, max_examples=25)

grid = st.integers(-64, 64).map(lambda n: n / 16)


def vectors(count: int = 3) -> st.SearchStrategy[list[torch.Tensor]]:
    """Several vectors of one length with values that float32 adds exactly."""
    return st.integers(1, 40).flatmap(
        lambda n: st.lists(st.lists(grid, min_size=n, max_size=n).map(torch.tensor), min_size=count, max_size=count)
    )


def encode(codec: str, tensors: list[torch.Tensor], **parameters: Any) -> Encoded:
    """A bundle of single vectors on a base of zeros."""
    base = {"w": torch.zeros_like(tensors[0])}
    return encode_tensors(codec, base, [{"w": t} for t in tensors], parameters=parameters)


def decoded(encoded: Encoded) -> list[list[float]]:
    return [decode_deltas(encoded, task)["w"].tolist() for task in encoded.tasks]


def masks(encoded: Encoded, name: str = "w") -> list[torch.Tensor]:
    target = next(t for t in encoded.targets if t.name == name)
    stored = [t.stored[f"{name}:mask"] for t in encoded.tasks.values()]
    return [FORMS["bits"].decode((s,), target.numel) for s in stored]


def _cases(file: str) -> list[Any]:
    with safe_open(ORACLES / f"{file}.safetensors", "pt") as opened:
        return [pytest.param(c, id=c["id"]) for c in json.loads(opened.metadata()["hubmerge_oracle"])["cases"]]


def _tensors(file: str, case: dict[str, Any], *expected: str) -> tuple[torch.Tensor, list[torch.Tensor], Any]:
    key = case["key"]
    with safe_open(ORACLES / f"{file}.safetensors", "pt") as opened:
        models = [opened.get_tensor(f"{key}/task.{i}") for i in range(case["tasks"])]
        return opened.get_tensor(f"{key}/base"), models, [opened.get_tensor(f"{key}/expected.{e}") for e in expected]


# --- EMR --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", _cases("emr"))
def test_released_emr(case: dict[str, Any]) -> None:
    base, models, (unified, expected, rescalers) = _tensors("emr", case, "unified", "masks", "rescalers")
    encoded = encode_tensors("emr", {"w": base}, [{"w": m} for m in models])
    assert torch.equal(torch.stack(masks(encoded)), expected.bool())
    torch.testing.assert_close(encoded.shared["w"], unified.float(), rtol=0, atol=0)
    found = [t.facts["rescaler"] for t in encoded.tasks.values()]
    assert found == pytest.approx(rescalers.tolist(), rel=1e-6)
    for i, task in enumerate(encoded.tasks):
        wanted = rescalers[i] * expected[i] * unified
        torch.testing.assert_close(decode_deltas(encoded, task)["w"], wanted.float(), rtol=1e-6, atol=0)
    # In float64, before storage rounds.
    codec, count = get_codec("emr"), len(models)
    group = MemoryGroup(base, models, tasks=list("abcde")[:count], weights=[1.0] * count, params=[None] * count)
    exact = codec.encode(group.chunk(0, 1500), Target("w", (1500,), "vector"), [Task(i, 0) for i in range(count)], None)
    torch.testing.assert_close(exact.shared[""], unified, rtol=1e-14, atol=0)


def test_emr_by_hand() -> None:
    encoded = encode("emr", [torch.tensor([1.0, -2.0]), torch.tensor([3.0, 1.0])])
    assert encoded.shared["w"].tolist() == [3.0, -2.0]
    assert [m.tolist() for m in masks(encoded)] == [[True, True], [True, False]]
    assert [t.facts["rescaler"] for t in encoded.tasks.values()] == [0.6, 4 / 3]
    assert decoded(encoded) == [pytest.approx([1.8, -1.2]), pytest.approx([4.0, 0.0])]


def test_emr_elects_minus_where_deltas_cancel() -> None:
    encoded = encode("emr", [torch.tensor([2.0, 1.0]), torch.tensor([-2.0, 0.0])])
    assert encoded.shared["w"].tolist() == [-2.0, 1.0]
    assert [m.tolist() for m in masks(encoded)] == [[False, True], [True, False]]


@law
@given(vectors())
def test_emr_agrees_with_a_naive_loop(tensors: list[torch.Tensor]) -> None:
    encoded = encode("emr", tensors)
    columns = list(zip(*(t.tolist() for t in tensors), strict=True))
    signs = [1 if sum(c) > 0 else -1 for c in columns]
    unified = [s * max(0.0, *(x * s for x in c)) for c, s in zip(columns, signs, strict=True)]
    assert encoded.shared["w"].tolist() == unified
    for t, (task, found) in enumerate(zip(encoded.tasks.values(), decoded(encoded), strict=True)):
        kept = [u if c[t] * s > 0 else 0.0 for c, s, u in zip(columns, signs, unified, strict=True)]
        total = sum(abs(x) for x in kept)
        scale = sum(abs(c[t]) for c in columns) / total if total else 0.0
        assert task.facts["rescaler"] == scale
        assert found == pytest.approx([scale * x for x in kept], rel=1e-6)


def test_emr_restores_the_l1_norm_of_the_whole_model() -> None:
    base, models = random_models(4)
    encoded = encode_tensors("emr", base, models)
    for task, model in zip(encoded.tasks, models, strict=True):
        found, wanted = (sum(float(t.abs().sum(dtype=torch.float64)) for t in d.values())
                         for d in (decode_deltas(encoded, task), deltas(base, model)))  # fmt: skip
        assert found == pytest.approx(wanted, rel=1e-6)
        own = deltas(base, model)
        assert (
            abs(
                float(own["embed.weight"].abs().sum()) - float(decode_deltas(encoded, task)["embed.weight"].abs().sum())
            )
            > 1e-3
        )


# --- TALL-masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", _cases("tall_masks"))
def test_released_tall_masks(case: dict[str, Any]) -> None:
    base, models, (expected,) = _tensors("tall_masks", case, "mask")
    encoded = encode_tensors("tall_mask", {"w": base}, [{"w": m} for m in models], parameters=case["params"])
    assert torch.equal(torch.stack(masks(encoded)), expected.bool())
    total = sum(m - base for m in models)
    torch.testing.assert_close(encoded.shared["w"], total.float(), rtol=1e-6, atol=1e-7)
    for i, task in enumerate(encoded.tasks):
        wanted = expected[i] * total
        torch.testing.assert_close(decode_deltas(encoded, task)["w"], wanted.float(), rtol=1e-6, atol=1e-7)


def test_tall_masks_by_hand() -> None:
    tensors = [torch.tensor([3.0, 2.0, -1.0]), torch.tensor([1.0, 2.0, 0.25])]
    encoded = encode("tall_mask", tensors)
    assert encoded.shared["w"].tolist() == [4.0, 4.0, -0.75]
    # The second's 1 is not above 0.4 · 3, its 0.25 not above 0.4 · 1.
    assert decoded(encoded) == [[4.0, 4.0, -0.75], [0.0, 4.0, 0.0]]
    assert decoded(encode("tall_mask", tensors, mask_lambda=[0.4, 0.3])) == [[4.0, 4.0, -0.75], [4.0, 4.0, 0.0]]


@law
@given(vectors(), st.lists(st.sampled_from([0.0, 0.2, 1.0, 3.0]), min_size=3, max_size=3))
def test_tall_masks_agree_with_a_naive_loop(tensors: list[torch.Tensor], each: list[float]) -> None:
    found = decoded(encode("tall_mask", tensors, mask_lambda=each))
    for j, column in enumerate(zip(*(t.tolist() for t in tensors), strict=True)):
        for t, x in enumerate(column):
            assert found[t][j] == (sum(column) if abs(x) > each[t] * abs(sum(column) - x) else 0.0)


@pytest.mark.parametrize("density", [0.1, 0.2, 0.7, 1.0])
def test_the_multi_task_vector_of_ties_is_that_of_the_merge_method(density: float) -> None:
    base, models = random_models(3)
    encoded = encode_tensors("tall_mask", base, models, parameters={"multi_task": "ties", "density": density})
    # The method ranks a model's tensors together, too: all of them as one vector, in canonical order.
    flat = [torch.cat([m[t.name].reshape(-1) for t in encoded.targets]) for m in (base, *models)]
    parameters = {"density": density, "aggregate": "sum", "scale": 1.0}
    merged = merge_tensors("ties", flat[0] * 0, [m - flat[0] for m in flat[1:]], parameters=parameters)
    stored = torch.cat([encoded.shared[t.name].reshape(-1) for t in encoded.targets])
    assert torch.equal(stored, merged)


# --- magnitude masks --------------------------------------------------------------------------------------------


def test_magnitude_masks_by_hand() -> None:
    tensors = [torch.tensor([3.0, -2.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, -0.25, 0.5])]
    assert decoded(encode("magnitude_mask", tensors, density=0.5)) == [[4.0, 0.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0]]
    found = encode("magnitude_mask", tensors, density=[0.75, 0.25])
    assert [m.tolist() for m in masks(found)] == [[True, True, True, False], [False, True, False, False]]
    # An entry that the task leaves as it is never belongs to its mask.
    assert decoded(encode("magnitude_mask", tensors, density=1.0))[0] == [4.0, 0.0, 0.75, 0.0]


@pytest.mark.parametrize("density", [0.0, 0.1, 0.33, 0.9])
def test_magnitude_masks_rank_the_whole_model(density: float) -> None:
    base, models = random_models(2, LONG)
    scaled = [{n: base[n] + (m[n] - base[n]) * (9 if n == "bias" else 1) for n in m} for m in models]
    encoded = encode_tensors("magnitude_mask", base, scaled, parameters={"density": density})
    for i, model in enumerate(scaled):
        own = deltas(base, model)
        magnitudes = torch.cat([own[t.name].abs().reshape(-1) for t in encoded.targets])
        count = int(density * len(magnitudes))
        expected = torch.zeros(len(magnitudes), dtype=torch.bool)
        expected[magnitudes.sort(descending=True, stable=True).indices[:count]] = True
        assert torch.equal(torch.cat([masks(encoded, t.name)[i] for t in encoded.targets]), expected)
        found = decode_deltas(encoded, str(i))
        assert energy(found) == pytest.approx(
            float((torch.cat([encoded.shared[t.name].reshape(-1) for t in encoded.targets]) * expected).square().sum()),
            rel=1e-5,
        )


def test_a_task_added_later_may_have_its_own_density() -> None:
    base, models = random_models(3)
    encoded = encode_tensors("magnitude_mask", base, models[:2], parameters={"density": 0.5})
    added = add_task(encoded, base, models[2], name="2", parameters={"density": 0.1})
    at_once = encode_tensors("magnitude_mask", base, models, parameters={"density": [0.5, 0.5, 0.1]})
    assert_same_bits(added.shared, at_once.shared)
    for name, task in at_once.tasks.items():
        assert_same_bits(added.tasks[name].stored, task.stored)


# --- all of them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["emr", "tall_mask", "magnitude_mask"])
@pytest.mark.parametrize("tasks", [1, 5])
def test_masks_take_a_bit_per_task_and_parameter(codec: str, tasks: int) -> None:
    base, models = random_models(tasks, LONG)
    encoded = encode_tensors(codec, base, models, parameters={"storage": "bfloat16"})
    bits = sum(-(-t.numel() // 8) for t in base.values())
    assert encoded.size_bytes == 2 * sum(t.numel() for t in base.values()) + tasks * bits
