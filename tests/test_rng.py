"""The random bits: published test vectors, random access, and the statistics they are used for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.rng import SEGMENT, bernoulli, lanes, permutation, realised, signs, stream_key, threshold, words

law = settings(deadline=None, derandomize=True)

ONES = (1 << 64) - 1
PI = [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89]
# Known answers of Random123 for philox4x64-10: counter, key, output.
KNOWN = [
    ([0] * 4, (0, 0), [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]),
    ([ONES] * 4, (ONES, ONES), [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]),
    (
        PI,
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        [0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_numpy_philox_is_the_published_one(counter: list[int], key: tuple[int, int], expected: list[int]) -> None:
    before = (sum(word << 64 * i for i, word in enumerate(counter)) - 1) % (1 << 256)
    generator = np.random.Philox(key=np.array(key, np.uint64), counter=before)
    assert generator.random_raw(4).tolist() == expected


def test_block_b_is_the_output_for_counter_b_plus_1() -> None:
    key = (0x452821E638D01377, 0xBE5466CF34E90C6C)
    one = np.random.Philox(key=np.array(key, np.uint64), counter=6).random_raw(4)
    assert words(key, 24, 4).tolist() == one.tolist()
    word = int(one[1])
    assert lanes(key, (6 * 4 + 1) * 4, 4, 16).tolist() == [(word >> 16 * j) & 0xFFFF for j in range(4)]
    assert lanes(key, (6 * 4 + 1) * 8, 8, 8).tolist() == [(word >> 8 * j) & 0xFF for j in range(8)]


def test_streams_never_change() -> None:
    key = stream_key(0, "a", "t")
    assert key == (0xFCB920655C68CA89, 0xDE87A379A684911D)
    assert words(key, 0, 3).tolist() == [0x7C074C47C7E2C5B1, 0x858C054AD4BA0ED5, 0x3C69C4041BB7323C]
    assert lanes(key, 0, 8, 16).tolist() == [50609, 51170, 19527, 31751, 3797, 54458, 1354, 34188]


@law
@given(st.integers(0, 3000), st.integers(0, 3000), st.sampled_from([8, 16]))
def test_any_range_can_be_computed_alone(start: int, count: int, bits: int) -> None:
    key = stream_key(7, "x")
    assert lanes(key, start, count, bits).tolist() == lanes(key, 0, 6000, bits)[start : start + count].tolist()


@law
@given(st.integers(0, 3), st.integers(1, 3 * SEGMENT), st.floats(0, 1))
def test_events_of_a_segment_do_not_depend_on_its_neighbours(first: int, count: int, p: float) -> None:
    key = stream_key(7, "x")
    whole = bernoulli(key, 0, 6 * SEGMENT, p)
    start = first * SEGMENT
    assert (bernoulli(key, start, count, p) == whole[start : start + count]).all()


def test_events_are_decided_as_documented() -> None:
    key = stream_key(1, "a")
    p = 0.3
    limit = threshold(p)
    expected = []
    for start in (0, SEGMENT):
        k = 0
        for byte in lanes(key, start, SEGMENT, 8).tolist():
            if byte == limit >> 16:
                expected.append(int(lanes(key, (1 << 82) + start + k, 1, 16)[0]) < limit & 0xFFFF)
                k += 1
            else:
                expected.append(byte < limit >> 16)
        assert k > 50
    assert bernoulli(key, 0, 2 * SEGMENT, p).tolist() == expected


def test_far_positions_are_as_cheap_as_near_ones() -> None:
    key = stream_key(7, "x")
    assert lanes(key, 10**12 + 5, 3, 16).tolist() == lanes(key, 10**12, 8, 16)[5:].tolist()


@law
@given(st.lists(st.one_of(st.integers(-5, 99), st.text("ab1", max_size=3)), max_size=4), st.data())
def test_different_parts_have_different_keys(parts: list[int | str], data: st.DataObject) -> None:
    other = data.draw(st.lists(st.one_of(st.integers(-5, 99), st.text("ab1", max_size=3)), max_size=4))
    same = [(type(p), p) for p in parts] == [(type(p), p) for p in other]
    assert (stream_key(*parts) == stream_key(*other)) == same


@law
@given(st.floats(2**-24, 1.0))
def test_a_realised_probability_is_within_its_resolution(p: float) -> None:
    assert abs(realised(p) - p) <= 2**-25


def test_the_ends_are_exact() -> None:
    key = stream_key(0)
    assert not bernoulli(key, 0, 10_000, 0.0).any()
    assert bernoulli(key, 0, 200_000, 1.0).all()
    assert threshold(1e-9) == 1


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_frequencies_and_neighbours_are_those_of_independent_events(p: float) -> None:
    n = 1 << 20
    events = bernoulli(stream_key(3, "task", "tensor"), 0, n, p)
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(events.mean() - p) < 5 * deviation
    both = (events[1:] & events[:-1]).mean()
    assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / n) ** 0.5 * 2
    other = bernoulli(stream_key(3, "task", "other"), 0, n, p)
    assert abs((events & other).mean() - p * p) < 5 * (p * p * (1 - p * p) / n) ** 0.5


def test_signs_and_permutations_never_change() -> None:
    key = stream_key("signs", 0, 1, "layers.0.weight")
    assert words(key, 0, 1).tolist() == [0xE93183442EB1926E]
    assert signs(key, 8).tolist() == [1, -1, -1, -1, 1, -1, -1, 1]
    assert permutation(stream_key("shuffle", 0, 1, "layers.*.weight", 4, 3), 6).tolist() == [5, 0, 4, 2, 1, 3]


@law
@given(st.integers(0, 300))
def test_signs_are_the_bits_of_the_words(count: int) -> None:
    key = stream_key(7, "x")
    bits = "".join(f"{word:064b}"[::-1] for word in words(key, 0, 5).tolist())
    assert signs(key, count).tolist() == [-1 if bit == "1" else 1 for bit in bits[:count]]


@law
@given(st.integers(0, 100), st.integers(0, 10))
def test_a_permutation_sorts_the_words(count: int, seed: int) -> None:
    key = stream_key(seed)
    keys = words(key, 0, count).tolist()
    order = permutation(key, count).tolist()
    assert sorted(order) == list(range(count))
    assert order == sorted(range(count), key=lambda i: (keys[i], i))


def test_equal_words_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    tied = np.array([5, 1, 5, 1, 0, 5], np.uint64)
    monkeypatch.setattr("hubmerge.rng.words", lambda key, start, count: tied[start : start + count])
    assert permutation((0, 0), 6).tolist() == [4, 1, 3, 0, 2, 5]


def test_signs_of_different_streams_are_independent() -> None:
    n = 1 << 16
    drawn = [signs(stream_key("signs", 0, task, name), n).astype(int) for task in (0, 1) for name in ("a", "b")]
    for i, one in enumerate(drawn):
        assert abs(one.mean()) < 5 / n**0.5
        for other in drawn[:i]:
            assert abs((one * other).mean()) < 5 / n**0.5


def test_every_permutation_is_equally_likely() -> None:
    orders = [tuple(permutation(stream_key("shuffle", seed), 3).tolist()) for seed in range(3000)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert max(abs(c - 500) for c in counts) < 5 * (500 * 5 / 6) ** 0.5
