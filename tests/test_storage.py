"""How numbers and booleans are stored: layouts worked by hand, naive loops, and the errors that are promised."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.errors import IntegrityError
from hubmerge.spec import DTYPES
from hubmerge.storage import BLOCK, FORMS, Stored

law = settings(deadline=None, derandomize=True, max_examples=25)

LEVELS = {"int8": 127, "int4": 7}
FLOATS = ["float32", "bfloat16", "int8", "int4"]

magnitudes = st.sampled_from([0.0, 1e-42, 1e-38, 1e-6, 1.0, 1e30])
vectors = st.integers(1, 200).flatmap(
    lambda n: st.lists(
        st.tuples(st.integers(-1000, 1000), magnitudes).map(lambda pair: pair[0] / 1000 * pair[1]),
        min_size=n, max_size=n,
    ).map(torch.tensor)
)  # fmt: skip


def restored(form: str, values: torch.Tensor) -> torch.Tensor:
    return FORMS[form].decode(FORMS[form].encode(values, "t"), len(values))


def float32(x: Fraction | float) -> Fraction:
    """Rounded to the nearest float32."""
    return Fraction(torch.tensor(float(x), dtype=torch.float64).float().item())


def scale_of(block: list[float], levels: int) -> Fraction:
    """The smallest bfloat16 that is at least the largest magnitude divided, in float32, by the levels."""
    quotient = (torch.tensor(max(abs(x) for x in block)) / levels).item()
    (bits,) = struct.unpack("<I", struct.pack("<f", quotient))
    up = bits if bits & 0xFFFF == 0 else (bits >> 16 << 16) + 0x10000
    return Fraction(struct.unpack("<f", struct.pack("<I", up))[0])


@pytest.mark.parametrize("form", ["int8", "int4"])
@law
@given(values=vectors)
def test_integers_agree_with_a_naive_loop(form: str, values: torch.Tensor) -> None:
    found = restored(form, values)
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK].tolist()
        scale = scale_of(block, LEVELS[form])
        for x, got in zip(block, found[start : start + BLOCK].tolist(), strict=True):
            # round() of a Fraction is to the nearest, ties to even; the quotient is rounded to float32 first.
            expected = round(float32(Fraction(x) / scale)) * scale if scale else Fraction(0)
            assert Fraction(got) == float32(expected)


@pytest.mark.parametrize("form", ["int8", "int4"])
@law
@given(values=vectors)
def test_no_value_is_off_by_more_than_half_a_step(form: str, values: torch.Tensor) -> None:
    found = restored(form, values)
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        # Rounding a scale up adds at most 2**-7 of it, or the distance of bfloat16's subnormal numbers.
        step = float(block.abs().max()) / LEVELS[form] * (1 + 2**-7) + 2**-133
        assert float((found[start : start + BLOCK] - block).abs().max()) <= step / 2 * (1 + 1e-5)


def test_int8_by_hand() -> None:
    values = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0] + [0.0] * 57 + [0.0, 0.0] + [0.0] * 62 + [3.0])
    integers, scales = FORMS["int8"].encode(values, "t")
    assert integers.dtype == torch.int8
    assert integers[:7].tolist() == [127, 0, 2, 2, 0, -2, -127]
    assert scales.dtype == torch.bfloat16
    # 3 / 127 = 0.0236220472…; the next bfloat16 above it.
    assert scales.tolist() == [1.0, 0.0, 0.0236816406250]
    assert integers[-1] == 127


def test_int4_by_hand() -> None:
    values = torch.zeros(BLOCK)
    values[0], values[1], values[31], values[32], values[33], values[63] = 7.0, -7.0, 2.0, -1.0, 3.0, -4.0
    pairs, scales = FORMS["int4"].encode(values, "t")
    assert pairs.dtype == torch.uint8
    assert pairs.shape == (32,)
    assert (pairs[0], pairs[1], pairs[31]) == (0xF7, 0x39, 0xC2)
    assert scales.tolist() == [1.0]
    assert torch.equal(FORMS["int4"].decode((pairs, scales), BLOCK), values)


def test_every_pair_of_four_bit_integers_comes_back() -> None:
    pairs = torch.cartesian_prod(torch.arange(-7.0, 8), torch.arange(-7.0, 8))  # (225, 2)
    blocks = torch.full((8, 2, 32), 7.0)  # 31 pairs in each, and one that fixes the scale
    for i, pair in enumerate(pairs):
        blocks[i // 31, :, i % 31] = pair
    assert torch.equal(restored("int4", blocks.view(-1)), blocks.view(-1))


def test_bits_by_hand() -> None:
    bits = torch.tensor([1, 0, 0, 1, 0, 0, 0, 1, 1, 0], dtype=torch.bool)
    (stored,) = FORMS["bits"].encode(bits, "t")
    assert stored.dtype == torch.uint8
    assert stored.tolist() == [0b10001001, 0b1]
    assert torch.equal(FORMS["bits"].decode((stored,), 10), bits)


@law
@given(vectors)
def test_exact_forms_are_exact(values: torch.Tensor) -> None:
    assert torch.equal(restored("float32", values), values)
    assert torch.equal(restored("bits", values > 0), values > 0)
    assert torch.equal(restored("bfloat16", values), values.bfloat16().float())
    assert {name: form.exact for name, form in FORMS.items()} == {
        "float32": True, "bfloat16": False, "int8": False, "int4": False, "bits": True,
    }  # fmt: skip


@pytest.mark.parametrize("form", [*FLOATS, "bits"])
@law
@given(length=st.integers(0, 400), cut=st.integers(0, 6), out=st.booleans())
def test_any_range_is_stored_and_read_alone(form: str, length: int, cut: int, out: bool) -> None:
    values = torch.randn(length, generator=torch.Generator().manual_seed(length))
    values = values > 0 if form == "bits" else values
    cut = min(cut * BLOCK, length)
    whole = FORMS[form].encode(values, "t")
    parts = [FORMS[form].encode(values[a:b], "t") for a, b in ((0, cut), (cut, length))]
    assert all(torch.equal(w, torch.cat(p)) for w, p in zip(whole, zip(*parts, strict=True), strict=True))
    layout = FORMS[form].stored((length,))
    assert [(s.dtype.torch, s.shape) for s in layout] == [(w.dtype, w.shape) for w in whole]
    for a, b in ((0, cut), (cut, length)):
        spans = [s.span(a, b) for s in layout]
        buffer = torch.empty(b - a, dtype=values.dtype) if out else None
        found = FORMS[form].decode([w[low:high] for w, (low, high) in zip(whole, spans, strict=True)], b - a, buffer)
        assert torch.equal(found, FORMS[form].decode(whole, length)[a:b])
        assert buffer is None or found.data_ptr() == buffer.data_ptr() or b == a


@pytest.mark.parametrize("form", FLOATS)
def test_decoded_values_may_be_overwritten(form: str) -> None:
    stored = FORMS[form].encode(torch.randn(100, generator=torch.Generator().manual_seed(0)), "t")
    before = [s.clone() for s in stored]
    FORMS[form].decode(stored, 100).zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, stored, strict=True))


@pytest.mark.parametrize("form", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_damaged_values_are_not_stored(form: str, bad: float) -> None:
    values = torch.ones(130)
    values[100] = bad
    with pytest.raises(IntegrityError, match=r"tensor 'layer\.weight'.*NaN or infinity"):
        FORMS[form].encode(values, "layer.weight")


def test_a_large_sum_is_not_damage() -> None:
    assert torch.equal(restored("float32", torch.full((8,), 3e38)), torch.full((8,), 3e38))


@pytest.mark.parametrize(("form", "error"), [("bfloat16", 0.0017), ("int8", 0.0061), ("int4", 0.110)])
def test_the_promised_errors(form: str, error: float) -> None:
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 1e-7
    found = float((restored(form, values) - values).norm() / values.norm())
    assert 0.97 * error < found < error


@pytest.mark.parametrize(("form", "bits"), [("float32", 32), ("bfloat16", 16), ("int8", 8.25), ("int4", 4.25)])
def test_the_promised_sizes(form: str, bits: float) -> None:
    shape = (128, 3, 64)
    size = sum(math.prod(s.shape) * s.dtype.nbytes for s in FORMS[form].stored(shape))
    assert size * 8 == bits * math.prod(shape)


def test_what_is_a_tensor_of_the_models_shape_keeps_it() -> None:
    assert FORMS["int8"].stored((3, 50)) == (
        Stored("", DTYPES["I8"], (3, 50)),
        Stored("scales", DTYPES["BF16"], (3,), BLOCK),
    )
    assert FORMS["int4"].stored(())[0].shape == (32,)
    assert FORMS["bits"].stored((3, 3))[0].shape == (2,)
