"""Counter-based random bits: a function of (seed, names, index), with no generator state anywhere.

The stream of a key is Philox4x64-10 (Salmon et al., SC 2011) in counter mode. Block b (b = 0, 1, …) is the output for
the 256-bit counter b + 1; word w of the stream is output word w % 4 of block w // 4; and lane i of n bits (n = 8 or 16)
is bits [n j, n j + n) of word i // (64 / n), with j = i % (64 / n).

An event of probability q / 2**24 (q an integer) happens to element i if its 8-bit lane i is less than q >> 16. If they
are equal, a 16-bit lane decides, which must be less than q & 0xFFFF: the k-th such element of the segment of 32768
elements that begins at element s uses lane 2**82 + s + k. So one byte decides nearly always, and any segment can be
computed alone.

Sign c is minus if bit c % 64, counted from the lowest, of word c // 64 is set. A permutation of n things lists their
numbers in the ascending order of words 0 to n - 1, equal words in the order of the numbers.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

RESOLUTION_BITS = 24
"""Probabilities are multiples of 2**-24, at most 2**-25 away from what is asked for."""
SEGMENT = 32768
"""Elements whose undecided ones are counted together."""

_WORDS_PER_BLOCK = 4
_UNDECIDED = 1 << 82


def stream_key(*parts: int | str) -> tuple[int, int]:
    """The 128-bit Philox key of a stream, as two words.

    BLAKE2b-128, personalised, over the parts in order: a type byte, the length in 8 bytes little-endian, and the UTF-8
    text (of the decimal form for integers). Different parts never encode to the same bytes.
    """
    digest = hashlib.blake2b(digest_size=16, person=b"hubmerge-rng-1")
    for part in parts:
        text = str(part).encode()
        digest.update(b"i" if isinstance(part, int) else b"s")
        digest.update(len(text).to_bytes(8, "little") + text)
    raw = digest.digest()
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")


def words(key: tuple[int, int], start: int, count: int) -> npt.NDArray[np.uint64]:
    """Words [start, start + count) of the key's stream, (count,)."""
    block, skip = divmod(start, _WORDS_PER_BLOCK)
    # NumPy increments the counter before it generates, hence block b comes from counter b + 1.
    generator = np.random.Philox(key=np.array(key, np.uint64), counter=block)
    found: npt.NDArray[np.uint64] = generator.random_raw(skip + count)
    return found[skip:]


def lanes(key: tuple[int, int], start: int, count: int, bits: int) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Lanes [start, start + count) of 8 or 16 bits of the key's stream: uniform integers, (count,)."""
    per_word = 64 // bits
    word, skip = divmod(start, per_word)
    raw = words(key, word, -(-(skip + count) // per_word))
    found: npt.NDArray[np.unsignedinteger[Any]] = raw.astype("<u8", copy=False).view(f"<u{bits // 8}")
    return found[skip : skip + count]


def threshold(probability: float) -> int:
    """The probability in units of 2**-24; at least 1 if it is positive."""
    return max(1, round(probability * (1 << RESOLUTION_BITS))) if probability > 0 else 0


def realised(probability: float) -> float:
    """The probability that ``bernoulli`` really has: the nearest multiple of 2**-24."""
    return threshold(probability) / (1 << RESOLUTION_BITS)


def bernoulli(key: tuple[int, int], start: int, count: int, probability: float) -> npt.NDArray[np.bool_]:
    """Independent events with the realised probability for elements [start, start + count), (count,).

    Args:
        key: From ``stream_key``.
        start: A multiple of 32768.
        count: Number of elements.
        probability: Between 0 and 1.
    """
    limit = threshold(probability)
    first = lanes(key, start, count, 8)
    happens = first < (limit >> 16)
    if not limit & 0xFFFF:
        return happens
    undecided = np.flatnonzero(first == limit >> 16)
    edges = np.searchsorted(undecided, range(0, count + SEGMENT, SEGMENT))
    for n, (low, high) in enumerate(pairwise(edges.tolist())):
        second = lanes(key, _UNDECIDED + start + n * SEGMENT, high - low, 16)
        happens[undecided[low:high]] = second < (limit & 0xFFFF)
    return happens


def signs(key: tuple[int, int], count: int) -> npt.NDArray[np.int8]:
    """Independent signs, 1 or -1 with equal probability, (count,)."""
    raw = words(key, 0, -(-count // 64)).astype("<u8", copy=False).view(np.uint8)
    minus = np.unpackbits(raw, count=count, bitorder="little")
    return 1 - 2 * minus.view(np.int8)


def permutation(key: tuple[int, int], count: int) -> npt.NDArray[np.intp]:
    """A random order of the numbers below ``count``, (count,)."""
    return np.argsort(words(key, 0, count), kind="stable")
