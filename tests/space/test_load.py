"""Twenty visitors start merges at once on two cores: all are served or told why not, and nobody waits for the page."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from huggingface_hub import constants

from hubmerge.localhub import User
from hubmerge.space.jobs import UNFINISHED, JobTable
from tests.end_to_end.support import save, tensors
from tests.space.running import Server, Town
from tests.space.visiting import Visitor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PEOPLE = tuple(User(f"visitor{i:02}", "hf_" + f"{i:02}loadLOAD" * 4) for i in range(20))
SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (1024, 1024) for i in range(8)}
"""32 MB."""
BUDGET_BYTES = 3_000_000_000
ANSWER_S = 2.0
RECIPE = """\
method: ties
base: local/base
models: [local/a, local/b]
parameters: {density: 0.4}
"""


@pytest.fixture
def town(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Town]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    made = Town(tmp_path, PEOPLE)
    for i, name in enumerate(("base", "a", "b")):
        made.publish(name, save(tmp_path / "in" / name, tensors(i, SHAPES)))
    yield made
    made.hub.stop()


class Memory:
    """What a process and all below it hold, sampled: what several share counts once."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self.peak_bytes = self.peak_processes = 0
        self.idle_bytes = self.held()

    def held(self) -> int:
        total, processes = 0, [self._root, *self._root.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                total += process.memory_full_info().pss
        self.peak_processes = max(self.peak_processes, len(processes))
        return total

    @contextmanager
    def watched(self) -> Iterator[None]:
        over = threading.Event()

        def sample() -> None:
            while not over.wait(0.25):
                self.peak_bytes = max(self.peak_bytes, self.held())

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def test_twenty_visitors_at_once(town: Town, tmp_path: Path) -> None:
    limits = ("--workers", "2", "--max-memory", str(BUDGET_BYTES), "--per-hour", "1")
    server = Server(town, tmp_path / "server", limits, threads=None)
    server.start()
    psutil.Process(server.process.pid).cpu_affinity(sorted(os.sched_getaffinity(0))[:2])
    visitors = [Visitor(server.url, user.name) for user in PEOPLE]
    memory = Memory(server.process.pid)
    with memory.watched(), _watching(server.url) as watcher:
        begun = time.monotonic()
        with ThreadPoolExecutor(len(visitors)) as pool:
            answers = list(pool.map(lambda v: [_start(v, n) for n in (1, 2)], visitors))
        taken_s = time.monotonic() - begun
        states = _settled(tmp_path / "server" / "data" / "jobs.db")
        took_s = time.monotonic() - begun
        waited = json.loads(watcher.communicate(timeout=60)[0].splitlines()[-1])
    left_bytes = memory.held()
    server.end()

    print(f"\n{len(states)} jobs in {took_s:.1f} s, all taken or refused after {taken_s:.1f} s")
    for what, times in waited.items():
        cuts = statistics.quantiles(times, n=100)
        shown = ", ".join(f"{name} {1000 * cuts[at]:.0f}" for name, at in (("50 %", 49), ("90 %", 89), ("99 %", 98)))
        print(f"{what}: {len(times)} answers, ms: {shown}, longest {1000 * max(times):.0f}")
    sizes = (memory.idle_bytes, memory.peak_bytes, left_bytes)
    print("PSS of {} processes, MB: before {:.0f}, peak {:.0f}, after {:.0f}".format(
        memory.peak_processes, *(size / 1e6 for size in sizes)
    ))  # fmt: skip
    assert states == {user.name: ["done"] for user in PEOPLE}
    for first, second in answers:
        assert "you have begun 1 jobs in an hour" not in first
        assert "you have begun 1 jobs in an hour" in second
    assert max(waited["page"] + waited["jobs"]) < ANSWER_S
    assert memory.peak_bytes <= BUDGET_BYTES


def _start(visitor: Visitor, number: int) -> str:
    boxes = {"Recipe": RECIPE, "Publish to": f"{visitor.name}/merged-{number}"}
    assert "Planned: fits here" in visitor.press("Plan", boxes)
    return visitor.press("Merge here", boxes)


@contextmanager
def _watching(url: str) -> Iterator[subprocess.Popen[str]]:
    """One of them looks at the page and at their jobs all the time, from a process of their own."""
    command = [sys.executable, "-m", "tests.space.visiting", url, PEOPLE[0].name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "ready\n"
        yield watcher


def _settled(table_path: Path) -> dict[str, list[str]]:
    """How everybody's jobs have ended."""
    table = JobTable(table_path)
    ends_at = time.monotonic() + 600
    while table.in_state(*UNFINISHED) and time.monotonic() < ends_at:
        time.sleep(0.5)
    found = {user.name: [job.state for job in table.of(user.name)] for user in PEOPLE}
    table.close()
    return found
