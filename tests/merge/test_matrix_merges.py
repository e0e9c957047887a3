"""Whole models merged by matrix methods: the engine against a loop over tensors, also where weights are stored
transposed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import hubmerge
from hubmerge.errors import IntegrityError
from hubmerge.memory import merge_tensors
from hubmerge.methods import all_methods
from hubmerge.spec import Kind
from tests.merge import naive
from tests.merge.models import FAMILIES, build, stored

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
def test_merge_equals_a_loop_over_tensors(method: str, family: str, tmp_path: Path) -> None:
    base, tunes = build(family, tmp_path)
    models = [f"{t}:{w}" for t, w in zip(tunes, WEIGHTS, strict=True)]
    hubmerge.merge(hubmerge.Recipe.from_flags(method, str(base), models), tmp_path / "out")
    known = kinds(FAMILIES[family].base())
    assert any(transposed for _, transposed in known.values()) == (family == "gpt2")

    before, merged = stored(base), stored(tmp_path / "out")
    aligned = [naive.align(before, stored(t)) for t in tunes]
    assert merged.keys() == before.keys()
    for name, value in before.items():
        kind, transposed = known.get(name, ("vector", False))
        versions = [value, *(m[name] for m in aligned)]
        if transposed:
            versions = [v.T.contiguous() for v in versions]
        expected = merge_tensors(method, versions[0], versions[1:], weights=WEIGHTS, kind=kind)
        torch.testing.assert_close(merged[name], expected.T if transposed else expected, rtol=1e-5, atol=1e-5, msg=name)
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
