"""Ranks: shares of about the same size, who this process is, and what it does alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.devices import share
from hubmerge.errors import RankError
from hubmerge.ranks import ALONE, Launched, dealt, of_environment
from hubmerge.tuning import threads

SIZES = st.lists(st.integers(0, 10**12), max_size=40)
LAUNCHED = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
}  # fmt: skip


@settings(deadline=None, derandomize=True, max_examples=25)
@given(SIZES, st.integers(1, 9))
def test_shares_differ_by_one_piece_at_most(sizes: list[int], count: int) -> None:
    owners = dealt(sizes, count)
    assert len(owners) == len(sizes)
    loads = [sum(s for s, o in zip(sizes, owners, strict=True) if o == rank) for rank in range(count)]
    for size, owner in zip(sizes, owners, strict=True):
        assert loads[owner] - size <= min(loads)  # nobody has less than the owner had without it


def test_pieces_are_dealt_the_largest_first() -> None:
    assert dealt([5, 9, 5, 9, 1], 2) == [0, 0, 1, 1, 0]
    assert dealt([7, 7, 7], 1) == [0, 0, 0]
    assert dealt([], 3) == []


def test_a_launcher_is_recognised_by_its_environment() -> None:
    found = of_environment(LAUNCHED)
    assert isinstance(found, Launched)
    assert (found.rank, found.size, found.local_rank, found.local_size, found.first) == (3, 8, 1, 2, False)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        assert of_environment({k: v for k, v in LAUNCHED.items() if k != name}) is ALONE
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert of_environment(LAUNCHED | one) is ALONE


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"RANK": "8"}, "rank 8 of 8, on this machine 1 of 2"),
        ({"RANK": "-1"}, "rank -1 of 8"),
        ({"LOCAL_RANK": "2"}, "rank 3 of 8, on this machine 2 of 2"),
        ({"WORLD_SIZE": "many"}, "no number: .*'many'"),
    ],
)
def test_a_launcher_that_makes_no_sense_is_an_error(wrong: dict[str, str], says: str) -> None:
    with pytest.raises(RankError, match=says) as caught:
        of_environment(LAUNCHED | wrong)
    assert "torchrun" in caught.value.hint


def test_alone_everything_is_done_here() -> None:
    with ALONE as ranks:
        assert list(ranks.gather("value")) == ["value"]
        assert ranks.from_first(lambda: "made") == "made"
        ranks.agree({"what": "ever"})
        assert not ranks.ending


def test_devices_are_shared_out() -> None:
    devices = tuple(torch.device("cuda", i) for i in range(4))
    assert [share(devices, rank, 2) for rank in range(2)] == [(devices[::2], 1), (devices[1::2], 1)]
    assert [share(devices, rank, 3)[0] for rank in range(3)] == [devices[::3], devices[1:2], devices[2:3]]
    # Too few: each is used by several, which share its memory.
    assert [share(devices[:2], rank, 3) for rank in range(3)] == [
        (devices[:1], 2), (devices[1:2], 1), (devices[:1], 2),
    ]  # fmt: skip
    assert share((), 1, 2) == ((), 1)
    assert share(devices, 0, 1) == (devices, 1)


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubmerge.tuning.cores", lambda: 16)
    assert threads(None, remote=False, processes=4) == 4
    assert threads(3, remote=False, processes=4) == 3
    monkeypatch.setattr("hubmerge.tuning.cores", lambda: 2)
    assert threads(None, remote=False, processes=3) == 1
    assert [threads(None, remote=True, processes=n) for n in (1, 2, 3, 8)] == [4, 2, 2, 1]
