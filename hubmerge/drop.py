"""DARE's random drop: keep each entry of a delta with a probability, and rescale what is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from hubmerge.rng import bernoulli, realised, stream_key
from hubmerge.spec import TensorGroup
from hubmerge.sums import Sums, magnitude_sums

Rescale = Literal["inverse", "l1", "none"]

NEGLIGIBLE_NORM = 1e-7
"""Below this L1 norm, mergekit leaves a tensor unscaled."""


def kept_delta(group: TensorGroup, i: int, density: float) -> torch.Tensor:
    """Model i's delta with entries dropped, not rescaled; (n,) in a buffer that may be overwritten.

    Which entries stay depends on the seed, the model's name, the tensor's name and the entry's index alone.
    """
    return _drop_(group.delta(i), group, i, density)


def _drop_(delta: torch.Tensor, group: TensorGroup, i: int, density: float) -> torch.Tensor:
    if density < 1.0:
        values = delta.numpy()
        kept = bernoulli(stream_key(group.seed, group.tasks[i], group.name), group.start, len(values), density)
        np.multiply(values, kept, out=values)
    return delta


def observed_norms(group: TensorGroup, densities: Sequence[float]) -> Sums:
    """L1 norms of the chunk's deltas, then of what is kept of them: 2T sums."""
    whole, kept = [], []
    for i, density in enumerate(densities):
        delta = group.delta(i).abs_()
        whole.append(magnitude_sums(delta))
        kept.append(magnitude_sums(_drop_(delta, group, i, density)))
    return Sums((np.stack([*whole, *kept], axis=1),))


def rescale_factor(rescale: Rescale, density: float, i: int, norms: Any | None) -> float:
    """What model i's kept entries are multiplied by.

    ``inverse`` divides by the probability that was really used, so the expectation is exactly the delta; ``l1``
    restores the tensor's L1 norm from ``norms``.
    """
    if rescale == "none" or density >= 1.0:
        return 1.0
    if rescale == "inverse":
        return 1.0 / realised(density)
    assert isinstance(norms, Sums)
    whole, kept = norms.totals[i], norms.totals[i + len(norms.totals) // 2]
    return whole / kept if min(whole, kept) >= NEGLIGIBLE_NORM else 1.0
