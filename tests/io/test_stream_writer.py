"""The stream writer: whatever order ranges come in, the stream gets the file, and no more is kept than fits."""

from __future__ import annotations

import hashlib
import itertools
import random
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.errors import HubMergeError
from hubmerge.io import stream as stream_module
from hubmerge.io.stream import StreamWriter

HEADER = b"header--"
BLINK_S = 0.05
BLOCK_BYTES = 20_000
laws = settings(deadline=None, derandomize=True, max_examples=25)


class Taken:
    """A stream that keeps what it is given; it can be slow, until it is let go, and it can break."""

    def __init__(self, breaks_after: int | None = None) -> None:
        self.content = bytearray()
        self.aborted = False
        self.open = threading.Event()
        self.open.set()
        self._breaks_after = breaks_after

    def write(self, data: bytes) -> None:
        self.open.wait()
        if self.aborted or (self._breaks_after is not None and len(self.content) >= self._breaks_after):
            raise HubMergeError("the stream broke")
        self.content += data

    def abort(self) -> None:
        self.aborted = True
        self.open.set()


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stream_module, "_BLOCK_BYTES", BLOCK_BYTES)
        yield


def spans_of(sizes: list[int]) -> list[tuple[int, int]]:
    edges = list(itertools.accumulate(sizes, initial=len(HEADER)))
    return list(itertools.pairwise(edges))


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@laws
@given(st.lists(st.integers(0, 50_000), max_size=12), st.integers(0, 2**32))
def test_every_order_gives_the_file_and_its_digest(sizes: list[int], seed: int) -> None:
    chance = random.Random(seed)
    content = HEADER + chance.randbytes(sum(sizes))
    stream = Taken()
    writer = StreamWriter(stream, len(content), HEADER, held_bytes=len(content))
    for a, b in chance.sample(spans := spans_of(sizes), len(spans)):
        writer.write(a, memoryview(content)[a:b])
        writer.mark(a, b)
    assert writer.finish() == hashlib.sha256(content).hexdigest()
    assert bytes(stream.content) == content


@laws
@given(
    st.lists(st.integers(1, 50_000), min_size=1, max_size=40),
    st.integers(1, 4),
    st.integers(0, 60_000),
    st.integers(0, 2**32),
)
def test_workers_that_take_ranges_in_order_need_little_room(
    sizes: list[int], workers: int, room: int, seed: int
) -> None:
    """As the engine does: each takes the next range, whenever it is done with the one before."""
    content = HEADER + random.Random(seed).randbytes(sum(sizes))
    stream = Taken()
    writer = StreamWriter(stream, len(content), HEADER, held_bytes=room)
    spans = iter(spans_of(sizes))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                span = next(spans, None)
            if span is None:
                return
            writer.write(span[0], content[slice(*span)])

    threads = [started(work) for _ in range(workers)]
    for thread in threads:
        thread.join()
    assert writer.finish() == hashlib.sha256(content).hexdigest()
    assert bytes(stream.content) == content
    assert writer.peak_bytes <= max(room, len(HEADER)) + BLOCK_BYTES


def test_who_is_early_waits_where_there_is_no_room() -> None:
    content = HEADER + random.Random(0).randbytes(300)
    stream = Taken()
    writer = StreamWriter(stream, len(content), HEADER, held_bytes=100)
    writer.write(108, content[108:208])
    waiting = started(lambda: writer.write(208, content[208:]))
    waiting.join(BLINK_S)
    assert waiting.is_alive()
    assert bytes(stream.content) == HEADER
    writer.write(8, content[8:108])
    waiting.join()
    assert writer.finish() == hashlib.sha256(content).hexdigest()
    assert writer.peak_bytes == 200


def test_a_slow_stream_is_waited_for() -> None:
    stream = Taken()
    stream.open.clear()
    writer = StreamWriter(stream, 28, HEADER, held_bytes=20)
    writer.write(8, bytes(10))
    waiting = started(lambda: writer.write(18, bytes(10)))
    waiting.join(BLINK_S)
    assert waiting.is_alive()
    stream.open.set()
    waiting.join()
    assert writer.finish() == hashlib.sha256(HEADER + bytes(20)).hexdigest()


@pytest.mark.parametrize(("start", "length", "reached"), [(8, 10, 18), (12, 16, 8)], ids=["end", "middle"])
def test_a_gap_is_an_error(start: int, length: int, reached: int) -> None:
    stream = Taken()
    writer = StreamWriter(stream, 28, HEADER)
    writer.write(start, bytes(length))
    with pytest.raises(HubMergeError, match=f"finished at byte {reached} of 28"):
        writer.finish()


@pytest.mark.parametrize("start", [0, 8, 18], ids=["header", "passed on", "kept"])
def test_nothing_is_written_twice(start: int) -> None:
    writer = StreamWriter(Taken(), 28, HEADER)
    writer.write(8, b"a")
    writer.write(18, b"b")
    with pytest.raises(HubMergeError, match=f"byte {start} of a stream was written twice"):
        writer.write(start, b"c")
    writer.abort()


def test_a_stream_that_breaks_ends_everything() -> None:
    stream = Taken(breaks_after=len(HEADER))
    writer = StreamWriter(stream, 128, HEADER, held_bytes=20)
    seen: list[HubMergeError] = []

    def early() -> None:
        try:
            writer.write(48, bytes(80))
        except HubMergeError as error:
            seen.append(error)

    waiting = started(early)
    writer.write(8, bytes(40))
    waiting.join()
    assert [error.message for error in seen] == ["the stream broke"]
    for late in (lambda: writer.write(60, b"c"), writer.finish):
        with pytest.raises(HubMergeError, match="the stream broke"):
            late()


def test_nobody_waits_for_a_run_that_has_ended() -> None:
    stopped = threading.Event()
    writer = StreamWriter(Taken(), 128, HEADER, stopped.is_set, held_bytes=0)
    seen: list[str] = []

    def early() -> None:
        try:
            writer.write(48, bytes(80))
        except HubMergeError as error:
            seen.append(error.message)

    waiting = started(early)
    stopped.set()
    waiting.join()
    assert seen == ["the run has ended, and its streams are closed"]
    writer.abort()


def test_abort_frees_a_thread_that_waits_for_the_stream() -> None:
    stream = Taken()
    stream.open.clear()
    writer = StreamWriter(stream, 28, HEADER)
    writer.write(8, bytes(20))

    def finish() -> None:
        with pytest.raises(HubMergeError):
            writer.finish()

    finishing = started(finish)
    writer.abort()
    writer.abort()
    finishing.join()
    assert stream.aborted
    assert not stream.content
    with pytest.raises(HubMergeError, match=r"the run has ended|the stream broke"):
        writer.write(8, bytes(20))
