"""A reader of bundles written from docs/bundle-format.md alone: integers and single floats, and nothing of hubmerge.

It is the slow twin of what the package does, so that a mistake in either shows.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

M64 = (1 << 64) - 1


# --- random bits ------------------------------------------------------------------------------------------------


def stream_key(*parts: int | str) -> tuple[int, int]:
    data = b""
    for part in parts:
        text = str(part).encode("utf-8")
        data += (b"i" if isinstance(part, int) else b"s") + struct.pack("<Q", len(text)) + text
    return struct.unpack("<QQ", hashlib.blake2b(data, digest_size=16, person=b"hubmerge-rng-1").digest())  # type: ignore[return-value]


def philox(counter: int, key: tuple[int, int]) -> list[int]:
    x = [counter >> 64 * i & M64 for i in range(4)]
    k = list(key)
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [b >> 64 ^ x[1] ^ k[0], b & M64, a >> 64 ^ x[3] ^ k[1], a & M64]
        k = [k[0] + 0x9E3779B97F4A7C15 & M64, k[1] + 0xBB67AE8584CAA73B & M64]
    return x


def words(key: tuple[int, int], count: int) -> list[int]:
    return [w for b in range(-(-count // 4)) for w in philox(b + 1, key)][:count]


def signs(key: tuple[int, int], count: int) -> list[int]:
    stream = words(key, -(-count // 64))
    return [-1 if stream[c // 64] >> c % 64 & 1 else 1 for c in range(count)]


def permutation(key: tuple[int, int], count: int) -> list[int]:
    stream = words(key, count)
    return sorted(range(count), key=lambda i: (stream[i], i))


# --- storage forms ----------------------------------------------------------------------------------------------


def single(x: float) -> float:
    """Rounded to float32."""
    return struct.unpack("<f", struct.pack("<f", x))[0]  # type: ignore[no-any-return]


def numbers(form: str, count: int, raw: Mapping[str, bytes], name: str) -> list[float]:
    """A part's values."""
    if form == "float32":
        return list(struct.unpack(f"<{count}f", raw[name]))
    if form == "bfloat16":
        return _bfloat16(raw[name])
    scales = _bfloat16(raw[f"{name}:scales"])
    if form == "int8":
        integers: Sequence[int] = struct.unpack(f"<{count}b", raw[name])
    else:
        assert form == "int4"
        half = [raw[name][i // 64 * 32 + i % 32] >> (4 if i % 64 >= 32 else 0) & 15 for i in range(count)]
        integers = [v - 16 if v > 7 else v for v in half]
    return [single(v * scales[i // 64]) for i, v in enumerate(integers)]


def _bfloat16(raw: bytes) -> list[float]:
    return [struct.unpack("<f", b"\0\0" + raw[i : i + 2])[0] for i in range(0, len(raw), 2)]


def bits(count: int, raw: bytes) -> list[int]:
    return [raw[i // 8] >> i % 8 & 1 for i in range(count)]


# --- codecs -----------------------------------------------------------------------------------------------------


@dataclass
class Target:
    name: str
    shape: tuple[int, ...]
    plain: bool
    transposed: bool = False

    @property
    def numel(self) -> int:
        n = 1
        for s in self.shape:
            n *= s
        return n


@dataclass
class Bundle:
    codec: str
    parameters: Mapping[str, Any]
    seed: int
    targets: Sequence[Target]


def sources(bundle: Bundle, task: int) -> dict[str, str]:
    """Which tensor's delta stands in a target's place, where that is another one."""
    p = bundle.parameters
    if bundle.codec != "superposition" or not p["shuffle"]:
        return {}
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[int, str]]] = {}
    for target in bundle.targets:
        words_of_name = target.name.split(".")
        at = next((i for i, word in enumerate(words_of_name) if re.fullmatch("[0-9]+", word)), None)
        if at is None or target.plain:
            continue
        pattern = ".".join([*words_of_name[:at], "*", *words_of_name[at + 1 :]])
        groups.setdefault((pattern, target.shape), []).append((int(words_of_name[at]), target.name))
    found = {}
    for (pattern, shape), members in groups.items():
        names = [name for _, name in sorted(members)]
        order = [(i + task * (p["shift"] or 0)) % len(names) for i in range(len(names))]
        if p["shift"] is None:
            order = permutation(stream_key("shuffle", bundle.seed, task, pattern, *shape), len(names))
        found.update({names[i]: names[order[i]] for i in range(len(names))})
    return found


def delta(
    bundle: Bundle, target: Target, task: int, raw: Mapping[str, bytes], facts: Mapping[str, float], rank: int | None
) -> list[float]:
    """The delta that stands in a target's place, flat."""
    p, name = bundle.parameters, target.name
    form = p["storage"]
    if bundle.codec == "tsv_compress":
        return _tsv(p, target, raw, rank)
    values = numbers(form, target.numel, raw, name)
    if bundle.codec == "superposition":
        if target.plain or not p["signs"]:
            return values
        width = target.shape[-1] if target.shape else 1
        own = () if p["same_signs"] else (name,)
        row = signs(stream_key("signs", bundle.seed, task, *own), width)
        return [x * row[i % width] for i, x in enumerate(values)]
    mask = bits(target.numel, raw[f"{name}:mask"])
    if bundle.codec == "emr":
        factor = single(facts["rescaler"])
        return [single(x * m * factor) for x, m in zip(values, mask, strict=True)]
    assert bundle.codec in ("tall_mask", "magnitude_mask")
    return [x * m for x, m in zip(values, mask, strict=True)]


def _tsv(p: Mapping[str, Any], target: Target, raw: Mapping[str, bytes], rank: int | None) -> list[float]:
    form, name = p["storage"], target.name
    if rank == 0:
        return [0.0] * target.numel
    if f"{name}:up" not in raw:
        return numbers(form, target.numel, raw, name)
    rows, columns = target.shape[::-1] if target.transposed else target.shape
    side = min(rows, columns)
    if target.plain:
        kept = side
    elif p["rank"] is not None:
        kept = p["rank"]
    elif p["budget"] is not None:
        kept = int(p["budget"] * target.numel / (rows + columns))
    else:
        kept = side // p["tasks"]
    kept = min(max(kept, 1), side, side if rank is None else rank)
    up = numbers(form, kept * rows, raw, f"{name}:up")
    down = numbers(form, kept * columns, raw, f"{name}:down")
    product = [[sum(up[k * rows + i] * down[k * columns + j] for k in range(kept)) for j in range(columns)]
               for i in range(rows)]  # fmt: skip
    if target.transposed:
        product = [list(column) for column in zip(*product, strict=True)]
    return [x for row in product for x in row]
