"""A file's digest, taken while its pieces are read in whatever order: no wrong byte passes, no right one is refused."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hubmerge.errors import SpoiledError
from hubmerge.io.checked import AHEAD_BYTES, Ahead, CheckedSource
from hubmerge.io.local import FileSource

SIZE = 300_000
CONTENT = random.Random(0).randbytes(SIZE)
HEADER = 1000
Spans = Sequence[tuple[int, int]]
laws = settings(
    deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def opened(
    folder: Path, wanted: Spans, content: bytes = CONTENT, *, room: int = AHEAD_BYTES, sha256: str | None = None
) -> tuple[CheckedSource, Ahead]:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    ahead = Ahead(room)
    expected = sha256 or hashlib.sha256(CONTENT).hexdigest()
    return CheckedSource(FileSource(path), expected, "a/b@1/model.safetensors", wanted, ahead), ahead


def read(source: CheckedSource, span: tuple[int, int]) -> bytes:
    buffer = bytearray(span[1] - span[0])
    source.read_into(span[0], memoryview(buffer))
    return bytes(buffer)


@st.composite
def pieces(draw: st.DrawFn) -> Spans:
    """The file after its header, cut; here and there a few bytes that nobody wants."""
    cuts = draw(st.lists(st.integers(HEADER, SIZE), max_size=12, unique=True))
    edges = sorted({HEADER, *cuts, SIZE})
    holes = draw(st.lists(st.booleans(), min_size=len(edges), max_size=len(edges)))
    spans = [(a + (500 if hole else 0), b) for a, b, hole in zip(edges, edges[1:], holes, strict=False)]
    return [(a, b) for a, b in spans if a < b]


@laws
@given(pieces(), st.randoms(use_true_random=False))
def test_every_order_gives_the_bytes_and_the_digest(tmp_path: Path, spans: Spans, chance: random.Random) -> None:
    shuffled = chance.sample(spans, len(spans))
    source, ahead = opened(tmp_path, spans)
    for a, b in shuffled:
        assert read(source, (a, b)) == CONTENT[a:b]
    assert source.is_checked
    source.close()
    assert ahead.take(AHEAD_BYTES)  # all room was given back


@laws
@given(pieces(), st.integers(0, SIZE - 1), st.randoms(use_true_random=False))
def test_no_wrong_byte_passes(tmp_path: Path, spans: Spans, at: int, chance: random.Random) -> None:
    content = CONTENT[:at] + bytes([CONTENT[at] ^ 1]) + CONTENT[at + 1 :]
    source, _ = opened(tmp_path, spans, content)
    with pytest.raises(SpoiledError, match=r"a/b@1/model.safetensors: .* do not have the digest of the commit"):  # noqa: PT012
        for span in chance.sample(spans, len(spans)):
            read(source, span)
    source.close()


def test_many_threads(tmp_path: Path) -> None:
    spans = [(a, min(a + 7000, SIZE)) for a in range(HEADER, SIZE, 7000)]
    source, _ = opened(tmp_path, spans)
    with ThreadPoolExecutor(4) as pool:
        assert b"".join(pool.map(lambda span: read(source, span), spans)) == CONTENT[HEADER:]
    assert source.is_checked
    source.close()


def test_what_finds_no_room_comes_by_in_the_next_pass(tmp_path: Path) -> None:
    spans = [(HEADER, 100_000), (100_000, 200_000), (200_000, SIZE)]
    source, ahead = opened(tmp_path, spans, room=150_000)
    for span in reversed(spans):
        read(source, span)
    assert not source.is_checked
    for span in spans:
        read(source, span)
    assert source.is_checked
    assert ahead.take(150_000)
    source.close()


def test_a_file_of_which_much_is_not_wanted_is_only_read(tmp_path: Path) -> None:
    source, ahead = opened(tmp_path, [(100_000, SIZE)], sha256="0" * 64)
    assert read(source, (100_000, SIZE)) == CONTENT[100_000:]
    assert not source.is_checked
    assert ahead.take(AHEAD_BYTES)  # nothing waits there
    source.close()


def test_closing_gives_the_room_back(tmp_path: Path) -> None:
    source, ahead = opened(tmp_path, [(HEADER, 100_000), (100_000, SIZE)])
    read(source, (100_000, SIZE))
    assert not ahead.take(AHEAD_BYTES)
    source.close()
    assert ahead.take(AHEAD_BYTES)
