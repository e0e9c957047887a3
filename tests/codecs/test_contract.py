"""What every codec must do, with its defaults and with settings that take another path through it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from hubmerge.codec import Codec, CodecParams
from hubmerge.codecs import all_codecs, get_codec
from hubmerge.coding import Encoded, add_task, decode_deltas, decode_tensors, encode_tensors, remove_task
from hubmerge.errors import IntegrityError, UnknownMethodError, UsageError

from .models import GRAIN, LONG, Model, assert_same, assert_same_bits, deltas, random_models

CODECS = all_codecs()
IDS = [c.name for c in CODECS]

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("superposition", {"signs": False}),
    ("superposition", {"shuffle": False}),
    ("superposition", {"signs": False, "shuffle": False}),
    ("superposition", {"targets": "linear", "skip_rate": 2}),
    ("superposition", {"targets": "attention", "same_signs": True}),
    ("superposition", {"targets": "mlp", "shift": 1}),
    ("superposition", {"storage": "int8"}),
    ("tall_mask", {"multi_task": "ties", "mask_lambda": [0.2, 0.4, 0.6]}),
    ("tall_mask", {"multi_task": "ties", "density": 1.0, "storage": "int4"}),
    ("magnitude_mask", {"density": 0.5}),
    ("magnitude_mask", {"density": 1.0}),
    ("tsv_compress", {"rank": 2, "include_embeddings": True}),
    ("tsv_compress", {"budget": 0.3, "storage": "int8"}),
]
CASES = [(c.name, {}) for c in CODECS] + VARIANTS
CASE_IDS = [f"{n}-{json.dumps(p)}" for n, p in CASES]
INCREMENTAL = [case for case in CASES if get_codec(case[0]).incremental]
INCREMENTAL_IDS = [f"{n}-{json.dumps(p)}" for n, p in INCREMENTAL]

# What makes a codec keep everything of a single task.
LOSSLESS = {"magnitude_mask": {"density": 1.0}}


def both_ways(models: list[Model]) -> list[Model]:
    """The models with their tensors in the opposite order."""
    return [dict(reversed(m.items())) for m in models]


@pytest.mark.parametrize("codec", CODECS, ids=IDS)
def test_every_codec_and_every_parameter_is_described(codec: Codec) -> None:
    assert codec.summary.endswith(".")
    assert "\n" not in codec.summary
    assert "arXiv" in codec.paper
    assert issubclass(codec.parameters, CodecParams)
    json.dumps(codec.parameters.model_json_schema())
    for name, field in codec.parameters.model_fields.items():
        assert field.description, f"{codec.name}.{name} has no description"
        assert not field.is_required(), f"{codec.name}.{name} has no default"


def test_a_misspelt_codec_gets_a_suggestion() -> None:
    with pytest.raises(UnknownMethodError, match="did you mean 'superposition'"):
        get_codec("superposision")


@pytest.mark.parametrize(("name", "parameters"), CASES, ids=CASE_IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_models_come_back_in_their_dtype_and_nothing_else_changes(
    name: str, parameters: dict[str, Any], dtype: torch.dtype
) -> None:
    base, models = random_models(3, dtype=dtype)
    base["position_ids"] = torch.arange(7)
    for model in models:
        model["position_ids"] = torch.arange(7)
    before = [{n: t.clone() for n, t in m.items()} for m in (base, *models)]
    encoded = encode_tensors(name, base, models, parameters=parameters)
    kept = {n: t.clone() for n, t in encoded.shared.items()}
    for i in range(3):
        found = decode_tensors(encoded, base, str(i))
        assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in base.items()}
        assert all(bool(torch.isfinite(t).all()) for t in found.values())
        assert torch.equal(found["position_ids"], torch.arange(7))
        assert_same_bits(found, decode_tensors(encoded, base, str(i)))
    assert_same_bits(kept, encoded.shared)
    for old, new in zip(before, (base, *models), strict=True):
        assert_same_bits(old, new)


@pytest.mark.parametrize(("name", "parameters"), CASES, ids=CASE_IDS)
def test_a_fine_tune_that_is_the_base_comes_back_as_the_base(name: str, parameters: dict[str, Any]) -> None:
    base, _ = random_models(1)
    encoded = encode_tensors(name, base, [base, base, base], parameters=parameters)
    for task in ("0", "1", "2"):
        found = decode_tensors(encoded, base, task)
        assert all(torch.equal(found[n], t) for n, t in base.items())


@pytest.mark.parametrize("codec", CODECS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_task_is_exact(codec: Codec, dtype: torch.dtype) -> None:
    base, models = random_models(1, dtype=dtype)
    encoded = encode_tensors(codec.name, base, models, parameters=LOSSLESS.get(codec.name))
    found, wanted = decode_deltas(encoded, "0"), deltas(base, models[0])
    assert all(torch.equal(found[n], t) for n, t in wanted.items())
    if dtype == torch.bfloat16:  # float32 holds the differences of such weights exactly
        assert all(torch.equal(t, models[0][n]) for n, t in decode_tensors(encoded, base, "0").items())


@pytest.mark.parametrize(("name", "parameters"), CASES, ids=CASE_IDS)
def test_bits_do_not_depend_on_chunks_threads_or_the_order_of_tensors(name: str, parameters: dict[str, Any]) -> None:
    base, models = random_models(3, LONG)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = encode_tensors(name, base, models, parameters=parameters, chunk_elements=1 << 40)
        runs = [
            encode_tensors(name, base, models, parameters=parameters, chunk_elements=GRAIN),
            encode_tensors(name, both_ways([base])[0], both_ways(models), parameters=parameters),
        ]
        decoded = [decode_tensors(expected, base, "1", chunk_elements=n) for n in (GRAIN, 2 * GRAIN, 1 << 40)]
        torch.set_num_threads(2)
        decoded.append(decode_tensors(expected, base, "1"))
        if get_codec(name).unit == "element":
            runs.append(encode_tensors(name, base, models, parameters=parameters, chunk_elements=1 << 40))
    finally:
        torch.set_num_threads(threads)
    for run in runs:
        assert_same(run, expected)
    for found in decoded[1:]:
        assert_same_bits(found, decoded[0])


@pytest.mark.parametrize(("name", "parameters"), CASES, ids=CASE_IDS)
def test_what_is_stored_is_known_beforehand(name: str, parameters: dict[str, Any]) -> None:
    base, models = random_models(3)
    encoded = encode_tensors(name, base, models, parameters=parameters)
    codec, p = get_codec(name), encoded.parameters
    parts = [(t, q) for t in encoded.targets for q in codec.parts(p, t)]
    for owner, stored in [("shared", encoded.shared), *(("task", t.stored) for t in encoded.tasks.values())]:
        layout = {n: s for t, q in parts if q.owner == owner for n, s in q.stored(t, p.storage).items()}
        assert {n: (s.dtype.torch, s.shape) for n, s in layout.items()} == {
            n: (t.dtype, t.shape) for n, t in stored.items()
        }
    assert {t.name for t in encoded.targets} == set(base)


@pytest.mark.parametrize(("name", "parameters"), CASES, ids=CASE_IDS)
def test_lambda_is_applied_at_retrieval(name: str, parameters: dict[str, Any]) -> None:
    base, models = random_models(3)
    encoded = encode_tensors(name, base, models, parameters={**parameters, "scale": 0.5})
    assert_same_bits(encoded.shared, encode_tensors(name, base, models, parameters=parameters).shared)
    found = decode_deltas(encoded, "1")
    halved, whole, none = (decode_tensors(encoded, base, "1", scale=s) for s in (None, 1.0, 0.0))
    for n, t in base.items():
        assert torch.equal(halved[n], torch.add(t, found[n], alpha=0.5))
        assert torch.equal(whole[n], t + found[n])
        assert torch.equal(none[n], t)


@pytest.mark.parametrize(("name", "parameters"), CASES, ids=CASE_IDS)
def test_expected_errors_add_up_over_chunks(name: str, parameters: dict[str, Any]) -> None:
    from hubmerge.memory import MemoryGroup

    codec = get_codec(name)
    base, models = random_models(3, LONG)
    encoded = encode_tensors(name, base, models, parameters=parameters)
    for target in encoded.targets if codec.unit == "element" else ():
        versions = [m[target.name] for m in models]
        group = MemoryGroup(base[target.name], versions, tasks="abc", weights=(1, 1, 1), params=(None,) * 3)
        whole = codec.expected_error(group, target, encoded.parameters)
        cuts = [(a, min(a + GRAIN, target.numel)) for a in range(0, target.numel, GRAIN)]
        pieces = [codec.expected_error(group.chunk(a, b), target, encoded.parameters) for a, b in cuts]
        if whole is None:
            assert set(pieces) == {None}
        else:
            assert [sum(column) for column in zip(*pieces, strict=True)] == pytest.approx(list(whole))  # type: ignore[arg-type]


# --- adding and removing ----------------------------------------------------------------------------------------


def one_by_one(name: str, base: Model, models: list[Model], parameters: dict[str, Any]) -> Encoded:
    codec = get_codec(name)
    fixed = codec.fixed(codec.parameters(**parameters), len(models)).model_dump()
    encoded = encode_tensors(name, base, models[:1], parameters=fixed)
    for i, model in enumerate(models[1:], start=1):
        encoded = add_task(encoded, base, model, name=str(i))
    return encoded


@pytest.mark.parametrize(("name", "parameters"), INCREMENTAL, ids=INCREMENTAL_IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adding_one_by_one_gives_the_bits_of_all_at_once(
    name: str, parameters: dict[str, Any], dtype: torch.dtype
) -> None:
    parameters = {**parameters, "storage": "float32"}
    base, models = random_models(4, dtype=dtype)
    assert_same(one_by_one(name, base, models, parameters), encode_tensors(name, base, models, parameters=parameters))


@pytest.mark.parametrize(("name", "parameters"), INCREMENTAL, ids=INCREMENTAL_IDS)
def test_adding_and_removing_restores_the_bits(name: str, parameters: dict[str, Any]) -> None:
    base, models = random_models(4, dtype=torch.bfloat16)
    parameters = {**parameters, "storage": "float32"}
    before = encode_tensors(name, base, models[:3], parameters=parameters)
    after = add_task(before, base, models[3], name="new")
    assert list(after.tasks) == ["0", "1", "2", "new"]
    restored = remove_task(after, base, models[3], name="new")
    assert_same(restored, before)
    # In another order than added, and down to nothing.
    rest = after
    for task in ("1", "new", "0", "2"):
        rest = remove_task(rest, base, models[3] if task == "new" else models[int(task)], name=task)
    assert not rest.tasks
    assert all(not bool(t.any()) for t in rest.shared.values())
    # A number is not given twice, so the same task has other random bits now.
    again = add_task(rest, base, models[0], name="0")
    assert again.tasks["0"].id == 4


@pytest.mark.parametrize(("name", "parameters"), INCREMENTAL, ids=INCREMENTAL_IDS)
def test_removing_float32_models_leaves_rounding_errors_at_most(name: str, parameters: dict[str, Any]) -> None:
    base, models = random_models(4)
    parameters = {**parameters, "storage": "float32"}
    before = encode_tensors(name, base, models[:3], parameters=parameters)
    restored = remove_task(add_task(before, base, models[3], name="new"), base, models[3], name="new")
    for n, tensor in before.shared.items():
        torch.testing.assert_close(restored.shared[n], tensor, rtol=0, atol=1e-7)


@pytest.mark.parametrize("codec", [c for c in CODECS if not c.incremental], ids=lambda c: c.name)
def test_codecs_that_need_all_models_say_so(codec: Codec) -> None:
    base, models = random_models(2)
    encoded = encode_tensors(codec.name, base, models)
    with pytest.raises(UsageError, match="cannot add or remove"):
        add_task(encoded, base, models[0], name="new")
    with pytest.raises(UsageError, match="cannot add or remove"):
        remove_task(encoded, base, models[0], name="0")
    with pytest.raises(NotImplementedError, match=codec.name):
        codec.remove({}, None, encoded.targets[0], [], encoded.parameters)  # type: ignore[arg-type]


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS, ids=IDS)
def test_damaged_models_are_refused(codec: Codec) -> None:
    base, models = random_models(2)
    models[1]["encoder.layers.1.attn.q.weight"][3, 4] = float("nan")
    with pytest.raises(IntegrityError, match=r"encoder\.layers\.\d\.attn\.q\.weight.*NaN or infinity"):
        encode_tensors(codec.name, base, models)
