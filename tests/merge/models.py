"""Tiny models of real architectures, saved by transformers: a base and two fine-tunes of it with heads of their own."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file

_TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 96,
    "max_position_embeddings": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How to build the base, the fine-tunes, and the model that loads the merged result."""

    base: Callable[[], Any]
    tune: Callable[[int], Any]
    inputs: dict[str, torch.Tensor]
    load: dict[str, Any] = field(default_factory=dict)


def _ids(**extra: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(12).reshape(2, 6) + 3, **extra}


def _pixels(size: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * size * size).reshape(2, 3, size, size)}


def _vit(**extra: Any) -> Any:
    return tf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        **extra,
    )


def _clip(**extra: Any) -> Any:
    return tf.CLIPVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        projection_dim=16,
        **extra,
    )


def _llama(**extra: Any) -> Any:
    return tf.LlamaConfig(**_TEXT, num_key_value_heads=2, pad_token_id=0, **extra)


def _gpt2(**extra: Any) -> Any:
    return tf.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=96,
        n_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **extra,
    )


def _t5(**extra: Any) -> Any:
    return tf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=96, **extra)


def _deberta(**extra: Any) -> Any:
    return tf.DebertaV2Config(
        **_TEXT, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], share_att_key=True, **extra
    )


def _qwen3(**extra: Any) -> Any:
    return tf.Qwen3Config(**_TEXT, num_key_value_heads=2, head_dim=8, **extra)


def _mixtral(**extra: Any) -> Any:
    return tf.MixtralConfig(**_TEXT, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, **extra)


FAMILIES: dict[str, Family] = {
    "vit": Family(
        lambda: tf.ViTModel(_vit(), add_pooling_layer=False),
        lambda n: tf.ViTForImageClassification(_vit(num_labels=n)),
        _pixels(16),
        {"add_pooling_layer": False},
    ),
    "clip-vision": Family(
        lambda: tf.CLIPVisionModel(_clip()), lambda n: tf.CLIPVisionModelWithProjection(_clip()), _pixels(16)
    ),
    "bert": Family(
        lambda: tf.BertModel(tf.BertConfig(**_TEXT)),
        lambda n: tf.BertForSequenceClassification(tf.BertConfig(**_TEXT, num_labels=n)),
        _ids(),
    ),
    "bert-mlm": Family(
        lambda: tf.BertForMaskedLM(tf.BertConfig(**_TEXT)),
        lambda n: tf.BertForTokenClassification(tf.BertConfig(**_TEXT, num_labels=n)),
        _ids(),
    ),
    "roberta": Family(
        lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**_TEXT)),
        lambda n: tf.RobertaForSequenceClassification(tf.RobertaConfig(**_TEXT, num_labels=n)),
        _ids(),
    ),
    "deberta-v2": Family(
        lambda: tf.DebertaV2Model(_deberta()),
        lambda n: tf.DebertaV2ForSequenceClassification(_deberta(num_labels=n)),
        _ids(),
    ),
    "gpt2": Family(
        lambda: tf.GPT2Model(_gpt2()), lambda n: tf.GPT2ForSequenceClassification(_gpt2(num_labels=n)), _ids()
    ),
    "gpt2-lm": Family(
        lambda: tf.GPT2LMHeadModel(_gpt2()), lambda n: tf.GPT2ForSequenceClassification(_gpt2(num_labels=n)), _ids()
    ),
    "t5": Family(
        lambda: tf.T5ForConditionalGeneration(_t5()),
        lambda n: tf.T5ForConditionalGeneration(_t5()),
        _ids(decoder_input_ids=torch.ones(2, 3, dtype=torch.long)),
    ),
    "llama-tied": Family(
        lambda: tf.LlamaForCausalLM(_llama(tie_word_embeddings=True)),
        lambda n: tf.LlamaForCausalLM(_llama(tie_word_embeddings=True)),
        _ids(),
    ),
    "llama-untied": Family(lambda: tf.LlamaForCausalLM(_llama()), lambda n: tf.LlamaForCausalLM(_llama()), _ids()),
    "llama-classification": Family(
        lambda: tf.LlamaForCausalLM(_llama()), lambda n: tf.LlamaForSequenceClassification(_llama(num_labels=n)), _ids()
    ),
    "qwen3": Family(lambda: tf.Qwen3ForCausalLM(_qwen3()), lambda n: tf.Qwen3ForCausalLM(_qwen3()), _ids()),
    "mixtral": Family(lambda: tf.MixtralForCausalLM(_mixtral()), lambda n: tf.MixtralForCausalLM(_mixtral()), _ids()),
}
LABELS = (3, 5)


def build(family: str, root: Path) -> tuple[Path, list[Path]]:
    """Save a base (float32, one file) and two fine-tunes: bfloat16 in small shards, float16 in one file."""
    made = FAMILIES[family]
    torch.manual_seed(0)
    base = made.base()
    shared = base.state_dict()
    _save(base, root / "base")
    tunes = []
    for i, labels in enumerate(LABELS):
        torch.manual_seed(100 + i)
        model = made.tune(labels)
        _near(model, shared)
        model = model.to((torch.bfloat16, torch.float16)[i])
        _save(model, root / f"task{i}", max_shard_size="20KB" if i == 0 else "5GB")
        tunes.append(root / f"task{i}")
    return root / "base", tunes


def _near(model: Any, base: dict[str, torch.Tensor]) -> None:
    """Move the model to the base plus a small random step, as fine-tuning would."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            found = next((b for n, b in base.items() if name.endswith(n) or n.endswith(name)), None)
            if found is not None and found.shape == value.shape and value.is_floating_point():
                value.copy_(found + 0.02 * torch.randn_like(value))


def _save(model: Any, folder: Path, **options: Any) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder, **options)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model, by their stored names."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def unknown_architecture(root: Path) -> tuple[Path, list[Path]]:
    """A checkpoint that transformers does not know: names of no convention, one odd shape, an integer buffer."""
    torch.manual_seed(0)
    names = {
        "enc.blocks.0.w": (7, 5), "enc.blocks.1.w": (7, 5), "enc.blocks.0.scale": (7,), "enc.blocks.1.scale": (7,),
        "conv_stem": (4, 3, 3, 3), "temperature": (), "empty": (0, 4),
    }  # fmt: skip
    base = {n: torch.randn(s) for n, s in names.items()} | {"steps": torch.tensor([3, 4])}
    tunes = []
    _store(base, root / "base", {"model_type": "homemade"})
    for i in range(2):
        tuned = {n: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t + 1 for n, t in base.items()}
        _store(tuned, root / f"task{i}", {"model_type": "homemade"})
        tunes.append(root / f"task{i}")
    return root / "base", tunes


def _store(tensors: dict[str, torch.Tensor], folder: Path, config: dict[str, Any]) -> None:
    import json

    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
