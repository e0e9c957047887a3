"""What the tests of bundles share: small models on disk, recipes, and what a bundle must give back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hubmerge.bundles.manifest import MANIFEST_NAME, Manifest, loads
from hubmerge.coding import decode_tensors, encode_tensors
from hubmerge.recipe import Recipe
from tests.end_to_end import support
from tests.end_to_end.support import Outcome, Tensors
from tests.merge.models import stored

CONFIG: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40}
SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (40, 24),
    **{f"model.layers.{i}.mlp.up_proj.weight": (48, 24) for i in range(3)},
    **{f"model.layers.{i}.mlp.down_proj.weight": (24, 48) for i in range(3)},
    "model.norm.weight": (24,),
}
WIDE: Mapping[str, tuple[int, ...]] = {f"model.layers.{i}.mlp.up_proj.weight": (300, 500) for i in range(3)}
"""Tensors of several chunks."""
HEAD = "score.weight"


def values(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, *, head: int = 0) -> Tensors:
    """A model in bfloat16: seed 0 is the base, others lie near it; with a head of so many rows of its own."""
    found = {n: t.bfloat16() for n, t in support.tensors(seed, shapes).items()}
    if head:
        found[HEAD] = torch.randn((head, 24), generator=torch.Generator().manual_seed(seed)).bfloat16()
    return found


def save(folder: Path, seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, *, head: int = 0) -> Path:
    """A checkpoint of such a model."""
    config = CONFIG | ({"architectures": ["LlamaForSequenceClassification"], "num_labels": head} if head else {})
    return support.save(folder, values(seed, shapes, head=head), config=config)


def data(codec: str, base: str | Path, models: Sequence[Any], **keys: Any) -> dict[str, Any]:
    """A bundle's recipe; ``storage`` and the like stand under ``parameters``."""
    entries = [m if isinstance(m, dict) else {"repo": str(m)} for m in models]
    output = {"format": "bundle"} | keys.pop("output", {})
    return {"method": codec, "base": str(base), "models": entries, "output": output} | keys


def recipe(codec: str, base: str | Path, models: Sequence[Any], **keys: Any) -> Recipe:
    """The same, checked."""
    return Recipe.from_data(data(codec, base, models, **keys))


def recipe_file(path: Path, codec: str, base: str | Path, models: Sequence[Any], **keys: Any) -> Path:
    """The same, as a file."""
    path.write_text(json.dumps(data(codec, base, models, **keys)))
    return path


def bundle(*arguments: str | Path) -> Outcome:
    """Run one of the commands for bundles."""
    return support.hubmerge("bundle", *arguments)


def done(*arguments: str | Path) -> dict[str, Any]:
    """Run one of the commands for bundles, which must succeed; returns what it prints as JSON."""
    found = bundle(*arguments, "--json")
    assert found.code == 0, found.text
    answer: dict[str, Any] = json.loads(found.out)
    return answer


def manifest(folder: Path) -> Manifest:
    """The manifest in a folder."""
    return loads((folder / MANIFEST_NAME).read_bytes())


def shared(folder: Path) -> dict[str, str]:
    """Digests of the files with shared parts."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("bundle-*.safetensors"))}


def given_back(
    codec: str, base: Tensors, models: Mapping[str, Tensors], *, scale: float | None = None, **parameters: Any
) -> dict[str, Tensors]:
    """What a bundle must give back of each task, by the naive computation in memory."""
    full = [{n: m.get(n, t) for n, t in base.items()} for m in models.values()]
    encoded = encode_tensors(codec, base, full, parameters=parameters, names=list(models))
    return {name: decode_tensors(encoded, base, name, scale=scale) for name in models}


def assert_same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Equal names, dtypes and values."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


__all__ = ["Outcome", "Tensors", "load_file", "stored"]
