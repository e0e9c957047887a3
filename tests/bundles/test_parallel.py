"""Work on a few threads: all of it is done once, errors stop it, and the rest of the process keeps its threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from hubmerge.bundles.parallel import side_by_side
from hubmerge.reader import Scratch


@pytest.fixture(params=[1, 2, 3])
def count(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_everything_is_done_once_by_threads_of_one_torch_thread_each(count: int) -> None:
    together = threading.Barrier(count)
    done: list[int] = []
    inside: set[tuple[int, int, bool, bool]] = set()

    def work(i: int, scratch: Scratch) -> None:
        if i < count:
            together.wait(20)  # so every thread has some of it
        done.append(i)
        state = torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        inside.add((threading.get_ident(), *state))

    with torch.inference_mode():
        side_by_side(partial(work, i) for i in range(50))
    assert sorted(done) == list(range(50))
    assert len(inside) == count
    assert {state for _, *rest in inside for state in [tuple(rest)]} == {(1, False, False)}


def test_other_threads_of_the_process_keep_torchs_threads(count: int) -> None:
    seen: list[int] = []
    side_by_side([lambda _: seen.append(threads_of_a_new_thread())] * 3)
    assert seen == [count] * 3
    assert torch.get_num_threads() == count


def test_the_first_error_stops_the_rest_and_is_raised(count: int) -> None:
    done: list[int] = []

    def work(i: int, scratch: Scratch) -> None:
        if i == 10:
            raise KeyError(i)
        done.append(i)

    with pytest.raises(KeyError, match="10"):
        side_by_side(partial(work, i) for i in range(10_000))
    assert len(done) < 10_000
    assert torch.get_num_threads() == count


def test_work_that_cannot_even_be_made_is_an_error_too(count: int) -> None:
    def works() -> Iterator[object]:
        yield lambda _: None
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        side_by_side(works())  # type: ignore[arg-type]
    side_by_side([])


def test_threads_that_cannot_begin(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one cannot: the others are not left waiting for it."""
    start, started = threading.Thread.start, []

    def refuse(thread: threading.Thread) -> None:
        if len(started) == count - 1:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        side_by_side([lambda _: None])
    assert len(started) == count - 1
    assert not any(thread.is_alive() for thread in started)
    assert torch.get_num_threads() == count
