"""TSV-Compress: the error of the best approximation, what is kept instead of it, and factors that come as factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.codec import Target, Task
from hubmerge.codecs import get_codec
from hubmerge.coding import add_task, decode_deltas, encode_tensors, remove_task
from hubmerge.memory import MemoryGroup
from hubmerge.spec import LowRank

from .models import SHAPES, assert_same, deltas, energy, random_models

law = settings(deadline=None, derandomize=True, max_examples=25)
CODEC = get_codec("tsv_compress")
MATRICES = [n for n, s in SHAPES.items() if len(s) == 2 and "embed" not in n]


def matrix(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def group_of(*models: torch.Tensor | LowRank, base: torch.Tensor | None = None) -> MemoryGroup:
    count = len(models)
    return MemoryGroup(base, models, tasks=list("abcdefgh")[:count], weights=[1.0] * count, params=[None] * count)


def kept(encoded: Any, task: str, name: str) -> dict[str, tuple[int, ...]]:
    stored = encoded.tasks[task].stored
    return {n.removeprefix(name): tuple(t.shape) for n, t in stored.items() if n.split(":")[0] == name}


@law
@given(st.integers(2, 24), st.integers(2, 24), st.integers(1, 8), st.integers(0, 50))
def test_the_error_is_that_of_the_best_approximation(rows: int, columns: int, rank: int, seed: int) -> None:
    models = [{"w": matrix((rows, columns), seed + i)} for i in range(2)]
    base = {"w": torch.zeros(rows, columns)}
    encoded = encode_tensors("tsv_compress", base, models, parameters={"rank": rank})
    expected = CODEC.expected_error(group_of(*(m["w"] for m in models)), encoded.targets[0], encoded.parameters)
    assert expected is not None
    for task, model, theory in zip(encoded.tasks, models, expected, strict=True):
        values = torch.linalg.svdvals(model["w"].double()).square()
        k = rank if rank * (rows + columns) < rows * columns and rank <= min(rows, columns) else len(values)
        left_out = float(values[k:].sum())
        error = energy({"w": decode_deltas(encoded, task)["w"] - model["w"]})
        assert error == pytest.approx(left_out, rel=1e-4, abs=1e-9 * float(values.sum()))
        assert theory == pytest.approx(left_out, rel=1e-4, abs=1e-5 * float(values.sum()))


def test_what_theory_expects_is_the_same_from_what_was_encoded() -> None:
    group, target = group_of(matrix((20, 12)), matrix((20, 12), 1)), Target("w", (20, 12), "linear")
    p = CODEC.parameters(rank=3)
    encoding = CODEC.encode(group, target, [Task(0, 0), Task(1, 0)], p)
    assert CODEC.expected_error(group, target, p, encoding) == CODEC.expected_error(group, target, p)


@pytest.mark.parametrize(
    ("parameters", "square", "wide"),
    [
        ({}, 6, 6),  # 24 // 4
        ({"rank": 3}, 3, 3),
        ({"tasks": 8}, 3, 3),
        ({"budget": 0.25}, 3, 3),  # of 576 / 48 and 960 / 64
        ({"budget": 0.4}, 4, 6),
        ({"budget": 1e-9}, 1, 1),
    ],
)
def test_ranks(parameters: dict[str, Any], square: int, wide: int) -> None:
    base, models = random_models(4)
    encoded = encode_tensors("tsv_compress", base, models, parameters=parameters)
    assert kept(encoded, "1", "encoder.layers.2.attn.q.weight") == {":up": (square, 24), ":down": (square, 24)}
    assert kept(encoded, "1", "encoder.layers.2.mlp.up.weight") == {":up": (wide, 40), ":down": (wide, 24)}


def test_the_rank_stays_what_creation_chose() -> None:
    base, models = random_models(6)
    encoded = encode_tensors("tsv_compress", base, models[:4])
    for i in (4, 5):
        encoded = add_task(encoded, base, models[i], name=str(i))
    assert len({str(kept(encoded, t, "encoder.layers.2.attn.q.weight")) for t in encoded.tasks}) == 1
    assert_same(remove_task(encoded, base, models[5], name="5"),
                add_task(encode_tensors("tsv_compress", base, models[:4]), base, models[4], name="4"))  # fmt: skip
    # Deltas do not depend on the other tasks at all.
    alone = encode_tensors("tsv_compress", base, models[1:2], parameters={"tasks": 4})
    found, expected = decode_deltas(alone, "0"), decode_deltas(encoded, "1")
    assert all(torch.equal(found[n], t) for n, t in expected.items())


def test_what_is_no_matrix_and_what_factors_do_not_shrink_is_kept_as_it_is() -> None:
    base, models = random_models(2)
    encoded = encode_tensors("tsv_compress", base, models)
    found, wanted = decode_deltas(encoded, "1"), deltas(base, models[1])
    exact = {n for n in base if torch.equal(found[n], wanted[n])}
    # 24 // 2 vectors of 24 + 24 entries are as many as a square matrix has; of 40 + 24 they are fewer.
    square = {f"encoder.layers.{i}.attn.q.weight" for i in range(4)}
    assert exact == square | {"nothing"} | {n for n in SHAPES if n not in MATRICES}
    decomposed = encode_tensors("tsv_compress", base, models, parameters={"rank": 2, "include_embeddings": True})
    assert kept(decomposed, "0", "embed.weight") == {":up": (2, 60), ":down": (2, 24)}
    assert kept(decomposed, "0", "patches.weight") == {"": (8, 3, 4, 5)}


def test_a_bundle_is_no_larger_than_two_bases_of_square_matrices() -> None:
    shapes = {f"layers.{i}.weight": (64, 64) for i in range(3)}
    for count in (2, 4, 8, 16):
        base, models = random_models(count, shapes)
        encoded = encode_tensors("tsv_compress", base, models)
        assert encoded.size_bytes == 2 * sum(t.nbytes for t in base.values())


def test_transposed_matrices_come_back_as_stored() -> None:
    delta = matrix((30, 12))
    target = Target("h.0.mlp.c_fc.weight", (30, 12), "linear", transposed=True)
    p = CODEC.fixed(CODEC.parameters(rank=12), 1)
    # A group shows the matrix as (out, in), and a whole one flat as stored is what decoding gives.
    group = group_of(delta.T.contiguous())
    for rank, names in ((4, {"up", "down"}), (12, {""})):
        q = p.model_copy(update={"rank": rank})
        (parts,) = CODEC.encode(group, target, [Task(0, 0)], q).tasks
        assert set(parts) == names
        layout = CODEC.parts(q, target)
        assert {part.name: part.shape for part in layout} == {n: tuple(t.shape) for n, t in parts.items()}
        found = CODEC.decode(parts, target, Task(0, 0), q).view(30, 12)
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        best = delta if names == {""} else (u[:, :4] * s[:4]) @ v[:4]
        torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)


# --- deltas that are factors ------------------------------------------------------------------------------------


def low_rank(rank: int, seed: int, shape: tuple[int, int] = (40, 24)) -> LowRank:
    return LowRank(matrix((shape[0], rank), seed), matrix((rank, shape[1]), seed + 100), 0.5)


def test_factors_keep_their_own_rank_and_are_exact() -> None:
    name = "encoder.layers.1.mlp.up.weight"
    base, models = random_models(3)
    given: list[dict[str, Any]] = [dict(m) for m in models]
    given[0][name], given[1][name], given[2][name] = low_rank(2, 0), low_rank(0, 1), low_rank(20, 2)
    given[2]["embed.weight"] = low_rank(3, 5, (60, 24))
    encoded = encode_tensors("tsv_compress", base, given)
    assert kept(encoded, "0", name) == {":up": (2, 40), ":down": (2, 24)}
    assert kept(encoded, "1", name) == {}
    assert kept(encoded, "2", name) == {":up": (8, 40), ":down": (8, 24)}
    assert kept(encoded, "2", "embed.weight") == {":up": (3, 60), ":down": (3, 24)}
    assert [t.ranks for t in encoded.tasks.values()] == [{name: 2}, {name: 0}, {name: 20, "embed.weight": 3}]
    torch.testing.assert_close(decode_deltas(encoded, "0")[name], given[0][name].dense(), rtol=1e-5, atol=1e-5)
    assert not decode_deltas(encoded, "1")[name].any()
    found = decode_deltas(encoded, "2")
    torch.testing.assert_close(found["embed.weight"], given[2]["embed.weight"].dense(), rtol=1e-5, atol=1e-5)
    values = torch.linalg.svdvals(given[2][name].dense().double())
    assert energy({"w": found[name] - given[2][name].dense()}) == pytest.approx(
        float(values[8:].square().sum()), rel=1e-4
    )


@pytest.mark.parametrize("shape", [(), (7,), (8, 6), (4, 3, 2)])
@pytest.mark.parametrize("plain", [False, True])
def test_nothing_is_kept_of_a_delta_of_rank_0(shape: tuple[int, ...], plain: bool) -> None:
    target, p = Target("w", shape, "vector", plain=plain), CODEC.parameters(tasks=1)
    assert CODEC.parts(p, target, 0) == ()
    assert CODEC.decode({}, target, Task(0, 0), p).tolist() == [0.0] * target.numel


def test_dense_deltas_are_never_formed_from_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_of(low_rank(4, 0), low_rank(9, 1))
    target, p = Target("w", (40, 24), "linear"), CODEC.parameters(tasks=2)
    monkeypatch.setattr(LowRank, "dense", None)
    monkeypatch.setattr(MemoryGroup, "delta", None)
    encoding = CODEC.encode(group, target, [Task(0, 0), Task(1, 0)], p)
    assert [tuple(parts["up"].shape) for parts in encoding.tasks] == [(4, 40), (9, 40)]
    left_out = CODEC.expected_error(group, target, p, encoding)
    assert left_out is not None
    assert left_out == pytest.approx([0.0, 0.0], abs=1e-3)


def test_deltas_of_factors_agree_with_the_dense_ones() -> None:
    factors = low_rank(12, 3)
    target, p = Target("w", (40, 24), "linear"), CODEC.parameters(rank=5)
    found = [
        CODEC.decode(CODEC.encode(group_of(m), target, [Task(0, 0)], p).tasks[0], target, Task(0, 0), p)
        for m in (factors, factors.dense())
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
