"""Adapters through the whole pipeline: one adapter with weight 1 is what PEFT's own merge gives; mixed inputs agree
with a naive loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

import hubmerge
from hubmerge.errors import HubMergeError
from tests.merge.models import _gpt2, _llama, _near, _save, stored

ATTENTION = ["q_proj", "v_proj"]
MLP = ["gate_proj", "down_proj"]
# Kinds of adapter, with what makes each take another path.
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION),
    "rslora": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=ATTENTION),
    "patterns": lambda: peft.LoraConfig(
        r=4, target_modules=ATTENTION + MLP, rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 3}
    ),
    "modules_to_save": lambda: peft.LoraConfig(r=2, target_modules=ATTENTION, modules_to_save=["lm_head"]),
    "embeddings": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=ATTENTION),
    "pissa": lambda: peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=ATTENTION),
    "olora": lambda: peft.LoraConfig(r=2, init_lora_weights="olora", target_modules=ATTENTION),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=ATTENTION),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=ATTENTION),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=ATTENTION),
    "boft": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=["q_proj", "o_proj"]),
}


def make_adapter(config: Any, base: Any, folder: Path, seed: int = 1) -> Any:
    """Wrap, move every trainable parameter off its initial value, save; returns the wrapped model."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value.add_(0.05 * torch.randn_like(value))
        model.save_pretrained(folder)
    return model


def merge(method: str, base: Path, models: list[Path], out: Path, *params: str) -> dict[str, torch.Tensor]:
    hubmerge.merge(hubmerge.Recipe.from_flags(method, str(base), [str(m) for m in models], list(params)), out)
    return stored(out)


def reload(folder: Path) -> Any:
    return tf.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_with_weight_1_is_pefts_own_merge_bit_for_bit(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    _save(tf.LlamaForCausalLM(_llama()), tmp_path / "base")
    make_adapter(KINDS[kind](), reload(tmp_path / "base"), tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = (
            peft.PeftModel.from_pretrained(reload(tmp_path / "base"), tmp_path / "adapter")
            .merge_and_unload()
            .state_dict()
        )
    found = merge("task_arithmetic", tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", "scale=1.0")
    base = stored(tmp_path / "base")
    assert found.keys() == base.keys()
    changed = [n for n in base if not torch.equal(found[n], base[n])]
    assert changed
    for name in base:
        assert torch.equal(found[name], reference[name]), name


def test_conv1d_base_and_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _save(tf.GPT2LMHeadModel(_gpt2()), tmp_path / "base")
    task = tf.GPT2ForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["score"], task_type="SEQ_CLS"
    )
    model = make_adapter(config, task, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = model.merge_and_unload().state_dict()
    found = merge("task_arithmetic", tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", "scale=1.0")
    for name, value in found.items():
        assert torch.equal(value, reference[f"transformer.{name.removeprefix('transformer.')}"]), name
    from safetensors.torch import load_file

    head = load_file(tmp_path / "out" / "heads" / "adapter.safetensors")
    assert torch.equal(head["score.weight"], reference["score.weight"])


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_adapters_and_full_checkpoints_together(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tf.LlamaForCausalLM(_llama())
    _save(base, tmp_path / "base")
    full = tf.LlamaForCausalLM(_llama())
    _near(full, base.state_dict())
    _save(full, tmp_path / "full")
    for i, kind in enumerate(("lora", "dora")):
        model = make_adapter(KINDS[kind](), reload(tmp_path / "base"), tmp_path / kind, seed=i + 1)
        _save(model.merge_and_unload(), tmp_path / f"{kind}-merged")
    mixed = merge(
        method, tmp_path / "base", [tmp_path / "lora", tmp_path / "full", tmp_path / "dora"], tmp_path / "mixed"
    )
    dense = merge(
        method,
        tmp_path / "base",
        [tmp_path / "lora-merged", tmp_path / "full", tmp_path / "dora-merged"],
        tmp_path / "dense",
    )
    for name, value in dense.items():
        torch.testing.assert_close(mixed[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_base_is_taken_from_the_adapter_if_the_recipe_names_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _save(tf.LlamaForCausalLM(_llama()), tmp_path / "base")
    make_adapter(KINDS["lora"](), reload(tmp_path / "base"), tmp_path / "adapter")
    recipe = hubmerge.Recipe.from_flags("linear", None, [str(tmp_path / "adapter")], [])
    assert hubmerge.plan(recipe).base.repo == str(tmp_path / "base")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
        (lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PREFIX_TUNING"),
        (
            lambda: peft.LoraConfig(r=2, target_modules=ATTENTION, alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
            "activated LoRA",
        ),
    ],
)
def test_kinds_that_cannot_be_merged_are_refused_by_name(
    config: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    _save(tf.LlamaForCausalLM(_llama()), tmp_path / "base")
    make_adapter(config(), reload(tmp_path / "base"), tmp_path / "adapter")
    with pytest.raises(HubMergeError, match=message):
        merge("task_arithmetic", tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_base_is_found_from_headers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _save(tf.LlamaForCausalLM(_llama()), tmp_path / "base")
    make_adapter(KINDS["lora"](), reload(tmp_path / "base"), tmp_path / "adapter")
    wide = _llama()
    wide.hidden_size = 48
    _save(tf.LlamaForCausalLM(wide), tmp_path / "wide")
    with pytest.raises(
        HubMergeError, match=r"the adapter is made for 'model.layers.0.self_attn.q_proj.weight' of shape \(32, 32\)"
    ):
        merge("task_arithmetic", tmp_path / "wide", [tmp_path / "adapter"], tmp_path / "out")
