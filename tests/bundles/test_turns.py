"""Passes run side by side, changes alone, in order of arrival; nobody waits for what has ended."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from hubmerge.bundles.turns import Turns
from hubmerge.errors import HubMergeError, UsageError

WAIT_S = 20
SOON_S = 0.1


class Gate(nn.Module):
    """A model whose passes last until they are let through; one that is given a number below 0 fails."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = threading.Semaphore(0)
        self.open = threading.Event()

    def forward(self, x: int) -> int:
        self.inside.release()
        if x < 0:
            raise KeyError(x)
        assert self.open.wait(WAIT_S)
        return x


class Plain(nn.Module):
    def forward(self, what: Callable[[], int]) -> int:
        return what()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(6) as pool:
        yield pool


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def turns(gate: Gate) -> Turns:
    found = Turns()
    found.guard(gate)
    return found


def change(turns: Turns, then: Callable[[], None] = lambda: None) -> None:
    with turns.alone():
        then()


def is_waiting(work: Future[object]) -> bool:
    time.sleep(SOON_S)
    return not work.done()


def test_passes_run_side_by_side_and_a_change_waits_for_them(
    gate: Gate, turns: Turns, threads: ThreadPoolExecutor
) -> None:
    passes = [threads.submit(gate, i) for i in range(3)]
    assert all(gate.inside.acquire(timeout=WAIT_S) for _ in passes)
    work = threads.submit(change, turns)
    assert is_waiting(work)
    gate.open.set()
    work.result(WAIT_S)
    assert [p.result(WAIT_S) for p in passes] == [0, 1, 2]


def test_a_pass_waits_for_earlier_changes_but_not_for_later_ones(
    gate: Gate, turns: Turns, threads: ThreadPoolExecutor
) -> None:
    order: list[str] = []
    first = threads.submit(gate, 0)
    assert gate.inside.acquire(timeout=WAIT_S)
    early = threads.submit(change, turns, lambda: order.append("early change"))
    while not turns._line:
        time.sleep(0.001)
    second = threads.submit(gate, 1)
    assert is_waiting(second)
    assert not gate.inside.acquire(blocking=False)
    late = threads.submit(change, turns, lambda: order.append("late change"))
    while len(turns._line) < 3:
        time.sleep(0.001)
    gate.register_forward_hook(lambda *_: order.append("pass"), prepend=True)
    gate.open.set()
    for work in (first, early, second, late):
        work.result(WAIT_S)
    assert order == ["pass", "early change", "pass", "late change"]


def test_no_pass_and_no_other_change_happens_during_a_change() -> None:
    turns, model = Turns(), Plain()
    turns.guard(model)
    passing = changing = 0
    seen: set[tuple[int, int]] = set()
    count = threading.Lock()

    def look(passes: int, changes: int) -> int:
        nonlocal passing, changing
        with count:
            passing, changing = passing + passes, changing + changes
            seen.add((passing, changing))
        time.sleep(0.0003)
        with count:
            passing, changing = passing - passes, changing - changes
        return 0

    def work(i: int) -> None:
        for _ in range(40):
            if i < 4:
                model(lambda: look(1, 0))
            else:
                with turns.alone():
                    look(0, 1)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert all(changes == 0 or (passes, changes) == (0, 1) for passes, changes in seen)
    assert {(1, 0), (0, 1)} <= seen
    assert max(passes for passes, _ in seen) > 1


def test_a_pass_that_raises_has_ended(gate: Gate, turns: Turns, threads: ThreadPoolExecutor) -> None:
    with pytest.raises(KeyError):
        gate(-1)
    threads.submit(change, turns).result(WAIT_S)


def test_a_pass_that_never_began_ends_nobody_elses(gate: Gate, turns: Turns, threads: ThreadPoolExecutor) -> None:
    running = threads.submit(gate, 0)
    assert gate.inside.acquire(timeout=WAIT_S)

    def refuse(*_: object) -> None:
        raise ValueError("no")

    handle = gate.register_forward_pre_hook(refuse, prepend=True)
    with pytest.raises(ValueError, match="no"):
        gate(1)
    handle.remove()
    work = threads.submit(change, turns)
    assert is_waiting(work)
    gate.open.set()
    work.result(WAIT_S)
    running.result(WAIT_S)


@contextmanager
def broken_off() -> Iterator[None]:
    """Torch's hooks do not see what is no Exception, such as Ctrl-C."""
    with pytest.raises(KeyboardInterrupt):
        yield


def test_a_pass_that_ctrl_c_broke_off_is_forgotten(threads: ThreadPoolExecutor) -> None:
    turns, model = Turns(), Plain()
    turns.guard(model)

    def stop() -> int:
        raise KeyboardInterrupt

    with broken_off():
        model(stop)
    change(turns)  # by the thread itself

    with broken_off():
        model(stop)
    work = threads.submit(change, turns)
    assert is_waiting(work)
    model(lambda: 0)  # the thread's next pass ends what was left over
    work.result(WAIT_S)

    def die() -> None:
        with broken_off():
            model(stop)

    thread = threading.Thread(target=die)
    thread.start()
    thread.join(WAIT_S)
    threads.submit(change, turns).result(WAIT_S)


def test_whoever_holds_the_model_runs_passes_while_a_change_waits(threads: ThreadPoolExecutor) -> None:
    turns, model = Turns(), Plain()
    turns.guard(model)
    with turns.hold():
        work = threads.submit(change, turns)
        assert is_waiting(work)
        assert [model(lambda i=i: i) for i in range(3)] == [0, 1, 2]
        assert not work.done()
        for refused in (turns.hold(), turns.alone()):
            with pytest.raises(UsageError, match="holds the model already"), refused:
                pass
    work.result(WAIT_S)


def test_holding_changes_first_if_need_be_and_once_for_all_who_want_it(threads: ThreadPoolExecutor) -> None:
    turns = Turns()
    state, changes = "a", 0
    together = threading.Barrier(3)

    def make_b() -> None:
        nonlocal state, changes
        time.sleep(0.01)
        state, changes = "b", changes + 1

    def use() -> str:
        with turns.hold(lambda: state == "b", make_b):
            together.wait(WAIT_S)  # all three hold it at once
            return state

    assert [w.result(WAIT_S) for w in [threads.submit(use) for _ in range(3)]] == ["b", "b", "b"]
    assert changes == 1


def test_nothing_passes_between_the_change_and_the_hold(threads: ThreadPoolExecutor) -> None:
    turns, wanted = Turns(), ["none"]
    stop = time.monotonic() + 0.5

    def use(name: str) -> int:
        count = 0
        while time.monotonic() < stop:
            with turns.hold(lambda: wanted[0] == name, lambda: wanted.__setitem__(0, name)):
                for _ in range(3):
                    assert wanted[0] == name
                    time.sleep(0.0001)
            count += 1
        return count

    counts = [w.result(WAIT_S) for w in [threads.submit(use, n) for n in "abc"]]
    assert min(counts) > 2  # nobody starves


def test_a_change_that_fails_lets_the_others_go_on(gate: Gate, turns: Turns, threads: ThreadPoolExecutor) -> None:
    with pytest.raises(ZeroDivisionError), turns.alone():
        raise ZeroDivisionError
    gate.open.set()
    assert threads.submit(gate, 5).result(WAIT_S) == 5
    change(turns)


def test_torn_weights_are_not_used(gate: Gate, turns: Turns, threads: ThreadPoolExecutor) -> None:
    turns.torn = True
    with pytest.raises(HubMergeError, match="of no task"):
        gate(0)
    change(turns, lambda: setattr(turns, "torn", False))
    gate.open.set()
    assert threads.submit(gate, 0).result(WAIT_S) == 0


def test_a_copy_of_a_model_has_turns_of_its_own(threads: ThreadPoolExecutor) -> None:
    model = nn.Linear(2, 2)
    turns = Turns()
    turns.guard(model)
    x = torch.ones(1, 2)
    with turns.alone():
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(
                threads.submit(copied, x).result(WAIT_S), nn.functional.linear(x, model.weight, model.bias)
            )
