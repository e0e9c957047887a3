"""Bundles on the Hub: made, changed and read there; every change is one commit that touches what it must."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from huggingface_hub import HfApi, ModelCard, snapshot_download
from torch.testing import assert_close

import hubmerge
from hubmerge.bundles.lifecycle import Running
from hubmerge.codecs import get_codec
from hubmerge.engine import Progress
from hubmerge.errors import TargetMovedError
from hubmerge.localhub import LocalHub
from tests.bundles import scene
from tests.bundles.scene import HEAD, bundle, done, given_back, manifest, recipe_file, save, shared, stored, values
from tests.bundles.test_round_trips import expected, predict
from tests.end_to_end import support
from tests.end_to_end.support import Town
from tests.merge.models import FAMILIES, LABELS, build

TARGET = "local/bundle"
NAMES = ("a", "b", "c")


@pytest.fixture
def town(start_hub: Callable[..., LocalHub], tmp_path: Path) -> Town:
    """A Hub with a base and three fine-tunes, the second and third with heads."""
    found = support.open_town(start_hub)
    for seed, name in enumerate(("base", *NAMES)):
        found.publish(f"local/{name}", save(tmp_path / "in" / name, seed, head=seed if seed > 1 else 0))
    return found


def create(
    tmp_path: Path, names: tuple[str, ...] = NAMES, codec: str = "superposition", *flags: str, **keys: Any
) -> Any:
    """Publish a bundle of some of them."""
    file = recipe_file(tmp_path / "r.yaml", codec, "local/base", [f"local/{n}" for n in names], **keys)
    return done("create", file, "--to", TARGET, *flags)


def files(town: Town, revision: str = "main") -> dict[str, str]:
    """The blob of every file."""
    tree = town.api.list_repo_tree(TARGET, recursive=True, revision=revision)
    return {f.path: f.blob_id for f in tree if hasattr(f, "blob_id")}


def commits(town: Town) -> list[str]:
    return [c.commit_id for c in town.api.list_repo_commits(TARGET)]


# --- life -------------------------------------------------------------------------------------------------------


def test_a_life(town: Town, tmp_path: Path) -> None:
    made = create(tmp_path, NAMES[:2], "magnitude_mask")
    state = town.state(TARGET)
    assert state is not None
    assert state.private
    assert state.branches == {"main": made["commit"]}
    assert made["url"].endswith(f"/{TARGET}")
    before = files(town)
    assert set(before) == {
        ".gitattributes", "README.md", "config.json", "hubmerge.yaml", "hubmerge.lock.json", "hubmerge_bundle.json",
        "bundle-00001-of-00001.safetensors", "tasks/0.safetensors", "tasks/1.safetensors", "heads/a.config.json",
        "heads/b.config.json", "heads/b.safetensors", "licenses/apache-2.0.txt", "aibom.cdx.json",
    }  # fmt: skip
    town.hub.requests.clear()
    added = done("add", TARGET, "--model", "local/c@main", "--name", "third")
    assert commits(town)[:2] == [added["commit"], made["commit"]]
    after = files(town)
    described = {"README.md", "hubmerge.yaml", "hubmerge.lock.json", "hubmerge_bundle.json", "aibom.cdx.json"}
    new = {"tasks/2.safetensors", "heads/third.config.json", "heads/third.safetensors"}
    assert {p for p in before if before[p] != after[p]} == described | {"bundle-00001-of-00001.safetensors"}
    assert after.keys() - before.keys() == new
    assert len(town.hub.requests.find("PUT", "^/_lfs/")) == 3  # the sum, the new task's mask and its head
    assert support.hubmerge("verify", TARGET).code == 0

    removed = done("remove", TARGET, "--task", "b")
    assert commits(town)[0] == removed["commit"]
    left = files(town)
    assert after.keys() - left.keys() == {"tasks/1.safetensors", "heads/b.config.json", "heads/b.safetensors"}
    assert {p for p in left if after[p] != left[p]} == described | {"bundle-00001-of-00001.safetensors"}
    assert [(t["name"], t["id"]) for t in done("ls", TARGET)["tasks"]] == [("a", 0), ("third", 2)]
    assert [t["name"] for t in done("ls", f"{TARGET}@{made['commit']}")["tasks"]] == ["a", "b"]
    assert support.hubmerge("verify", TARGET).code == 0


def test_the_hub_and_a_folder_hold_the_same(town: Town, tmp_path: Path) -> None:
    """One by one on the Hub, all at once in a folder; streamed or from the cache."""
    create(tmp_path, NAMES[:1])
    for name in NAMES[1:]:
        done("add", TARGET, "--model", f"local/{name}", "--fetch", "stream")
    file = recipe_file(tmp_path / "all.yaml", "superposition", "local/base", [f"local/{n}" for n in NAMES])
    done("create", file, "--out", tmp_path / "folder", "--fetch", "cache")
    published = Path(snapshot_download(TARGET))
    assert shared(published) == shared(tmp_path / "folder")
    local, remote = manifest(tmp_path / "folder"), manifest(published)
    assert remote.files == local.files
    assert remote.base == local.base
    assert [t.source for t in remote.tasks] == [t.source for t in local.tasks]
    assert all(t.source.repo == f"local/{t.name}" and len(t.source.commit or "") == 40 for t in remote.tasks)
    # A bundle in a folder whose models are on the Hub needs nothing else to be changed.
    done("remove", tmp_path / "folder", "--task", "b")
    done("remove", TARGET, "--task", "b")
    assert shared(Path(snapshot_download(TARGET))) == shared(tmp_path / "folder")
    lines = (tmp_path / "folder" / "hubmerge.yaml").read_text()
    assert f"local/base@{local.base.commit}" in lines


@pytest.mark.parametrize("fetch", ["auto", "cache", "stream"])
def test_retrieved_from_the_hub(fetch: str, town: Town, tmp_path: Path) -> None:
    create(tmp_path)
    out = tmp_path / "out"
    done("retrieve", TARGET, "--task", "c", "--out", out, "--fetch", fetch, "--scale", "0.5")
    found = stored(out)
    assert torch.equal(found.pop(HEAD), values(3, head=3)[HEAD])
    models = {n: values(1 + i) for i, n in enumerate(NAMES)}
    scene.assert_same(found, given_back("superposition", values(0), models, scale=0.5)["c"])


def test_a_retrieved_model_loads_and_can_be_published_again(town: Town, tmp_path: Path) -> None:
    base, tunes = build("bert", tmp_path / "bert")
    for folder in (base, *tunes):
        (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": len(folder.name)}))
        town.publish(f"local/bert-{folder.name}", folder)
    models = [f"local/bert-{t.name}" for t in tunes]
    file = recipe_file(tmp_path / "r.yaml", "superposition", "local/bert-base", models, parameters={"storage": "int8"})
    done("create", file, "--to", TARGET, "--public")
    done("retrieve", TARGET, "--task", "bert-task1", "--out", tmp_path / "out")
    town.publish("local/restored", tmp_path / "out")
    found, report = tf.BertForSequenceClassification.from_pretrained("local/restored", output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]
    assert found.config.num_labels == LABELS[1]
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == (
        tunes[1] / "tokenizer_config.json"
    ).read_bytes()
    naive = tf.BertForSequenceClassification.from_pretrained(tunes[1])
    before = predict(naive, FAMILIES["bert"].inputs)
    naive.load_state_dict(expected(get_codec("superposition"), base, tunes, storage="int8")["task1"])
    assert_close(predict(found, FAMILIES["bert"].inputs), predict(naive, FAMILIES["bert"].inputs), rtol=0, atol=2e-6)
    assert (predict(naive, FAMILIES["bert"].inputs) - before).abs().max() > 1e-4


# --- what is published ------------------------------------------------------------------------------------------


def test_the_card(town: Town, tmp_path: Path) -> None:
    create(tmp_path, card={"title": "Three in one", "language": "en", "tags": ["demo"], "limitations": "It is tiny."})
    card = ModelCard.load(TARGET)
    card.validate()
    found = card.data.to_dict()
    assert found["library_name"] == "hubmerge"
    assert found["base_model"] == ["local/base", "local/a", "local/b", "local/c"]
    assert found["base_model_relation"] == "merge"
    assert found["license"] == "apache-2.0"
    assert found["tags"] == ["merge", "hubmerge", "bundle", "superposition", "demo"]
    assert found["language"] in ("en", ["en"])
    assert "# Three in one" in card.text
    assert "It is tiny." in card.text
    assert f"hubmerge bundle retrieve {TARGET} --task a --out a\n" in card.text
    head = town.api.model_info("local/c").sha
    assert f"[{head[:7]}]({town.hub.endpoint}/local/c/tree/{head})" in card.text
    # What only a person can say stays when a task goes; the task's model does not.
    done("remove", TARGET, "--task", "c")
    card = ModelCard.load(TARGET)
    assert "It is tiny." in card.text
    assert "local/c" not in card.content


@pytest.mark.parametrize(("flag", "private"), [("--public", False), ("--private", True)])
def test_visibility(flag: str, private: bool, town: Town, tmp_path: Path) -> None:
    create(tmp_path, NAMES, "superposition", flag)
    state = town.state(TARGET)
    assert state is not None
    assert state.private is private
    done("remove", TARGET, "--task", "a")
    after = town.state(TARGET)
    assert after is not None
    assert after.private is private


def test_nobody_sees_half_a_bundle(town: Town, tmp_path: Path) -> None:
    create(tmp_path, NAMES[:2], "superposition", "--public")
    anonymous = HfApi(endpoint=town.hub.endpoint, token=False)
    seen = set()

    def look(_: Progress) -> None:
        seen.add(anonymous.model_info(TARGET).sha)

    made = hubmerge.add_task(TARGET, "local/c", running=Running(progress=look))
    assert len(seen) == 1
    assert anonymous.model_info(TARGET).sha == made.commit not in seen


def test_a_merged_model_gives_way_to_a_bundle_and_back(town: Town, tmp_path: Path) -> None:
    merge = tmp_path / "merge.yaml"
    merge.write_text("method: task_arithmetic\nbase: local/base\nmodels: [local/b, local/c]\n")
    assert support.hubmerge("push", merge, "--to", TARGET).code == 0
    assert {"model.safetensors", "heads/b.safetensors"} <= files(town).keys()
    create(tmp_path, ("a", "b"))
    assert not {"model.safetensors", "heads/c.safetensors", "heads/c.config.json"} & files(town).keys()
    assert support.hubmerge("verify", TARGET).code == 0
    assert support.hubmerge("push", merge, "--to", TARGET).code == 0
    assert not {"hubmerge_bundle.json", "bundle-00001-of-00001.safetensors", "heads/a.config.json"} & files(town).keys()
    assert support.hubmerge("verify", TARGET).code == 0


def test_other_branches(town: Town, tmp_path: Path) -> None:
    made = create(tmp_path, NAMES[:2])
    town.api.create_branch(TARGET, branch="more")
    town.api.create_tag(TARGET, tag="v1")
    added = done("add", f"{TARGET}@more", "--model", "local/c")
    state = town.state(TARGET)
    assert state is not None
    assert state.branches == {"main": made["commit"], "more": added["commit"]}
    for revision in ("v1", made["commit"], "refs/pr/1"):
        failed = bundle("add", f"{TARGET}@{revision}", "--model", "local/c", "--name", "d")
        assert failed.code in (2, 4), failed.text
    assert (
        "has no branch 'v1', and bundles are changed on a branch" in bundle("remove", f"{TARGET}@v1", "--task", "a").err
    )
    assert town.state(TARGET) == state


# --- two clients ------------------------------------------------------------------------------------------------


def test_two_clients_add_at_once(town: Town, tmp_path: Path) -> None:
    """While one is at work, the other is done: the first is told, nothing is lost, and its second try works."""
    create(tmp_path, NAMES[:1])
    other: list[Any] = []

    def meanwhile(_: Progress) -> None:
        if not other:
            other.append(done("add", TARGET, "--model", "local/b"))

    with pytest.raises(TargetMovedError, match="run the same command again"):
        hubmerge.add_task(TARGET, "local/c", running=Running(workers=1, progress=meanwhile))
    assert commits(town)[0] == other[0]["commit"]
    assert [t["name"] for t in done("ls", TARGET)["tasks"]] == ["a", "b"]
    again = done("add", TARGET, "--model", "local/c")
    assert [(t["name"], t["id"]) for t in again["tasks"]] == [("a", 0), ("b", 1), ("c", 2)]
    assert support.hubmerge("verify", TARGET).code == 0


def test_a_bundle_that_changed_before_work_began(town: Town, tmp_path: Path) -> None:
    """Between reading the bundle and writing to it, a moment is enough."""
    create(tmp_path, NAMES[:2])
    from hubmerge.bundles import api
    from hubmerge.hub import Hub
    from hubmerge.recipe.refs import ModelRef

    hub = Hub()
    with api.opened(TARGET, hub) as found:
        place = api._same_place(found, hub, Running(), "late")
        done("remove", TARGET, "--task", "b")
        with pytest.raises(TargetMovedError, match="run the same command again"):
            api.lifecycle.add(found, ModelRef.parse("local/c"), None, hub, place, Running())
    assert [t["name"] for t in done("ls", TARGET)["tasks"]] == ["a"]
    shutil.rmtree(tmp_path / "in")
