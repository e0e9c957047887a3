"""The merge as a naive float64 loop over state dicts: what the engine must agree with."""

from __future__ import annotations

import torch


def align(base: dict[str, torch.Tensor], model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's tensors under the base's names, found by brute force: the longest common suffix that is unique."""
    found: dict[str, torch.Tensor] = {}
    for name in base:
        candidates = [n for n in model if n == name] or [
            n for n in model if n.endswith("." + name) or name.endswith("." + n)
        ]
        if len(candidates) == 1 and model[candidates[0]].shape == base[name].shape:
            found[name] = model[candidates[0]]
    return found


def task_arithmetic(
    base: dict[str, torch.Tensor], models: list[dict[str, torch.Tensor]], scale: float
) -> dict[str, torch.Tensor]:
    """``W0 + λ Σ (Wt - W0)`` in float64, in the base's dtype at the end; what a model lacks counts as unchanged."""
    merged = {}
    aligned = [align(base, m) for m in models]
    for name, value in base.items():
        if not value.is_floating_point():
            merged[name] = value
            continue
        total = torch.zeros_like(value, dtype=torch.float64)
        for model in aligned:
            if name in model:
                total += model[name].double() - value.double()
        merged[name] = (value.double() + scale * total).to(value.dtype)
    return merged
