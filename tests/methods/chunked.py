"""Merge whole models held in memory as the engine would: chunk by chunk, in any order, per tensor or per model."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hubmerge.memory import MemoryGroup, chunks, gather, join, model_params
from hubmerge.methods import get_method
from hubmerge.spec import Kind, LowRank

GRAIN = 32768
Model = Mapping[str, torch.Tensor]


def merge_model(
    method: str,
    base: Model,
    models: Sequence[Mapping[str, torch.Tensor | LowRank]],
    *,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
    kinds: Mapping[str, Kind] | None = None,
    seed: int = 0,
    chunk_size: int = 8 * GRAIN,
    shuffle: int | None = None,
) -> dict[str, torch.Tensor]:
    """The merged model in the compute dtype, from models' tensors or their deltas' factors.

    ``kinds`` names tensors that are no linear weights; ``shuffle`` seeds the order in which chunks are seen and summed.
    """
    chosen = get_method(method)
    p, per_model = model_params(chosen, dict(parameters or {}), len(models))
    groups = {}
    for index, name in enumerate(base):
        groups[name] = MemoryGroup(
            base[name],
            [m[name] for m in models],
            tasks=names or [str(i) for i in range(len(models))],
            weights=weights or [1.0] * len(models),
            params=per_model,
            name=name,
            index=index,
            kind=(kinds or {}).get(name, "linear"),
            seed=seed,
        )
    parts = {name: list(chunks(chosen, p, group, chunk_size)) for name, group in groups.items()}

    def ordered(wanted: Sequence[MemoryGroup]) -> list[MemoryGroup]:
        found = list(wanted)
        if shuffle is not None:
            random.Random(shuffle).shuffle(found)
        return found

    with torch.inference_mode():
        if chosen.scope(p) == "model":
            shared = gather(chosen, p, ordered([part for some in parts.values() for part in some]))
            stats = dict.fromkeys(parts, shared)
        else:
            stats = {name: gather(chosen, p, ordered(some)) for name, some in parts.items()}
        return {name: join(chosen, p, groups[name], parts[name], stats[name]) for name in parts}


def random_model(sizes: Mapping[str, tuple[int, ...]], seed: int, *, coarse: bool = False) -> dict[str, torch.Tensor]:
    """Normal values; ``coarse`` ones are rounded to eighths, so that magnitudes repeat."""
    generator = torch.Generator().manual_seed(seed)
    model = {name: torch.randn(shape, generator=generator) for name, shape in sizes.items()}
    return {name: (value * 8).round() / 8 if coarse else value for name, value in model.items()}


def added(base: Model, delta: Model) -> dict[str, torch.Tensor]:
    """``base + delta``."""
    return {name: base[name] + delta[name] for name in base}
