"""Ranking magnitudes by their bit patterns: counting them in a window, shrinking the window, and cutting at its answer.

The bit pattern of a magnitude, read as an integer, orders like the magnitude itself. Equal magnitudes rank by position
(tensor index, then flat index).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

GRAIN = 32768
"""Elements per block in which ties are counted; chunks start at multiples of it."""
MAX_BINS_LOG2 = 20
"""log2 of the most bins in a window."""
FLUSH_SIZE = 1 << 20
"""Pending hits after which a tally folds them into its histogram."""
SORT_SIZE = 1 << 18
"""Up to this many hits, sorting beats a histogram."""

Ints: TypeAlias = npt.NDArray[np.signedinteger[Any]]


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a ranking by magnitude is cut: above are all larger patterns, and the first of the equal ones.

    An equal one is above if it comes before (``index``, ``start``), or is among the first ``quota`` of the grain that
    begins there.
    """

    pattern: int
    index: int
    start: int = 0
    quota: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """Patterns [lo, hi) under study, in bins of 2**shift; ties of the pattern ``guess`` are counted per grain."""

    lo: int
    hi: int
    shift: int
    guess: int = -1

    @classmethod
    def over(cls, lo: int, hi: int) -> Window:
        """The finest bins that cover a range; each begins at a multiple of its width."""
        shift = max(0, (hi - lo - 1).bit_length() - MAX_BINS_LOG2)
        return cls(lo >> shift << shift, hi, shift)

    @property
    def bins(self) -> int:
        """Number of bins."""
        return (self.hi - self.lo - 1 >> self.shift) + 1


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of one pass for one window; tallies of the same window add up."""

    bins: int = 0
    above: int = 0
    hits: tuple[Ints, ...] = ()
    """Bin numbers not yet counted; ties of the guess are not among them."""
    pending: int = 0
    counts: Ints | None = None
    low: int = 0
    """Bitwise or of the hits' positions within their bins: 0 when every hit is the first pattern of its bin."""
    ties: tuple[tuple[int, int, Ints], ...] = ()
    """(tensor index, number of the first grain, ties per grain)."""

    def __add__(self, other: Tally) -> Tally:
        counts = other.counts if self.counts is None else self.counts
        if self.counts is not None and other.counts is not None:
            counts = self.counts + other.counts
        total = Tally(
            max(self.bins, other.bins),
            self.above + other.above,
            self.hits + other.hits,
            self.pending + other.pending,
            counts,
            self.low | other.low,
            self.ties + other.ties,
        )
        return replace(total, hits=(), pending=0, counts=total.dense()) if total.pending > FLUSH_SIZE else total

    def dense(self) -> Ints:
        """Count per bin, (bins,)."""
        counts = np.zeros(self.bins, np.int64) if self.counts is None else self.counts
        return counts + np.bincount(np.concatenate(self.hits), minlength=self.bins) if self.hits else counts

    def ranked(self, window: Window) -> tuple[Ints, Ints, Ints]:
        """Non-empty bins in ascending order, their counts, and the number of elements at or above each."""
        if self.counts is None and self.pending <= SORT_SIZE:
            hits = np.concatenate(self.hits) if self.hits else np.zeros(0, np.int64)
            bins, counts = np.unique(hits, return_counts=True)
        else:
            dense = self.dense()
            bins = np.flatnonzero(dense)
            counts = dense[bins]
        if tied := sum(int(row[2].sum()) for row in self.ties):
            guess = window.guess - window.lo >> window.shift
            at = np.searchsorted(bins, guess)
            bins, counts = np.insert(bins, at, guess), np.insert(counts, at, tied)
        return bins, counts, self.above + np.cumsum(counts[::-1])[::-1]


def count(patterns: Ints, window: Window, where: tuple[int, int] | None) -> Tally:
    """Count the patterns above and inside a window; ``where``: (tensor index, number of the chunk's first grain)."""
    inside = patterns >= window.lo
    at_least = int(np.count_nonzero(inside))
    if window.hi <= infinity(patterns.itemsize * 8 - 1):
        inside &= patterns < window.hi
    within = int(np.count_nonzero(inside))
    ties: tuple[tuple[int, int, Ints], ...] = ()
    if where is not None and window.guess >= 0:
        # In coarse formats a single pattern can be a tenth of all; counting is ten times faster than collecting.
        tied = patterns == window.guess
        grains = [int(np.count_nonzero(tied[a : a + GRAIN])) for a in range(0, len(tied), GRAIN)]
        if any(grains):
            ties = ((*where, np.array(grains)),)
            np.greater(inside, tied, out=inside)
    hits = patterns[inside] - patterns.dtype.type(window.lo)
    low = int(np.bitwise_or.reduce(hits)) & ((1 << window.shift) - 1)
    hits = (hits >> window.shift).astype(np.int32, copy=False)
    return Tally(window.bins, at_least - within, (hits,), len(hits), None, low, ties)


def predict(window: Window, tally: Tally, rank: float, seen: int) -> Window:
    """A window that most likely holds the k-th magnitude, if ``rank`` is its rank in a sample of ``seen`` elements."""
    bins, _, at_least = tally.ranked(window)
    if not len(bins):
        return Window.over(window.lo, window.hi)
    rarer = min(rank, seen - rank)
    margin = 0.03 * rarer + 4 * rarer**0.5
    upward = at_least[::-1]

    def bin_at(wanted: float) -> int:
        return int(bins[len(bins) - 1 - min(int(np.searchsorted(upward, wanted)), len(bins) - 1)])

    lo, hi = window.lo, window.hi
    if rank + margin <= at_least[0]:
        low = bin_at(rank + margin)
        # Zeros are common, and bins that reach down to them would be coarse.
        low = int(bins[1]) if low == window.lo == 0 and bin_at(rank) > 0 else low
        lo = window.lo + (low << window.shift)
    if rank - margin > tally.above:
        hi = min(window.hi, window.lo + (bin_at(rank - margin) + 1 << window.shift))
    found = Window.over(lo, hi)
    return found if tally.low else replace(found, guess=window.lo + (bin_at(rank) << window.shift))


def narrow(window: Window, tally: Tally, k: int, top: int, *, all_ties: bool) -> Window | Cut:
    """The cut below the k-th largest magnitude, or a smaller window that certainly holds it."""
    bins, counts, at_least = tally.ranked(window)
    if k <= tally.above:
        return Window.over(window.hi, top)
    if not len(bins) or k > at_least[0]:
        return Window.over(0, window.lo)
    at = len(bins) - 1 - int(np.searchsorted(at_least[::-1], k))
    pattern = window.lo + (int(bins[at]) << window.shift)
    alone = bool(tally.ties) and window.guess == pattern and np.count_nonzero(bins == bins[at]) == 1
    if tally.low and not alone:
        narrower = Window.over(pattern, min(window.hi, pattern + (1 << window.shift)))
        return replace(narrower, guess=pattern if narrower.shift == 0 else -1)
    quota = k - int(at_least[at] - counts[at])
    if all_ties or pattern == 0 or quota == counts[at]:
        return Cut(pattern, sys.maxsize)
    if window.guess != pattern:
        return Window(pattern, pattern + 1, 0, guess=pattern)
    return _locate(pattern, tally, quota)


def _locate(pattern: int, tally: Tally, quota: int) -> Cut:
    """The cut at which the first ``quota`` ties are above."""
    for index, grain, counts in sorted(tally.ties, key=lambda row: row[:2]):
        total = int(counts.sum())
        if quota < total:
            before = np.cumsum(counts) - counts
            at = int(np.searchsorted(before, quota, side="right")) - 1
            return Cut(pattern, index, (grain + at) * GRAIN, quota - int(before[at]))
        quota -= total
    return Cut(pattern, sys.maxsize)


def keep_above_(values: torch.Tensor, cut: Cut, index: int, start: int) -> torch.Tensor:
    """Set to 0 what lies below the cut, in place.

    Args:
        values: Flat chunk (n,).
        cut: The cut.
        index: Position of the tensor in the canonical order.
        start: Flat index of the chunk's first element, a multiple of the grain.
    """
    threshold = _magnitude(cut.pattern, values.dtype)
    just_below = _magnitude(max(cut.pattern - 1, 0), values.dtype)
    split = len(values) if index < cut.index else 0
    if index == cut.index:
        split = min(max(cut.start - start, 0), len(values))
        if start <= cut.start < start + len(values):
            grain = values[split : split + GRAIN]
            grain[(grain.abs() == threshold).nonzero()[cut.quota :]] = 0.0
            split += len(grain)
    for part, limit in ((values[:split], just_below), (values[split:], threshold)):
        if len(part):
            torch.hardshrink(part, limit, out=part)
    return values


def patterns_of(values: torch.Tensor) -> tuple[Ints, int]:
    """The magnitudes' bit patterns (n,) and their number of bits; the values are overwritten."""
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    return values.abs_().view(integer).numpy(), values.element_size() * 8 - 1


def _magnitude(pattern: int, dtype: torch.dtype) -> float:
    integer, real = (np.int64, np.float64) if dtype == torch.float64 else (np.int32, np.float32)
    return float(np.array(pattern, integer).view(real))


def infinity(bits: int) -> int:
    """The pattern of infinity among magnitudes of that many bits; larger ones are NaN."""
    return 0x7F800000 if bits == 31 else 0x7FF0000000000000
