"""The lock: the same inputs give the same text, nothing about the machine is in it, and reading it is strict."""

from __future__ import annotations

import dataclasses
import getpass
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hubmerge
from hubmerge.errors import HubMergeError, IntegrityError
from hubmerge.lock import LOCK_NAME, Lock, build_lock, dumps, loads, numerics_of, portable_recipe, schema_text
from hubmerge.methods import all_methods, get_method
from hubmerge.recipe import Recipe
from hubmerge.spec import DTYPES, FileSpec, Plan, Settings, TensorJob
from tests import factories as make

SCHEMA = Path(__file__).parent.parent / "docs" / "lock.schema.json"
OUTPUTS = [
    FileSpec("model.safetensors", 4096, sha256=make.digest("out")),
    FileSpec("README.md", 900, sha256=make.digest("card")),
    FileSpec("heads/a.safetensors", 10, sha256=make.digest("head")),
]
BASE = make.pinned("org/base", role="base")
FT = make.pinned("org/ft")
LOCAL = make.pinned("/home/alice/secret plans/ft2", root="/home/alice/secret plans/ft2", name="ft2")


def built(*models: Any, outputs: Any = OUTPUTS, **changes: Any) -> Lock:
    models = models or (FT,)
    asked = make.recipe(BASE, models)
    return build_lock(make.plan(asked, BASE, models, **changes), asked.normalized(), outputs)


def test_what_a_lock_records() -> None:
    data = json.loads(dumps(built()))
    assert data["format_version"] == 1
    assert data["hubmerge_version"] == hubmerge.__version__
    assert data["plan_sha256"] == make.digest("plan")
    assert (data["seed"], data["numerics"]) == (0, "exact")
    assert [(s["role"], s["name"], s["repo"], s["commit"], s["local"]) for s in data["sources"]] == [
        ("base", "base", "org/base", make.digest("org/base", 40), False),
        ("model", "ft", "org/ft", make.digest("org/ft", 40), False),
    ]
    assert data["recipe"] == make.recipe(BASE, [FT]).normalized()
    assert data["environment"]["python"].startswith("3.")
    assert {"torch", "numpy", "safetensors"} <= data["environment"].keys()


def test_outputs_are_sorted_and_include_the_card_but_not_the_lock() -> None:
    lock = built(outputs=[*OUTPUTS, FileSpec(LOCK_NAME, 5, sha256=make.digest("lock"))])
    assert [f.path for f in lock.outputs] == ["README.md", "heads/a.safetensors", "model.safetensors"]


def test_a_source_lists_the_files_that_were_used_with_the_digests_that_are_known() -> None:
    base, ft = json.loads(dumps(built()))["sources"]
    assert [f["path"] for f in base["files"]] == ["README.md", "config.json", "model.safetensors"]
    assert base["files"][1] == {
        "path": "config.json",
        "size_bytes": 60,
        "git_sha1": make.digest("org/baseconfig", 40),
    }
    assert ft["files"][2] == {
        "path": "model.safetensors",
        "size_bytes": 4096,
        "sha256": make.digest("org/ftweights"),
    }


def test_a_local_folder_is_recorded_by_name_sizes_and_headers_alone() -> None:
    text = dumps(built(FT, LOCAL))
    source = json.loads(text)["sources"][2]
    assert source["local"] is True
    assert source["header_sha256"] == LOCAL.header_sha256
    assert "repo" not in source
    assert source["files"][2] == {"path": "model.safetensors", "size_bytes": 4096}
    for secret in ("alice", "secret", "home", socket.gethostname(), getpass.getuser() + "/", str(Path.cwd())):
        assert secret not in text


def test_a_portable_recipe_is_a_recipe_and_names_folders_by_name() -> None:
    base = dataclasses.replace(LOCAL, role="base", name="base")
    asked = make.recipe(base, [LOCAL, FT])
    data = portable_recipe(make.plan(asked, base, [LOCAL, FT]), asked.normalized())
    again = Recipe.from_data(data)
    assert str(again.base) == "./base"
    assert [m.repo for m in again.models] == ["./ft2", "org/ft"]
    assert again.names == asked.names
    assert asked.normalized()["models"][0]["repo"] == LOCAL.repo


def test_same_inputs_same_text_whatever_the_order_of_outputs() -> None:
    assert dumps(built(FT, LOCAL)) == dumps(built(FT, LOCAL, outputs=reversed(OUTPUTS)))
    assert dumps(built()).endswith("}\n")
    assert dumps(built()) != dumps(built(seed=1))


def test_text_is_read_back_to_an_equal_lock() -> None:
    lock = built(FT, LOCAL)
    assert loads(dumps(lock)) == lock
    assert loads(dumps(lock).encode()) == lock
    assert dumps(loads(dumps(lock))) == dumps(lock)


NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.recursive(st.none() | st.booleans() | NUMBERS | st.text(), st.lists, max_leaves=8))
def test_any_recipe_value_survives(value: Any) -> None:
    asked = make.recipe(BASE, [FT]).normalized() | {"parameters": {"scale": value}}
    lock = build_lock(make.plan(make.recipe(BASE, [FT]), BASE, [FT]), asked, OUTPUTS)
    assert loads(dumps(lock)).recipe == asked


def test_numerics_are_exact_only_if_every_method_is_element_wise() -> None:
    asked = make.recipe(BASE, [FT])
    plan = make.plan(asked, BASE, [FT])
    assert numerics_of(plan) == "exact"
    matrix = [m.name for m in all_methods() if m.unit == "matrix"]
    for name in matrix:
        assert numerics_of(dataclasses.replace(plan, method=name)) == "tolerance"
        assert numerics_of(dataclasses.replace(plan, jobs=(_job(name),))) == "tolerance"
    assert numerics_of(dataclasses.replace(plan, jobs=(_job("linear"),))) == "exact"


def _job(method: str) -> TensorJob:
    settings = Settings(get_method(method).parameters(), (), ())
    return TensorJob(0, "w", "linear", (2, 2), DTYPES["F32"], 0, 8, 24, "merge", None, (), settings, method=method)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (FileSpec("model.safetensors", 1), r"outputs\[0\]\.sha256"),
        (FileSpec("../model.safetensors", 1, sha256="a" * 64), "does not stay inside"),
    ],
)
def test_a_lock_that_could_not_be_checked_is_not_written(bad: FileSpec, says: str) -> None:
    with pytest.raises(HubMergeError, match=says):
        built(outputs=[bad])


# --- strict reading


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.__setitem__(key, value)


def _output(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["outputs"][1].update(changes)


def _source(i: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["sources"][i].update(changes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.pop("plan_sha256"), "plan_sha256: is missing"),
        (lambda d: d.pop("format_version"), "format_version: is missing"),
        (lambda d: d["outputs"][1].pop("sha256"), r"outputs\[1\]\.sha256: is missing"),
        (_set("clock", 1), "clock: unknown key"),
        (_set("format_version", "1"), "format_version"),
        (_set("format_version", 0), "format_version"),
        (_set("numerics", "roughly"), "numerics"),
        (_set("seed", -1), "seed"),
        (_set("seed", "0"), "seed"),
        (_set("seed", True), "seed"),
        (_set("outputs", []), "outputs"),
        (_set("outputs", {}), "outputs"),
        (_set("sources", []), "sources"),
        (_set("environment", {"torch": 2}), "environment.torch"),
        (_set("recipe", None), "recipe"),
        (_output(sha256="A" * 64), r"outputs\[1\]\.sha256"),
        (_output(sha256="a" * 63), r"outputs\[1\]\.sha256"),
        (_output(size_bytes=-1), r"outputs\[1\]\.size_bytes"),
        (_output(size_bytes="10"), r"outputs\[1\]\.size_bytes"),
        (_output(mode=7), r"outputs\[1\]\.mode: unknown key"),
        (_output(path="../x"), "does not stay inside"),
        (_output(path="/etc/passwd"), "does not stay inside"),
        (_output(path="a\\b"), "does not stay inside"),
        (_output(path="C:x"), "does not stay inside"),
        (_output(path="a//b"), "does not stay inside"),
        (_output(path="a/./b"), "does not stay inside"),
        (_output(path="a\0b"), "does not stay inside"),
        (_output(path=""), r"outputs\[1\]\.path"),
        (_output(path="README.md"), "'README.md' is listed twice"),
        (_output(path=LOCK_NAME), "cannot list itself"),
        (_source(0, role="donor"), r"sources\[0\]\.role"),
        (_source(1, local=True), "either a repo and its commit, or local"),
        (_source(1, commit="main"), r"sources\[1\]\.commit"),
        (_source(0, header_sha256="x"), r"sources\[0\]\.header_sha256"),
    ],
)
def test_reading_is_strict_and_names_the_key(change: Callable[[dict[str, Any]], None], says: str) -> None:
    data = json.loads(dumps(built()))
    change(data)
    with pytest.raises(IntegrityError, match=says) as caught:
        loads(json.dumps(data), "org/m/hubmerge.lock.json")
    assert caught.value.message.startswith("org/m/hubmerge.lock.json: ")


@pytest.mark.parametrize("version", [2, 99])
def test_a_newer_format_asks_for_a_newer_hubmerge(version: int) -> None:
    text = json.dumps({"format_version": version, "surprise": []})
    with pytest.raises(HubMergeError, match=f"lock format {version}; .* reads format 1") as caught:
        loads(text)
    assert not isinstance(caught.value, IntegrityError)
    assert caught.value.hint == "install a newer hubmerge"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"seed": 1, "seed": 2}', "the key 'seed' is there twice"),
        ('{"seed": NaN}', "NaN is not a number"),
        ("[" * 100_000, "not valid JSON"),
        (b"\xff\xfe\xfa", "not valid JSON"),
    ],
)
def test_what_is_no_json_object_is_refused(text: str | bytes, says: str) -> None:
    with pytest.raises(IntegrityError, match=says):
        loads(text)


def test_the_published_schema_is_current() -> None:
    command = 'python -c \'import hubmerge.lock as l; open("docs/lock.schema.json", "w").write(l.schema_text())\''
    assert SCHEMA.read_text() == schema_text(), f"run: {command}"


def test_the_schema_names_every_key_a_lock_has() -> None:
    schema = json.loads(schema_text())
    assert sorted(schema["required"]) == sorted(json.loads(dumps(built())))
    assert schema["additionalProperties"] is False


def test_plan_is_left_alone() -> None:
    asked = make.recipe(BASE, [LOCAL])
    plan: Plan = make.plan(asked, BASE, [LOCAL])
    before = repr(plan)
    build_lock(plan, asked.normalized(), OUTPUTS)
    assert repr(plan) == before
