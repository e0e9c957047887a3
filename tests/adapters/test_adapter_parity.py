"""Merged values are PEFT's own, bit for bit, for every supported kind of adapter."""

# ruff: noqa: C408 (options read best as they are written in calls)
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapter_zoo as zoo
import pytest
import torch
from torch import nn

from hubmerge.adapters import check_base, check_config, delta, inventory, merged

ATTENTION = ["q_proj", "v_proj"]
Case = tuple[Callable[[], nn.Module], str, dict[str, Any]]

CASES: dict[str, Case] = {
    "lora": (zoo.llama, "LoraConfig", dict(r=4, lora_alpha=12, target_modules=[*ATTENTION, "down_proj"])),
    "lora-odd-scale": (zoo.llama, "LoraConfig", dict(r=3, lora_alpha=7, target_modules=ATTENTION)),
    "rslora": (zoo.llama, "LoraConfig", dict(r=3, lora_alpha=7, use_rslora=True, target_modules=ATTENTION)),
    "patterns": (
        zoo.llama,
        "LoraConfig",
        dict(
            r=4,
            target_modules=["q_proj", "k_proj", "v_proj", "up_proj"],
            rank_pattern={"layers.0.self_attn.q_proj": 2, "^model.*v_proj": 6, "layers.\\d.mlp.up_proj": 5},
            alpha_pattern={"q_proj": 3, "layers.1.*up_proj": 11},
        ),
    ),
    "lora-bias": (zoo.llama, "LoraConfig", dict(r=4, lora_bias=True, target_modules=ATTENTION)),
    "trained-biases": (zoo.llama, "LoraConfig", dict(r=4, bias="all", target_modules=ATTENTION)),
    "lora-only-biases": (
        zoo.llama, "LoraConfig", dict(r=4, bias="lora_only", lora_bias=True, target_modules=ATTENTION)
    ),
    "embeddings": (zoo.llama, "LoraConfig", dict(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "orthogonal": (zoo.llama, "LoraConfig", dict(r=4, init_lora_weights="orthogonal", target_modules=ATTENTION)),
    "mica": (zoo.llama, "LoraConfig", dict(r=4, init_lora_weights="mica", target_modules=ATTENTION)),
    "modules-to-save": (
        zoo.bert,
        "LoraConfig",
        dict(r=4, target_modules=["query", "value"], modules_to_save=["classifier", "pooler"], task_type="SEQ_CLS"),
    ),
    "bert-word-embeddings": (zoo.bert, "LoraConfig", dict(r=4, target_modules=["word_embeddings", "key"])),
    "gpt2": (zoo.gpt2, "LoraConfig", dict(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "gpt2-wrong-flag": (zoo.gpt2, "LoraConfig", dict(r=4, target_modules=["c_attn"], fan_in_fan_out=False)),
    "gpt2-tied-wte": (zoo.gpt2, "LoraConfig", dict(r=4, target_modules=["wte", "c_fc"])),
    "vit": (zoo.vit, "LoraConfig", dict(r=4, target_modules=["query", "value", "projection"])),
    "convolutions": (zoo.Convolutions, "LoraConfig", dict(r=4, target_modules=["one", "two", "point", "three"])),
    "tokens": (zoo.llama, "LoraConfig", dict(r=4, target_modules=ATTENTION, trainable_token_indices=[7, 2, 30])),
    "tokens-tied": (
        lambda: zoo.llama(tied=True),
        "LoraConfig",
        dict(r=4, target_modules=ATTENTION, trainable_token_indices={"embed_tokens": [7, 2]}),
    ),
    "tokens-alone": (
        zoo.llama,
        "TrainableTokensConfig",
        dict(token_indices=[3, 1], target_modules=["embed_tokens"]),
    ),
    "dora": (zoo.llama, "LoraConfig", dict(r=4, use_dora=True, target_modules=[*ATTENTION, "embed_tokens"])),
    "dora-rslora": (
        zoo.llama,
        "LoraConfig",
        dict(r=4, use_dora=True, use_rslora=True, target_modules=ATTENTION),
    ),
    "dora-gpt2": (zoo.gpt2, "LoraConfig", dict(r=4, use_dora=True, target_modules=["c_attn", "c_proj"])),
    "dora-convolutions": (
        zoo.Convolutions,
        "LoraConfig",
        dict(r=4, use_dora=True, target_modules=["one", "two", "point", "three"]),
    ),
    "pissa": (zoo.llama, "LoraConfig", dict(r=4, init_lora_weights="pissa", target_modules=ATTENTION)),
    "pissa-gpt2": (zoo.gpt2, "LoraConfig", dict(r=4, init_lora_weights="pissa", target_modules=["c_attn"])),
    "pissa-patterns": (
        zoo.llama,
        "LoraConfig",
        dict(r=4, init_lora_weights="pissa", target_modules=ATTENTION, rank_pattern={"q_proj": 6, "k_proj": 2}),
    ),
    "olora": (zoo.llama, "LoraConfig", dict(r=4, init_lora_weights="olora", target_modules=ATTENTION)),
    "adalora": (zoo.llama, "AdaLoraConfig", dict(init_r=6, target_r=3, total_step=10, target_modules=ATTENTION)),
    "adalora-gpt2": (zoo.gpt2, "AdaLoraConfig", dict(init_r=6, total_step=10, target_modules=["c_attn"])),
    "loha": (zoo.llama, "LoHaConfig", dict(r=4, alpha=6, target_modules=ATTENTION, rank_pattern={"q_proj": 2})),
    "loha-convolutions": (
        zoo.Convolutions,
        "LoHaConfig",
        dict(r=4, target_modules=["two", "point"], use_effective_conv2d=True),
    ),
    "lokr": (zoo.llama, "LoKrConfig", dict(r=2, target_modules=ATTENTION, decompose_both=True, decompose_factor=4)),
    "lokr-full": (zoo.llama, "LoKrConfig", dict(r=64, target_modules=ATTENTION)),
    "ia3": (
        zoo.llama,
        "IA3Config",
        dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "ia3-gpt2": (
        zoo.gpt2, "IA3Config", dict(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])
    ),
    "vera": (zoo.llama, "VeraConfig", dict(r=4, target_modules=ATTENTION)),
    "vera-gpt2": (zoo.gpt2, "VeraConfig", dict(r=4, target_modules=["c_attn", "c_fc"])),
    "oft": (zoo.llama, "OFTConfig", dict(oft_block_size=4, target_modules=ATTENTION)),
    "oft-constrained": (
        zoo.llama,
        "OFTConfig",
        dict(
            oft_block_size=4, coft=True, eps=1e-3, block_share=True, use_cayley_neumann=False, target_modules=ATTENTION
        ),
    ),
    "oft-embedding": (zoo.llama, "OFTConfig", dict(oft_block_size=4, target_modules=["embed_tokens"])),
    "oft-convolutions": (zoo.Convolutions, "OFTConfig", dict(oft_block_size=4, target_modules=["two", "point"])),
    "boft-convolutions": (zoo.Convolutions, "BOFTConfig", dict(boft_block_size=4, target_modules=["two"])),
    "hra-convolutions": (zoo.Convolutions, "HRAConfig", dict(r=4, target_modules=["two"])),
    "ia3-convolutions": (
        zoo.Convolutions, "IA3Config", dict(target_modules=["two", "point"], feedforward_modules=["point"])
    ),
    "adalora-convolutions": (zoo.Convolutions, "AdaLoraConfig", dict(total_step=10, target_modules=["two"])),
    "lokr-convolutions": (zoo.Convolutions, "LoKrConfig", dict(r=2, target_modules=["one", "two", "point"])),
    "miss-mini": (zoo.llama, "MissConfig", dict(r=4, mini_r=2, init_weights="mini", target_modules=["q_proj"])),
    "boft": (zoo.llama, "BOFTConfig", dict(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=ATTENTION)),
    "hra": (zoo.llama, "HRAConfig", dict(r=4, apply_GS=True, target_modules=ATTENTION)),
    "fourierft": (zoo.llama, "FourierFTConfig", dict(n_frequency=20, target_modules=ATTENTION)),
    "fourierft-gpt2": (zoo.gpt2, "FourierFTConfig", dict(n_frequency=20, target_modules=["c_attn"])),
    "miss": (zoo.llama, "MissConfig", dict(r=4, target_modules=ATTENTION)),
    "miss-bat": (zoo.llama, "MissConfig", dict(r=4, init_weights="bat", target_modules=["q_proj", "o_proj"])),
    "layernorm": (zoo.bert, "LNTuningConfig", dict(target_modules=["LayerNorm"])),
    "randlora": (zoo.llama, "RandLoraConfig", dict(r=4, target_modules=[*ATTENTION, "down_proj"])),
    "randlora-up": (zoo.llama, "RandLoraConfig", dict(r=4, sparse=True, target_modules=[*ATTENTION, "up_proj"])),
    "c3a": (zoo.llama, "C3AConfig", dict(block_size=4, target_modules=ATTENTION)),
}  # fmt: skip
LOW_RANK = {
    "lora", "lora-odd-scale", "rslora", "patterns", "lora-bias", "orthogonal", "mica", "gpt2", "gpt2-wrong-flag",
    "vit", "convolutions", "bert-word-embeddings", "gpt2-tied-wte",
}  # fmt: skip


def _save(name: str, folder: Path, dtype: torch.dtype | None = None) -> zoo.Saved:
    import peft

    make, config, options = CASES[name]
    with zoo.quiet():
        return zoo.save(make, getattr(peft, config)(**options), folder, dtype=dtype)


def _is_transposed(name: str, parameter: str) -> bool:
    return "gpt2" in name and parameter.endswith("weight") and "c_" in parameter


def _compare(name: str, saved: zoo.Saved) -> None:
    check_config(saved.config, name)
    parts = {part.name: part for part in inventory(saved.config, saved.tensors, name)}
    changed = 0
    for parameter, expected in saved.expected.items():
        if parameter in saved.tied:
            continue
        part, base = parts.pop(parameter, None), saved.base[parameter]
        if part is None:
            assert torch.equal(base, expected), f"{parameter} changes, but is not in the inventory"
            continue
        untouched = base.clone()
        transposed = _is_transposed(name, parameter)
        assert part.fits(tuple(base.shape), transposed=transposed)
        ours = merged(part, saved.config, saved.load, base, transposed=transposed)
        assert ours.dtype == torch.float32
        assert torch.equal(ours, expected), f"{parameter}: {(ours - expected).abs().max()}"
        difference = delta(part, saved.config, saved.load, base, transposed=transposed)
        assert difference.dtype == (torch.float32 if part.kind == "low_rank" else torch.float64)
        assert torch.equal((base + difference).float(), expected), parameter
        assert torch.equal(base, untouched), "the base was written to"
        assert not torch.equal(base, expected), f"{parameter} is not changed by the test's adapter"
        changed += 1
    assert changed
    assert not [part.name for part in parts.values() if not part.optional]
    if name in LOW_RANK:
        kinds = {part.kind for part in inventory(saved.config, saved.tensors, name) if part.parameter == "weight"}
        assert kinds == {"low_rank"}


@pytest.mark.parametrize("name", sorted(CASES))
def test_merged_values_are_pefts_own(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved = _save(name, tmp_path)
    capfd.readouterr()
    before = torch.get_rng_state()
    _compare(name, saved)
    assert torch.equal(torch.get_rng_state(), before), "the global random generator moved"
    assert capfd.readouterr() == ("", "")
    assert check_base(saved.config, "owner/base", None, name) is not None


@pytest.mark.parametrize("name", ["lora", "embeddings", "dora", "loha", "ia3", "modules-to-save"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters_are_computed_in_float32(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _compare(name, _save(name, tmp_path, dtype))
