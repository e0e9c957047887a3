"""Measures how task vectors lie to one another: their length, the angles between them, and their interference."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from hubmerge.linalg import truncated_svd


@dataclass(frozen=True, slots=True)
class Geometry:
    """Figures about the task vectors of one set of fine-tunes."""

    relative_norm: float
    """Mean length of a task vector, as a fraction of the base's."""
    cosine: float
    """Mean over pairs of tasks."""
    interference: float
    """Singular task interference, mean over linear weights."""
    relative_interference: float
    """The same with each weight's divided by the sum of the singular values in it: the deltas' length cancels."""


def measure_geometry(
    base: Mapping[str, Tensor], deltas: Sequence[Mapping[str, Tensor]], linear: Collection[str]
) -> Geometry:
    """All figures, for T models' deltas; ``linear`` names the weights (out, in) of linear layers."""
    vectors = torch.stack([flat(delta) for delta in deltas])
    scores = [singular_task_interference([delta[name] for delta in deltas]) for name in sorted(linear)]
    return Geometry(
        relative_norm=float(vectors.norm(dim=1).mean() / flat(base).norm()),
        cosine=mean_cosine(vectors),
        interference=sum(score for score, _ in scores) / len(scores),
        relative_interference=sum(score / total for score, total in scores) / len(scores),
    )


def flat(state: Mapping[str, Tensor]) -> Tensor:
    """All weights end to end, (n,), float64."""
    return torch.cat([tensor.double().view(-1) for tensor in state.values()])


def mean_cosine(vectors: Tensor) -> float:
    """Mean cosine between two different rows of (T, n)."""
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    cosines = [float(unit[i] @ unit[j]) for i, j in combinations(range(len(unit)), 2)]
    return sum(cosines) / len(cosines)


def singular_task_interference(deltas: Sequence[Tensor], rank: int | None = None) -> tuple[float, float]:
    """``‖(UᵀU - I) Σ (VᵀV - I)‖₁`` over the deltas' leading singular triplets side by side, and the sum of Σ.

    Zero if the left or the right spaces of different tasks are orthogonal. The norm is entrywise; directions that a
    delta numerically has not do not count.

    Args:
        deltas: T matrices (out, in).
        rank: Triplets of each; by default the smaller side divided by T, what ``tsv_merge`` keeps.

    Source: Task Singular Vectors, Gargiulo et al., 2025, arXiv 2412.00081, section 3.2.
    """
    k = max(1, min(deltas[0].shape) // len(deltas)) if rank is None else rank
    found = [truncated_svd(delta, k) for delta in deltas]
    left, right = torch.cat([f.left for f in found], dim=1), torch.cat([f.right for f in found], dim=0)
    values = torch.cat([f.values for f in found])
    identity = torch.eye(len(values), dtype=torch.float64)
    score = (left.T @ left - identity) * values @ (right @ right.T - identity)
    return float(score.abs().sum()), float(values.sum())
