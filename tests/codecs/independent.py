"""A reader of bundles written from docs/bundle-format.md alone: integers and single floats, and nothing of hubmerge.

It is the slow twin of what the package does, so that a mistake in either shows.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
        for size in target.shape[1:-1]:
            width *= size
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


# --- files ------------------------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """A tensor of a safetensors file."""

    dtype: str
    shape: list[int]
    data: bytes


def read_tensors(path: Path) -> dict[str, Tensor]:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    found = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            a, b = entry["data_offsets"]
            found[name] = Tensor(entry["dtype"], entry["shape"], content[start + a : start + b])
    return found


class Folder:
    """A bundle in a folder, and the folder of its base; everything is checked that the page says."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / "hubmerge_bundle.json").read_text("utf-8"))
        assert self.manifest["format_version"] == 1
        for file in self.manifest["files"]:
            self._check(folder / file["path"], file)
        self.base: dict[str, Tensor] = {}
        headers = hashlib.sha256()
        for file in self.manifest["base"]["files"]:
            content = self._check(base / file["path"], file)
            headers.update(content[8 : 8 + int.from_bytes(content[:8], "little")])
            self.base |= read_tensors(base / file["path"])
        assert headers.hexdigest() == self.manifest["base"]["header_sha256"]
        targets = [
            Target(t["name"], tuple(t["shape"]), t.get("plain", False), t.get("transposed", False))
            for t in self.manifest["targets"]
        ]
        m = self.manifest
        self.bundle = Bundle(m["codec"], m["parameters"], m["seed"], targets)

    def _check(self, path: Path, file: Mapping[str, Any]) -> bytes:
        content = path.read_bytes()
        assert len(content) == file["size_bytes"]
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
        return content

    def task(self, name: str) -> dict[str, Any]:
        return next(t for t in self.manifest["tasks"] if t["name"] == name)  # type: ignore[no-any-return]

    def small_files(self, name: str) -> dict[str, bytes | None]:
        """The other small files that are kept for a task; None stands for the base's."""
        kept = self.task(name).get("files", {})
        found = {f: (self.folder / "heads" / name / f).read_bytes() if d else None for f, d in kept.items()}
        for path, content in found.items():
            assert content is None or hashlib.sha256(content).hexdigest() == kept[path]
        return found

    def deltas(self, name: str) -> dict[str, list[float]]:
        """By the tensor they belong to."""
        task, raw = self.task(name), {}
        for file in self.manifest["files"]:
            if file["path"].startswith("bundle-") or file["path"] == f"tasks/{task['id']}.safetensors":
                raw |= {n: t.data for n, t in read_tensors(self.folder / file["path"]).items()}
        moved, ranks = sources(self.bundle, task["id"]), task.get("ranks", {})
        return {
            moved.get(t.name, t.name): delta(self.bundle, t, task["id"], raw, task.get("facts", {}), ranks.get(t.name))
            for t in self.bundle.targets
        }

    def head(self, name: str) -> dict[str, Tensor]:
        path = self.folder / "heads" / f"{name}.safetensors"
        return read_tensors(path) if path.exists() else {}

    def model(self, name: str) -> dict[str, Tensor]:
        """A task's whole checkpoint, at the bundle's own λ, which is 1."""
        assert self.bundle.parameters["scale"] == 1
        task, deltas, found = self.task(name), self.deltas(name), self.head(name)
        for of_base, tensor in self.base.items():
            if of_base not in task.get("absent", []):
                own = task.get("names", {}).get(of_base) or _prefixed(of_base, task.get("prefix", ""))
                assert own not in found
                found[own] = _added(tensor, deltas[of_base]) if of_base in deltas else tensor
        return found

    def adapter(self, name: str) -> dict[str, tuple[list[int], list[float]]]:
        """A task's adapter: shapes and values."""
        task, deltas = self.task(name), self.deltas(name)
        shapes = {t.name: t.shape for t in self.bundle.targets}
        found = {}
        for weight, rank in task["ranks"].items():
            module = "base_model.model." + task.get("modules", {}).get(weight, weight.removesuffix(".weight"))
            rows, columns = shapes[f"{weight}.up"][1], shapes[f"{weight}.down"][1]
            up, down = deltas[f"{weight}.up"], deltas[f"{weight}.down"]
            found[f"{module}.lora_A.weight"] = [rank, columns], down[: rank * columns]
            turned = [up[k * rows + i] for i in range(rows) for k in range(rank)]
            found[f"{module}.lora_B.weight"] = [rows, rank], turned
        return found


def _prefixed(name: str, prefix: str) -> str:
    if prefix.startswith("-"):
        return prefix[1:] + name
    return name.removeprefix(prefix[1:])


def _added(base: Tensor, change: Sequence[float]) -> Tensor:
    """Base and delta, added in float32 and rounded to the base's dtype."""
    count = len(change)
    if base.dtype == "F32":
        before: Sequence[float] = struct.unpack(f"<{count}f", base.data)
        return base._replace(data=struct.pack(f"<{count}f", *(b + d for b, d in zip(before, change, strict=True))))
    assert base.dtype == "BF16"
    total = b"".join(struct.pack("<f", b + d) for b, d in zip(_bfloat16(base.data), change, strict=True))
    return base._replace(data=b"".join(_rounded(*struct.unpack_from("<I", total, i)) for i in range(0, 4 * count, 4)))


def _rounded(single_bits: int) -> bytes:
    """The nearest bfloat16, ties to even."""
    return struct.pack("<H", single_bits + 0x7FFF + (single_bits >> 16 & 1) >> 16)
