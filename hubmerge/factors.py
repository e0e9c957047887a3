"""Balanced factors: low-rank deltas as pairs of tensors that can be stored, or superposed, like any others.

A delta's factors are not unique: B A = (B G)(G⁻¹ A) for any invertible G. Errors of two factors that are stored apart
multiply each other's norms, so both get the same share of each singular value: row j of ``up`` is √σⱼ uⱼ, row j of
``down`` √σⱼ vⱼ. Both have a row per singular triplet, so that random signs of columns are as many as the matrix has
rows or columns, and values that share a scale are of like size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hubmerge.linalg import Delta, truncated_svd
from hubmerge.spec import LowRank

UP, DOWN = ".up", ".down"
"""What the names of a delta's two tensors end with."""


def balanced(delta: Delta, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest product of balanced factors with ``rank`` rows (Eckart-Young); float32.

    Shapes: up (rank, out), down (rank, in), of a delta (out, in); rows beyond the delta's own rank are zero.
    """
    found = truncated_svd(delta, rank)
    roots = found.values.sqrt()[:, None]
    missing = (0, 0, 0, rank - found.rank)
    up, down = (torch.nn.functional.pad(roots * rows, missing) for rows in (found.left.T, found.right))
    return up.float(), down.float()


def superposable(
    adapters: Sequence[Mapping[str, LowRank]],
) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Adapters of one base as models whose tensors are balanced factors, and the base of zeros they stand on.

    Ranks are padded to the largest that any adapter has there; a delta that an adapter lacks is zero.

    Args:
        adapters: Deltas by name, with their scales; of equal shapes where names are equal.

    Returns:
        The base and the models, for ``encode_tensors``. ``retrieved`` undoes it.
    """
    shapes = {name: delta.shape for adapter in adapters for name, delta in adapter.items()}
    ranks = {name: max(a[name].rank for a in adapters if name in a) for name in shapes}
    base: dict[str, torch.Tensor] = {}
    models: list[dict[str, torch.Tensor]] = [{} for _ in adapters]
    for name, (rows, columns) in shapes.items():
        base[name + UP], base[name + DOWN] = torch.zeros(ranks[name], rows), torch.zeros(ranks[name], columns)
        for model, adapter in zip(models, adapters, strict=True):
            pair = balanced(adapter[name], ranks[name]) if name in adapter else (base[name + UP], base[name + DOWN])
            model[name + UP], model[name + DOWN] = pair
    return base, models


def retrieved(tensors: Mapping[str, torch.Tensor], ranks: Mapping[str, int]) -> dict[str, LowRank]:
    """One adapter's deltas from its factors.

    Args:
        tensors: Of ``decode_tensors``.
        ranks: The adapter's own, by name. Rows beyond them hold nothing of it, but what others left there.
    """
    return {
        name: LowRank(tensors[name + UP][:rank].T.contiguous(), tensors[name + DOWN][:rank])
        for name, rank in ranks.items()
    }
