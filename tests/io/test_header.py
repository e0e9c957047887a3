"""The safetensors header: written so that the reference library reads it, and refused when it lies."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from hubmerge.errors import HubMergeError, IntegrityError, SourceError
from hubmerge.io.header import build_header, parse_header, read_header
from hubmerge.spec import DTYPES

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def read(data: bytes) -> Any:
    return read_header(lambda a, b: data[a:b], len(data), "m.safetensors", "m.safetensors")


def file(table: dict[str, Any] | bytes, n_data: int = 0) -> bytes:
    raw = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(n_data)


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"),
        st.tuples(st.sampled_from(["F32", "BF16", "I64", "BOOL"]), SHAPES),
        max_size=6,
    )
)
def test_what_is_built_is_what_the_reference_library_reads(entries: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    prefix, spans = build_header((n, DTYPES[d], s) for n, (d, s) in entries.items())
    data = prefix + bytes((spans[-1][1] if spans else len(prefix)) - len(prefix))
    if not entries:
        assert read(data).tensors == {}
        return
    from safetensors import deserialize

    reference = dict(deserialize(data))
    found = read(data).tensors
    assert found.keys() == reference.keys() == entries.keys()
    for (name, (dtype, shape)), span in zip(entries.items(), spans, strict=True):
        assert found[name].shape == shape == tuple(reference[name]["shape"])
        assert found[name].dtype.name == dtype == reference[name]["dtype"]
        assert (found[name].start_byte, found[name].end_byte) == span
    assert len(prefix) % 8 == 0


def test_reads_what_the_reference_library_writes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(7)}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "m.safetensors").read_bytes()
    header = read(data)
    assert header.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        spec = header.tensors[name]
        raw = data[spec.start_byte : spec.end_byte]
        assert torch.equal(torch.frombuffer(bytearray(raw), dtype=tensor.dtype).view(tensor.shape), tensor)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        (b"\0" * 9, "9 bytes"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "header claims 1099511627776 bytes"),
        ((101_000_000).to_bytes(8, "little") + b"{}", "header claims"),
        (file(b"{nope"), "not valid JSON"),
        (file(b"\xff\xfe{}"), "not valid JSON"),
        (file(b"[1, 2]"), "not a JSON object"),
        (
            file(
                b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
            ),
            "twice",
        ),
        (file(b"[" * 50_000 + b"]" * 50_000), "not valid JSON"),
        (file({"__metadata__": {"a": 1}}), "__metadata__"),
        (file({"a": 3}), "not described by an object"),
        (file({"a": entry(shape=(-1,))}, 8), "shape [-1]"),
        (file({"a": entry(shape=(2.0,))}, 8), "shape [2.0]"),
        (file({"a": entry(shape=(True, 2))}, 8), "shape [True, 2]"),
        (file({"a": entry(shape=[1] * 65)}, 8), "shape [1, 1"),
        (file({"a": entry(offsets=(8, 0))}, 8), "spans -8 bytes"),
        (file({"a": entry(offsets=(0,))}, 8), "offsets [0]"),
        (file({"a": entry(offsets=(-8, 0))}, 8), "offsets [-8, 0]"),
        (file({"a": entry(shape=(3,))}, 8), "spans 8 bytes"),
        (file({"a": entry(shape=(2**62, 2**62))}, 8), "spans 8 bytes"),
        (file({"a": entry(), "b": entry()}, 8), "starts at byte"),
        (file({"a": entry(offsets=(8, 16))}, 16), "starts at byte"),
        (file({"a": entry()}, 7), "tensors end at byte"),
        (file({"a": entry()}, 9), "tensors end at byte"),
    ],
)
def test_unsound_files_are_refused_before_anything_is_allocated(data: bytes, message: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        read(data)
    assert message in caught.value.message
    assert caught.value.message.startswith("m.safetensors: not a sound safetensors file: ")
    assert caught.value.hint


def test_unknown_dtype_is_named() -> None:
    with pytest.raises(SourceError, match="dtype 'F4'"):
        read(file({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, 1))


@given(st.binary(max_size=200))
def test_no_header_makes_the_parser_fail_otherwise(raw: bytes) -> None:
    with contextlib.suppress(HubMergeError):
        parse_header(raw, 8 + len(raw), "f", "f")
