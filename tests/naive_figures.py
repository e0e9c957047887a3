"""The figures of a merge as their definitions say them, entry by entry in float64: what the others are held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def naive_figures(deltas: Sequence[torch.Tensor], merged: torch.Tensor, base: torch.Tensor) -> dict[str, Any]:
    """Of task vectors, the merged delta and the base, each (n,)."""
    tasks, m = [d.double().numpy() for d in deltas], merged.double().numpy()

    def cosine(a: Any, b: Any) -> float:
        length = np.linalg.norm(a) * np.linalg.norm(b)
        return float(a @ b / length) if length else np.nan

    def agreement(a: Any, b: Any) -> float:
        both = (a != 0) & (b != 0)
        return float((np.sign(a) == np.sign(b))[both].mean()) if both.any() else np.nan

    return {
        "norms": [np.linalg.norm(d) for d in tasks],
        "merged_norm": np.linalg.norm(m),
        "base_norm": np.linalg.norm(base.double().numpy()),
        "cosines": [[cosine(a, b) for b in tasks] for a in tasks],
        "sign_agreement": [[agreement(a, b) for b in tasks] for a in tasks],
        "merged_cosines": [cosine(d, m) for d in tasks],
        "distances": [np.linalg.norm(m - d) / np.linalg.norm(d) if d.any() else np.nan for d in tasks],
    }


def naive_spectra(deltas: Sequence[torch.Tensor], rank: int | None = None) -> dict[str, Any]:
    """Of matrices (out, in): the published formula on singular value decompositions, nothing left out."""
    n = min(deltas[0].shape)
    k = rank or max(1, n // len(deltas))
    ranks = [r for r in (2**i for i in range(20)) if r < n] + [n]
    found = [np.linalg.svd(d.double().numpy(), full_matrices=False) for d in deltas]
    tops = [min(k, int((s > 1e-5 * s[0]).sum())) for _, s, _ in found]
    left = np.concatenate([u[:, :r] for (u, _, _), r in zip(found, tops, strict=True)], axis=1)
    right = np.concatenate([v[:r] for (_, _, v), r in zip(found, tops, strict=True)])
    values = np.concatenate([s[:r] for (_, s, _), r in zip(found, tops, strict=True)])
    one = np.eye(len(values))
    scores = (left.T @ left - one) @ np.diag(values) @ (right @ right.T - one)
    return {
        "energy": [[(s[:r] ** 2).sum() / (s**2).sum() for r in ranks] for _, s, _ in found],
        "interference": np.abs(scores).sum(),
        "induced": np.linalg.norm(scores, 1),
        "nuclear": values.sum(),
    }
