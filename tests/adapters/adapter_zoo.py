"""Tiny base models, adapters with random values saved by PEFT, and PEFT's own merge to compare with."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn

from hubmerge.spec import DTYPES, TensorSpec


# Every warning is an error in the tests; PEFT's and transformers' own are not ours.
@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def llama(*, tied: bool = False, layers: int = 2, vocab: int = 40) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocab, attention_bias=True, tie_word_embeddings=tied,
    )  # fmt: skip
    return _random_biases(LlamaForCausalLM(config))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return _random_biases(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=40, n_positions=16)))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=40, num_labels=3
    )
    return _random_biases(BertForSequenceClassification(config))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    return _random_biases(ViTForImageClassification(config))


class Convolutions(nn.Module):
    """One convolution of each kind that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv1d(8, 12, 3)
        self.two = nn.Conv2d(8, 12, 3)
        self.point = nn.Conv2d(8, 12, 1)
        self.three = nn.Conv3d(4, 8, 2)


def _random_biases(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(0, 0.1)
    return model


@dataclass(frozen=True)
class Saved:
    """An adapter on disk as hubmerge sees it, and the model that PEFT makes of it."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorSpec]
    base: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    tied: frozenset[str]

    def load(self, spec: TensorSpec) -> torch.Tensor:
        return loader(self.folder)(spec)


def save(make: Callable[[], nn.Module], config: Any, folder: Path, *, dtype: torch.dtype | None = None) -> Saved:
    """Adapt the model, fill the adapter with random numbers, save it with PEFT, and merge it with PEFT."""
    from peft import PeftModel, get_peft_model

    with quiet():
        model = get_peft_model(make(), config)
        randomise(model)
        model.save_pretrained(folder)
        if dtype is not None:
            cast_file(folder, dtype)
        base = make()
        before = {name: value.clone() for name, value in base.state_dict().items()}
        merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
    tied = getattr(merged, "all_tied_weights_keys", None) or {}
    return Saved(
        folder, read_config(folder), headers(folder), before, merged.state_dict(),
        frozenset(tied),
    )  # fmt: skip


def randomise(model: nn.Module) -> None:
    """Random values for everything that was trained; PEFT initialises most of it to change nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad or "mica" in name:
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float32) * 0.1
                value.add_(noise.to(value.dtype))


def cast_file(folder: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)


def read_config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter_config.json").read_text()))


def loader(folder: Path) -> Callable[[TensorSpec], torch.Tensor]:
    def load(wanted: TensorSpec) -> torch.Tensor:
        with safe_open(folder / wanted.file, "pt") as file:
            return cast("torch.Tensor", file.get_tensor(wanted.name))

    return load


def headers(folder: Path) -> dict[str, TensorSpec]:
    """The stored tensors' headers, in the file's order."""
    specs = {}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            part = file.get_slice(name)
            specs[name] = spec(name, part.get_shape(), part.get_dtype())
    return specs


def spec(name: str, shape: list[int] | tuple[int, ...], dtype: str = "F32") -> TensorSpec:
    return TensorSpec(name, DTYPES[dtype], tuple(shape), "adapter_model.safetensors", 0, 0)


def specs(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
    return {name: spec(name, shape) for name, shape in shapes.items()}
