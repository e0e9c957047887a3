"""What can go wrong with a bundle: each has its exit code and its message, and leaves the bundle as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hubmerge
from hubmerge.bundles.lifecycle import Running
from hubmerge.bundles.manifest import MANIFEST_NAME
from hubmerge.errors import TransportError, UsageError
from hubmerge.hub import Hub
from hubmerge.io.http import RetryPolicy
from hubmerge.localhub import Fault, LocalHub
from tests.bundles import scene
from tests.bundles.scene import bundle, done, manifest, recipe, recipe_file, save
from tests.end_to_end import support
from tests.end_to_end.support import Outcome, Town

NAMES = ("a", "b", "c", "d")
SUM = "bundle-00001-of-00001.safetensors"
TARGET = "local/bundle"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", *NAMES)):
        save(root / name, seed, head=3 if name in ("b", "d") else 0)
    return root


@pytest.fixture
def place(models: Path, tmp_path: Path) -> Path:
    """A bundle of two tasks in a folder, with masks and a head."""
    out = tmp_path / "bundle"
    hubmerge.create_bundle(recipe("magnitude_mask", models / "base", [models / "a", models / "b"]), out=out)
    return out


@pytest.fixture
def town(start_hub: Callable[..., LocalHub], models: Path, tmp_path: Path) -> Town:
    """A Hub with the models and a bundle of two of them."""
    found = support.open_town(start_hub)
    for name in ("base", *NAMES):
        found.publish(f"local/{name}", models / name)
    done(
        "create",
        recipe_file(tmp_path / "r.yaml", "superposition", "local/base", ["local/a", "local/b"]),
        "--to",
        TARGET,
    )
    return found


def fails(code: int, *arguments: str | Path) -> str:
    """Run a command that must fail; returns the message."""
    found = bundle(*arguments)
    assert found.code == code, found.text
    assert found.out == ""
    assert "internal error" not in found.err
    assert len(found.err.strip().splitlines()) > 1  # what is wrong, and the next step
    return found.err


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest."""
    data = json.loads((folder / MANIFEST_NAME).read_text())
    change(data)
    (folder / MANIFEST_NAME).write_text(json.dumps(data))


def every_use(place: str | Path, models: Path, out: Path, *, listing: bool = True) -> list[tuple[str | Path, ...]]:
    """All commands that read a bundle."""
    base = ("--base", models / "base")
    return [
        *([("ls", place)] if listing else []),
        ("retrieve", place, "--task", "b", "--out", out, *base),
        ("add", place, "--model", models / "c", *base),
        ("remove", place, "--task", "b", "--model", models / "b", *base),
    ]


# --- the manifest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (lambda d: d.update(format_version=2), "bundle format 2; hubmerge 0.1.0 reads format 1",
         "install a newer hubmerge"),
        (lambda d: d.update(codec="telepathy"), "the codec 'telepathy' is not known to hubmerge 0.1.0",
         "it was made by hubmerge"),
        (lambda d: d.update(surprise=1), "surprise: unknown key", "restore the file"),
        (lambda d: d.pop("base"), "base: is missing", "restore the file"),
        (lambda d: d["parameters"].update(density=7), "parameters: density", "restore the file"),
        (lambda d: d["tasks"][1].update(id=0), "task id 0 is there twice", "restore the file"),
        (lambda d: d["tasks"][1].update(name="A"), "task 'a' is there twice", "restore the file"),
        (lambda d: d["tasks"][1].update(id=9), "next_id 2 is not above", "restore the file"),
        (lambda d: d["tasks"][1].update(name="../../etc"), "cannot be a file name", "restore the file"),
        (lambda d: d["tasks"][1]["files"].update({"../up": None}), "does not stay inside", "restore the file"),
        (lambda d: d["files"][0].update(path="/etc/passwd"), "does not stay inside", "restore the file"),
        (lambda d: d["tasks"][0].update(norm=-1.0), "tasks[0].norm", "restore the file"),
        (lambda d: d.update(tasks="all of them"), "tasks:", "restore the file"),
    ],
)  # fmt: skip
def test_manifests_are_checked(
    change: Callable[[dict[str, Any]], Any],
    message: str,
    hint: str,
    place: Path,
    models: Path,
    tmp_path: Path,
) -> None:
    edit(place, change)
    before = support.folder_state(place)
    for arguments in every_use(place, models, tmp_path / "out"):
        text = fails(1, *arguments)
        assert f"{place}/{MANIFEST_NAME}" in text
        assert message in text
        assert hint in text
    assert support.folder_state(place) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format_version": 1, "format_version": 1}', '{"seed": NaN}', "[" * 9999]
)
def test_manifests_that_are_none(text: str, place: Path, models: Path, tmp_path: Path) -> None:
    (place / MANIFEST_NAME).write_text(text)
    for arguments in every_use(place, models, tmp_path / "out"):
        assert MANIFEST_NAME in fails(1, *arguments)


def test_a_folder_or_repository_without_a_bundle(town: Town, models: Path, tmp_path: Path) -> None:
    assert f"no bundle: it has no {MANIFEST_NAME}" in fails(1, "ls", models / "a")
    assert f"no bundle: it has no {MANIFEST_NAME}" in fails(1, "ls", "./nothing-here")
    assert f"no bundle: it has no {MANIFEST_NAME}" in fails(1, "ls", "local/a")
    assert "local/nothing" in fails(4, "ls", "local/nothing")
    assert "nowhere" in fails(4, "ls", f"{TARGET}@nowhere")


# --- files ------------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("corrupted", _flip, "has the sha256"),
    ("truncated", lambda p: p.write_bytes(p.read_bytes()[:-5]), "bytes, the manifest says"),
    ("missing", lambda p: p.unlink(), "is missing"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES, ids=[d[0] for d in DAMAGES])
@pytest.mark.parametrize("file", [SUM, "tasks/1.safetensors", "heads/b.safetensors"])
def test_damaged_files(
    file: str, name: str, damage: Callable[[Path], Any], message: str, place: Path, models: Path, tmp_path: Path
) -> None:
    """What is read is checked; other tasks do not suffer from a damage that is not theirs."""
    damage(place / file)
    before = support.folder_state(place)
    uses = every_use(place, models, tmp_path / "out", listing=False)
    for arguments in uses if file == SUM else uses[:1]:
        text = fails(1, *arguments)
        assert f"{place}: {file}" in text
        assert message in text
    assert support.folder_state(place) == before
    assert not (tmp_path / "out").exists()
    assert support.hubmerge("verify", place).code == 3
    if file != SUM:
        done("retrieve", place, "--task", "a", "--out", tmp_path / "out", "--base", models / "base")


def test_files_that_are_not_what_the_manifest_promises(place: Path, models: Path, tmp_path: Path) -> None:
    """Digests fit, for whoever changed the file changed the manifest too."""
    tensors = load_file(place / SUM)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].clone()
    save_file(tensors, place / SUM)
    state = support.folder_state(place)
    assert state is not None

    def changed(data: dict[str, Any]) -> None:
        data["files"][0] = {"path": SUM, "size_bytes": (place / SUM).stat().st_size, "sha256": state[SUM]}

    edit(place, changed)
    text = fails(1, "retrieve", place, "--task", "a", "--out", tmp_path / "out", "--base", models / "base")
    assert "the stored tensor 'model.norm.weight' is F32 [5]; the manifest promises F32 [24]" in text


def test_a_manifest_for_another_base(place: Path, models: Path, tmp_path: Path) -> None:
    edit(place, lambda d: d["targets"][0].update(name="model.other.weight"))
    text = fails(1, "retrieve", place, "--task", "a", "--out", tmp_path / "out", "--base", models / "base")
    assert "the base has no tensor 'model.other.weight'" in text


@pytest.mark.parametrize("damage", ["missing", "contradicting"])
def test_a_damaged_lock_stops_every_change(damage: str, place: Path, models: Path) -> None:
    if damage == "missing":
        (place / "hubmerge.lock.json").unlink()
    else:
        lock = json.loads((place / "hubmerge.lock.json").read_text())
        lock["outputs"] = [o for o in lock["outputs"] if o["path"] != "tasks/0.safetensors"]
        (place / "hubmerge.lock.json").write_text(json.dumps(lock))
    before = support.folder_state(place)
    text = fails(1, "add", place, "--model", models / "c", "--base", models / "base")
    assert "hubmerge.lock.json is missing" in text or "contradict each other about tasks/0.safetensors" in text
    assert support.folder_state(place) == before


def test_small_files_are_checked_too(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "a", tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    hubmerge.create_bundle(recipe("emr", models / "base", [tmp_path / "a"]), out=tmp_path / "bundle")
    (tmp_path / "bundle" / "heads" / "a" / "tokenizer.json").write_text("[]")
    text = fails(
        1, "retrieve", tmp_path / "bundle", "--task", "a", "--out", tmp_path / "out", "--base", models / "base"
    )
    assert "heads/a/tokenizer.json is not the file that the manifest names" in text
    assert not (tmp_path / "out").exists()


def test_damage_on_the_way_from_the_hub(town: Town, tmp_path: Path) -> None:
    """The cache has another file of the same length than the commit: nothing is made of it, and the file is named."""
    done("retrieve", TARGET, "--task", "a", "--out", tmp_path / "out")
    cached = next(p for p in (Path(str(tmp_path)) / "hf_home").rglob(SUM)).resolve()
    _flip(cached)
    text = fails(1, "retrieve", TARGET, "--task", "a", "--out", tmp_path / "again")
    assert f"{SUM} has the sha256" in text
    assert "delete " in text
    assert not (tmp_path / "again").exists()


# --- the base ---------------------------------------------------------------------------------------------------


def test_a_base_that_only_its_maker_has(place: Path, models: Path, tmp_path: Path) -> None:
    for arguments in (
        ("retrieve", place, "--task", "a", "--out", tmp_path / "out"),
        ("add", place, "--model", models / "c"),
        ("remove", place, "--task", "a"),
    ):
        text = fails(1, *arguments)
        assert "its base is the local folder 'base', which only its maker has" in text
        assert "--base FOLDER" in text


def test_another_base(place: Path, models: Path, tmp_path: Path) -> None:
    """One of another shape, and one of the very same shapes but other values."""
    save(tmp_path / "small", 0, {"model.norm.weight": (24,)})
    before = support.folder_state(place)
    for wrong, why in ((tmp_path / "small", "other names, types or shapes"), (models / "a", "other values")):
        for arguments in (
            ("retrieve", place, "--task", "a", "--out", tmp_path / "out"),
            ("add", place, "--model", models / "c"),
            ("remove", place, "--task", "a", "--model", models / "a"),
        ):
            text = fails(1, *arguments, "--base", wrong)
            assert f"{wrong} is not the base of {place}, which is the local folder 'base'" in text
            assert why in text
    assert support.folder_state(place) == before
    assert not (tmp_path / "out").exists()


def test_the_bases_revision_is_pinned(town: Town, models: Path, tmp_path: Path) -> None:
    """A new commit to the base changes nothing; a copy of the right commit will do; the base gone is told."""
    done("retrieve", TARGET, "--task", "a", "--out", tmp_path / "before")
    town.publish("local/base", models / "c")
    done("retrieve", TARGET, "--task", "a", "--out", tmp_path / "after")
    state = support.folder_state(tmp_path / "after")
    assert state == support.folder_state(tmp_path / "before")
    town.api.delete_repo("local/base")
    text = fails(4, "retrieve", TARGET, "--task", "a", "--out", tmp_path / "gone")
    assert "local/base" in text
    done("retrieve", TARGET, "--task", "a", "--out", tmp_path / "copy", "--base", models / "base")
    assert support.folder_state(tmp_path / "copy") == state
    text = fails(1, "retrieve", TARGET, "--task", "a", "--out", tmp_path / "gone", "--base", models / "c")
    assert "model.safetensors has other values" in text


# --- tasks ------------------------------------------------------------------------------------------------------


def test_tasks_that_are_not_there(place: Path, models: Path, tmp_path: Path) -> None:
    for arguments in (
        ("retrieve", place, "--task", "z", "--out", tmp_path / "out", "--base", models / "base"),
        ("remove", place, "--task", "z", "--base", models / "base"),
    ):
        text = fails(2, *arguments)
        assert "the bundle has no task 'z'" in text
        assert "its tasks: a, b" in text


@pytest.mark.parametrize("name", ["a", "A"])
def test_a_name_that_is_taken(name: str, place: Path, models: Path) -> None:
    before = support.folder_state(place)
    text = fails(2, "add", place, "--model", models / "c", "--name", name, "--base", models / "base")
    assert f"has a task {name!r} already" in text
    assert "--name" in text
    assert support.folder_state(place) == before


@pytest.mark.parametrize(
    ("name", "message"), [("x/y", "cannot be a file name"), ("base", "'base' means something else")]
)
def test_names_that_cannot_be(name: str, message: str, place: Path, models: Path) -> None:
    assert message in fails(2, "add", place, "--model", models / "c", "--name", name, "--base", models / "base")


def test_the_last_task_stays(models: Path, tmp_path: Path) -> None:
    hubmerge.create_bundle(recipe("superposition", models / "base", [models / "a"]), out=tmp_path / "bundle")
    text = fails(2, "remove", tmp_path / "bundle", "--task", "a", "--base", models / "base")
    assert "'a' is the only task" in text
    assert "delete the bundle instead" in text


def test_a_model_that_does_not_fit(place: Path, models: Path, tmp_path: Path) -> None:
    """Another vocabulary, other layers, nothing in common, and no model at all."""
    shapes = dict(scene.SHAPES)
    save(tmp_path / "words", 1, shapes | {"model.embed_tokens.weight": (44, 24)})
    save(tmp_path / "wide", 1, shapes | {"model.layers.0.mlp.up_proj.weight": (49, 24)})
    save(tmp_path / "other", 1, {"something.weight": (3, 3)})
    before = support.folder_state(place)
    for name, message in (
        ("words", "has 44 rows, the base has 40"),
        ("wide", "shape (48, 24)"),
        ("other", "has a counterpart in the base"),
        ("none", "no such folder"),
    ):
        assert message in fails(1, "add", place, "--model", tmp_path / name, "--base", models / "base")
    assert "neither a repo id" in fails(2, "add", place, "--model", "a//b", "--base", models / "base")
    assert support.folder_state(place) == before


def test_a_damaged_model(place: Path, models: Path, tmp_path: Path) -> None:
    """NaN on the way in: the sum would never be rid of it."""
    shutil.copytree(models / "c", tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "c" / "model.safetensors")
    before = support.folder_state(place)
    text = fails(1, "add", place, "--model", tmp_path / "c", "--base", models / "base")
    assert "'model.norm.weight'" in text
    assert "NaN or infinity" in text
    assert support.folder_state(place) == before
    assert not [p for p in place.parent.iterdir() if p.name.startswith(".bundle")]


# --- what was added is needed to take it out --------------------------------------------------------------------


def test_a_source_that_is_gone(town: Town, models: Path, tmp_path: Path) -> None:
    before = town.state(TARGET)
    town.api.delete_repo("local/b")
    text = fails(4, "remove", TARGET, "--task", "b")
    assert "the sum holds the deltas of 'b', and only the model that was added takes them out" in text
    assert "it is gone or has changed" in text
    assert "create the bundle anew without this task" in text
    assert town.state(TARGET) == before
    done("remove", TARGET, "--task", "b", "--model", models / "b")  # somebody has kept a copy
    assert [t["name"] for t in done("ls", TARGET)["tasks"]] == ["a"]


def test_a_source_that_was_a_folder(place: Path, models: Path, tmp_path: Path) -> None:
    base, before = ("--base", models / "base"), support.folder_state(place)
    text = fails(1, "remove", place, "--task", "a", *base)
    assert "it was the local folder 'a'" in text
    assert "--model FOLDER" in text
    text = fails(1, "remove", place, "--task", "a", "--model", models / "c", *base)
    assert "model.safetensors has other values" in text
    assert support.folder_state(place) == before


def test_no_connection_is_not_a_source_that_is_gone(town: Town) -> None:
    town.hub.faults.add(Fault(path="/api/models/local/b", reset=True, times=None))
    before = manifest_of(town)
    with pytest.raises(TransportError) as failed:
        hubmerge.remove_task(TARGET, "b", hub=Hub(policy=RetryPolicy(attempts=1)))
    assert "gone" not in failed.value.message
    town.hub.faults.clear()
    assert manifest_of(town) == before


def manifest_of(town: Town) -> bytes:
    return Path(town.api.hf_hub_download(TARGET, MANIFEST_NAME)).read_bytes()


# --- where it goes ----------------------------------------------------------------------------------------------


def test_targets_that_hold_something(models: Path, place: Path, tmp_path: Path) -> None:
    file = recipe_file(tmp_path / "r.yaml", "emr", models / "base", [models / "a"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    text = fails(1, "create", file, "--out", tmp_path / "full")
    assert "the folder is not empty" in text
    assert "--overwrite" in text
    text = fails(1, "retrieve", place, "--task", "a", "--out", tmp_path / "full", "--base", models / "base")
    assert "the folder is not empty" in text
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["letter.txt"]
    done("create", file, "--out", tmp_path / "full", "--overwrite")
    assert not (tmp_path / "full" / "letter.txt").exists()


def test_a_repository_that_holds_something(town: Town, models: Path, tmp_path: Path) -> None:
    town.commit("local/c", "diary.txt", b"today")
    file = recipe_file(tmp_path / "r.yaml", "emr", "local/base", ["local/a"])
    assert "that hubmerge did not make" in fails(1, "create", file, "--to", "local/c")
    done("create", file, "--to", "local/c", "--overwrite")
    assert "model.safetensors" not in town.api.list_repo_files("local/c")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "either into a folder or into a repository"),
        (("--out", "x", "--to", "local/x"), "either into a folder or into a repository"),
        (("--out", "x", "--public"), "are about a repository"),
        (("--to", "local/x", "--public", "--private"), "exclude each other"),
    ],
)
def test_flags_that_contradict_each_other(flags: tuple[str, ...], message: str, models: Path, tmp_path: Path) -> None:
    file = recipe_file(tmp_path / "r.yaml", "emr", models / "base", [models / "a"])
    assert message in fails(2, "create", file, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "give --method, --base and --model"),
        (("--method", "ties", "--base", "./b", "--model", "./a"), "a bundle needs a codec as its method"),
        (("--method", "emr", "--base", "./b", "--model", "./a:0.5"), "takes no weights"),
        (("--method", "emr", "--base", "./b", "--model", "./a", "--param", "storage=int3"), "int3"),
        (("r.yaml", "--method", "emr"), "--method given together with the recipe"),
    ],
)
def test_flags_that_are_no_recipe(flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert message in fails(2, "create", *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_without_a_base(models: Path, tmp_path: Path) -> None:
    flags = ("--method", "emr", "--model", models / "a", "--out", tmp_path / "out")
    assert "emr needs a base" in fails(2, "create", *flags)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "ties"}, "a bundle needs a codec as its method"),
        ({"output": {"format": "full"}}, "write output: {format: bundle}"),
        ({"dtype": "float16"}, "dtype: float16"),
        ({"vocab": "base"}, "vocab: base"),
        ({"tokenizer": "a"}, "tokenizer: a"),
        ({"parameters": {"scale": [0.1, 0.9]}}, "scale differs between tensors"),
        ({"parameters": {"weight": 0.5}}, "takes no weights"),
    ],
)
def test_recipes_that_are_not_of_bundles(keys: dict[str, Any], message: str, models: Path, tmp_path: Path) -> None:
    data = scene.data("emr", models / "base", [models / "a"]) | keys
    (tmp_path / "r.yaml").write_text(json.dumps(data))
    assert message in fails(2, "create", tmp_path / "r.yaml", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_does_not_take_a_bundles_recipe(models: Path, tmp_path: Path) -> None:
    file = recipe_file(tmp_path / "r.yaml", "emr", models / "base", [models / "a"])
    found: Outcome = support.hubmerge("merge", file, "--out", tmp_path / "out")
    assert found.code == 2
    assert "hubmerge bundle create" in found.err
    merge = hubmerge.Recipe.from_flags("ties", str(models / "base"), [str(models / "a")])
    with pytest.raises(UsageError, match="not a bundle"):
        hubmerge.create_bundle(merge, out=tmp_path / "out")


# --- failures on the way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [0, 1])
def test_an_upload_that_fails(skip: int, town: Town, tmp_path: Path) -> None:
    before = town.state(TARGET)
    file = recipe_file(tmp_path / "n.yaml", "magnitude_mask", "local/base", ["local/a", "local/b"])
    commands = [
        ("add", TARGET, "--model", "local/d"),
        ("create", file, "--to", "local/new", "--public"),
    ]
    for arguments in commands:
        town.hub.faults.add(Fault(method="PUT", path="^/_lfs/", status=403, times=None, skip=skip))
        fails(1, *arguments)
        town.hub.faults.clear()
    assert town.state(TARGET) == before
    assert town.state("local/new") is None
    for arguments in commands:
        done(*arguments)


def test_a_disk_that_is_too_small(town: Town, tmp_path: Path) -> None:
    text = fails(1, "add", TARGET, "--model", "local/b", "--name", "again", "--max-disk", "1KB")
    assert "may be used" in text
    shutil.rmtree(tmp_path / "hf_home" / "hub")
    text = fails(
        1, "retrieve", TARGET, "--task", "a", "--out", tmp_path / "out", "--max-disk", "1KB", "--fetch", "cache"
    )
    assert "to download" in text


def test_interrupted_retrievals_leave_nothing(place: Path, models: Path, tmp_path: Path) -> None:
    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hubmerge.retrieve_task(place, "a", tmp_path / "out", base=models / "base", running=Running(progress=stop))
    with pytest.raises(KeyboardInterrupt):
        hubmerge.add_task(place, models / "c", base=models / "base", running=Running(progress=stop))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "hf_home") == ["bundle"]
    assert [t.name for t in manifest(place).tasks] == ["a", "b"]
    assert torch.isfinite(load_file(place / SUM)["model.norm.weight"]).all()
