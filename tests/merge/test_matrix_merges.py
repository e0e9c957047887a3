"""Whole models merged by matrix methods: the engine against a merge in memory, also where weights are stored
transposed."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import hubmerge
from hubmerge.errors import IntegrityError, PlanError
from hubmerge.methods import all_methods
from hubmerge.spec import Kind
from tests.merge import naive
from tests.merge.models import FAMILIES, _gpt2, _save, build, stored
from tests.merge.test_adapters import make_adapter
from tests.methods.chunked import merge_model

MATRIX = [m.name for m in all_methods() if m.unit == "matrix"]
WEIGHTS = [1.0, 0.5]


def kinds(model: nn.Module) -> dict[str, tuple[Kind, bool]]:
    """Each weight's kind, and whether it is stored as (in, out), from the modules that own them."""
    found: dict[str, tuple[Kind, bool]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) or path.endswith("lm_head"):
            found[f"{path}.weight"] = ("embedding", False)
        elif isinstance(module, nn.Linear | Conv1D):
            found[f"{path}.weight"] = ("linear", isinstance(module, Conv1D))
    return found


@pytest.mark.parametrize("family", ["llama-untied", "gpt2"])
@pytest.mark.parametrize("method", MATRIX)
def test_merge_equals_one_in_memory(method: str, family: str, tmp_path: Path) -> None:
    base, tunes = build(family, tmp_path)
    models = [f"{t}:{w}" for t, w in zip(tunes, WEIGHTS, strict=True)]
    hubmerge.merge(hubmerge.Recipe.from_flags(method, str(base), models), tmp_path / "out")
    known = kinds(FAMILIES[family].base())
    assert any(transposed for _, transposed in known.values()) == (family == "gpt2")

    before, merged = stored(base), stored(tmp_path / "out")
    versions = [before, *(naive.align(before, stored(t)) for t in tunes)]
    turned = {name for name, (_, transposed) in known.items() if transposed}
    given = [{n: v[n].T.contiguous() if n in turned else v[n] for n in before} for v in versions]
    shown: dict[str, Kind] = {name: known.get(name, ("vector", False))[0] for name in before}
    expected = merge_model(method, given[0], given[1:], weights=WEIGHTS, kinds=shown)
    assert merged.keys() == before.keys()
    for name, value in before.items():
        wanted = expected[name].T if name in turned else expected[name]
        torch.testing.assert_close(merged[name], wanted, rtol=1e-5, atol=1e-5, msg=name)
        assert not torch.equal(merged[name], value), name


def test_the_lock_says_that_values_agree_within_a_tolerance(tmp_path: Path) -> None:
    base, tunes = build("llama-untied", tmp_path)
    hubmerge.merge(hubmerge.Recipe.from_flags("tsv_merge", str(base), [str(t) for t in tunes]), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "hubmerge.lock.json").read_text())["numerics"] == "tolerance"


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    base, tunes = build("llama-untied", tmp_path)
    path = tunes[1] / "model.safetensors"
    tensors = {n: t.clone() for n, t in stored(tunes[1]).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    recipe = hubmerge.Recipe.from_flags("tsv_merge", str(base), [str(t) for t in tunes])
    with pytest.raises(IntegrityError, match=rf"{name}.*task1"):
        hubmerge.merge(recipe, tmp_path / "out")


@pytest.mark.parametrize("method", MATRIX)
def test_adapters_of_a_transposed_layer_are_merged_as_their_products(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    _save(tf.GPT2LMHeadModel(_gpt2()), tmp_path / "base")
    ranks, tunes = (2, 3), []
    for i, rank in enumerate(ranks):
        model = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["c_attn"], fan_in_fan_out=True)
        tunes.append(tmp_path / f"adapter{i}")
        make_adapter(config, model, tunes[-1], seed=i)
    hubmerge.merge(
        hubmerge.Recipe.from_flags(method, str(tmp_path / "base"), [str(t) for t in tunes]), tmp_path / "out"
    )

    before, merged = stored(tmp_path / "base"), stored(tmp_path / "out")
    adapted = [name for name in before if name.endswith("c_attn.weight")]
    deltas: list[dict[str, torch.Tensor]] = []
    for tune in tunes:
        factors = {n: f.double() for n, f in load_file(tune / "adapter_model.safetensors").items()}
        paths = {name: f"base_model.model.{name.removesuffix('.weight')}" for name in adapted}
        deltas.append({n: 2 * factors[f"{p}.lora_B.weight"] @ factors[f"{p}.lora_A.weight"] for n, p in paths.items()})
    expected = merge_model(method, {name: torch.zeros_like(d) for name, d in deltas[0].items()}, deltas)
    for name, value in before.items():
        if name not in adapted:
            assert torch.equal(merged[name], value), name
            continue
        found = merged[name].T.double() - value.T.double()
        assert float((found - expected[name]).norm()) <= 1e-4 * float(expected[name].norm()), name
        assert int((torch.linalg.svdvals(found) > 1e-4 * torch.linalg.svdvals(found)[0]).sum()) <= sum(ranks)


def test_awd_says_that_it_finds_no_layers(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        save_file({"encoder.weight": torch.randn(6, 4, generator=rng)}, tmp_path / name / "model.safetensors")
    models = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(PlanError, match="no tensor's name has a layer's number"):
        hubmerge.merge(hubmerge.Recipe.from_flags("awd", str(tmp_path / "base"), models), tmp_path / "out")
    hubmerge.merge(hubmerge.Recipe.from_flags("awd", str(tmp_path / "base"), models, ["rest=mean"]), tmp_path / "out")
