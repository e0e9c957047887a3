"""The shard writer: any order of ranges, one hash of the whole file, nothing left after an abort."""

from __future__ import annotations

import hashlib
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.errors import HubMergeError
from hubmerge.io.writer import ShardWriter

HEADER = b"header--"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3_000_000), max_size=6), st.integers(0, 2**32))
def test_digest_is_that_of_the_file_for_any_order_of_ranges(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int
) -> None:
    order = random.Random(seed)
    content = order.randbytes(sum(sizes))
    ranges, position = [], 0
    for size in sizes:
        ranges.append((position, position + size))
        position += size
    path = tmp_path_factory.mktemp("w") / "shard"
    writer = ShardWriter(path, len(HEADER) + len(content), HEADER)
    order.shuffle(ranges)

    def work(part: list[tuple[int, int]]) -> None:
        for start, end in part:
            writer.write(len(HEADER) + start, content[start:end])
            writer.mark(len(HEADER) + start, len(HEADER) + end)

    threads = [threading.Thread(target=work, args=(ranges[i::2],)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert writer.finish() == hashlib.sha256(HEADER + content).hexdigest()
    assert path.read_bytes() == HEADER + content


def test_finish_refuses_an_incomplete_file(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "shard", 20, HEADER)
    writer.mark(12, 20)
    with pytest.raises(HubMergeError, match="finished at byte 8 of 20"):
        writer.finish()


def test_abort_removes_the_file_at_once(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "shard", 1 << 20, HEADER)
    writer.abort()
    writer.abort()
    assert not (tmp_path / "shard").exists()


def test_a_file_that_cannot_fit_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(HubMergeError, match="cannot be reserved") as caught:
        ShardWriter(tmp_path / "shard", 1 << 60, HEADER)
    assert "disk space" in str(caught.value.hint)
    assert not (tmp_path / "shard").exists()
