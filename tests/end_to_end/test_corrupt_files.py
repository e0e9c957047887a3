"""Hundreds of damaged weight files: each is merged soundly or refused by name, and never leaves anything behind."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hubmerge import Recipe, merge
from hubmerge.errors import HubMergeError, PlanError
from tests.end_to_end.support import save, save_adapter, tensors

SHAPES = {
    "model.embed_tokens.weight": (6, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.1.mlp.up_proj.weight": (16, 8),
    "model.norm.weight": (8,),
}
ROUNDS = 40
Damage = Callable[[bytes, random.Random], bytes]


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _flip(data: bytes, at: int, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_in_header(data: bytes, rng: random.Random) -> bytes:
    return _flip(data, rng.randrange(header_end(data)), rng)


def flip_in_data(data: bytes, rng: random.Random) -> bytes:
    return _flip(data, rng.randrange(header_end(data), len(data)), rng)


def flip_exponents(data: bytes, rng: random.Random) -> bytes:
    """All exponent bits of some numbers: infinities and NaNs."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = header_end(data) + 4 * rng.randrange((len(data) - header_end(data)) // 4)
        changed[at + 2 : at + 4] = bytes([changed[at + 2] | 0x80, changed[at + 3] | 0x7F])
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randint(1, 16)) + data[at:]


def remove(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randint(1, 16) :]


def edit_length(data: bytes, rng: random.Random) -> bytes:
    length = header_end(data) - 8
    wrong = rng.choice(
        [0, 1, length - 1, length + 1, length + 8, len(data), 2**31, 2**63, 2**64 - 1, rng.randrange(2**20)]
    )
    return wrong.to_bytes(8, "little") + data[8:]


def edit_header(data: bytes, rng: random.Random) -> bytes:
    """A header that is valid JSON, of the right length, and says something else."""
    text = data[8 : header_end(data)].decode()
    numbers = list(re.finditer(r"\d+(?=[,\]])", text))
    found = rng.choice(numbers)
    value = rng.choice([0, 1, -1, int(found[0]) + 4, int(found[0]) * 2, 2**31, 2**63, 2**64, 10**30])
    return _with_header(data, text[: found.start()] + str(value) + text[found.end() :])


def edit_entry(data: bytes, rng: random.Random) -> bytes:
    """An entry that is missing, doubled, of another type, or has parts of other types."""
    table = json.loads(data[8 : header_end(data)])
    name = rng.choice([n for n in table if n != "__metadata__"])
    odd = rng.choice([None, True, 1.5, "x", [], {}, [[1]], ["2"], [1e400], -1, [2.0, 4.0]])
    what = rng.randrange(5)
    if what == 0:
        del table[name]
    elif what == 1:
        table[rng.choice(["", "a" * 3000, "../../x", "model.layers.0.\u202e", "\x00", "__metadata__"])] = table.pop(
            name
        )
    elif what == 2:
        table[name] = odd
    elif what == 3:
        table[name][rng.choice(["dtype", "shape", "data_offsets"])] = odd
    else:
        table[name]["dtype"] = rng.choice(["F64", "F16", "BF16", "I32", "U8", "F8_E4M3", "BOOL", "C64", "F4", ""])
    return _with_header(data, json.dumps(table))


def _with_header(data: bytes, text: str) -> bytes:
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw + data[header_end(data) :]


DAMAGES = (
    flip_in_header, flip_in_data, flip_exponents, truncate, insert, remove, edit_length, edit_header, edit_entry,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage(damage: Damage, tmp_path: Path) -> None:
    folders = [save(tmp_path / "in" / n, tensors(i, SHAPES)) for i, n in enumerate(("base", "full"))]
    folders.append(save_adapter(tmp_path / "in" / "adapter", base=None))
    files = [next(f.glob("*.safetensors")) for f in folders]
    whole = [f.read_bytes() for f in files]
    results = tmp_path / "results"
    results.mkdir()
    refused = 0
    for number in range(ROUNDS):
        rng = random.Random(f"{damage.__name__} {number}")
        victim = rng.randrange(3)
        files[victim].write_bytes(damage(whole[victim], rng))
        refused += assert_sound_or_refused(folders, victim, results / "out", f"round {number}")
        files[victim].write_bytes(whole[victim])
    if damage is not flip_in_data:
        assert refused


def assert_sound_or_refused(folders: list[Path], victim: int, out: Path, where: str) -> bool:
    recipe = Recipe.from_data({"method": "ties", "base": str(folders[0]), "models": [str(f) for f in folders[1:]]})
    refusal: HubMergeError | None = None
    try:
        merge(recipe, out)
    except HubMergeError as error:
        refusal = error
    if refusal is not None:
        assert refusal.exit_code == 1, where
        # Models that do not fit each other may each be the wrong one.
        culprits = folders if isinstance(refusal, PlanError) else [folders[victim]]
        assert any(str(f) in refusal.message for f in culprits), f"{where}: {refusal.message}"
        assert os.listdir(out.parent) == [], where
        return True
    for file in out.rglob("*.safetensors"):
        assert all(torch.isfinite(t).all() for t in load_file(file).values() if t.is_floating_point()), where
    assert os.listdir(out.parent) == [out.name], where
    shutil.rmtree(out)
    return False


def test_enough_of_them() -> None:
    assert len(DAMAGES) * ROUNDS >= 200
