"""Bundles as files are what docs/bundle-format.md says: a reader written from the page alone gets the same models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

import hubmerge
from hubmerge.bundles.manifest import MANIFEST_NAME, Manifest, Origin, TaskEntry
from hubmerge.codec import Codec
from hubmerge.codecs import all_codecs
from tests.bundles.scene import SHAPES, manifest, recipe, save, values
from tests.codecs.independent import Folder, Tensor, read_tensors
from tests.end_to_end import support
from tests.merge.models import _llama, _save
from tests.merge.test_adapters import make_adapter, reload
from tests.merge.test_merged_adapters import LORAS

PAGE = Path(__file__).parents[2] / "docs" / "bundle-format.md"
TASKS = ("a", "b", "c")


def bundled(folder: Path, codec: str, parameters: dict[str, Any] | None = None, **keys: Any) -> Path:
    """Of a base and three fine-tunes: one with a head, one under other names and with a tensor less."""
    save(folder / "base", 0)
    (folder / "base" / "tokenizer.json").write_text("{}")
    save(folder / "a", 1, head=3)
    (folder / "a" / "tokenizer.json").write_text('{"own": true}')
    save(folder / "b", 2)
    renamed = {n.removeprefix("model."): t for n, t in values(3).items() if n != "model.norm.weight"}
    support.save(folder / "c", renamed, config={"model_type": "llama"})
    (folder / "c" / "tokenizer.json").write_text("{}")
    asked = recipe(codec, folder / "base", [folder / t for t in TASKS], parameters=parameters or {}, seed=7, **keys)
    hubmerge.create_bundle(asked, out=folder / "bundle")
    return folder / "bundle"


def retrieved(bundle: Path, task: str) -> Path:
    out = bundle.parent / "out" / task
    hubmerge.retrieve_task(bundle, task, out, base=bundle.parent / "base")
    return out


def assert_reads_alike(bundle: Path, *, exactly: bool = True) -> None:
    reader = Folder(bundle, bundle.parent / "base")
    for task in TASKS:
        out = retrieved(bundle, task)
        found, wanted = reader.model(task), read_tensors(out / "model.safetensors")
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name][:2] == tensor[:2]
            if exactly:
                assert found[name] == tensor, name
            else:  # sums of products are rounded in another order, and then once more, to bfloat16
                torch.testing.assert_close(_values(found[name]), _values(tensor), rtol=2**-7, atol=1e-6)
        for path, content in reader.small_files(task).items():
            source = bundle.parent / "base" / path
            assert (out / path).read_bytes() == (source.read_bytes() if content is None else content)


def _values(tensor: Tensor) -> torch.Tensor:
    assert tensor.dtype == "BF16"
    return torch.frombuffer(bytearray(tensor.data), dtype=torch.bfloat16)


@pytest.mark.parametrize("codec", all_codecs(), ids=lambda c: c.name)
def test_every_codec(codec: Codec, tmp_path: Path) -> None:
    bundle = bundled(tmp_path, codec.name)
    assert_reads_alike(bundle, exactly=codec.name != "tsv_compress")
    tasks = [Folder(bundle, tmp_path / "base").task(t) for t in TASKS]
    assert [t.get("prefix", "") for t in tasks] == ["", "", "+model."]
    assert tasks[2]["absent"] == ["model.norm.weight"]
    assert len(tasks[0]["files"]["tokenizer.json"]) == 64
    assert tasks[2]["files"]["tokenizer.json"] is None


@pytest.mark.parametrize("storage", ["bfloat16", "int8", "int4"])
def test_every_storage_form(storage: str, tmp_path: Path) -> None:
    assert_reads_alike(bundled(tmp_path, "superposition", {"storage": storage}))


def test_shared_parts_in_several_files(tmp_path: Path) -> None:
    bundle = bundled(tmp_path, "superposition", output={"format": "bundle", "shard_size": 5000})
    assert len(list(bundle.glob("bundle-*-of-*.safetensors"))) > 3
    assert_reads_alike(bundle)


def test_after_tasks_were_added_and_removed(tmp_path: Path) -> None:
    """Numbers have a gap then, and the largest is beyond the count."""
    bundle = bundled(tmp_path, "superposition")
    hubmerge.remove_task(bundle, "b", model=tmp_path / "b", base=tmp_path / "base")
    hubmerge.add_task(bundle, tmp_path / "b", base=tmp_path / "base")
    assert [t.id for t in manifest(bundle).tasks] == [0, 2, 3]
    assert_reads_alike(bundle)


def test_adapters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _save(tf.LlamaForCausalLM(_llama()), tmp_path / "base")
    names = ("lora0", "lora1")
    for i, name in enumerate(names):
        make_adapter(
            peft.LoraConfig(task_type="CAUSAL_LM", **LORAS[i]), reload(tmp_path / "base"), tmp_path / name, seed=i
        )
    asked = recipe("superposition", tmp_path / "base", [tmp_path / n for n in names], parameters={"storage": "int8"})
    hubmerge.create_bundle(asked, out=tmp_path / "bundle")
    reader = Folder(tmp_path / "bundle", tmp_path / "base")
    assert reader.manifest["factors"] is True
    for name in names:
        wanted = read_tensors(retrieved(tmp_path / "bundle", name) / "adapter_model.safetensors")
        found = reader.adapter(name)
        assert found.keys() == wanted.keys()
        for key, (shape, numbers) in found.items():
            assert wanted[key].shape == shape
            assert torch.frombuffer(bytearray(wanted[key].data), dtype=torch.float32).tolist() == numbers


def test_the_page_names_every_key() -> None:
    page = PAGE.read_text(encoding="utf-8")
    section = page[page.index("## The manifest") : page.index("## Random bits")]
    named = set(re.findall(r"`([a-z0-9_]+)`", section))
    for model in (Manifest, TaskEntry, Origin):
        assert set(model.model_fields) <= named, model.__name__


def test_the_page_names_every_file(tmp_path: Path) -> None:
    bundle = bundled(tmp_path, "emr")
    kinds = {
        r"hubmerge_bundle\.json|README\.md|hubmerge\.yaml|hubmerge\.lock\.json|aibom\.cdx\.json|config\.json",
        r"bundle-\d{5}-of-\d{5}\.safetensors",
        r"tasks/\d+\.safetensors",
        r"heads/[abc](\.safetensors|\.config\.json|/tokenizer\.json)",
        r"NOTICE|licenses/.+",
    }
    for path in bundle.rglob("*"):
        name = path.relative_to(bundle).as_posix()
        assert path.is_dir() or any(re.fullmatch(kind, name) for kind in kinds), name
    assert set(SHAPES) == {t["name"] for t in json.loads((bundle / MANIFEST_NAME).read_text())["targets"]}
