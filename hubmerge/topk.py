"""Exact selection of the k largest magnitudes of a whole model, or of one tensor, in streaming passes.

The bit pattern of a magnitude, read as an integer, orders like the magnitude itself. A pass counts the patterns above a
window and those inside it by bins; the window shrinks until a bin is a single pattern: the threshold. The first passes
look at a sample only and merely guess a narrow window: a guess that misses costs another pass, never exactness.

Equal magnitudes rank by position (tensor index, then flat index), so exactly k elements are selected. Where only a part
of the ties at the threshold is selected, a pass counts them per grain; the grain in which they run out is resolved when
it is trimmed.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from hubmerge.spec import TensorGroup

GRAIN = 32768
"""Elements per block of the tie counts and of the sample; chunks start at multiples of it."""
SAMPLE_EVERY = 64
"""One grain in this many is sampled."""
SAMPLE_ALIGN = 8
"""Sampled grains are multiples of this one: chunks of 1, 2, 4 or 8 grains begin with them."""
MIN_SAMPLE = 4096
"""Fewer sampled elements than this predict nothing."""
MAX_BINS_LOG2 = 19
"""log2 of the most bins in a window."""
FLUSH_SIZE = 1 << 20
"""Pending hits after which a tally folds them into its histogram."""
SORT_SIZE = 1 << 14
"""Up to this many hits, sorting beats a histogram."""

Ints: TypeAlias = npt.NDArray[np.signedinteger[Any]]
Ranks: TypeAlias = Callable[[Any, int], Sequence[int]]
"""From a pool's settings and size: how many elements lie above each of its cuts."""


class PoolKey(NamedTuple):
    """Elements that are ranked against each other: one model's tensors of one compute dtype with equal settings."""

    model: int
    bits: int
    """Bits of a magnitude's pattern: 31 for float32, 63 for float64."""
    settings: Hashable


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
        """The finest bins over a range."""
        return cls(lo, hi, max(0, (hi - lo - 1).bit_length() - MAX_BINS_LOG2))

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
    """Bin numbers not yet counted."""
    pending: int = 0
    counts: Ints | None = None
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
            self.ties + other.ties,
        )
        return replace(total, hits=(), pending=0, counts=total.dense()) if total.pending > FLUSH_SIZE else total

    def dense(self) -> Ints:
        """Count per bin, (bins,)."""
        counts = np.zeros(self.bins, np.int64) if self.counts is None else self.counts
        return counts + np.bincount(np.concatenate(self.hits), minlength=self.bins) if self.hits else counts

    def ranked(self) -> tuple[Ints, Ints, Ints]:
        """Non-empty bins in ascending order, their counts, and the number of elements at or above each."""
        if self.counts is None and self.pending <= SORT_SIZE:
            hits = np.concatenate(self.hits) if self.hits else np.zeros(0, np.int64)
            bins, counts = np.unique(hits, return_counts=True)
        else:
            dense = self.dense()
            bins = np.flatnonzero(dense)
            counts = dense[bins]
        return bins, counts, self.above + np.cumsum(counts[::-1])[::-1]


@dataclass(frozen=True, slots=True)
class PoolTally:
    """A pass's counts for one pool, a tally per cut."""

    size: int = 0
    """Elements of the tensors whose beginning was seen."""
    seen: int = 0
    """Elements looked at."""
    tallies: tuple[Tally, ...] = ()

    def __add__(self, other: PoolTally) -> PoolTally:
        tallies = self.tallies or other.tallies
        if self.tallies and other.tallies:
            tallies = tuple(a + b for a, b in zip(self.tallies, other.tallies, strict=True))
        return PoolTally(self.size + other.size, self.seen + other.seen, tallies)


@dataclass(frozen=True, slots=True)
class Pool:
    """What is known of a pool: its size, and per cut the window under study or the answer."""

    bits: int
    size: int
    marks: tuple[Window | Cut, ...]
    sampling: bool

    @classmethod
    def unknown(cls, bits: int, size: int) -> Pool:
        """A pool before its first pass; one window serves all cuts."""
        return cls(bits, size, (Window.over(0, 1 << bits),), sampling=True)

    @property
    def done(self) -> bool:
        """Whether every cut is known."""
        return all(isinstance(m, Cut) for m in self.marks)

    def settled(self, total: PoolTally, ranks: Sequence[int], *, all_ties: bool) -> Pool:
        """The pool after a pass."""
        repeat = len(ranks) if len(self.marks) == 1 else 1
        marks, tallies = self.marks * repeat, (total.tallies or (Tally(),)) * repeat
        if self.sampling and total.seen < min(self.size, MIN_SAMPLE):
            return replace(self, sampling=False)
        sampled = self.sampling and total.seen < self.size
        found: list[Window | Cut] = []
        for mark, tally, k in zip(marks, tallies, ranks, strict=True):
            if isinstance(mark, Cut):
                found.append(mark)
            elif not 0 < k < self.size:
                found.append(Cut(0, sys.maxsize) if k > 0 else Cut(_infinity(self.bits), -1))
            elif sampled:
                found.append(_predict(mark, tally, k * total.seen / self.size, total.seen))
            else:
                found.append(_narrow(mark, tally, k, 1 << self.bits, all_ties=all_ties))
        finer = any(
            isinstance(old, Window) and isinstance(new, Window) and new.shift < old.shift
            for old, new in zip(marks, found, strict=True)
        )
        return replace(self, marks=tuple(found), sampling=sampled and finer)


def _predict(window: Window, tally: Tally, rank: float, seen: int) -> Window:
    """A window that most likely holds the k-th magnitude, if ``rank`` is its rank in a sample of ``seen`` elements."""
    bins, _, at_least = tally.ranked()
    if not len(bins):
        return Window.over(window.lo, window.hi)
    rarer = min(rank, seen - rank)
    margin = 0.05 * rarer + 4 * rarer**0.5
    upward = at_least[::-1]

    def bin_at(wanted: float) -> int:
        return int(bins[len(bins) - 1 - min(int(np.searchsorted(upward, wanted)), len(bins) - 1)])

    lo, hi = window.lo, window.hi
    if rank + margin <= at_least[0]:
        lo = window.lo + (bin_at(rank + margin) << window.shift)
    if rank - margin > tally.above:
        hi = min(window.hi, window.lo + (bin_at(rank - margin) + 1 << window.shift))
    if window.shift == 0:
        return replace(Window.over(lo, hi), guess=window.lo + bin_at(rank))
    return Window.over(lo, hi)


def _narrow(window: Window, tally: Tally, k: int, top: int, *, all_ties: bool) -> Window | Cut:
    """The cut below the k-th largest magnitude, or a smaller window that certainly holds it."""
    bins, counts, at_least = tally.ranked()
    if k <= tally.above:
        return Window.over(window.hi, top)
    if not len(bins) or k > at_least[0]:
        return Window.over(0, window.lo)
    at = len(bins) - 1 - int(np.searchsorted(at_least[::-1], k))
    pattern = window.lo + (int(bins[at]) << window.shift)
    if window.shift:
        return Window.over(pattern, min(window.hi, pattern + (1 << window.shift)))
    quota = k - int(at_least[at] - counts[at])
    if all_ties or quota == counts[at]:
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


@dataclass(frozen=True, slots=True)
class Selection:
    """The search for the cuts of all pools: a ``Stats``. Contributions to a pass and their sums fill ``counted``."""

    pools: Mapping[PoolKey, Pool] = field(default_factory=dict)
    counted: Mapping[PoolKey, PoolTally] = field(default_factory=dict)
    sampling: bool = True
    first: bool = True
    done: bool = False

    def __add__(self, other: Selection) -> Selection:
        counted = dict(self.counted)
        for key, tally in other.counted.items():
            counted[key] = counted[key] + tally if key in counted else tally
        return replace(self, counted=counted)

    def wants(self, name: str, start: int = 0, stop: int | None = None) -> bool:
        """Sampling passes need the sampled grains, and the beginning of each tensor, which tells its size."""
        return not self.sampling or start == 0 or stop is None or bool(_sampled(name, start, stop))

    def observe(
        self, group: TensorGroup, settings: Sequence[Hashable | None], values: Callable[[int], torch.Tensor]
    ) -> Selection:
        """The chunk's contribution to the current pass.

        Args:
            group: The chunk.
            settings: Per model what selects its pool, equal within a tensor; None for a model that needs no cut.
            values: Model i's values (n,) in a buffer that may be overwritten; called only where they are needed.
        """
        counted = {}
        # A group does not tell where it ends; sampled grains are placed where chunks begin.
        if self.wants(group.name, group.start, group.start + GRAIN):
            for i, setting in enumerate(settings):
                if setting is not None and self._turn(i, setting):
                    patterns, bits = _patterns(values(i))
                    key = PoolKey(i, bits, setting)
                    counted[key] = self._look(group, key, patterns)
        return Selection(counted=counted)

    def _turn(self, i: int, setting: Hashable) -> bool:
        """Whether this pass is about a pool of this model."""
        if self.first:
            return True
        pools = (self.pools.get(PoolKey(i, bits, setting)) for bits in (31, 63))
        return any(p is not None and not p.done and p.sampling == self.sampling for p in pools)

    def _look(self, group: TensorGroup, key: PoolKey, patterns: Ints) -> PoolTally:
        size = group.numel if group.start == 0 else 0
        pool = self.pools.get(key) or Pool.unknown(key.bits, 0)
        if pool.done or pool.sampling != self.sampling:
            return PoolTally(size)
        if self.sampling and group.numel > GRAIN:
            grains = _sampled(group.name, group.start, group.start + len(patterns))
            if not grains:
                return PoolTally(size)
            patterns = np.concatenate([patterns[g * GRAIN - group.start :][:GRAIN] for g in grains])
        where = None if self.sampling else (group.index, group.start // GRAIN)
        tallies = tuple(_count(patterns, m, where) if isinstance(m, Window) else Tally() for m in pool.marks)
        return PoolTally(size, len(patterns), tallies)

    def settle(self, total: Selection, ranks: Ranks, *, all_ties: bool = False) -> Selection:
        """What the pass's total says.

        Args:
            total: Sum of the contributions.
            ranks: How many elements are to be above each cut.
            all_ties: Select every element that equals the k-th, instead of exactly k.
        """
        pools = dict(self.pools)
        for key, counted in total.counted.items():
            pool = pools.get(key) or Pool.unknown(key.bits, counted.size)
            if not pool.done and pool.sampling == self.sampling:
                pools[key] = pool.settled(counted, ranks(key.settings, pool.size), all_ties=all_ties)
        sampling = any(p.sampling for p in pools.values() if not p.done)
        return Selection(pools, sampling=sampling, first=False, done=all(p.done for p in pools.values()))

    def trim_(
        self, group: TensorGroup, i: int, setting: Hashable, values: torch.Tensor, which: int = 0
    ) -> torch.Tensor:
        """Set to 0 what lies below model i's cut number ``which``, in place; values (n,) are the group's chunk."""
        cut = self.pools[PoolKey(i, values.element_size() * 8 - 1, setting)].marks[which]
        assert isinstance(cut, Cut)
        return keep_above_(values, cut, group.index, group.start)


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


def _patterns(values: torch.Tensor) -> tuple[Ints, int]:
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    return values.abs_().view(integer).numpy(), values.element_size() * 8 - 1


def _magnitude(pattern: int, dtype: torch.dtype) -> float:
    integer, real = (np.int64, np.float64) if dtype == torch.float64 else (np.int32, np.float32)
    return float(np.array(pattern, integer).view(real))


def _infinity(bits: int) -> int:
    return 0x7F800000 if bits == 31 else 0x7FF0000000000000


def _sampled(name: str, start: int, stop: int) -> range:
    """Numbers of the sampled grains among elements [start, stop); which ones depends on the tensor's name."""
    phase = zlib.crc32(name.encode()) % (SAMPLE_EVERY // SAMPLE_ALIGN) * SAMPLE_ALIGN
    low = start // GRAIN
    return range(low + (phase - low) % SAMPLE_EVERY, -(-stop // GRAIN), SAMPLE_EVERY)


def _count(patterns: Ints, window: Window, where: tuple[int, int] | None) -> Tally:
    """Count the patterns above and inside a window; ``where``: (tensor index, number of the chunk's first grain)."""
    inside = patterns >= window.lo
    at_least = int(np.count_nonzero(inside))
    inside &= patterns < window.hi if window.hi <= _infinity(patterns.itemsize * 8 - 1) else True
    places = np.flatnonzero(inside)
    hits = patterns[places] - patterns.dtype.type(window.lo)
    ties: tuple[tuple[int, int, Ints], ...] = ()
    if where is not None and window.guess >= 0:
        grains = places[hits == window.guess - window.lo] // GRAIN
        if len(grains):
            ties = ((*where, np.bincount(grains)),)
    bins = (hits >> window.shift).astype(np.int32)
    return Tally(window.bins, at_least - len(places), (bins,), len(bins), None, ties)
