"""Architectures that transformers stores under other names than it runs with: adapters name what runs, checkpoints may
store either, and all of them are merged."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import hubmerge
from hubmerge.adapters import naming_of
from hubmerge.errors import SourceError, UnsupportedAdapterError
from tests.merge.models import _TEXT, _clip, _gpt2, _llama, _mixtral, _near, _save, _vit, stored
from tests.merge.test_adapters import make_adapter, merge

# Whether a checkpoint has the names of transformers 4, which save_pretrained writes, or those of the running model.
ORIGINAL = pytest.mark.parametrize("original", [True, False], ids=["original", "running"])


def _dinov2() -> Any:
    return tf.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8, use_swiglu_ffn=True
    )


def _swin() -> Any:
    return tf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)


def _llava() -> Any:
    return tf.LlavaConfig(vision_config=_clip(), text_config=_llama(), image_token_index=90)


# Model class, its config, an adapter, and a name that the two formats have different.
Case = tuple[Any, Callable[[], Any], Callable[[], Any], str]
CASES: dict[str, Case] = {
    "vit": (
        tf.ViTForImageClassification,
        _vit,
        lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "fc1"]),
        "vit.encoder.layer.0.attention.attention.query.weight",
    ),
    "vit-dora": (
        tf.ViTForImageClassification,
        _vit,
        lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "fc1"]),
        "vit.encoder.layer.0.intermediate.dense.weight",
    ),
    "vit-patterns-and-biases": (
        tf.ViTForImageClassification,
        _vit,
        lambda: peft.LoraConfig(
            r=4, bias="all", target_modules=["q_proj", "o_proj"], rank_pattern={r"layers\.1\.attention\.q_proj": 2},
            alpha_pattern={"o_proj": 3},
        ),
        "vit.encoder.layer.1.attention.attention.query.bias",
    ),
    "vit-ia3": (
        tf.ViTForImageClassification,
        _vit,
        lambda: peft.IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
        "vit.encoder.layer.0.attention.attention.key.weight",
    ),
    "swin": (
        tf.SwinForImageClassification,
        _swin,
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "fc2"]),
        "swin.encoder.layers.0.blocks.0.attention.self.query.weight",
    ),
    "llava": (
        tf.LlavaForConditionalGeneration,
        _llava,
        lambda: peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj|.*vision_tower.*\.fc1"),
        "language_model.model.layers.0.self_attn.q_proj.weight",
    ),
    "gpt-neox-output": (
        tf.GPTNeoXForCausalLM,
        lambda: tf.GPTNeoXConfig(**_TEXT),
        lambda: peft.LoraConfig(r=2, target_modules=["query_key_value"], modules_to_save=["lm_head"]),
        "embed_out.weight",
    ),
}  # fmt: skip


def reference(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """PEFT's own merge, saved by transformers in the format the model was loaded from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    _save(merged, folder)
    return stored(folder)


@ORIGINAL
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_merged_as_peft_does_whatever_names_the_base_has(
    case: str, original: bool, tmp_path: Path
) -> None:
    cls, config, adapter, renamed = CASES[case]
    torch.manual_seed(0)
    _save(cls(config()), tmp_path / "base", save_original_format=original)
    base = stored(tmp_path / "base")
    assert (renamed in base) == original
    model = make_adapter(adapter(), cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    expected = reference(model, tmp_path / "reference")
    found = merge("task_arithmetic", tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", "scale=1.0")
    assert found.keys() == base.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    if original:
        assert not torch.equal(found[renamed], base[renamed])


@ORIGINAL
def test_an_adapter_of_a_task_model_on_a_base_without_head(original: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    _save(tf.ViTModel(_vit(), add_pooling_layer=False), tmp_path / "base", save_original_format=original)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = tf.ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"])
    model = make_adapter(config, task, tmp_path / "adapter")
    expected = reference(model, tmp_path / "reference")
    found = merge("task_arithmetic", tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", "scale=1.0")
    assert found.keys() == stored(tmp_path / "base").keys()
    for name, value in found.items():
        assert torch.equal(value, expected[f"vit.{name}"]), name
    head = load_file(tmp_path / "out" / "heads" / "adapter.safetensors")
    assert torch.equal(head["classifier.weight"], expected["classifier.weight"])


def test_an_adapter_with_the_names_of_transformers_4_on_a_base_with_those_of_5(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _save(tf.ViTForImageClassification(_vit()), tmp_path / "base", save_original_format=False)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    make_adapter(config, tf.ViTForImageClassification.from_pretrained(tmp_path / "base"), tmp_path / "new")
    (tmp_path / "old").mkdir()
    new = {"layers.": "encoder.layer.", "attention.q_proj": "attention.attention.query"}
    tensors = load_file(tmp_path / "new" / "adapter_model.safetensors")
    for now, before in new.items():
        tensors = {name.replace(now, before): value for name, value in tensors.items()}
    save_file(tensors, tmp_path / "old" / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["query"]}))
    results = [merge("linear", tmp_path / "base", [tmp_path / n], tmp_path / f"out-{n}") for n in ("new", "old")]
    assert any(not torch.equal(value, stored(tmp_path / "base")[name]) for name, value in results[0].items())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@ORIGINAL
@pytest.mark.parametrize("case", ["vit", "llava", "gpt-neox-output"])
def test_a_fine_tune_in_the_other_format_is_merged_the_same(case: str, original: bool, tmp_path: Path) -> None:
    cls, config, _, renamed = CASES[case]
    torch.manual_seed(0)
    base, tuned = cls(config()), cls(config())
    _near(tuned, base.state_dict())
    _save(base, tmp_path / "base", save_original_format=original)
    _save(tuned, tmp_path / "same", save_original_format=original)
    _save(tuned, tmp_path / "other", save_original_format=not original)
    assert (renamed in stored(tmp_path / "other")) != original
    expected = merge("ties", tmp_path / "base", [tmp_path / "same"], tmp_path / "out-same")
    found = merge("ties", tmp_path / "base", [tmp_path / "other"], tmp_path / "out-other")
    assert expected.keys() == found.keys() == stored(tmp_path / "base").keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@ORIGINAL
def test_a_head_of_a_fine_tune_in_the_other_format_is_kept(original: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tf.ViTModel(_vit(), add_pooling_layer=False)
    tuned = tf.ViTForImageClassification(_vit(num_labels=3))
    _near(tuned, base.state_dict())
    _save(base, tmp_path / "base", save_original_format=original)
    _save(tuned, tmp_path / "tuned", save_original_format=not original)
    found = merge("linear", tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out")
    _save(tuned, tmp_path / "same", save_original_format=original)
    for name, value in stored(tmp_path / "same").items():
        if name.startswith("vit."):
            assert torch.equal(found[name.removeprefix("vit.")], value), name
    head = load_file(tmp_path / "out" / "heads" / "tuned.safetensors")
    assert torch.equal(head["classifier.weight"], tuned.classifier.weight)


def test_the_plan_says_that_names_were_mapped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _save(tf.ViTForImageClassification(_vit()), tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    make_adapter(config, tf.ViTForImageClassification.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    plan = hubmerge.plan(hubmerge.Recipe.from_flags("linear", str(tmp_path / "base"), [str(tmp_path / "adapter")], []))
    notes = [problem.message for problem in plan.problems if problem.severity == "note"]
    assert any(
        "'vit.layers.0.attention.q_proj.weight' is 'vit.encoder.layer.0.attention.attention.query.weight' in the base"
        in note
        for note in notes
    ), notes


@ORIGINAL
def test_experts_stored_apart_in_one_checkpoint_and_together_in_the_other_are_refused(
    original: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    _save(tf.MixtralForCausalLM(_mixtral()), tmp_path / "base", save_original_format=original)
    _save(tf.MixtralForCausalLM(_mixtral()), tmp_path / "tuned", save_original_format=not original)
    with pytest.raises(SourceError, match=r"experts.*is stored in another form than in the base"):
        merge("linear", tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out")


def test_an_adapter_on_a_part_of_a_stored_tensor_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "gate_proj"])
    _save(tf.Dinov2Model(_dinov2()), tmp_path / "base")
    _save(tf.Dinov2Model.from_pretrained(tmp_path / "base"), tmp_path / "running", save_original_format=False)
    model = make_adapter(config, tf.Dinov2Model.from_pretrained(tmp_path / "running"), tmp_path / "adapter")
    with pytest.raises(
        UnsupportedAdapterError, match=r"'encoder.layer.0.mlp.gate_proj.weight', which the base .* in another form"
    ) as found:
        merge("task_arithmetic", tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert "save_original_format=False" in found.value.hint
    expected = reference(model, tmp_path / "reference")
    merged = merge("task_arithmetic", tmp_path / "running", [tmp_path / "adapter"], tmp_path / "out", "scale=1.0")
    for name in expected:
        assert torch.equal(merged[name], expected[name]), name


def test_names_that_agree_cost_no_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _save(tf.GPT2LMHeadModel(_gpt2()), tmp_path / "base")
    task = tf.GPT2ForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["score"])
    _save(task, tmp_path / "full")
    make_adapter(config, task, tmp_path / "adapter")
    code = (
        "import sys, hubmerge\n"
        "base, *models = sys.argv[1:]\n"
        "plan = hubmerge.plan(hubmerge.Recipe.from_flags('linear', base, models, []))\n"
        "assert not [p for p in plan.problems if p.severity == 'error'], plan.problems\n"
        "print([m for m in ('transformers', 'peft') if m in sys.modules])"
    )
    folders = [str(tmp_path / name) for name in ("base", "adapter", "full")]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": ["system"], "model_type": "homemade"},
        {"architectures": ["pipeline"], "auto_map": {"AutoModel": "org/repo--modeling.Model"}, "model_type": "x"},
        {"architectures": [3], "model_type": ["vit"]},
        {"architectures": "ViTModel"},
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 10**9},
        {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"num_hidden_layers": 10**9}},
        {"architectures": ["TimmWrapperModel"], "model_type": "timm_wrapper", "architecture": "hf-hub:org/repo"},
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": "wide"},
    ],
)
def test_strange_configs_give_no_names_and_fetch_nothing(
    config: dict[str, Any], connections: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    assert naming_of(config) is None
    assert connections == []
    assert capfd.readouterr() == ("", "")


def test_kernels_and_code_named_in_a_config_are_not_fetched(
    connections: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    config = _vit().to_dict() | {
        "architectures": ["ViTModel"], "attn_implementation": "org/kernel", "_attn_implementation": "org/kernel",
        "auto_map": {"AutoModel": "org/repo--modeling.Model"},
    }  # fmt: skip
    found = naming_of(config)
    assert found is not None
    assert found.running(["encoder.layer.0.output.dense.bias"]) == {
        "encoder.layer.0.output.dense.bias": "layers.0.mlp.fc2.bias"
    }
    assert connections == []
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every connection somebody asks for; none is made."""
    asked: list[Any] = []

    def refuse(_: socket.socket, address: Any) -> None:
        asked.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked
