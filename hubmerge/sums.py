"""Sums over whole tensors that decisions hang on, bit-identical however the tensor is cut into chunks.

Values are summed in float64 per grain of 32768 elements from the tensor's start; the grains' sums are added exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import numpy.typing as npt
import torch

from hubmerge.ranking import GRAIN

Doubles = npt.NDArray[np.float64]
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Sums:
    """Several sums over one tensor: a ``Stats``."""

    rows: tuple[Doubles, ...] = ()
    """Per chunk the grains' sums, (grains, sums)."""
    totals: tuple[float, ...] = ()
    done: bool = False

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.rows + other.rows)

    def wants(self, name: str, start: int = 0, stop: int | None = None) -> bool:
        """Everything is needed."""
        return True

    def settled(self) -> Sums:
        """The totals, correctly rounded and hence independent of the rows' order."""
        columns = np.concatenate(self.rows).T.tolist()
        return Sums(totals=tuple(math.fsum(column) for column in columns), done=True)


def per_grain(values: Sequence[torch.Tensor], summands: Callable[[list[Doubles]], list[Doubles]]) -> Sums:
    """Sums of what ``summands`` makes of each grain of the values (n,), in float64."""
    arrays = [v.numpy() for v in values]
    rows = []
    for start in range(0, max(len(arrays[0]), 1), GRAIN):
        grain = [a[start : start + GRAIN].astype(np.float64) for a in arrays]
        rows.append([float(np.add.reduce(s)) for s in summands(grain)])
    return Sums((np.array(rows, np.float64),))


def inner_products(values: Sequence[torch.Tensor]) -> Sums:
    """Inner products of all pairs (i, j) with i ≤ j, in lexicographic order."""
    return per_grain(values, lambda grain: [a * b for a, b in combinations_with_replacement(grain, 2)])


def magnitude_sums(magnitudes: torch.Tensor) -> Doubles:
    """Sums over the grains of non-negative values (n,): blocks of 512 in the values' dtype, then blocks in float64.

    Summing everything in float64 would take four times as long, and without cancellation the blocks lose nothing.
    """
    whole = magnitudes[: len(magnitudes) // GRAIN * GRAIN].view(-1, _BLOCK)
    grains = whole.sum(1).double().view(-1, GRAIN // _BLOCK).sum(1)
    rest = magnitudes[whole.numel() :].sum(dtype=torch.float64)
    found: Doubles = torch.cat([grains, rest.view(1)]).numpy()
    return found
