"""Codecs beside the merge methods, where people look for what there is to choose from."""

from __future__ import annotations

import json

import pytest

from hubmerge.codec import Codec
from hubmerge.codecs import all_codecs
from hubmerge.methods import all_methods
from tests.end_to_end.support import hubmerge


def test_the_list_has_methods_and_codecs() -> None:
    found = hubmerge("methods")
    assert found.code == 0
    first = [line.split()[0] for line in found.out.splitlines() if line.strip()]
    names = [a.name for a in (*all_methods(), *all_codecs())]
    assert [word for word in first if word in names] == names


def test_as_json() -> None:
    found = {a["name"]: a for a in json.loads(hubmerge("methods", "--json").out)}
    assert [n for n, a in found.items() if a["kind"] == "codec"] == [c.name for c in all_codecs()]
    assert [n for n, a in found.items() if a["kind"] == "method"] == [m.name for m in all_methods()]
    assert found["superposition"]["incremental"] is True
    assert found["emr"]["incremental"] is False
    assert found["superposition"]["parameters"]["properties"]["storage"]["enum"] == [
        "float32", "bfloat16", "int8", "int4",
    ]  # fmt: skip
    assert found["ties"]["min_models"] == 1
    assert json.loads(hubmerge("methods", "emr", "--json").out) == found["emr"]


@pytest.mark.parametrize("codec", all_codecs(), ids=lambda c: c.name)
def test_one_codec(codec: Codec) -> None:
    found = hubmerge("methods", codec.name).out
    for words in (codec.summary, codec.paper, "can be added" if codec.incremental else "cannot be added"):
        assert words in found
    assert all(field in found for field in codec.parameters.model_fields)


def test_neither_method_nor_codec() -> None:
    found = hubmerge("methods", "superpositions")
    assert found.code == 2
    assert "superposition" in found.text
    assert "task_arithmetic" in found.text
