"""Diagnostics of real merges: figures as a naive computation finds them in the files, and not a merged byte changed."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import hubmerge
from hubmerge import api
from hubmerge.analysis import Diagnostics
from hubmerge.devices import device_map
from hubmerge.errors import UsageError
from hubmerge.measuring import Meter
from hubmerge.ranking import GRAIN
from hubmerge.recipe import Recipe
from hubmerge.tuning import Tuning, footprint_of, tuned
from tests.end_to_end.support import SHAPES, folder_state, save, tensors
from tests.naive_figures import naive_figures, naive_spectra

BIG = {**SHAPES, "model.embed_tokens.weight": (5000, 40), "model.layers.0.mlp.up_proj.weight": (300, 280)}
LINEAR = {n for n in SHAPES if "_proj" in n}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2Model"]}


def recipe(method: str, folder: Path, models: list[str], **keys: Any) -> Recipe:
    entries = [str(folder / name) for name in models]
    return Recipe.from_data({"method": method, "base": str(folder / "base"), "models": entries} | keys)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes: one leaves a tensor as it is, one is in bfloat16."""
    root = tmp_path_factory.mktemp("full")
    for seed, name in enumerate(("base", "a", "b", "c")):
        made = tensors(seed, BIG)
        if name == "b":
            made["model.layers.1.mlp.up_proj.weight"] = tensors(0, BIG)["model.layers.1.mlp.up_proj.weight"]
        if name == "c":
            made = {n: t.bfloat16() for n, t in made.items()}
        save(root / name, made)
    return root


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 whose weights are stored [in, out], and two adapters of it with other ranks and scales."""
    root = tmp_path_factory.mktemp("lora")
    shapes = {f"h.{i}.attn.c_attn.weight": (40, 120) for i in range(2)} | {"wte.weight": (30, 40)}
    save(root / "base", tensors(0, shapes), config=GPT2)
    for seed, (name, rank) in enumerate({"x": 2, "y": 5}.items(), start=1):
        made = {}
        for i in range(2):
            module, generator = f"base_model.model.h.{i}.attn.c_attn", torch.Generator().manual_seed(10 * seed + i)
            made[f"{module}.lora_A.weight"] = torch.randn((rank, 40), generator=generator)
            made[f"{module}.lora_B.weight"] = torch.randn((120, rank), generator=generator)
        (root / name).mkdir()
        save_file(made, root / name / "adapter_model.safetensors", metadata={"format": "pt"})
        described = {
            "peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True,
            "base_model_name_or_path": str(root / "base"),
        }  # fmt: skip
        (root / name / "adapter_config.json").write_text(json.dumps(described))
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def lora_deltas(folder: Path, module: str) -> torch.Tensor:
    """An adapter's delta (out, in), in float64."""
    made = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    prefix = f"base_model.model.{module}.lora_"
    alpha = config["lora_alpha"] / config["r"]
    return alpha * made[f"{prefix}B.weight"].double() @ made[f"{prefix}A.weight"].double()


def assert_equal(found: Any, naive: dict[str, Any], names: tuple[str, ...] | None = None) -> None:
    for name in names or tuple(naive):
        np.testing.assert_allclose(getattr(found, name), naive[name], rtol=1e-6, atol=1e-6, err_msg=name)


def merged(asked: Recipe, out: Path, **options: Any) -> Diagnostics:
    """Merge with diagnostics, and analyse: the same figures."""
    api.merge(asked, out, options=api.RunOptions(**options), diagnostics=True)
    found = api.analyze(asked, options=api.RunOptions(**options))
    assert json.loads((out / "diagnostics.json").read_text()) == json.loads(json.dumps(found.to_json()))
    return found


# --- the figures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv_merge"])
def test_full_models(method: str, full: Path, tmp_path: Path) -> None:
    found = merged(recipe(method, full, ["a", "b", "c"], dtype="bfloat16"), tmp_path / "out", workers=2)
    base, result = weights(full / "base"), weights(tmp_path / "out")
    models = [weights(full / name) for name in ("a", "b", "c")]
    assert [t.name for t in found.tensors] == sorted(BIG)
    everything: list[list[torch.Tensor]] = [[] for _ in range(5)]
    for tensor in found.tensors:
        deltas = [(m[tensor.name].double() - base[tensor.name].double()).view(-1) for m in models]
        merge = (result[tensor.name].double() - base[tensor.name].double()).view(-1)
        parts = [*deltas, merge, base[tensor.name].double().view(-1)]
        assert_equal(tensor.relations, naive_figures(deltas, merge, parts[-1]))
        for whole, part in zip(everything, parts, strict=True):
            whole.append(part)
        assert (tensor.spectra is not None) == (tensor.name in LINEAR)
        if tensor.spectra is not None and all(bool(d.any()) for d in deltas):
            naive = naive_spectra([d.view(base[tensor.name].shape) for d in deltas])
            assert_equal(tensor.spectra, naive)
    *deltas, merge, held = (torch.cat(parts) for parts in everything)
    assert_equal(found.model, naive_figures(deltas, merge, held))


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv_merge"])
def test_adapters_merged_into_a_full_model(method: str, lora: Path, tmp_path: Path) -> None:
    found = merged(recipe(method, lora, ["x", "y"]), tmp_path / "out")
    base, result = weights(lora / "base"), weights(tmp_path / "out")
    assert [t.name for t in found.tensors] == [f"h.{i}.attn.c_attn.weight" for i in range(2)]
    for tensor in found.tensors:
        deltas = [lora_deltas(lora / name, tensor.name.removesuffix(".weight")) for name in ("x", "y")]
        merge = result[tensor.name].double() - base[tensor.name].double()
        flat = [d.T.reshape(-1) for d in deltas]
        assert_equal(tensor.relations, naive_figures(flat, merge.view(-1), base[tensor.name].view(-1)))
        assert_equal(tensor.spectra, naive_spectra(deltas))


@pytest.mark.parametrize("method", ["task_arithmetic", "drm"])
def test_a_merged_adapter(method: str, lora: Path, tmp_path: Path) -> None:
    found = merged(recipe(method, lora, ["x", "y"], output={"format": "adapter", "rank": 6}), tmp_path / "out")
    for tensor in found.tensors:
        module = tensor.name.removesuffix(".weight")
        deltas = [lora_deltas(lora / name, module).reshape(-1) for name in ("x", "y")]
        merge = lora_deltas(tmp_path / "out", module).reshape(-1)
        naive = naive_figures(deltas, merge, torch.zeros(1))
        assert_equal(tensor.relations, naive)
        assert tensor.spectra is not None
        assert tensor.spectra.energy[1][-1] == 1.0
    assert found.summary[0].length != found.summary[0].length  # there is no base to compare with


def test_rows_that_not_all_have(tmp_path: Path) -> None:
    more = {**SHAPES, "model.embed_tokens.weight": (14, 8)}
    for seed, (name, shapes) in enumerate({"base": SHAPES, "a": SHAPES, "b": more}.items()):
        save(tmp_path / name, tensors(seed, shapes))
    asked = recipe("task_arithmetic", tmp_path, ["a", "b"], vocab="union")
    found = merged(asked, tmp_path / "out")
    embeddings = next(t for t in found.tensors if "embed" in t.name)
    base, models = weights(tmp_path / "base"), [weights(tmp_path / n) for n in ("a", "b")]
    rows = [m[embeddings.name][:12] - base[embeddings.name] for m in models]
    assert embeddings.shape == (12, 8)
    assert_equal(embeddings.relations, naive_figures([r.reshape(-1) for r in rows], torch.zeros(96), torch.zeros(96)),
                 ("norms", "cosines", "sign_agreement"))  # fmt: skip


# --- nothing else changes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ties", "dare_linear", "tsv_merge"])
def test_no_merged_byte_changes(method: str, full: Path, tmp_path: Path) -> None:
    asked = recipe(method, full, ["a", "b", "c"], output={"shard_size": "100KB"}, **_parameters(method))
    hubmerge.merge(asked, tmp_path / "plain")
    hubmerge.merge(asked, tmp_path / "measured", diagnostics=True)
    plain, measured = folder_state(tmp_path / "plain"), folder_state(tmp_path / "measured")
    assert plain is not None
    assert measured is not None
    extra = {"diagnostics.json", "assets/cosines.svg", "assets/interference.svg", "assets/spectrum.svg"}
    assert set(measured) - set(plain) == extra
    assert {n for n in plain if plain[n] != measured[n]} == {"README.md", "hubmerge.lock.json"}


def _parameters(method: str) -> dict[str, Any]:
    return {"parameters": {"density": 0.5}} if method == "dare_linear" else {}


def test_workers_and_chunks_do_not_matter(full: Path, tmp_path: Path) -> None:
    asked = recipe("ties", full, ["a", "b", "c"])
    files = []
    for i, options in enumerate(({"workers": 1, "chunk_elements": 32768}, {"workers": 3}, {"fetch": "stream"})):
        api.merge(asked, tmp_path / str(i), options=api.RunOptions(**options), diagnostics=True)
        files.append(folder_state(tmp_path / str(i)))
    assert files[0] == files[1] == files[2]


def test_a_continued_run_has_the_figures_of_all_tensors(full: Path, tmp_path: Path) -> None:
    asked = recipe("ties", full, ["a", "b", "c"], output={"shard_size": "100KB"})
    hubmerge.merge(asked, tmp_path / "whole", diagnostics=True)

    def interrupt(p: Any) -> None:
        if p.finished:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.merge(asked, tmp_path / "out", options=api.RunOptions(workers=1), diagnostics=True, progress=interrupt)
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.hubmerge-*.journal"))
    hubmerge.merge(asked, tmp_path / "out", diagnostics=True)
    assert folder_state(tmp_path / "out") == folder_state(tmp_path / "whole")


# --- what is asked for ------------------------------------------------------------------------------------------


def test_spectra_of_none_and_of_all(full: Path) -> None:
    asked = recipe("ties", full, ["a", "b", "c"])
    none, every = (api.analyze(asked, sampling=s) for s in ("none", "all"))
    assert not none.decomposed
    assert {t.name for t in every.decomposed} == LINEAR
    assert none.matrices == every.matrices == len(LINEAR)
    np.testing.assert_array_equal(none.model.gram, every.model.gram)


def test_little_memory_leaves_out_large_weights(full: Path) -> None:
    asked = recipe("ties", full, ["a", "b", "c"])
    found = api.analyze(asked, options=api.RunOptions(max_memory_bytes=500_000_000))
    assert len(found.decomposed) == len(LINEAR)
    meter = Meter(hubmerge.plan(asked))
    meter.set_room(4_000_000)
    assert {job.name for job in meter.spectral} == LINEAR - {"model.layers.0.mlp.up_proj.weight"}
    assert 0 < meter.memory_bytes <= 4_000_000


@pytest.mark.parametrize("beside_bytes", [0, 1_000_000, 3_000_000, 40_000_000])
def test_merging_and_measuring_share_the_memory(full: Path, beside_bytes: int) -> None:
    """What merging can do without is there for diagnostics, which never make it impossible."""
    planned = hubmerge.plan(recipe("ties", full, ["a", "b", "c"]))
    devices, meter = device_map(planned, "cpu"), Meter(planned)

    def needed(tuning: Tuning) -> int:
        return footprint_of(planned, tuning, devices, remote=True).memory_bytes

    least = needed(Tuning(1, GRAIN, 4 * GRAIN))
    found = tuned(planned, devices, remote=True, max_memory_bytes=least + beside_bytes, diagnostics=meter)
    assert meter.memory_bytes <= beside_bytes
    assert needed(found) + meter.memory_bytes <= least + beside_bytes
    assert (meter.memory_bytes > 0) == (beside_bytes > 0)


def test_a_merge_without_a_base_is_refused(full: Path, tmp_path: Path) -> None:
    asked = Recipe.from_data({"method": "linear", "models": [str(full / "a"), str(full / "b")]})
    for run in (lambda: api.analyze(asked), lambda: api.merge(asked, tmp_path / "out", diagnostics=True)):
        with pytest.raises(UsageError, match="without a base"):
            run()
    assert not (tmp_path / "out").exists()


def test_one_model_alone(full: Path) -> None:
    found = api.analyze(recipe("task_arithmetic", full, ["a"], parameters={"scale": 1.0}))
    assert found.summary[0].distance == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(found.summary[0].cosine)
    assert found.to_json()["pairs"] == []
    assert all(t.spectra is not None and t.spectra.interference == 0.0 for t in found.decomposed)


def test_pairs_stand_in_the_recipes_order(full: Path) -> None:
    said = api.analyze(recipe("ties", full, ["c", "a", "b"]), sampling="none").to_json()
    assert said["tasks"] == ["c", "a", "b"]
    assert said["pairs"] == [list(pair) for pair in combinations(["c", "a", "b"], 2)]
