"""Small models with everything that codecs tell apart, and how well a bundle gives them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hubmerge.coding import Encoded, decode_deltas

GRAIN = 32768
Model = dict[str, torch.Tensor]

LAYERS = 4
SHAPES: Mapping[str, tuple[int, ...]] = {
    "embed.weight": (60, 24),
    **{f"encoder.layers.{i}.attn.q.weight": (24, 24) for i in range(LAYERS)},
    **{f"encoder.layers.{i}.attn.q.bias": (24,) for i in range(LAYERS)},
    **{f"encoder.layers.{i}.mlp.up.weight": (40, 24) for i in range(LAYERS)},
    "encoder.layers.0.extra.weight": (24, 7),
    "head.weight": (10, 24),
    "patches.weight": (8, 3, 4, 5),
    "temperature": (),
    "nothing": (0, 24),
}
LONG: Mapping[str, tuple[int, ...]] = {
    "layers.0.weight": (GRAIN + 77, 3),
    "layers.1.weight": (GRAIN + 77, 3),
    "bias": (5,),
    "wide": (2 * GRAIN + 1,),
}
"""Tensors of several chunks."""


def random_models(
    count: int,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    *,
    dtype: torch.dtype = torch.float32,
    common: float = 0.3,
    seed: int = 0,
) -> tuple[Model, list[Model]]:
    """A base and fine-tunes of it, whose deltas are a tenth of it and have ``common`` of their energy in common."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Model:
        return {n: torch.randn(s, generator=generator) for n, s in shapes.items()}

    base, shared = draw(), draw()
    models = []
    for _ in range(count):
        own = draw()
        deltas = {n: 0.1 * (common**0.5 * shared[n] + (1 - common) ** 0.5 * own[n]) for n in shapes}
        models.append({n: (base[n] + deltas[n]).to(dtype) for n in shapes})
    return {n: t.to(dtype) for n, t in base.items()}, models


def deltas(base: Model, model: Model) -> Model:
    """The model minus the base, float32."""
    return {n: model[n].float() - base[n].float() for n in base}


def energy(tensors: Mapping[str, torch.Tensor]) -> float:
    """The squared norm of all tensors together."""
    return sum(float(t.double().square().sum()) for t in tensors.values())


def retrieval_errors(encoded: Encoded, base: Model, models: Sequence[Model]) -> list[float]:
    """Squared norms of what decoded deltas are off by, task by task."""
    found = []
    for name, model in zip(encoded.tasks, models, strict=True):
        decoded, wanted = decode_deltas(encoded, name), deltas(base, model)
        found.append(energy({n: decoded[n] - wanted[n] for n in wanted}))
    return found


def assert_same(a: Encoded, b: Encoded) -> None:
    """Everything two bundles keep is the same, bit for bit."""
    assert (a.parameters, a.targets, list(a.tasks)) == (b.parameters, b.targets, list(b.tasks))
    assert_same_bits(a.shared, b.shared)
    for name, task in a.tasks.items():
        assert (task.id, task.ranks, task.facts) == (b.tasks[name].id, b.tasks[name].ranks, b.tasks[name].facts)
        assert_same_bits(task.stored, b.tasks[name].stored)


def assert_same_bits(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    """Equal names, dtypes and shapes, and equal bytes: a zero's sign counts."""
    assert {n: (t.dtype, t.shape) for n, t in a.items()} == {n: (t.dtype, t.shape) for n, t in b.items()}
    for name, tensor in a.items():
        one, other = (t.reshape(-1).contiguous().view(torch.uint8) for t in (tensor, b[name]))
        assert torch.equal(one, other), name
