"""docs/bundle-format.md is true: its vectors, and a reader that was written from it alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hubmerge import rng
from hubmerge.coding import Encoded, decode_deltas, encode_tensors
from hubmerge.spec import LowRank

from . import independent
from .models import Model, random_models
from .test_contract import CASE_IDS, CASES

PAGE = Path(__file__).parents[2] / "docs" / "bundle-format.md"


def vectors() -> dict[str, Any]:
    found = re.search(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return json.loads(found.group(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("reader", [rng, independent], ids=["hubmerge", "independent"])
def test_the_pages_vectors(reader: Any) -> None:
    given = vectors()
    for case in given["words"]:
        key = reader.stream_key(*case["key"])
        assert [f"0x{k:016X}" for k in key] == case["key_words"]
        found = rng.words(key, 0, 5).tolist() if reader is rng else independent.words(key, 5)
        assert [f"0x{w:016X}" for w in found] == case["words"]
    for case in given["signs"]:
        row = list(reader.signs(reader.stream_key(*case["key"]), len(case["signs"])))
        assert "".join("+" if s > 0 else "-" for s in row) == case["signs"]
    for case in given["permutations"]:
        order = reader.permutation(reader.stream_key(*case["key"]), len(case["order"]))
        assert list(order) == case["order"]


def test_the_independent_philox_is_the_published_one() -> None:
    # Known answers of Random123 for philox4x64-10.
    assert independent.philox(0, (0, 0)) == [
        0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B,
    ]  # fmt: skip
    assert independent.philox((1 << 256) - 1, (independent.M64, independent.M64)) == [
        0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0,
    ]  # fmt: skip


def raw_bytes(encoded: Encoded, task: str) -> dict[str, bytes]:
    """The stored tensors as their files hold them."""
    stored = {**encoded.shared, **encoded.tasks[task].stored}
    return {n: t.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for n, t in stored.items()}


def read(encoded: Encoded, task: str) -> Model:
    """A task's deltas, by the independent reader."""
    own = encoded.tasks[task]
    targets = [independent.Target(t.name, t.shape, t.plain, t.transposed) for t in encoded.targets]
    bundle = independent.Bundle(encoded.codec, encoded.parameters.model_dump(), encoded.seed, targets)
    places, raw = independent.sources(bundle, own.id), raw_bytes(encoded, task)
    return {
        places.get(t.name, t.name): torch.tensor(
            independent.delta(bundle, t, own.id, raw, own.facts, own.ranks.get(t.name)), dtype=torch.float64
        ).view(t.shape)
        for t in targets
    }


def assert_reads_alike(encoded: Encoded) -> None:
    for task in encoded.tasks:
        found, expected = decode_deltas(encoded, task), read(encoded, task)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            if encoded.codec == "tsv_compress":  # sums of products are rounded in another order
                torch.testing.assert_close(found[name], tensor.float(), rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(found[name].double(), tensor), name


@pytest.mark.parametrize(("name", "parameters"), CASES, ids=CASE_IDS)
def test_another_reader_finds_the_same(name: str, parameters: dict[str, Any]) -> None:
    base, models = random_models(3)
    assert_reads_alike(encode_tensors(name, base, models, parameters=parameters, seed=2**64 - 1))


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("codec", ["superposition", "emr", "tsv_compress"])
def test_another_reader_knows_all_forms(codec: str, storage: str) -> None:
    base, models = random_models(2)
    assert_reads_alike(encode_tensors(codec, base, models, parameters={"storage": storage}))


@pytest.mark.parametrize("storage", ["float32", "int4"])
def test_another_reader_knows_ranks(storage: str) -> None:
    base, models = random_models(2)
    generator = torch.Generator().manual_seed(5)

    def factors(rank: int, rows: int, columns: int) -> LowRank:
        draw = [torch.randn(s, generator=generator) for s in ((rows, rank), (rank, columns))]
        return LowRank(*draw, 0.1)

    given: list[dict[str, Any]] = [dict(m) for m in models]
    given[0] |= {"encoder.layers.2.mlp.up.weight": factors(3, 40, 24), "embed.weight": factors(4, 60, 24)}
    given[1] |= {"encoder.layers.2.mlp.up.weight": factors(0, 40, 24), "head.weight": factors(9, 10, 24)}
    parameters = {"storage": storage, "budget": 0.3}
    assert_reads_alike(encode_tensors("tsv_compress", base, given, parameters=parameters))
