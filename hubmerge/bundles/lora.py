"""A task's adapter out of a bundle of adapters: its factors, decoded and cut to its own ranks, as a PEFT folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from hubmerge import layout
from hubmerge.bundles.companions import own_files
from hubmerge.bundles.manifest import TaskEntry
from hubmerge.bundles.store import DAMAGED, Bundle
from hubmerge.bundles.stream import StoredParts
from hubmerge.errors import IntegrityError
from hubmerge.factors import retrieved
from hubmerge.output import FolderSink, Written
from hubmerge.spec import LowRank

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_ROOT = "base_model.model."


def factors_of(bundle: Bundle, task: TaskEntry, *, parts: StoredParts | None = None) -> dict[str, LowRank]:
    """A task's deltas as they come out of the bundle, by tensor of the base; without λ."""
    manifest = bundle.manifest
    codec, params = manifest.codec_of()
    targets = [t.target() for t in manifest.targets]
    who, parts = manifest.identity(task), parts or bundle.parts(task)
    sources = codec.sources(params, targets, who)
    found = {}
    for target in targets:
        kept = codec.parts(params, target)
        stored = parts.load(target, kept, params.storage, 0, target.numel, whole=False)
        name = sources.get(target.name, target.name)
        found[name] = codec.decode(stored, target, who, params, facts=task.facts).view(target.shape)
    return retrieved(found, task.ranks)


def retrieve_adapter(
    bundle: Bundle, task: TaskEntry, out: Path, *, scale: float | None = None, overwrite: bool = False
) -> tuple[Written, ...]:
    """Write a task's adapter as an ordinary PEFT folder.

    Raises:
        IntegrityError: The bundle's files are damaged.
        HubMergeError: What else went wrong; nothing is left behind.
    """
    _, params = bundle.manifest.codec_of()
    factor = params.scale if scale is None else scale
    bundle.check([*bundle.files(task=task), *bundle.head_files(task)])
    deltas = factors_of(bundle, task)
    tensors = _head(bundle, task)
    for name, delta in deltas.items():
        module = f"{_ROOT}{module_of(task, name)}"
        tensors[f"{module}.lora_A.weight"] = delta.down.contiguous()
        tensors[f"{module}.lora_B.weight"] = delta.up.mul(factor).contiguous()
    config = json.loads(bundle.read(task.adapter_config_path))
    weights = save(tensors, metadata={"format": "pt"})
    files = own_files(bundle, task) | {WEIGHTS: weights, CONFIG: layout.to_json(_config(bundle, task, config))}
    with FolderSink(out, "retrieve", sum(map(len, files.values())), overwrite=overwrite) as sink:
        sink.commit(files)
    return (Written(WEIGHTS, len(weights), hashlib.sha256(weights).hexdigest()),)


def _head(bundle: Bundle, task: TaskEntry) -> dict[str, torch.Tensor]:
    """What only this task has, under the names PEFT gives it."""
    return {
        f"{_ROOT}{name}": value
        for path in bundle.head_files(task)
        for name, value in load_file(bundle.path(path)).items()
    }


def module_of(task: TaskEntry, name: str) -> str:
    """The adapter's own name of a module, from that of its weight in the base."""
    return task.modules.get(name, name.removesuffix(".weight"))


def _config(bundle: Bundle, task: TaskEntry, own: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's config, with its ranks and without scales, which are inside the factors."""
    ranks = {module_of(task, name): rank for name, rank in task.ranks.items()}
    if not ranks:
        raise IntegrityError(f"{bundle.label}: the manifest gives task {task.name!r} no ranks", hint=DAMAGED)
    largest = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != largest}
    return {
        **own,
        "base_model_name_or_path": bundle.manifest.base.repo or own.get("base_model_name_or_path"),
        "revision": bundle.manifest.base.commit,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "init_lora_weights": True,
    }
