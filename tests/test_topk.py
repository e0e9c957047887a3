"""The streaming selection against sorting: exactly k, ties by position, whatever the sample guessed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge import ranking, topk
from hubmerge.memory import MemoryGroup
from hubmerge.topk import Selection, keep_largest_


@contextlib.contextmanager
def tiny() -> Iterator[None]:
    """Constants so small that little data goes through samples, coarse bins, flushes and grain boundaries."""
    with (
        mock.patch.multiple(ranking, GRAIN=8, MAX_BINS_LOG2=3, FLUSH_SIZE=32, SORT_SIZE=16),
        mock.patch.multiple(topk, GRAIN=8, SAMPLE_EVERY=4, SAMPLE_ALIGN=1, MIN_SAMPLE=3),
    ):
        yield


def select(
    deltas: Sequence[torch.Tensor], ranks: topk.Ranks, *, chunk: int, all_ties: bool = False, order: int = 0
) -> tuple[list[list[torch.Tensor]], int]:
    """Per cut the trimmed tensors, and the number of passes."""
    parts = []
    for index, delta in enumerate(deltas):
        whole = MemoryGroup(
            torch.zeros_like(delta), [delta], tasks=["a"], weights=[1.0], params=[None], name=f"t{index}", index=index
        )
        parts.append([whole.chunk(a, min(a + chunk, len(delta))) for a in range(0, max(len(delta), 1), chunk)])
    shuffled = [part for some in parts for part in some]
    random.Random(order).shuffle(shuffled)
    found, passes = Selection(), 0
    while not found.done:
        total = None
        for part in shuffled:
            counted = found.observe(part, ["pool"], part.delta)
            total = counted if total is None else total + counted
        assert total is not None
        found, passes = found.settle(total, ranks, all_ties=all_ties), passes + 1
        assert passes < 40
    cuts = len(ranks("pool", sum(map(len, deltas))))
    return [
        [torch.cat([found.trim_(p, 0, "pool", p.delta(0), which) for p in some]) for some in parts]
        for which in range(cuts)
    ], passes


def by_sorting(deltas: Sequence[torch.Tensor], k: int, *, all_ties: bool = False) -> list[torch.Tensor]:
    flat = torch.cat(list(deltas))
    order = torch.sort(flat.abs(), descending=True, stable=True).indices
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[order[:k]] = True
    if all_ties and 0 < k <= len(flat):
        kept |= flat.abs() == flat.abs()[order[k - 1]]
    return list(torch.where(kept, flat, torch.zeros_like(flat)).split([len(d) for d in deltas]))


def assert_selected(deltas: Sequence[torch.Tensor], k: int, *, chunk: int, order: int = 0) -> int:
    (trimmed,), passes = select(deltas, lambda _, n: (k,), chunk=chunk, order=order)
    for got, wanted in zip(trimmed, by_sorting(deltas, k), strict=True):
        assert torch.equal(got, wanted)
    return passes


values = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 1.5, -2.0]), st.floats(-4, 4, width=32))
few_values = st.sampled_from([0.0, -0.0, 0.5, -0.5, 0.75, 1.0, -1.0])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.one_of(values, few_values), max_size=60), min_size=1, max_size=4),
    st.floats(0, 1),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 9),
)
def test_selection_is_what_sorting_selects(
    lists: list[list[float]], fraction: float, grains: int, dtype: torch.dtype, order: int
) -> None:
    deltas = [torch.tensor(some, dtype=dtype) for some in lists]
    with tiny():
        assert_selected(deltas, int(fraction * sum(map(len, deltas))), chunk=8 * grains, order=order)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(few_values, min_size=1, max_size=120), st.floats(0, 1), st.floats(0, 1))
def test_two_cuts_and_all_ties(some: list[float], first: float, second: float) -> None:
    deltas = [torch.tensor(some)]
    ks = sorted(int(f * len(some)) for f in (first, second))
    with tiny():
        exact, _ = select(deltas, lambda _, n: ks, chunk=16)
        loose, _ = select(deltas, lambda _, n: ks, chunk=16, all_ties=True)
    for k, got, got_loose in zip(ks, exact, loose, strict=True):
        assert torch.equal(got[0], by_sorting(deltas, k)[0])
        assert torch.equal(got_loose[0], by_sorting(deltas, k, all_ties=True)[0])


def _large(kind: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [2_200_000, 5000, 700_000]
    deltas = [torch.randn(n, generator=generator) * 1e-3 for n in sizes]
    if kind == "coarse":
        return [(d * 4000).round() / 8192 for d in deltas]
    if kind == "bfloat16":
        bases = [(torch.randn(n, generator=generator) * 0.02).bfloat16() for n in sizes]
        return [(b.float() + d).bfloat16().float() - b.float() for b, d in zip(bases, deltas, strict=True)]
    if kind == "float64":
        return [d.double() * (1 + 1e-12 * torch.arange(len(d), dtype=torch.float64)) for d in deltas]
    if kind == "clustered":
        # All that is large lies where the sample does not look.
        return [d * (torch.arange(len(d)) % 200_000 < 30_000) for d in deltas]
    return deltas


@pytest.mark.parametrize(
    ("kind", "fraction"),
    [(k, f) for k in ("normal", "coarse", "bfloat16") for f in (0.001, 0.2, 0.9)]
    + [("float64", 0.2), ("clustered", 0.05), ("clustered", 0.2)],
)
def test_large_tensors_through_the_sample(kind: str, fraction: float) -> None:
    deltas = _large(kind)
    passes = assert_selected(deltas, int(fraction * sum(map(len, deltas))), chunk=131072)
    assert passes <= (4 if kind in {"normal", "coarse", "bfloat16"} else 7)


def test_a_sampling_pass_reads_little() -> None:
    found = Selection()
    grains = [g for g in range(6400) if found.wants("some.tensor", g * topk.GRAIN, (g + 1) * topk.GRAIN)]
    assert len(grains) in {100, 101}
    assert found.wants("some.tensor", 0, topk.GRAIN)
    assert found.wants("some.tensor")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.one_of(values, few_values), max_size=60), min_size=1, max_size=4),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_what_tensors_are_turned_into_is_ranked_without_a_sample(
    lists: list[list[float]], fraction: float, dtype: torch.dtype
) -> None:
    turned = [torch.tensor(some, dtype=dtype) for some in lists]
    size, seen = sum(map(len, turned)), []
    groups = [
        MemoryGroup(torch.zeros(2, 3), [torch.zeros(2, 3)], tasks=["a"], weights=[1.0], params=[None], index=i)
        for i in range(len(turned))
    ]
    found = Selection(sampling=False)
    with tiny():
        while not found.done:
            total = Selection()
            for group, made in zip(groups, turned, strict=True):
                total += found.observe(group, ["pool"], lambda _, made=made: made.clone())
            found = found.settle(total, lambda _, n: (seen.append(n) or int(fraction * n),))
        trimmed = [found.trim_(g, 0, "pool", made.clone()) for g, made in zip(groups, turned, strict=True)]
    assert set(seen) == {size}
    for got, wanted in zip(trimmed, by_sorting(turned, int(fraction * size)), strict=True):
        assert torch.equal(got, wanted)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.one_of(values, few_values), max_size=60), st.integers(0, 62), st.booleans())
def test_values_at_hand_are_selected_as_by_sorting(some: list[float], k: int, all_ties: bool) -> None:
    given_ = torch.tensor(some)
    with mock.patch.multiple(topk, MIN_SAMPLE=3, _STRIDE=3, _DEVIATIONS=1, _PART=7):
        kept = keep_largest_(given_.clone().view(1, -1), k, all_ties=all_ties).view(-1)
    assert torch.equal(kept, by_sorting([given_], k, all_ties=all_ties)[0])


@pytest.mark.parametrize("shape", ["normal", "few values", "a sample that misleads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_values_at_hand_are_selected_as_by_sorting(dtype: torch.dtype, shape: str) -> None:
    given_ = torch.randn(700_001, generator=torch.Generator().manual_seed(0), dtype=dtype)
    if shape == "few values":
        given_ = given_.mul_(3).round_()
    if shape == "a sample that misleads":
        given_[:: topk._STRIDE] *= 1000.0
    for k in (1, 7, 140_000, 690_000, 700_000):
        assert torch.equal(keep_largest_(given_.clone(), k), by_sorting([given_], k)[0]), k


def test_settings_that_differ_rank_apart() -> None:
    delta = torch.arange(1.0, 11.0)
    group = MemoryGroup(torch.zeros(10), [delta, delta], tasks=["a", "b"], weights=[1.0, 1.0], params=[None, None])
    part = group.chunk(0, 10)
    found = Selection()
    while not found.done:
        found = found.settle(found.observe(part, [0.2, 0.5], part.delta), lambda share, n: (int(share * n),))
    assert found.trim_(part, 0, 0.2, part.delta(0)).count_nonzero() == 2
    assert found.trim_(part, 1, 0.5, part.delta(1)).count_nonzero() == 5
