"""Plans and recipes built by hand: small values with every field set, for tests of what is made from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hubmerge.recipe import Recipe
from hubmerge.spec import DTYPES, FileSpec, OutputFile, PinnedModel, Plan, SmallFile, TensorSpec

GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
BERT = {"model_type": "bert", "architectures": ["BertModel"]}


def digest(text: str, length: int = 64) -> str:
    """Hex digits that look like a digest, the same for the same text."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def pinned(
    repo: str,
    *,
    role: str = "model",
    name: str | None = None,
    root: str | None = None,
    config: Mapping[str, Any] = GPT2,
    card: Mapping[str, Any] | None = None,
    **changes: Any,
) -> PinnedModel:
    """A model with one tensor, on the Hub unless ``root`` says where it lies."""
    files = {
        "README.md": FileSpec("README.md", 120, git_sha1=None if root else digest(repo + "card", 40)),
        "config.json": FileSpec("config.json", 60, git_sha1=None if root else digest(repo + "config", 40)),
        "model.safetensors": FileSpec("model.safetensors", 4096, sha256=None if root else digest(repo + "weights")),
        "training.log": FileSpec("training.log", 9),
    }
    tensor = TensorSpec("wte.weight", DTYPES["F32"], (10, 4), "model.safetensors", 200, 360)
    return dataclasses.replace(
        PinnedModel(
            role=role,  # type: ignore[arg-type]
            name=name or ("base" if role == "base" else repo.rpartition("/")[2]),
            repo=repo,
            commit=None if root else digest(repo, 40),
            root=root,
            files=files,
            tensors={tensor.name: tensor},
            config=config,
            card=card or {},
            header_sha256=digest(repo + "header"),
        ),
        **changes,
    )


def recipe(base: PinnedModel, models: Sequence[PinnedModel], /, **keys: Any) -> Recipe:
    """A recipe that names these models."""
    entries = [{"repo": m.repo, "name": m.name, "parameters": {"weight": 0.5 + i}} for i, m in enumerate(models)]
    return Recipe.from_data({"method": "task_arithmetic", "base": base.repo, "models": entries} | keys)


def plan(asked: Recipe, base: PinnedModel, models: Sequence[PinnedModel], **changes: Any) -> Plan:
    """The plan of such a recipe, without jobs: one weight file, a config and a tokenizer."""
    return dataclasses.replace(
        Plan(
            method=asked.method,
            base=base,
            models=tuple(models),
            jobs=(),
            outputs=(OutputFile("model.safetensors", b"", 4096),),
            files=(SmallFile("config.json", source=-1), SmallFile("tokenizer.json", source=-1)),
            problems=(),
            seed=asked.seed,
            params=asked.params,
            digest=digest("plan"),
        ),
        **changes,
    )


def with_heads(made: Plan, heads: Mapping[str, Mapping[str, Any]]) -> Plan:
    """The plan with a head file, and its config, for each name."""
    outputs = tuple(OutputFile(f"heads/{name}.safetensors", b"", 100) for name in heads)
    files = tuple(SmallFile(f"heads/{n}.config.json", content=json.dumps(c).encode()) for n, c in heads.items())
    return dataclasses.replace(made, outputs=made.outputs + outputs, files=made.files + files)
