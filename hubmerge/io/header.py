"""The safetensors header: read and checked before anything is allocated, and written with offsets known beforehand.

Format: 8 bytes little-endian header length N, N bytes of JSON ``{name: {dtype, shape, data_offsets: [start, end)}}``
with offsets
relative to byte 8+N, then the data, without holes (safetensors README, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hubmerge.errors import IntegrityError, SourceError
from hubmerge.spec import DTYPES, Dtype, TensorSpec

MAX_HEADER_BYTES = 100_000_000
FIRST_READ_BYTES = 256 * 1024
_MAX_DIMS = 64


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file holds. Byte ranges are absolute in the file."""

    tensors: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]
    raw: bytes


def read_header(read: Callable[[int, int], bytes], size_bytes: int, file: str, where: str) -> Header:
    """Read and check the header of one file.

    Args:
        read: Returns the bytes of a half-open range of the file.
        size_bytes: Length of the file.
        file: Path of the file inside its model; goes into the specs.
        where: How to call the file in messages.

    Raises:
        IntegrityError: The file is not a sound safetensors file.
        SourceError: It holds a dtype hubmerge does not know.
    """
    if size_bytes < 10:
        raise _broken(where, f"it has {size_bytes} bytes; the shortest safetensors file has 10")
    first = read(0, min(FIRST_READ_BYTES, size_bytes))
    length = int.from_bytes(first[:8], "little")
    if length > MAX_HEADER_BYTES or length > size_bytes - 8 or length < 2:
        raise _broken(where, f"its header claims {length} bytes; the file has {size_bytes}")
    raw = first[8 : 8 + length]
    if len(raw) < length:
        raw += read(8 + len(raw), 8 + length)
    return parse_header(raw, size_bytes, file, where)


def parse_header(raw: bytes, size_bytes: int, file: str, where: str) -> Header:
    """Check the JSON part ``raw`` of a file of ``size_bytes`` bytes; see ``read_header``."""
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as e:
        raise _broken(where, f"its header is not valid JSON ({str(e)[:120]})") from e
    if not isinstance(table, dict):
        raise _broken(where, "its header is not a JSON object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(where, "its __metadata__ is not a map of strings")
    data_start = 8 + len(raw)
    tensors = {name: _tensor(name, entry, data_start, file, where) for name, entry in table.items()}
    _check_coverage(tensors.values(), data_start, size_bytes, where)
    return Header(tensors, metadata, raw)


def build_header(entries: Iterable[tuple[str, Dtype, tuple[int, ...]]]) -> tuple[bytes, list[tuple[int, int]]]:
    """The bytes before the data (length prefix included), and each entry's absolute byte range, in the given order."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    spans = []
    position = 0
    for name, dtype, shape in entries:
        size = math.prod(shape) * dtype.nbytes
        table[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [position, position + size]}
        spans.append((position, position + size))
        position += size
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    prefix = len(raw).to_bytes(8, "little") + raw
    return prefix, [(len(prefix) + start, len(prefix) + end) for start, end in spans]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key appears twice")
    return table


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(name: str, entry: object, data_start: int, file: str, where: str) -> TensorSpec:
    if not isinstance(entry, dict):
        raise _broken(where, f"tensor {name!r} is not described by an object")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_is_count, shape)):
        raise _broken(where, f"tensor {name!r} has the shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _broken(where, f"tensor {name!r} has the offsets {str(offsets)[:80]}")
    dtype = DTYPES.get(str(entry.get("dtype")))
    if dtype is None:
        raise SourceError(
            f"{where}: tensor {name!r} has the dtype {str(entry.get('dtype'))[:40]!r}, which cannot be merged",
            hint="use an unquantised checkpoint (float32, float16 or bfloat16)",
        )
    start, end = offsets
    if math.prod(shape) * dtype.nbytes != end - start:
        raise _broken(where, f"tensor {name!r} of {dtype.name}{shape} spans {end - start} bytes")
    return TensorSpec(name, dtype, tuple(shape), file, data_start + start, data_start + end)


def _check_coverage(specs: Iterable[TensorSpec], data_start: int, size_bytes: int, where: str) -> None:
    position = data_start
    for spec in sorted(specs, key=lambda s: (s.start_byte, s.end_byte)):
        if spec.start_byte != position:
            raise _broken(where, f"tensor {spec.name!r} starts at byte {spec.start_byte}, expected {position}")
        position = spec.end_byte
    if position != size_bytes:
        raise _broken(where, f"its tensors end at byte {position}, the file at {size_bytes}")


def _broken(where: str, what: str) -> IntegrityError:
    return IntegrityError(
        f"{where}: not a sound safetensors file: {what}", hint="download it again, or ask its author to save it again"
    )
