"""Makes the models that the benchmarks merge: a Llama-shaped base and three fine-tunes, sharded, from a fixed seed.

Run as a program, so that whoever measures memory never loads torch itself:

``python benchmarks/models.py 1b DIR``
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from cases import FINE_TUNES
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

NAMES = ("base", *FINE_TUNES)
MARKER = "models.json"
_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """Everything that decides the bytes of the models."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    shard_bytes: int
    dtype: str = "bfloat16"
    distinct: bool = False
    """Task vectors in which no two magnitudes of a tensor are equal, exactly representable: top-k has one answer."""
    seed: int = 0

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the parameters, in the order in which transformers saves them."""
        kv = self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for i in range(self.layers):
            at = f"model.layers.{i}."
            yield f"{at}input_layernorm.weight", (self.hidden,)
            for name, rows in (("q", self.hidden), ("k", kv), ("v", kv), ("o", self.hidden)):
                yield f"{at}self_attn.{name}_proj.weight", (rows, self.hidden)
            yield f"{at}post_attention_layernorm.weight", (self.hidden,)
            for name in ("gate", "up"):
                yield f"{at}mlp.{name}_proj.weight", (self.intermediate, self.hidden)
            yield f"{at}mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)


SHAPES = {
    # TinyLlama-1.1B: 2.2 GB in bfloat16.
    "1b": Shape(2048, 5632, 22, 32, 4, 32000, 1_000_000_000),
    # 50 MB: shows that everything runs; says nothing about speed.
    "quick": Shape(256, 704, 12, 8, 4, 32000, 20_000_000),
    # Small enough for distinct multiples of 2**-27, float32: both tools must agree to rounding.
    "check": Shape(128, 352, 4, 8, 4, 512, 1_000_000, dtype="float32", distinct=True),
    # As large, in the dtype that models come in: equal magnitudes abound, and rounding shows.
    "check-bf16": Shape(128, 352, 4, 8, 4, 512, 1_000_000),
}


def make(shape: Shape, out: Path) -> None:
    """Write ``out/base`` and ``out/ft-a`` to ``out/ft-c``, or keep them if they were made from the same shape."""
    described = {"format": _FORMAT, **asdict(shape)}
    marker = out / MARKER
    if marker.exists() and json.loads(marker.read_text()) == described:
        return
    if out.exists():
        if any(out.iterdir()) and not marker.exists() and not (out / "base").exists():
            raise SystemExit(f"{out}: not empty, and not made by this program")
        shutil.rmtree(out)
    for name in NAMES:
        (out / name).mkdir(parents=True)
        _write_small_files(shape, out / name)
    _write_weights(shape, out)
    marker.write_text(json.dumps(described, indent=2))


def write_model(shape: Shape, folder: Path, model: int) -> None:
    """One of the models alone, tensor by tensor: 0 is the base, others are its fine-tunes."""
    from hubmerge.io.header import build_header
    from hubmerge.spec import DTYPES

    folder.mkdir(parents=True)
    _write_small_files(shape, folder)
    shards, dtype = list(_shards(shape)), getattr(torch, shape.dtype)
    code = next(d for d in DTYPES.values() if d.torch == dtype)
    files: dict[str, str] = {}
    index = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, _ = build_header((tensor, code, dims) for tensor, dims in shard)
        with (folder / file).open("wb") as out:
            out.write(header)
            for tensor, dims in shard:
                index += 1
                _, values = next(islice(_versions(shape, index, dims, dtype), model, None))
                out.write(values.view(torch.uint8).numpy())
                files[tensor] = file
    _write_index(shape, folder, files)


def _write_weights(shape: Shape, out: Path) -> None:
    shards = list(_shards(shape))
    dtype = getattr(torch, shape.dtype)
    maps: dict[str, dict[str, str]] = {name: {} for name in NAMES}
    index = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # One shard of every model at a time: the fine-tunes need the base's values, and this is all that is ever held.
        held: dict[str, dict[str, torch.Tensor]] = {name: {} for name in NAMES}
        for tensor, dims in shard:
            index += 1
            for name, values in _versions(shape, index, dims, dtype):
                held[name][tensor] = values
                maps[name][tensor] = file
        for name in NAMES:
            save_file(held.pop(name), out / name / file, metadata={"format": "pt"})
    for name in NAMES:
        _write_index(shape, out / name, maps[name])


def _write_index(shape: Shape, folder: Path, files: dict[str, str]) -> None:
    total = sum(_numel(dims) for _, dims in shape.tensors()) * getattr(torch, shape.dtype).itemsize
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text)


def _versions(
    shape: Shape, index: int, dims: tuple[int, ...], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The base's values of one tensor, then each fine-tune's."""
    centre = 1.0 if len(dims) == 1 else 0.0
    task_vector: Callable[[tuple[int, ...], torch.Generator], torch.Tensor]
    task_vector = _distinct if shape.distinct else _small_noise
    base = torch.empty(0)
    for model, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(_seed(shape.seed, model, index))
        if model == 0:
            base = torch.empty(dims).normal_(centre, 0.02, generator=generator)
            if shape.distinct:
                base = (base * 1024).round() / 1024
            yield name, base.to(dtype)
            base = base.to(dtype).float()
        else:
            yield name, (base + task_vector(dims, generator)).to(dtype)


def _seed(seed: int, model: int, index: int) -> int:
    # torch's CPU generator keeps the low 32 bits of a seed: all three numbers have to reach them.
    digest = hashlib.sha256(f"{seed}/{model}/{index}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _small_noise(dims: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.empty(dims).normal_(0.0, 3e-4, generator=generator)


def _distinct(dims: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Each multiple of 2**-27 (2**-23 next to ones) up to the tensor's length once, with a random sign."""
    n = _numel(dims)
    sign = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    magnitude = torch.randperm(n, generator=generator) + 1
    unit = 2.0**-23 if len(dims) == 1 else 2.0**-27
    return (sign * magnitude).to(torch.float32).mul_(unit).view(dims)


def _shards(shape: Shape) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    width = getattr(torch, shape.dtype).itemsize
    shard: list[tuple[str, tuple[int, ...]]] = []
    size = 0
    for tensor, dims in shape.tensors():
        tensor_bytes = _numel(dims) * width
        if shard and size + tensor_bytes > shape.shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append((tensor, dims))
        size += tensor_bytes
    yield shard


def _write_small_files(shape: Shape, folder: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": shape.dtype,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\nRandom weights, made for a benchmark.\n")
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _numel(dims: tuple[int, ...]) -> int:
    n = 1
    for d in dims:
        n *= d
    return n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    make(SHAPES[args.shape], args.out)


if __name__ == "__main__":
    main()
