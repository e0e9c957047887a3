"""Counter-based random bits: a function of (seed, names, index), with no generator state anywhere.

The stream of a key is Philox4x64-10 (Salmon et al., SC 2011) in counter mode. Block b (b = 0, 1, …) is the output for
the 256-bit counter b + 1; word w of the stream is output word w % 4 of block w // 4; and 16-bit lane i of the stream is
bits [16 j, 16 j + 16) of word i // 4, with j = i % 4. Element i of a tensor uses lane i, so any range can be computed
alone.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

LANE_BITS = 16
"""Bits per element: probabilities are multiples of 2**-16, at most 2**-17 away from what is asked for."""

_WORDS_PER_BLOCK = 4
_LANES_PER_WORD = 4


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


def lanes(key: tuple[int, int], start: int, count: int) -> npt.NDArray[np.uint16]:
    """Lanes [start, start + count) of the key's stream: uniform 16-bit integers, (count,)."""
    word, skip = divmod(start, _LANES_PER_WORD)
    raw = words(key, word, -(-(skip + count) // _LANES_PER_WORD))
    found: npt.NDArray[np.uint16] = raw.astype("<u8", copy=False).view("<u2")
    return found[skip : skip + count]


def threshold(probability: float) -> int:
    """The lane value below which an event of this probability happens; at least 1 for a positive probability."""
    return max(1, round(probability * (1 << LANE_BITS))) if probability > 0 else 0


def realised(probability: float) -> float:
    """The probability that ``bernoulli`` really has: the nearest multiple of 2**-16."""
    return threshold(probability) / (1 << LANE_BITS)


def bernoulli(key: tuple[int, int], start: int, count: int, probability: float) -> npt.NDArray[np.bool_]:
    """Independent events with the realised probability for elements [start, start + count), (count,)."""
    return lanes(key, start, count) < threshold(probability)
