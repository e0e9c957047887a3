"""Exact selection of the k largest magnitudes of a whole model, or of one tensor, in streaming passes.

A pass counts the patterns above a window and those inside it by bins; the window shrinks until a bin is a single
pattern: the threshold. The first passes look at a sample only and merely guess a narrow window: a guess that misses
costs another pass, never exactness. Exactly k elements are selected: where only a part of the ties at the threshold is,
a pass counts them per grain, and the grain in which they run out is resolved when it is trimmed.

Where all values are at hand, ``keep_largest_`` makes the same selection without passes.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from hubmerge.ranking import GRAIN, Cut, Ints, Tally, Window, count, infinity, keep_above_, narrow, patterns_of, predict
from hubmerge.spec import TensorGroup

SAMPLE_EVERY = 64
"""One grain in this many is sampled."""
SAMPLE_ALIGN = 8
"""Sampled grains are multiples of this one: chunks of 1, 2, 4 or 8 grains begin with them."""
MIN_SAMPLE = 4096
"""Fewer sampled elements than this predict nothing."""
_STRIDE = 61
"""Where all values are at hand, one in this many is sampled; prime, so that no column of a matrix is left out."""
_DEVIATIONS = 6
"""How many standard deviations of a sample's rank a window is wide, on either side."""
_PART = 1 << 18

Ranks: TypeAlias = Callable[[Any, int], Sequence[int]]
"""From a pool's settings and size: how many elements lie above each of its cuts."""


class PoolKey(NamedTuple):
    """Elements that are ranked against each other: one model's tensors of one compute dtype with equal settings."""

    model: int
    bits: int
    """Bits of a magnitude's pattern: 31 for float32, 63 for float64."""
    settings: Hashable


@dataclass(frozen=True, slots=True)
class PoolTally:
    """A pass's counts for one pool, a tally per cut."""

    size: int = 0
    """Elements of the tensors whose beginning was seen."""
    seen: int = 0
    """Elements looked at; without sampling, all there are."""
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
    def unknown(cls, bits: int, size: int, *, sampling: bool) -> Pool:
        """A pool before its first pass; one window serves all cuts."""
        return cls(bits, size, (Window.over(0, 1 << bits),), sampling)

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
                found.append(Cut(0, sys.maxsize) if k > 0 else Cut(infinity(self.bits), -1))
            elif sampled:
                found.append(predict(mark, tally, k * total.seen / self.size, total.seen))
            else:
                found.append(narrow(mark, tally, k, 1 << self.bits, all_ties=all_ties))
        finer = any(
            isinstance(old, Window) and isinstance(new, Window) and new.guess < 0 and new.shift < old.shift
            for old, new in zip(marks, found, strict=True)
        )
        return replace(self, marks=tuple(found), sampling=sampled and finer)


@dataclass(frozen=True, slots=True)
class Selection:
    """The search for the cuts of all pools: a ``Stats``. Contributions to a pass and their sums fill ``counted``."""

    pools: Mapping[PoolKey, Pool] = field(default_factory=dict)
    counted: Mapping[PoolKey, PoolTally] = field(default_factory=dict)
    sampling: bool = True
    """Whether this pass looks at a sample only. One that starts with False ranks values that whole tensors are turned
    into: they are dear to make, so no pass is spent on a sample, and there may be any number of them."""
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
                    patterns, bits = patterns_of(values(i))
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
        pool = self.pools.get(key) or Pool.unknown(key.bits, 0, sampling=self.sampling)
        if pool.done or pool.sampling != self.sampling:
            return PoolTally(size)
        if self.sampling and group.numel > GRAIN:
            grains = _sampled(group.name, group.start, group.start + len(patterns))
            if not grains:
                return PoolTally(size)
            patterns = np.concatenate([patterns[g * GRAIN - group.start :][:GRAIN] for g in grains])
        where = None if self.sampling else (group.index, group.start // GRAIN)
        tallies = tuple(count(patterns, m, where) if isinstance(m, Window) else Tally() for m in pool.marks)
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
            size = counted.size if self.sampling else counted.seen
            pool = pools.get(key) or Pool.unknown(key.bits, size, sampling=self.sampling)
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


def keep_largest_(values: torch.Tensor, count: int, *, all_ties: bool = False) -> torch.Tensor:
    """Set all but ``count`` entries to 0, in place: kept are the largest magnitudes, among equal ones the first.

    Args:
        values: Contiguous, of any shape.
        count: How many to keep; more than there are keep all.
        all_ties: Keep every entry that equals the smallest that is kept.
    """
    if count >= values.numel():
        return values
    if count == 0:
        return values.zero_()
    flat = values.view(-1)
    threshold, larger, equal = _kth_magnitude(flat, count)
    if not all_ties and equal > count - larger:
        ties = flat.abs().eq(float(threshold)).nonzero().view(-1)
        flat[ties[count - larger :]] = 0.0
    below = np.nextafter(threshold, 0.0)
    for part in _parts(flat):
        torch.hardshrink(part, float(below), out=part)
    return values


def _kth_magnitude(flat: torch.Tensor, k: int) -> tuple[np.floating[Any], int, int]:
    """The k-th largest magnitude of (n,), 1 ≤ k ≤ n, in its dtype; how many are larger, and how many equal it.

    A sample tells where to look; if the magnitude is not there, or the values are few, it is looked for everywhere.
    """
    low, high = _window(flat, k)
    found = [part.abs() for part in _parts(flat)] if high == math.inf else []
    above = 0
    if not found:
        for part in _parts(flat):
            magnitudes = part.abs()
            above += int((magnitudes > high).sum())
            found.append(magnitudes[(magnitudes >= low) & (magnitudes <= high)])
        if not 0 < k - above <= sum(len(f) for f in found):
            above, found = 0, [part.abs() for part in _parts(flat)]
    ranked = torch.cat(found).cpu().numpy()
    place = len(ranked) - (k - above)
    ranked.partition(place)
    threshold = ranked[place]
    # Behind its place stand the larger ones and others that equal it.
    larger = int((ranked[place:] > threshold).sum())
    return threshold, above + larger, int((ranked == threshold).sum())


def _window(flat: torch.Tensor, k: int) -> tuple[float, float]:
    """Between which magnitudes the k-th largest lies, as far as a sample tells; 0 and infinity if it is too small."""
    sample = flat[::_STRIDE].abs().cpu().numpy()
    size = len(sample)
    if size < MIN_SAMPLE:
        return 0.0, math.inf
    rank, margin = k * size / len(flat), _DEVIATIONS * math.sqrt(size) / 2
    last, first = size - int(rank - margin), size - int(rank + margin)
    sample.sort()
    return float(sample[first]) if first > 0 else 0.0, float(sample[min(last, size - 1)])


def _parts(flat: torch.Tensor) -> Sequence[torch.Tensor]:
    """Pieces that stay in a processor's cache; elsewhere, all at once."""
    return torch.split(flat, _PART) if flat.device.type == "cpu" else (flat,)


def _sampled(name: str, start: int, stop: int) -> range:
    """Numbers of the sampled grains among elements [start, stop); which ones depends on the tensor's name."""
    phase = zlib.crc32(name.encode()) % (SAMPLE_EVERY // SAMPLE_ALIGN) * SAMPLE_ALIGN
    low = start // GRAIN
    return range(low + (phase - low) % SAMPLE_EVERY, -(-stop // GRAIN), SAMPLE_EVERY)
