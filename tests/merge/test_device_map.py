"""Whole merges with some layers on other devices: the same result, computed where the map says, whatever goes wrong."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from huggingface_hub import snapshot_download
from safetensors.torch import save_file

import hubmerge
from hubmerge import devices
from hubmerge.api import RunOptions
from hubmerge.devices import DeviceMap, Lane
from hubmerge.errors import IntegrityError
from hubmerge.localhub import LocalHub
from hubmerge.methods import all_methods, get_method
from hubmerge.spec import Plan, TensorGroup
from tests.elsewhere import far_lane
from tests.merge.models import _gpt2, _llama, _near, _save, _store, build, stored
from tests.merge.test_adapters import make_adapter

MATRIX = [m.name for m in all_methods() if m.unit == "matrix"]
Spread = Callable[[Sequence[Lane]], list[DeviceMap]]
Seen = Callable[[str], dict[str, set[str]]]


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> Spread:
    """Make merges use these lanes; returns the list that their maps are added to."""

    def use(lanes: Sequence[Lane]) -> list[DeviceMap]:
        made: list[DeviceMap] = []

        def device_map(plan: Plan, *_: object) -> DeviceMap:
            made.append(devices.assign(plan, lanes))
            return made[-1]

        monkeypatch.setattr("hubmerge.running.device_map", device_map)
        return made

    return use


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Note which threads call a method for which tensor."""

    def watch(method: str) -> dict[str, set[str]]:
        chosen, found = get_method(method), defaultdict[str, set[str]](set)
        observe, merge = chosen.observe, chosen.merge

        def note(group: TensorGroup) -> None:
            found[group.name].add(threading.current_thread().name.removeprefix("merge ").rpartition(" ")[0])

        monkeypatch.setattr(type(chosen), "observe", lambda self, group, *rest: (note(group), observe(group, *rest))[1])
        monkeypatch.setattr(type(chosen), "merge", lambda self, group, *rest: (note(group), merge(group, *rest))[1])
        return found

    return watch


def merge(method: str, root: Path, out: str, *params: str, **options: Any) -> dict[str, torch.Tensor]:
    models = sorted(str(folder) for folder in root.glob("task*"))
    recipe = hubmerge.Recipe.from_flags(method, str(root / "base"), models, list(params), **options)
    hubmerge.merge(recipe, root / out, options=RunOptions(workers=2))
    return stored(root / out)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name].double() - value.double()).norm()) <= 1e-6 * float(value.double().norm()), name


@pytest.mark.parametrize("method", MATRIX)
def test_layers_on_two_devices_give_the_same_model(
    method: str, tmp_path: Path, spread: Spread, seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    build("llama-untied", tmp_path)
    expected = merge(method, tmp_path, "here")
    made = spread([far_lane("a"), far_lane("b")])
    threads = seen(method)
    with caplog.at_level(logging.WARNING, "hubmerge"):
        same(merge(method, tmp_path, "there"), expected)
    assert not [r for r in caplog.records if r.name.startswith("hubmerge")]  # nothing was refused
    assert len(made) == 1
    for name, lanes in threads.items():
        if "proj" in name:
            assert lanes == {"a" if ".layers.0." in name else "b"}, name
        else:
            assert lanes == {"cpu"}, name
    assert sum("proj" in name for name in threads) == 14


@pytest.mark.parametrize(
    ("method", "params"), [("tsv_merge", ("include_embeddings=true",)), ("awd", ("solver=adam", "steps=5"))]
)
def test_what_else_is_worth_a_device(
    method: str, params: tuple[str, ...], tmp_path: Path, spread: Spread, seen: Seen
) -> None:
    build("llama-untied", tmp_path)
    expected = merge(method, tmp_path, "here", *params)
    spread([far_lane("a")])
    threads = seen(method)
    same(merge(method, tmp_path, "there", *params), expected)
    assert threads["model.embed_tokens.weight"] == ({"a"} if method == "tsv_merge" else {"cpu"})
    assert threads["model.layers.1.mlp.up_proj.weight"] == {"a"}


def test_weights_that_are_stored_transposed(tmp_path: Path, spread: Spread, seen: Seen) -> None:
    build("gpt2", tmp_path)
    expected = merge("iso_cts", tmp_path, "here")
    spread([far_lane("a"), far_lane("b")])
    threads = seen("iso_cts")
    same(merge("iso_cts", tmp_path, "there"), expected)
    assert {lane for name, lanes in threads.items() if "c_fc.weight" in name for lane in lanes} == {"a", "b"}


def test_float64_and_models_that_lack_a_tensor(tmp_path: Path, spread: Spread) -> None:
    torch.manual_seed(0)
    names = {"layers.0.w": (9, 7), "layers.1.w": (9, 7), "pooler.w": (7, 7)}
    base = {n: torch.randn(s, dtype=torch.float64) for n, s in names.items()}
    _store(base, tmp_path / "base", {"model_type": "homemade"})
    for i in range(2):
        tuned = {n: v + 0.1 * torch.randn_like(v) for n, v in base.items() if i or n != "pooler.w"}
        _store(tuned, tmp_path / f"task{i}", {"model_type": "homemade"})
    expected = merge("drm", tmp_path, "here")
    spread([far_lane("a"), far_lane("b")])
    found = merge("drm", tmp_path, "there")
    same(found, expected)
    assert {v.dtype for v in found.values()} == {torch.float64}


ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"]),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "down_proj"]),
}


@pytest.fixture
def adapters(tmp_path: Path) -> Callable[[Sequence[str]], Path]:
    """A base with these adapters, and full checkpoints where it says so."""

    def make(kinds: Sequence[str]) -> Path:
        torch.manual_seed(0)
        base = tf.LlamaForCausalLM(_llama())
        _save(base, tmp_path / "base")
        for i, kind in enumerate(kinds):
            if kind == "full":
                full = tf.LlamaForCausalLM(_llama())
                _near(full, base.state_dict())
                _save(full, tmp_path / f"task{i}")
            else:
                fresh = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
                make_adapter(ADAPTERS[kind](), fresh, tmp_path / f"task{i}", seed=i + 1)
        return tmp_path

    return make


@pytest.mark.parametrize("kinds", [("lora", "lora"), ("lora", "dora"), ("lora", "full", "dora")], ids="-".join)
@pytest.mark.parametrize("method", ["tsv_merge", "knots"])
def test_adapters(
    method: str,
    kinds: tuple[str, ...],
    adapters: Callable[[Sequence[str]], Path],
    spread: Spread,
    seen: Seen,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = adapters(kinds)
    expected = merge(method, root, "here")
    spread([far_lane("a"), far_lane("b")])
    threads = seen(method)
    with caplog.at_level(logging.WARNING, "hubmerge"):
        same(merge(method, root, "there"), expected)
    assert not [r for r in caplog.records if r.name.startswith("hubmerge")]
    assert {lane for name, lanes in threads.items() if "q_proj" in name for lane in lanes} == {"a", "b"}


def test_a_merged_adapter(adapters: Callable[[Sequence[str]], Path], spread: Spread, seen: Seen) -> None:
    root = adapters(("lora", "lora"))
    output = {"format": "adapter", "rank": 4}
    expected = merge("tsv_merge", root, "here", output=output)
    spread([far_lane("a"), far_lane("b")])
    threads = seen("tsv_merge")
    found = merge("tsv_merge", root, "there", output=output)
    assert {lane for lanes in threads.values() for lane in lanes} == {"a", "b"}
    paths = {name.rpartition(".lora_")[0] for name in expected}
    for path in paths:  # factors are unique up to a rotation only
        products = [
            m[f"{path}.lora_B.weight"].double() @ m[f"{path}.lora_A.weight"].double() for m in (found, expected)
        ]
        torch.testing.assert_close(products[0], products[1], rtol=1e-5, atol=1e-7, msg=path)


# --- what goes wrong --------------------------------------------------------------------------------------------


def test_a_device_that_runs_out_of_memory_once(
    tmp_path: Path, spread: Spread, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build("llama-untied", tmp_path)
    expected = merge("tsv_merge", tmp_path, "here")
    spread([far_lane("a"), far_lane("b")])
    full, kinds, real = "model.layers.1.mlp.up_proj.weight", [], get_method("tsv_merge").merge

    def merged(self: Any, group: TensorGroup, *args: Any) -> Any:
        if group.name == full:
            kinds.append(group.base().device.type)
            if len(kinds) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(group, *args)

    monkeypatch.setattr(type(get_method("tsv_merge")), "merge", merged)
    with caplog.at_level(logging.WARNING, "hubmerge"):
        same(merge("tsv_merge", tmp_path, "there"), expected)
    assert kinds == ["meta", "cpu"]
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("hubmerge")]
    assert message == f"{full} is computed on the CPU, not on b: CUDA out of memory. Tried to allocate 2.00 GiB."


def test_a_damaged_checkpoint_is_named(tmp_path: Path, spread: Spread) -> None:
    _, tunes = build("llama-untied", tmp_path)
    tensors = {n: t.clone() for n, t in stored(tunes[1]).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, tunes[1] / "model.safetensors", metadata={"format": "pt"})
    spread([far_lane("a"), far_lane("b")])
    with pytest.raises(IntegrityError, match=rf"{name}.*task1 holds NaN or infinity \(element 100"):
        merge("tsv_merge", tmp_path, "there")
    assert not (tmp_path / "there").exists()


def test_what_fits_no_device_is_computed_here(tmp_path: Path, spread: Spread, seen: Seen) -> None:
    build("llama-untied", tmp_path)
    expected = merge("tsv_merge", tmp_path, "here")
    made = spread([far_lane("a", memory_bytes=32 * 32 * 150)])  # the attention's matrices fit, the others do not
    threads = seen("tsv_merge")
    same(merge("tsv_merge", tmp_path, "there"), expected)
    assert "6 of the matrices are computed on the CPU" in made[0].notes[0]
    for name, lanes in threads.items():
        assert lanes == ({"a"} if "self_attn" in name else {"cpu"}), name


@pytest.mark.timeout(60)
def test_a_push_with_one_file_at_a_time_goes_through(tmp_path: Path, hub: LocalHub, spread: Spread) -> None:
    """Devices that wait for room for a later file must not keep an earlier one from being finished."""
    torch.manual_seed(0)
    for name in ("base", "task0", "task1"):
        _save(tf.GPT2LMHeadModel(_gpt2()), tmp_path / name)
    expected = merge("tsv_merge", tmp_path, "here")
    spread([far_lane("a"), far_lane("b"), far_lane("c")])
    models = [str(tmp_path / f"task{i}") for i in range(2)]
    for size in ("15KB", "40KB"):
        recipe = hubmerge.Recipe.from_flags(
            "tsv_merge", str(tmp_path / "base"), models, [], output={"shard_size": size}
        )
        result = hubmerge.push(recipe, f"local/merged-{size}", options=RunOptions(workers=2))
        assert sum(f.path.endswith(".safetensors") for f in result.files) > 3
        found = snapshot_download(f"local/merged-{size}", local_dir=tmp_path / size)
        same(stored(Path(found)), expected)
