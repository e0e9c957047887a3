"""A bundle's life in a folder: created, listed, added to, taken from, retrieved from; nothing else ever changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import hubmerge
from hubmerge.bundles import stream
from hubmerge.bundles.lifecycle import Running
from hubmerge.codecs import all_codecs, get_codec
from hubmerge.lock import loads
from hubmerge.ranking import GRAIN
from tests.bundles import scene
from tests.bundles.scene import HEAD, WIDE, bundle, done, given_back, manifest, recipe, save, shared, stored, values
from tests.end_to_end import support

NAMES = ("a", "b", "c")
INCREMENTAL = [c.name for c in all_codecs() if c.incremental]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes, the second and third with heads of their own."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", *NAMES)):
        save(root / name, seed, head=seed if seed > 1 else 0)
    return root


def create(root: Path, out: Path, names: tuple[str, ...] = NAMES, codec: str = "superposition", **keys: Any) -> Path:
    """A bundle of some of the models."""
    hubmerge.create_bundle(recipe(codec, root / "base", [root / n for n in names], **keys), out=out)
    return out


def naive(codec: str, names: tuple[str, ...], **parameters: Any) -> dict[str, scene.Tensors]:
    tensors = {n: values(1 + NAMES.index(n)) for n in names}
    return given_back(codec, values(0), tensors, **parameters)


# --- commands ---------------------------------------------------------------------------------------------------


def test_a_life(models: Path, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    file = scene.recipe_file(tmp_path / "r.yaml", "superposition", models / "base", [models / "a", models / "b"])
    made = done("create", file, "--out", place)
    assert made["path"] == str(place)
    assert [t["name"] for t in made["tasks"]] == ["a", "b"]
    assert {w["path"] for w in made["written"]} == {"bundle-00001-of-00001.safetensors", "heads/b.safetensors"}
    assert support.hubmerge("verify", place).code == 0

    base = ("--base", models / "base")
    added = done("add", place, "--model", models / "c", "--name", "third", *base)
    assert [(t["name"], t["id"]) for t in added["tasks"]] == [("a", 0), ("b", 1), ("third", 2)]
    assert {w["path"] for w in added["written"]} == {"bundle-00001-of-00001.safetensors", "heads/third.safetensors"}
    removed = done("remove", place, "--task", "a", "--model", models / "a", *base)
    assert [t["name"] for t in removed["tasks"]] == ["b", "third"]
    assert support.hubmerge("verify", place).code == 0
    again = done("add", place, "--model", models / "a", *base)
    assert [(t["name"], t["id"]) for t in again["tasks"]] == [("b", 1), ("third", 2), ("a", 3)]

    listed = done("ls", place)
    assert listed["tasks"] == again["tasks"]
    out = tmp_path / "third"
    answer = done("retrieve", place, "--task", "third", "--out", out, *base)
    assert [f["path"] for f in answer["files"]] == ["model.safetensors"]
    found = stored(out)
    assert torch.equal(found.pop(HEAD), stored(models / "c")[HEAD])
    assert found.keys() == values(0).keys()
    assert json.loads((out / "config.json").read_text())["num_labels"] == 3


def test_flags_instead_of_a_recipe(models: Path, tmp_path: Path) -> None:
    """They make the same bundle, to the byte."""
    file = scene.recipe_file(
        tmp_path / "r.yaml", "superposition", models / "base", [models / "a", models / "b"], seed=3,
        parameters={"storage": "int8", "targets": "mlp"}, output={"shard_size": 4000},
    )  # fmt: skip
    done("create", file, "--out", tmp_path / "one")
    flags = ["--method", "superposition", "--base", models / "base", "--model", models / "a", "--model", models / "b"]
    flags += ["--param", "storage=int8", "--param", "targets=mlp", "--seed", "3", "--shard-size", "4000"]
    done("create", *flags, "--out", tmp_path / "two")
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*") if p.is_file())
    assert len([f for f in files if f.name.startswith("bundle-")]) > 1
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


def test_what_is_listed(models: Path, tmp_path: Path) -> None:
    place = create(models, tmp_path / "bundle", parameters={"storage": "int8"})
    answer = done("ls", place)
    deltas = [{n: t.float() - values(0)[n].float() for n, t in values(s).items()} for s in (1, 2, 3)]
    energies = [sum(float(t.double().square().sum()) for t in d.values()) for d in deltas]
    for task, energy in zip(answer["tasks"], energies, strict=True):
        assert task["norm"] == pytest.approx(energy**0.5, rel=1e-12)
        assert task["expected_error"] == pytest.approx((sum(energies) - energy) ** 0.5, rel=1e-12)
        assert task["expected_relative_error"] == pytest.approx((sum(energies) / energy - 1) ** 0.5, rel=1e-12)
        assert task["plain_bytes"] == (models / task["name"] / "model.safetensors").stat().st_size
    assert answer["tasks"][1]["own_bytes"] == (place / "heads" / "b.safetensors").stat().st_size
    assert answer["size_bytes"] == sum(p.stat().st_size for p in place.rglob("*.safetensors"))
    assert answer["codec"] == "superposition"
    assert answer["parameters"]["storage"] == "int8"
    assert answer["saves"]

    text = bundle("ls", place).out
    assert all(f"{name} (local folder)" in text for name in NAMES)
    assert "superposition, int8" in text
    assert "The bundle with its base takes" in text
    assert bundle("ls", place, "--quiet").out.split() == list(NAMES)


def test_create_compares_with_plain_storage(models: Path, tmp_path: Path) -> None:
    two = scene.recipe_file(tmp_path / "two.yaml", "superposition", models / "base", [models / "a", models / "b"])
    three = [models / n for n in NAMES]
    small = scene.recipe_file(
        tmp_path / "three.yaml", "superposition", models / "base", three, parameters={"storage": "int8"}
    )
    honest = bundle("create", two, "--out", tmp_path / "two").out
    assert "Plain storage is no larger: the models as they are take" in honest
    assert "The bundle with its base takes" in bundle("create", small, "--out", tmp_path / "three").out


def test_messages_go_where_they_belong(models: Path, tmp_path: Path) -> None:
    file = scene.recipe_file(tmp_path / "r.yaml", "superposition", models / "base", [models / "a", models / "b"])
    loud = bundle("create", file, "--out", tmp_path / "one")
    assert "finished bundle-00001-of-00001.safetensors" in loud.err
    assert "note:" in loud.err
    quiet = bundle("create", file, "--out", tmp_path / "two", "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    parsed = bundle("create", file, "--out", tmp_path / "three", "--json")
    assert json.loads(parsed.out)["path"] == str(tmp_path / "three")
    base = ("--base", models / "base")
    out = tmp_path / "out"
    assert bundle("retrieve", tmp_path / "one", "--task", "a", "--out", out, *base, "-q").text == ""
    assert f"{out}: a, " in bundle("retrieve", tmp_path / "one", "--task", "a", "--out", out, *base, "--overwrite").out


# --- the same bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", INCREMENTAL)
def test_one_by_one_is_all_at_once(codec: str, models: Path, tmp_path: Path) -> None:
    """Parameters say what would otherwise depend on the number of tasks at creation."""
    parameters = {"tsv_compress": {"tasks": 3}}.get(codec, {})
    whole = create(models, tmp_path / "whole", codec=codec, parameters=parameters)
    grown = create(models, tmp_path / "grown", NAMES[:1], codec, parameters=parameters)
    for name in NAMES[1:]:
        hubmerge.add_task(grown, models / name, base=models / "base")
    assert shared(grown) == shared(whole)
    kept = [{f.path: f.sha256 for f in manifest(place).files} for place in (grown, whole)]
    assert kept[0] == kept[1]
    a, b = (manifest(place) for place in (grown, whole))
    assert a.model_copy(update={"tasks": b.tasks}) == b
    for one, other in zip(a.tasks, b.tasks, strict=True):
        assert one.model_copy(update={"error": None}) == other.model_copy(update={"error": None})
        assert one.error == (None if other.error is None else pytest.approx(other.error, rel=1e-12))


@pytest.mark.parametrize("codec", INCREMENTAL)
def test_added_and_removed_is_as_before(codec: str, models: Path, tmp_path: Path) -> None:
    place = create(models, tmp_path / "bundle", NAMES[:2], codec)
    before, files, sums = manifest(place), support.folder_state(place), shared(place)
    hubmerge.add_task(place, models / "c", base=models / "base")
    assert (shared(place) == sums) is (codec == "tsv_compress")
    hubmerge.remove_task(place, "c", model=models / "c", base=models / "base")
    after, left = manifest(place), support.folder_state(place)
    assert after.next_id == before.next_id + 1
    assert after.model_copy(update={"next_id": before.next_id}) == before
    assert files is not None
    assert left is not None
    assert {n for n in files | left if files.get(n) != left.get(n)} <= {
        "hubmerge_bundle.json", "hubmerge.lock.json", "aibom.cdx.json",
    }  # fmt: skip


@pytest.mark.parametrize("codec", [c.name for c in all_codecs()])
def test_results_do_not_depend_on_how_it_runs(codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PIECE", 2 * GRAIN)
    for seed, name in enumerate(("base", *NAMES)):
        save(tmp_path / name, seed, WIDE)
    asked = recipe(codec, tmp_path / "base", [tmp_path / n for n in NAMES])
    states = set()
    for workers, chunk in ((1, 8 * GRAIN), (3, GRAIN), (2, None)):
        place, out = tmp_path / f"{workers}", tmp_path / f"out-{workers}"
        running = Running(workers=workers, chunk_elements=chunk)
        hubmerge.create_bundle(asked, out=place, running=running)
        hubmerge.retrieve_task(place, "b", out, base=tmp_path / "base", running=running)
        states.add(json.dumps([support.folder_state(place), support.folder_state(out)]))
    assert len(states) == 1


def test_the_published_recipe_makes_the_same_again(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = create(
        models, tmp_path / "bundle", exclude=["*.norm.*"], heads="drop", seed=7, output={"shard_size": "10KB"},
        parameters={"storage": "bfloat16", "scale": 0.5}, card={"title": "Three"},
    )  # fmt: skip
    monkeypatch.chdir(models)
    answer = done("create", place / "hubmerge.yaml", "--out", tmp_path / "again")
    assert len([w for w in answer["written"] if w["path"].startswith("bundle-")]) > 1
    assert support.folder_state(tmp_path / "again") == support.folder_state(place)


# --- only what changed ------------------------------------------------------------------------------------------


def test_other_files_stay(models: Path, tmp_path: Path) -> None:
    """Other tasks' files, and whatever else lies in the folder, hidden or not, are the same files as before."""
    place = create(models, tmp_path / "bundle", NAMES[:2], "magnitude_mask")
    (place / ".git" / "objects").mkdir(parents=True)
    (place / ".git" / "objects" / "ab").write_bytes(b"history")
    (place / "notes").mkdir()
    (place / "notes" / "plot.png").write_bytes(b"a picture")
    (place / "link").symlink_to("notes")
    kept = ["tasks/0.safetensors", "tasks/1.safetensors", "heads/b.safetensors", "heads/b.config.json", "config.json",
            ".git/objects/ab", "notes/plot.png"]  # fmt: skip
    before = {path: ((place / path).read_bytes(), (place / path).stat().st_ino) for path in kept}
    hubmerge.add_task(place, models / "c", base=models / "base")
    after = {path: ((place / path).read_bytes(), (place / path).stat().st_ino) for path in kept}
    assert after == before
    assert (place / "link").readlink() == Path("notes")
    hubmerge.remove_task(place, "b", model=models / "b", base=models / "base")
    left = {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()}
    assert left == {
        "bundle-00001-of-00001.safetensors", "tasks/0.safetensors", "tasks/2.safetensors", "heads/a.config.json",
        "heads/c.safetensors", "heads/c.config.json", "config.json", "README.md", "hubmerge.yaml",
        "hubmerge_bundle.json", "hubmerge.lock.json", ".git/objects/ab", "notes/plot.png",
        "licenses/apache-2.0.txt", "aibom.cdx.json",
    }  # fmt: skip
    report = support.hubmerge("verify", place)
    assert report.code == 0
    assert "notes/plot.png: not in the lock" in report.out
    assert not list(tmp_path.glob(".bundle*"))


def test_a_codec_that_shares_nothing_needs_no_model_to_remove(models: Path, tmp_path: Path) -> None:
    place = create(models, tmp_path / "bundle", codec="tsv_compress")
    before = support.folder_state(place)
    removed = done("remove", place, "--task", "b")
    assert removed["written"] == []
    after = support.folder_state(place)
    assert before is not None
    assert after is not None
    assert {p for p in before if p not in after} == {
        "tasks/1.safetensors",
        "heads/b.safetensors",
        "heads/b.config.json",
    }
    assert support.hubmerge("verify", place).code == 0


@pytest.mark.parametrize("codec", [c.name for c in all_codecs() if not c.incremental])
def test_codecs_that_need_all_tasks_say_so(codec: str, models: Path, tmp_path: Path) -> None:
    place = create(models, tmp_path / "bundle", NAMES[:2], codec)
    before = support.folder_state(place)
    for arguments in (("add", place, "--model", models / "c"), ("remove", place, "--task", "a")):
        failed = bundle(*arguments, "--base", models / "base")
        assert failed.code == 2
        assert f"{codec} keeps what depends on all tasks at once" in failed.err
    assert support.folder_state(place) == before


def test_what_the_recipe_leaves_out_stays_out(models: Path, tmp_path: Path) -> None:
    place = create(models, tmp_path / "bundle", ("b",), exclude=["*.norm.*"], heads="drop")
    hubmerge.add_task(place, models / "c", base=models / "base")
    found = manifest(place)
    assert [f.path for f in found.files] == ["bundle-00001-of-00001.safetensors"]
    assert "model.norm.weight" not in {t.name for t in found.targets}
    hubmerge.retrieve_task(place, "c", tmp_path / "c", base=models / "base")
    assert HEAD not in stored(tmp_path / "c")
    assert torch.equal(stored(tmp_path / "c")["model.norm.weight"], values(0)["model.norm.weight"])


# --- retrieval --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
def test_every_storage_gives_back_what_the_naive_computation_does(storage: str, models: Path, tmp_path: Path) -> None:
    place = create(models, tmp_path / "bundle", parameters={"storage": storage, "scale": 0.7})
    for scale in (None, 0.3):
        wanted = naive("superposition", NAMES, storage=storage, scale=0.7 if scale is None else scale)
        out = tmp_path / str(scale)
        hubmerge.retrieve_task(place, "a", out, base=models / "base", scale=scale)
        scene.assert_same(stored(out), wanted["a"])


def test_small_files_come_back(tmp_path: Path) -> None:
    """Each model's own tokenizer and generation settings, kept once; those of the base where they are the same."""
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, seed)
        (tmp_path / name / "tokenizer.json").write_text('{"vocabulary": 1}')
        (tmp_path / name / "generation_config.json").write_text(json.dumps({"top_k": seed // 2}))
        (tmp_path / name / "LICENSE").write_text(f"licence of {name}")
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "b" / "tokenizer.json").unlink()
    (tmp_path / "base" / "special_tokens_map.json").write_text("{}")
    place = create(tmp_path, tmp_path / "bundle", ("a", "b"))
    kept = {p.relative_to(place / "heads").as_posix() for p in (place / "heads").rglob("*") if p.is_file()}
    assert kept == {
        "a.config.json", "b.config.json", "a/LICENSE", "b/LICENSE", "b/chat_template.jinja", "b/generation_config.json",
    }  # fmt: skip
    for name in ("a", "b"):
        hubmerge.retrieve_task(place, name, tmp_path / "out" / name, base=tmp_path / "base")
        own = {
            p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.name not in ("README.md", "config.json")
        }
        found = {p.name: p.read_bytes() for p in (tmp_path / "out" / name).iterdir() if p.name != "config.json"}
        assert found.keys() == own.keys()
        assert all(found[n] == own[n] for n in own if not n.endswith(".safetensors"))


def test_the_lock_names_every_source_and_every_file(models: Path, tmp_path: Path) -> None:
    place = create(models, tmp_path / "bundle", NAMES[:2])
    hubmerge.add_task(place, models / "c", base=models / "base")
    lock = loads((place / "hubmerge.lock.json").read_bytes())
    assert [s.name for s in lock.sources] == ["base", *NAMES]
    for source in lock.sources:
        assert [f.sha256 for f in source.files] == [support.folder_state(models / source.name)["model.safetensors"]]  # type: ignore[index]
    state = support.folder_state(place)
    assert state is not None
    assert {f.path: f.sha256 for f in lock.outputs} == {n: d for n, d in state.items() if n != "hubmerge.lock.json"}
    assert str(tmp_path) not in (place / "hubmerge.lock.json").read_text()
    assert str(models) not in "".join(p.read_text() for p in place.rglob("*.json"))


def test_a_bundle_can_be_copied_and_moved(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = create(models, tmp_path / "bundle", NAMES[:2])
    shutil.copytree(place, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    hubmerge.add_task("copy", models / "c", base=models / "base")
    assert support.hubmerge("verify", "copy").code == 0
    assert [t.name for t in manifest(place).tasks] == ["a", "b"]


def test_the_python_functions_are_exported() -> None:
    assert get_codec("superposition").incremental
    names = {"create_bundle", "add_task", "remove_task", "retrieve_task"}
    assert names <= set(hubmerge.__all__)
    assert all(callable(getattr(hubmerge, n)) for n in names)
