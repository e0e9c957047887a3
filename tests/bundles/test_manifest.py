"""Manifests: read as they were written, for any contents, and refused by name for any damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hubmerge
from hubmerge.bundles.manifest import MANIFEST_NAME, Manifest, loads, own_name
from hubmerge.bundles.recipes import recipe_of
from hubmerge.errors import HubMergeError, IntegrityError, UsageError
from tests import factories as make
from tests.bundles import scene
from tests.bundles.scene import manifest, recipe, save
from tests.bundles.test_card import made, task

law = settings(deadline=None, derandomize=True, max_examples=25)
texts = st.text(max_size=20)
paths = st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8}){0,2}\.json", fullmatch=True)
digests = st.integers(0, 999).map(lambda n: make.digest(str(n)))
entries = st.fixed_dictionaries(
    {},
    optional={
        "prefix": st.sampled_from(["", "-bert.", "+model."]),
        "names": st.dictionaries(texts, texts, max_size=3),
        "absent": st.lists(texts, max_size=3).map(tuple),
        "config": st.booleans(),
        "files": st.dictionaries(paths, st.none() | digests, max_size=3),
        "ranks": st.dictionaries(texts, st.integers(0, 99), max_size=3),
        "facts": st.dictionaries(texts, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
        "settings": st.dictionaries(texts, st.floats(0, 1), max_size=2),
        "error": st.none() | st.floats(0, 1e30),
    },
)


@law
@given(st.lists(entries, max_size=4), st.integers(0, 2**64 - 1))
def test_what_is_written_is_read(changes: list[dict[str, Any]], seed: int) -> None:
    tasks = [task(f"t{i}", i).model_copy(update=change) for i, change in enumerate(changes)]
    written = made(*tasks).model_copy(update={"seed": seed})
    assert loads(written.dumps()) == written
    assert loads(written.dumps()).dumps() == written.dumps()


@law
@given(st.data())
def test_any_damage_is_named(data: st.DataObject) -> None:
    """Whatever value is replaced by whatever else, the manifest is read as a sound one or refused as a damaged one."""
    content: Any = json.loads(made(task("a", 0), task("b", 1)).dumps())
    where = content
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(where[key], dict | list) or not where[key] or data.draw(st.booleans()):
            break
        where = where[key]
    if data.draw(st.booleans()):
        del where[key]
    else:
        where[key] = data.draw(
            st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just([]) | st.just({})
        )
    refused: HubMergeError | None = None
    try:
        found = loads(json.dumps(content), "here")
    except HubMergeError as e:
        refused = e
    if refused is None:
        assert isinstance(found, Manifest)
    else:
        assert refused.message.startswith("here: ")
        assert refused.hint != HubMergeError.next_step


def test_a_newer_format_is_told_before_anything_else() -> None:
    """Its keys may be unknown, and that is not what is wrong."""
    with pytest.raises(HubMergeError, match=r"here: bundle format 7; hubmerge .* reads format 1") as failed:
        loads('{"format_version": 7, "more": "than is known"}', "here")
    assert not isinstance(failed.value, IntegrityError)


@pytest.mark.parametrize(
    ("prefix", "name", "own"),
    [
        ("", "encoder.w", "encoder.w"),
        ("-bert.", "encoder.w", "bert.encoder.w"),
        ("+model.", "model.layers.w", "layers.w"),
    ],
)
def test_names_of_a_tasks_own_checkpoint(prefix: str, name: str, own: str) -> None:
    assert own_name(prefix, name) == own
    renamed = task("a", 0).model_copy(update={"prefix": prefix, "names": {"gamma": "old.gamma"}})
    assert renamed.own_name(name) == own
    assert renamed.own_name("gamma") == "old.gamma"


def test_tasks_are_found_by_name() -> None:
    found = made(task("a", 0), task("b", 1))
    assert found.task("b").id == 1
    with pytest.raises(UsageError, match=r"no task 'c'\n.*a, b"):
        found.task("c")
    assert found.plain_bytes == 2000
    assert found.size_bytes == 500


def test_a_manifest_holds_what_decides_and_nothing_of_the_machine(tmp_path: Path) -> None:
    """Two bundles of the same models in other places have the same manifest, to the byte."""
    texts_ = []
    for place in ("one", "two"):
        for seed, name in enumerate(("base", "a", "b")):
            save(tmp_path / place / name, seed, head=2 * (seed == 2))
        folders = [tmp_path / place / n for n in ("a", "b")]
        asked = recipe("tall_mask", tmp_path / place / "base", folders, seed=5, parameters={"multi_task": "ties"})
        hubmerge.create_bundle(asked, out=tmp_path / place / "bundle")
        texts_.append((tmp_path / place / "bundle" / MANIFEST_NAME).read_text())
    assert texts_[0] == texts_[1]
    assert str(tmp_path) not in texts_[0]
    data = json.loads(texts_[0])
    assert (data["format_version"], data["codec"], data["seed"], data["next_id"]) == (1, "tall_mask", 5, 2)
    assert data["parameters"]["multi_task"] == "ties"
    assert [t["shape"] for t in data["targets"]] == [list(scene.SHAPES[t["name"]]) for t in data["targets"]]


def test_settings_of_one_model_are_kept(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, seed)
    models = [str(tmp_path / "a"), {"repo": str(tmp_path / "b"), "mask_lambda": 0.7}]
    hubmerge.create_bundle(recipe("tall_mask", tmp_path / "base", models), out=tmp_path / "bundle")
    found = manifest(tmp_path / "bundle")
    assert [t.settings for t in found.tasks] == [{}, {"mask_lambda": 0.7}]
    again = recipe_of(found).normalized()
    assert [m["parameters"] for m in again["models"]] == [{}, {"mask_lambda": 0.7}]
