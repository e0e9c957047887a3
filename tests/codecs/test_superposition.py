"""Superposition: examples worked by hand, the theory of its errors, and what each switch does."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.codec import Target, Task
from hubmerge.codecs import get_codec
from hubmerge.coding import Encoded, decode_deltas, decode_tensors, encode_tensors
from hubmerge.memory import merge_tensors
from hubmerge.rng import permutation, signs, stream_key
from hubmerge.spec import natural_key

from .models import LAYERS, SHAPES, deltas, energy, random_models, retrieval_errors

law = settings(deadline=None, derandomize=True, max_examples=25)

WIDE = {
    "embed.weight": (64, 256),
    **{f"layers.{i}.attn.weight": (256, 256) for i in range(8)},
    **{f"layers.{i}.mlp.weight": (256, 192) for i in range(8)},
    **{f"layers.{i}.bias": (256,) for i in range(8)},
}
CODEC = get_codec("superposition")


def encode(base: Any, models: Any, *, seed: int = 0, **parameters: Any) -> Encoded:
    return encode_tensors("superposition", base, models, parameters=parameters, seed=seed)


def sign_rows(seed: int, name: str, width: int, tasks: int) -> list[list[int]]:
    return [signs(stream_key("signs", seed, task, name), width).tolist() for task in range(tasks)]


def test_by_hand() -> None:
    seed = next(s for s in itertools.count() if sign_rows(s, "w", 2, 2) == [[1, -1], [-1, -1]])
    base = {"w": torch.zeros(2)}
    encoded = encode(base, [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])}], seed=seed)
    assert encoded.shared["w"].tolist() == [-2.0, -6.0]
    assert decode_deltas(encoded, "0")["w"].tolist() == [-2.0, 6.0]
    assert decode_deltas(encoded, "1")["w"].tolist() == [2.0, 6.0]
    assert decode_tensors(encoded, base, "0", scale=0.5)["w"].tolist() == [-1.0, 3.0]


def test_two_layers_by_hand() -> None:
    pattern = ("shuffle", 5, 0, "h.*.b", 1)
    assert permutation(stream_key(*pattern), 2).tolist() in ([0, 1], [1, 0])
    base = {f"h.{i}.b": torch.zeros(1) for i in range(2)}
    models = [{"h.0.b": torch.tensor([1.0]), "h.1.b": torch.tensor([10.0])}]
    orders = set()
    for seed in range(8):
        encoded = encode(base, models, seed=seed, signs=False)
        stored = [float(encoded.shared[f"h.{i}.b"]) for i in range(2)]
        order = permutation(stream_key("shuffle", seed, 0, "h.*.b", 1), 2).tolist()
        assert stored == [[1.0, 10.0][i] for i in order]
        assert {n: float(t) for n, t in decode_deltas(encoded, "0").items()} == {"h.0.b": 1.0, "h.1.b": 10.0}
        orders.add(tuple(order))
    assert len(orders) == 2


@pytest.mark.parametrize("common", [0.0, 0.4])
def test_the_error_is_what_theory_expects(common: float) -> None:
    base, models = random_models(6, WIDE, common=common)
    energies = [energy(deltas(base, m)) for m in models]
    expected = [sum(energies) - e for e in energies]
    for error, theory in zip(retrieval_errors(encode(base, models), base, models), expected, strict=True):
        assert error == pytest.approx(theory, rel=0.03)
    signed = retrieval_errors(encode(base, models, shuffle=False), base, models)
    summed = retrieval_errors(encode(base, models, signs=False, shuffle=False), base, models)
    shuffled = retrieval_errors(encode(base, models, signs=False), base, models)
    assert sum(signed) == pytest.approx(sum(expected), rel=0.03)
    if common:  # what deltas have in common adds up unless signs or layers tell it apart
        assert sum(summed) > 2.5 * sum(expected)
        assert 1.1 * sum(expected) < sum(shuffled) < 0.7 * sum(summed)
    total = energy(encode(base, models).shared)
    assert total == pytest.approx(sum(energies), rel=0.03)


@pytest.mark.parametrize("parameters", [{}, {"same_signs": True}, {"targets": "attention"}, {"skip_rate": 3},
                                        {"signs": False, "shuffle": False}])  # fmt: skip
def test_expected_errors_are_those_measured(parameters: dict[str, Any]) -> None:
    from hubmerge.memory import MemoryGroup

    base, models = random_models(4, WIDE, common=0.4)
    encoded = encode(base, models, **parameters)
    expected = [0.0] * 4
    for target in encoded.targets:
        versions = [m[target.name] for m in models]
        group = MemoryGroup(base[target.name], versions, tasks="abcd", weights=[1.0] * 4, params=[None] * 4)
        found = CODEC.expected_error(group, target, encoded.parameters)
        assert found is not None
        expected = [a + b for a, b in zip(expected, found, strict=True)]
    assert retrieval_errors(encoded, base, models) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("storage", "more"), [("bfloat16", 1e-4), ("int8", 1e-3), ("int4", 0.02)])
def test_smaller_storage_hardly_adds_to_the_error(storage: str, more: float) -> None:
    base, models = random_models(8, WIDE)
    exact, stored = (sum(retrieval_errors(encode(base, models, storage=s), base, models)) for s in ("float32", storage))
    assert (stored / exact) ** 0.5 < 1 + more


def test_sizes_do_not_depend_on_the_number_of_tasks() -> None:
    base, models = random_models(8, WIDE, dtype=torch.bfloat16)
    size = sum(t.nbytes for t in base.values())
    for storage, share in (("float32", 2.0), ("bfloat16", 1.0), ("int8", 8.25 / 16), ("int4", 4.25 / 16)):
        assert encode(base, models, storage=storage).size_bytes == size * share
        assert encode(base, models[:1], storage=storage).size_bytes == size * share
    assert 1 + 8.25 / 16 < 1.55


def test_without_signs_and_shuffling_it_is_task_arithmetic() -> None:
    base, models = random_models(3)
    encoded = encode(base, models, signs=False, shuffle=False)
    for task in encoded.tasks:
        found = decode_tensors(encoded, base, task, scale=0.3)
        for name, tensor in base.items():
            merged = merge_tensors("task_arithmetic", tensor, [m[name] for m in models], parameters={"scale": 0.3})
            assert torch.equal(found[name], merged)


@law
@given(st.integers(0, 99), st.sampled_from([-2.0, 0.5, 4.0]))
def test_encoding_and_decoding_are_linear(seed: int, factor: float) -> None:
    base, models = random_models(2, seed=seed)
    zero = {n: torch.zeros_like(t) for n, t in base.items()}
    parts = [deltas(base, m) for m in models]
    scaled = [{n: factor * t for n, t in d.items()} for d in parts]  # by powers of two: exact
    one, other = encode(zero, parts, seed=seed), encode(zero, scaled, seed=seed)
    assert all(torch.equal(other.shared[n], factor * t) for n, t in one.shared.items())
    for task in ("0", "1"):
        doubled = decode_deltas(other, task)
        assert all(torch.equal(doubled[n], factor * t) for n, t in decode_deltas(one, task).items())


# --- which tensors ----------------------------------------------------------------------------------------------


def targets_of(**parameters: Any) -> dict[str, Target]:
    base, _ = random_models(0)
    return {t.name: t for t in encode(base, [base], **parameters).targets}


def treated(**parameters: Any) -> list[str]:
    return [n for n, t in targets_of(**parameters).items() if not t.plain]


def test_targets_choose_tensors() -> None:
    assert treated() == sorted(SHAPES, key=natural_key)
    assert treated(targets="attention") == [f"encoder.layers.{i}.attn.q.weight" for i in range(LAYERS)]
    feed_forward = [f"encoder.layers.{i}.mlp.up.weight" for i in range(LAYERS)]
    assert treated(targets="mlp") == sorted([*feed_forward, "encoder.layers.0.extra.weight"], key=natural_key)
    linear = treated(targets="linear")
    assert set(linear) == {n for n, s in SHAPES.items() if len(s) == 2 and "embed" not in n}
    assert treated(targets="linear", skip_rate=3) == linear[2::3]
    assert treated(skip_rate=100) == []


@pytest.mark.parametrize("parameters", [{"targets": "attention"}, {"skip_rate": 2}])
def test_what_is_not_chosen_is_summed(parameters: dict[str, Any]) -> None:
    base, models = random_models(3)
    encoded = encode(base, models, **parameters)
    parts = [deltas(base, m) for m in models]
    plain = [t.name for t in encoded.targets if t.plain]
    assert plain
    for name in plain:
        assert torch.equal(decode_deltas(encoded, "1")[name], parts[0][name] + parts[1][name] + parts[2][name])
        assert CODEC.sources(encoded.parameters, encoded.targets, Task(1, 0)).get(name, name) == name


# --- signs ------------------------------------------------------------------------------------------------------


def test_signs_belong_to_columns_of_the_place_and_to_the_task() -> None:
    base = {n: torch.zeros(s) for n, s in SHAPES.items()}
    model = {n: torch.ones(s) for n, s in SHAPES.items()}
    for name, tensor in encode(base, [base, model], seed=3).shared.items():
        width = tensor[0].numel() if tensor.ndim > 2 else tensor.shape[-1] if tensor.ndim else 1
        row = torch.from_numpy(signs(stream_key("signs", 3, 1, name), width)).float()
        assert torch.equal(tensor.view(-1, width), row.expand(tensor.numel() // width, width))
    same = encode(base, [base, model], seed=3, same_signs=True).shared
    row = torch.from_numpy(signs(stream_key("signs", 3, 1), 24)).float()
    for name, shape in SHAPES.items():
        if shape[-1:] == (24,) and len(shape) < 3:
            assert torch.equal(same[name], row.expand(shape))


def test_another_seed_or_task_has_other_bits() -> None:
    base, models = random_models(2, WIDE)
    stored = [encode(base, models, seed=s).shared["layers.0.attn.weight"] for s in (0, 1)]
    assert not torch.equal(*stored)
    swapped = encode(base, models[::-1], seed=0).shared["layers.0.attn.weight"]
    assert not torch.allclose(stored[0], swapped, atol=1e-3)


@pytest.mark.parametrize("width", [1, 3, 7, 64, 4096, 5000, 40000])
@law
@given(start=st.integers(0, 3).map(lambda n: n * 32768), length=st.integers(0, 90000))
def test_a_chunk_has_the_signs_of_its_columns(width: int, start: int, length: int) -> None:
    target, task = Target("w", (200000 // width, width), "linear"), Task(3, 1)
    length = min(length, target.numel - start)
    found = CODEC.decode({"": torch.ones(length)}, target, task, CODEC.parameters(), start=start)
    row = torch.from_numpy(signs(stream_key("signs", 1, 3, "w"), width)).float()
    assert torch.equal(found, row[torch.arange(start, start + length) % width])
    factors = CODEC.multiplier(target, task, CODEC.parameters(), start)
    assert torch.equal(found, factors[torch.arange(length) % len(factors)])


@pytest.mark.parametrize("plain", [True, False])
def test_what_has_no_signs_is_multiplied_by_1(plain: bool) -> None:
    target, p = Target("w", (4, 6), "linear", plain=plain), CODEC.parameters(signs=plain)
    assert CODEC.multiplier(target, Task(3, 1), p, 0).tolist() == [1]


# --- layers -----------------------------------------------------------------------------------------------------


def sources(names: dict[str, tuple[int, ...]], task: int = 0, **parameters: Any) -> dict[str, str]:
    base = {n: torch.zeros(s) for n, s in names.items()}
    encoded = encode(base, [base], **parameters)
    return dict(CODEC.sources(encoded.parameters, encoded.targets, Task(task, 0)))


def test_layers_change_places_only_with_their_like() -> None:
    names = {
        **{f"h.{i}.w": (4, 4) for i in range(12)},
        "h.3.odd": (2,),
        "h.4.odd": (3,),
        "norm.weight": (4,),
        "blocks.0.1.w": (4, 4),
        "blocks.1.1.w": (4, 4),
        "v2.w": (4, 4),
    }
    seen = set()
    for task in range(20):
        found = sources(names, task)
        assert sorted(found) == sorted(found.values())
        layers = [found[f"h.{i}.w"] for i in range(12)]
        assert sorted(layers) == sorted(f"h.{i}.w" for i in range(12))
        assert {found["blocks.0.1.w"], found["blocks.1.1.w"]} == {"blocks.0.1.w", "blocks.1.1.w"}
        assert all(found.get(n, n) == n for n in ("h.3.odd", "h.4.odd", "norm.weight", "v2.w"))
        seen.add(tuple(layers))
    assert len(seen) == 20


def test_layers_are_numbered_not_spelt() -> None:
    names = {f"h.{i}.w": (1,) for i in range(12)}
    order = permutation(stream_key("shuffle", 0, 2, "h.*.w", 1), 12).tolist()
    assert sources(names, 2) == {f"h.{i}.w": f"h.{n}.w" for i, n in enumerate(order)}


def test_layers_can_be_shifted_instead() -> None:
    names = {f"h.{i}.w": (1,) for i in range(5)}
    for task in range(4):
        shifted = {f"h.{i}.w": f"h.{(i + 2 * task) % 5}.w" for i in range(5)}
        assert sources(names, task, shift=2) == shifted
    assert sources(names, 3, shift=2, shuffle=False) == {}


def test_superposed_whole_weights_collapse() -> None:
    """Without a base, whole weights are superposed: the error is that of weights, not of small deltas."""
    base, models = random_models(4, WIDE)
    zero = {n: torch.zeros_like(t) for n, t in base.items()}
    whole = retrieval_errors(encode(zero, models), zero, models)
    assert sum(whole) > 50 * sum(retrieval_errors(encode(base, models), base, models))
