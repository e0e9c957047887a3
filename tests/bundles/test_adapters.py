"""Adapters as tasks: superposed by their factors where all are LoRA, otherwise by what they change."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import hubmerge
from hubmerge.coding import decode_tensors, encode_tensors
from hubmerge.factors import retrieved, superposable
from hubmerge.spec import LowRank
from tests.adapters import adapter_zoo as zoo
from tests.bundles import scene
from tests.bundles.scene import bundle, done, given_back, manifest, recipe, stored
from tests.end_to_end import support
from tests.merge.models import FAMILIES, LABELS, _llama, _save, build
from tests.merge.test_adapters import make_adapter, reload
from tests.merge.test_merged_adapters import LORAS, applied

NAMES = ("lora0", "lora1", "lora2")
ROOT = "base_model.model."


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama, three LoRA adapters of different ranks, scales and targets, and a full fine-tune."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    base = tf.LlamaForCausalLM(_llama())
    _save(base, folder / "base")
    for i, options in enumerate(LORAS):
        config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
        make_adapter(config, reload(folder / "base"), folder / NAMES[i], seed=i + 1)
    with torch.no_grad():
        for value in base.parameters():
            value.add_(0.02 * torch.randn_like(value))
    _save(base, folder / "full")
    return folder


def factors(folder: Path) -> dict[str, LowRank]:
    """An adapter's deltas by the base's names, from its file and its config."""
    config, tensors = zoo.read_config(folder), load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, down in tensors.items():
        if name.endswith("lora_A.weight"):
            module, rank = name.removeprefix(ROOT).removesuffix(".lora_A.weight"), down.shape[0]
            scale = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
            found[f"{module}.weight"] = LowRank(tensors[name.replace("lora_A", "lora_B")], down, scale)
    return found


def superposed(folder: Path, **parameters: Any) -> list[dict[str, torch.Tensor]]:
    """What the bundle must give back of every adapter, dense, by the naive computation."""
    adapters = [factors(folder / name) for name in NAMES]
    zeros, models = superposable(adapters)
    encoded = encode_tensors("superposition", zeros, models, parameters=parameters)
    ranks = [{n: d.rank for n, d in a.items()} for a in adapters]
    found = [retrieved(decode_tensors(encoded, zeros, t), r) for t, r in zip(encoded.tasks, ranks, strict=True)]
    return [{n: d.dense() for n, d in one.items()} for one in found]


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_adapters_come_back_as_adapters(storage: str, llama: Path, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    asked = recipe("superposition", llama / "base", [llama / n for n in NAMES], parameters={"storage": storage})
    hubmerge.create_bundle(asked, out=place)
    assert manifest(place).factors
    assert support.hubmerge("verify", place).code == 0
    base = stored(llama / "base")
    for name, wanted in zip(NAMES, superposed(llama, storage=storage), strict=True):
        out = tmp_path / name
        hubmerge.retrieve_task(place, name, out)  # the base is not needed
        config = zoo.read_config(out)
        own = zoo.read_config(llama / name)
        assert (config["target_modules"], config["task_type"]) == (own["target_modules"], "CAUSAL_LM")
        state = applied(reload(llama / "base"), out)
        assert {n for n in base if not torch.equal(state[n], base[n])} == wanted.keys()
        for tensor, delta in wanted.items():
            torch.testing.assert_close(state[tensor], base[tensor] + delta, rtol=0, atol=2e-6)


def test_one_adapter_alone_is_exact(llama: Path, tmp_path: Path) -> None:
    hubmerge.create_bundle(recipe("superposition", llama / "base", [llama / "lora2"]), out=tmp_path / "bundle")
    for scale in (1.0, 0.5):
        out = tmp_path / str(scale)
        hubmerge.retrieve_task(tmp_path / "bundle", "lora2", out, scale=scale)
        base = stored(llama / "base")
        found, wanted = (applied(reload(llama / "base"), folder) for folder in (out, llama / "lora2"))
        for name, value in base.items():
            torch.testing.assert_close(found[name], value + scale * (wanted[name] - value), rtol=0, atol=1e-6)


def test_adapters_are_compared_with_adapters(llama: Path, tmp_path: Path) -> None:
    """Two small adapters in half precision take less than their sum in float32, and the bundle says so."""
    for name in NAMES[1:]:
        shutil.copytree(llama / name, tmp_path / name)
        zoo.cast_file(tmp_path / name, torch.bfloat16)
    file = scene.recipe_file(tmp_path / "r.yaml", "superposition", llama / "base", [tmp_path / n for n in NAMES[1:]])
    plain = sum((tmp_path / n / "adapter_model.safetensors").stat().st_size for n in NAMES[1:])
    made = bundle("create", file, "--out", tmp_path / "bundle")
    assert made.code == 0, made.text
    verdict = f"Plain storage is no larger: the adapters as they are take {plain / 1000:.3g} kB, the bundle "
    assert verdict in made.out
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert verdict in card
    assert "PeftModel.from_pretrained" in card
    assert done("ls", tmp_path / "bundle")["saves"] is False
    larger = scene.recipe_file(tmp_path / "l.yaml", "superposition", llama / "base", [llama / n for n in NAMES[1:]])
    assert "The bundle takes" in bundle("create", larger, "--out", tmp_path / "larger").out


def test_adapters_are_added_and_removed(llama: Path, tmp_path: Path) -> None:
    place, base = tmp_path / "bundle", ("--base", llama / "base")
    asked = recipe("superposition", llama / "base", [llama / n for n in ("lora2", "lora0")])
    hubmerge.create_bundle(asked, out=place)
    before = {n: t for p in place.glob("bundle-*") for n, t in load_file(p).items()}
    done("add", place, "--model", llama / "lora1", *base)
    out = tmp_path / "lora1"
    done("retrieve", place, "--task", "lora1", "--out", out)
    assert set(applied(reload(llama / "base"), out)) == set(stored(llama / "base"))
    done("remove", place, "--task", "lora1", "--model", llama / "lora1", *base)
    after = {n: t for p in place.glob("bundle-*") for n, t in load_file(p).items()}
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)


def test_an_adapter_must_fit_the_room_there_is(llama: Path, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    hubmerge.create_bundle(recipe("superposition", llama / "base", [llama / "lora1"]), out=place)
    before = support.folder_state(place)
    failed = bundle("add", place, "--model", llama / "lora0", "--base", llama / "base")
    assert failed.code == 1
    assert "has rank 4, the bundle has room for rank 2" in failed.err
    assert "create the bundle anew with this adapter" in failed.err
    failed = bundle("add", place, "--model", llama / "full", "--base", llama / "base")
    assert failed.code == 1
    assert "the bundle holds LoRA adapters as factors" in failed.err
    assert support.folder_state(place) == before


@pytest.mark.parametrize("codec", ["superposition", "tsv_compress", "emr"])
def test_adapters_beside_full_models(codec: str, llama: Path, tmp_path: Path) -> None:
    """Both come back as full models: an adapter's is the base with its changes."""
    place = tmp_path / "bundle"
    hubmerge.create_bundle(recipe(codec, llama / "base", [llama / "full", llama / "lora0"]), out=place)
    assert [t.adapter for t in manifest(place).tasks] == [False, True]
    assert not manifest(place).factors
    merged = {n: t for n, t in applied(reload(llama / "base"), llama / "lora0").items() if n in stored(llama / "base")}
    models = {"full": stored(llama / "full"), "lora0": merged}
    wanted = given_back(codec, stored(llama / "base"), models)
    for name in models:
        hubmerge.retrieve_task(place, name, tmp_path / name, base=llama / "base")
        found = stored(tmp_path / name)
        assert found.keys() == wanted[name].keys()
        if (codec, name) == ("tsv_compress", "lora0"):  # of rank 4, and kept whole: better than its rank alone allows
            wanted[name] = merged
        for tensor, value in wanted[name].items():
            torch.testing.assert_close(found[tensor], value, rtol=0, atol=2e-6, msg=tensor)
        with contextlib.redirect_stderr(io.StringIO()):
            _, report = tf.LlamaForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not report["missing_keys"] | report["unexpected_keys"]


def test_an_adapter_with_a_head_comes_back_as_a_classifier(tmp_path: Path) -> None:
    """PEFT names no labels: they are as many as the head has rows."""
    base, tunes = build("bert", tmp_path)
    torch.manual_seed(3)
    with zoo.quiet():
        model = tf.BertForSequenceClassification.from_pretrained(base, num_labels=7)
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query"]))
        zoo.randomise(adapted)
        adapted.save_pretrained(tmp_path / "lora")
        reference = adapted.merge_and_unload().eval()
    place = tmp_path / "bundle"
    hubmerge.create_bundle(recipe("tsv_compress", base, [tunes[0], tmp_path / "lora"]), out=place)
    out = tmp_path / "out"
    hubmerge.retrieve_task(place, "lora", out, base=base)
    with contextlib.redirect_stderr(io.StringIO()):
        found, report = tf.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert isinstance(found, tf.BertForSequenceClassification)
    assert found.config.num_labels == 7 not in LABELS
    assert not report["missing_keys"] | report["unexpected_keys"]
    inputs = FAMILIES["bert"].inputs
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(**inputs).logits, reference(**inputs).logits, rtol=0, atol=1e-5)


def test_a_head_travels_with_its_adapter(tmp_path: Path) -> None:
    """In a bundle of adapters, PEFT finds the head where it expects it."""
    base, _ = build("bert", tmp_path)
    for i, rows in enumerate((4, 6)):
        torch.manual_seed(i)
        with zoo.quiet():
            model = tf.BertForSequenceClassification.from_pretrained(base, num_labels=rows)
            adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["value"]))
            zoo.randomise(adapted)
            adapted.save_pretrained(tmp_path / f"lora{i}")
    (tmp_path / "lora1" / "tokenizer_config.json").write_text('{"special": true}')
    place = tmp_path / "bundle"
    hubmerge.create_bundle(recipe("superposition", base, [tmp_path / "lora0", tmp_path / "lora1"]), out=place)
    assert manifest(place).factors
    hubmerge.retrieve_task(place, "lora1", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json",
    }  # fmt: skip
    found, wanted = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("out", "lora1"))
    heads = {n for n in wanted if "lora_" not in n}
    assert heads == {f"{ROOT}classifier.weight", f"{ROOT}classifier.bias"}
    assert {n for n in found if "lora_" not in n} == heads
    assert all(torch.equal(found[n], wanted[n]) for n in heads)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in wanted.items()}
