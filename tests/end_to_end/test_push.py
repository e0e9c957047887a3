"""From the Hub through a merge to the Hub: what is published loads, is described truthfully, appears all at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file

import hubmerge
from hubmerge.api import PushTarget
from hubmerge.localhub import Fault, LocalHub
from tests.adapters import adapter_zoo as zoo
from tests.end_to_end import support
from tests.end_to_end.support import OWNER, UP, Town, save, tensors
from tests.merge import naive
from tests.merge.models import FAMILIES, LABELS, build, stored

TARGET = "local/merged"
RECIPE = """\
method: task_arithmetic
base: local/base
models:
  - local/task0
  - {repo: local/task1@v1, name: second}
  - local/adapter
parameters: {scale: 0.5}
output: {shard_size: 10KB}
card: {title: Three in one, language: en}
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT, two classifiers made of it in other dtypes and shards, and a LoRA adapter of it."""
    root = tmp_path_factory.mktemp("sources")
    build("bert", root)
    with zoo.quiet():
        config = peft.LoraConfig(r=2, target_modules=["query", "value"])
        model = peft.get_peft_model(FAMILIES["bert"].base().from_pretrained(root / "base"), config)
        zoo.randomise(model)
        model.save_pretrained(root / "adapter")
        merged = peft.PeftModel.from_pretrained(
            FAMILIES["bert"].base().from_pretrained(root / "base"), root / "adapter"
        ).merge_and_unload()
        merged.save_pretrained(root / "adapter-merged")
    described = json.loads((root / "adapter" / "adapter_config.json").read_text())
    (root / "adapter" / "adapter_config.json").write_text(
        json.dumps(described | {"base_model_name_or_path": "local/base"})
    )
    for folder in root.iterdir():
        (folder / "README.md").write_text(support.CARD)
    return root


@pytest.fixture
def town(start_hub: Callable[..., LocalHub]) -> Town:
    return support.open_town(start_hub)


@pytest.fixture
def families(town: Town, sources: Path) -> Town:
    """The Hub with the BERTs on it."""
    for name in ("base", "task0", "task1", "adapter"):
        town.publish(f"local/{name}", sources / name)
    town.api.create_tag("local/task1", tag="v1")
    return town


@pytest.fixture
def small(town: Town, tmp_path: Path) -> Path:
    """A recipe over models of a few tensors, which are on the Hub."""
    for seed, name in enumerate(("base", "a", "b")):
        town.publish(f"local/{name}", save(tmp_path / name, tensors(seed)))
    recipe = tmp_path / "small.yaml"
    recipe.write_text("method: ties\nbase: local/base\nmodels: [local/a, local/b]\noutput: {shard_size: 700B}\n")
    return recipe


def push(recipe: Path, *flags: str) -> dict[str, Any]:
    """Push as a user does; returns what is printed as JSON."""
    done = support.hubmerge("push", recipe, "--to", TARGET, "--json", *flags)
    assert done.code == 0, done.text
    answer: dict[str, Any] = json.loads(done.out)
    return answer


# --- the result -------------------------------------------------------------------------------------------------


def test_full_models_and_an_adapter(families: Town, sources: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(RECIPE)
    answer = push(recipe)
    state = families.state(TARGET)
    assert state is not None
    assert state.private
    assert state.branches == {"main": answer["commit"]}
    assert len(families.api.list_repo_commits(TARGET)) == 2  # the Hub's own first commit, and ours
    shards = [f for f in state.files if f.startswith("model-0")]
    assert len(shards) > 3
    small_files = {"config.json", "model.safetensors.index.json", "README.md", "hubmerge.yaml", "hubmerge.lock.json"}
    small_files |= {"aibom.cdx.json", "licenses/apache-2.0.txt"}  # which the licence wants along, and no parent has
    heads = {f"heads/{n}.{end}" for n in ("task0", "second") for end in ("safetensors", "config.json")}
    assert set(state.files) == {*shards, *small_files, *heads, ".gitattributes"}

    assert_right_values(sources)
    assert_right_heads(sources)
    assert_true_card(answer)


def assert_right_values(sources: Path) -> None:
    """What transformers loads from the Hub is what a naive loop makes of the sources."""
    model, report = tf.BertModel.from_pretrained(TARGET, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = naive.task_arithmetic(
        stored(sources / "base"), [stored(sources / n) for n in ("task0", "task1", "adapter-merged")], 0.5
    )
    found = model.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)
    with torch.no_grad():
        assert torch.isfinite(model(**FAMILIES["bert"].inputs).last_hidden_state).all()


def assert_right_heads(sources: Path) -> None:
    folder = Path(snapshot_download(TARGET)) / "heads"
    for name, source, labels in zip(("task0", "second"), ("task0", "task1"), LABELS, strict=True):
        head = load_file(folder / f"{name}.safetensors")
        assert head["classifier.weight"].shape[0] == labels
        own = stored(sources / source)
        assert all(torch.equal(value, own[tensor]) for tensor, value in head.items())


def assert_true_card(answer: dict[str, Any]) -> None:
    card = ModelCard.load(TARGET)
    card.validate()
    data = card.data.to_dict()
    assert set(data["base_model"]) == {"local/base", "local/task0", "local/task1", "local/adapter"}
    assert data["base_model_relation"] == "merge"
    assert data["license"] == "apache-2.0"
    assert data["language"] in ("en", ["en"])
    assert {"merge", "hubmerge"} <= set(data["tags"])
    assert card.text.lstrip().startswith("# Three in one")
    lock = json.loads(Path(snapshot_download(TARGET), "hubmerge.lock.json").read_text())
    assert {f["path"] for f in answer["files"]} == {f["path"] for f in lock["outputs"]} | {"hubmerge.lock.json"}


def test_verify_finds_what_others_change(small: Path, town: Town) -> None:
    push(small)
    done = support.hubmerge("verify", TARGET)
    assert done.code == 0, done.text
    assert done.out.startswith("OK: ")
    good = town.api.model_info(TARGET).sha
    name = next(f for f in town.api.list_repo_files(TARGET) if f.startswith("model-00002"))
    content = Path(town.api.hf_hub_download(TARGET, name)).read_bytes()
    town.commit(TARGET, name, content[:-1] + bytes([content[-1] ^ 1]))
    town.commit(TARGET, "model-extra.safetensors", content)
    done = support.hubmerge("verify", TARGET)
    assert done.code == 3
    assert f"changed  {name}: expected {len(content)} bytes" in done.out
    assert "extra    model-extra.safetensors" in done.out
    assert support.hubmerge("verify", f"{TARGET}@{good}").code == 0


def test_the_published_recipe_makes_the_same_again(small: Path, tmp_path: Path) -> None:
    push(small)
    folder = Path(snapshot_download(TARGET))
    assert support.hubmerge("merge", folder / "hubmerge.yaml", "--out", tmp_path / "again").code == 0
    locks = [json.loads((f / "hubmerge.lock.json").read_text()) for f in (folder, tmp_path / "again")]
    weights = [[o for o in lock["outputs"] if o["path"].endswith(".safetensors")] for lock in locks]
    assert weights[0] == weights[1]


# --- how it is published ----------------------------------------------------------------------------------------


def test_pull_request_leaves_the_branch_alone(small: Path, town: Town) -> None:
    first = push(small)
    answer = push(edited(small, "scale: 0.5"), "--pr")
    state = town.state(TARGET)
    assert state is not None
    assert state.branches == {"main": first["commit"]}
    assert state.pull_requests == ("refs/pr/1",)
    assert answer["url"].endswith(f"/{TARGET}/discussions/1")
    assert support.hubmerge("verify", f"{TARGET}@refs/pr/1").code == 0
    town.api.merge_pull_request(TARGET, 1)
    assert support.hubmerge("verify", TARGET).code == 0


def edited(recipe: Path, parameter: str) -> Path:
    """The same merge with another parameter: other weights."""
    other = recipe.with_name("edited.yaml")
    other.write_text(recipe.read_text() + f"parameters: {{{parameter}}}\n")
    return other


def test_branch_and_tag(small: Path, town: Town) -> None:
    first = push(small)
    second = push(edited(small, "scale: 0.5"), "--revision", "half", "--tag", "v1")
    state = town.state(TARGET)
    assert state is not None
    assert state.branches == {"main": first["commit"], "half": second["commit"]}
    assert state.tags == {"v1": second["commit"]}
    assert second["url"].endswith(f"/{TARGET}/tree/half")
    for revision in ("half", "v1"):
        assert support.hubmerge("verify", f"{TARGET}@{revision}").code == 0


@pytest.mark.parametrize(("flag", "private"), [("--public", False), ("--private", True)])
def test_visibility(flag: str, private: bool, small: Path, town: Town) -> None:
    push(small, flag)
    state = town.state(TARGET)
    assert state is not None
    assert state.private is private


def test_nobody_sees_a_new_repository_before_it_is_whole(small: Path, town: Town) -> None:
    anonymous = HfApi(endpoint=town.hub.endpoint, token=False)
    seen = []

    def look(_: object) -> None:
        state = town.state(TARGET)
        assert state is not None
        seen.append((state.private, state.files))
        with pytest.raises(RepositoryNotFoundError):
            anonymous.model_info(TARGET)

    hubmerge.push(hubmerge.Recipe.load(small), PushTarget(TARGET, private=False), progress=look)
    assert len(seen) >= len(tensors(0))
    assert set(seen) == {(True, (".gitattributes",))}
    assert not anonymous.model_info(TARGET).private
    assert support.hubmerge("verify", TARGET).code == 0


def test_second_push_replaces_all_weights(small: Path, town: Town, tmp_path: Path) -> None:
    push(small)
    before = town.state(TARGET)
    small.write_text(small.read_text().replace("700B", "1GB"))
    push(small)
    after = town.state(TARGET)
    assert before is not None
    assert after is not None
    assert sum(f.startswith("model-0") for f in before.files) > 3
    assert [f for f in after.files if "safetensors" in f] == ["model.safetensors"]
    assert support.hubmerge("verify", TARGET).code == 0
    assert UP in load_file(town.api.hf_hub_download(TARGET, "model.safetensors", local_dir=tmp_path / "new"))


def test_same_push_again_changes_and_sends_nothing(small: Path, town: Town) -> None:
    first = push(small)
    town.hub.requests.clear()
    assert push(small)["commit"] == first["commit"]
    assert not town.hub.requests.find("PUT", "^/_lfs/")


# --- failures on the way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_failure_on_the_way(existing: bool, skip: int, small: Path, town: Town) -> None:
    """Whichever upload fails, the repository is as it was, but for what is staged for the next run."""
    if existing:
        push(small)
    before = town.state(TARGET)
    recipe = edited(small, "scale: 0.5")
    town.hub.faults.add(Fault(method="PUT", path="^/_lfs/", status=403, times=None, skip=skip))
    done = support.hubmerge("push", recipe, "--to", TARGET, "--public", "--revision", "next")
    assert done.code == 1, done.text
    assert f"to {TARGET}" in done.err
    assert OWNER.token not in done.text
    assert town.hub.requests.find("PUT", "^/_lfs/", status=403)
    town.hub.faults.clear()
    shards = [o["path"] for o in planned(recipe)["outputs"]]
    if skip:
        assert town.state(TARGET) == support.with_stage(before, town, TARGET, *shards[:skip])
        assert f"{skip} of {len(shards)} files are staged" in done.err
    else:
        assert town.state(TARGET) == before
    town.hub.requests.clear()
    answer = push(recipe)
    assert len(town.hub.requests.find("PUT", "^/_lfs/")) == len(shards) - skip
    after = town.state(TARGET)
    assert after is not None
    assert after.branches == {"main": answer["commit"]}
    assert support.hubmerge("verify", TARGET).code == 0


def planned(recipe: Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(support.hubmerge("plan", recipe, "--json").out)
    return answer
