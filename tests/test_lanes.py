"""Lanes: a queue and threads for each device, one tensor at a time on it, and the CPU for what it refuses."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import pytest
import torch

from hubmerge.devices import CPU, Lane
from hubmerge.reader import AdapterDelta, ChunkGroup, Scratch, Slot, Versions
from hubmerge.schedule import Schedule
from hubmerge.spec import DTYPES, LowRank, Settings, TensorJob, TensorSpec
from tests import factories
from tests.elsewhere import ELSEWHERE, Elsewhere, Present


def lane(name: str) -> Lane:
    return Lane(name, torch.device("cpu"), 10**9)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_each_lane_has_threads_and_an_order_of_its_own() -> None:
    schedule, seen, done = Schedule(), list[tuple[str, str]](), threading.Event()

    def work(label: str, then: Callable[[], object] = lambda: None) -> Callable[[Scratch], None]:
        def run(scratch: Scratch) -> None:
            seen.append((label, threading.current_thread().name))
            then()

        return run

    def more() -> None:
        """Queue work for another lane, while the threads of a third wait as well, and see it done."""
        time.sleep(0.05)
        schedule.add((9,), work("cpu9", done.set), CPU)
        assert done.wait(10)

    schedule.add((3,), work("a3", more), "a")
    schedule.add((1,), work("a1"), "a")
    schedule.add((2,), work("b2"), "b")
    schedule.run({"b": 8, CPU: 1, "a": 1})
    assert [label for label, _ in seen if label.startswith("a")] == ["a1", "a3"]
    assert {label: name.rpartition(" ")[0] for label, name in seen} == {
        "a1": "merge a", "a3": "merge a", "b2": "merge b", "cpu9": "merge cpu",
    }  # fmt: skip


def test_the_first_error_of_a_lane_stops_all() -> None:
    schedule, seen = Schedule(), []

    def fail(scratch: Scratch) -> None:
        raise ValueError("broken")

    def wait(scratch: Scratch) -> None:
        while schedule.error is None:
            time.sleep(0.001)

    schedule.add((0,), fail, "a")
    schedule.add((0,), wait)
    schedule.add((1,), lambda scratch: seen.append("later"))
    with pytest.raises(ValueError, match="broken"):
        schedule.run({CPU: 1, "a": 2, "b": 2})
    assert not seen


class Group:
    """What a lane needs to know of a group."""

    name = "some.weight"

    def __init__(self) -> None:
        self.device: torch.device | None = None

    def prepare(self) -> None:
        pass

    def on(self, device: torch.device) -> Group:
        self._next = device
        return self

    def __enter__(self) -> None:
        self.device = self._next

    def __exit__(self, *_: object) -> None:
        self.device = None


def test_a_device_works_on_one_tensor_at_a_time() -> None:
    one, working, most = lane("gpu:0"), [0], [0]

    def work() -> None:
        working[0] += 1
        most[0] = max(most[0], working[0])
        time.sleep(0.005)
        working[0] -= 1

    schedule = Schedule()
    for i in range(6):
        schedule.add((i,), lambda scratch: one.compute(Group(), work), one.name)  # type: ignore[arg-type]
    schedule.run({CPU: 1, one.name: 2})
    assert most == [1]


@pytest.mark.parametrize(
    "refusal",
    [torch.OutOfMemoryError("out of memory\nmore"), RuntimeError("did not converge"), TypeError("can't convert")],
)
def test_what_a_device_refuses_is_done_on_the_cpu(refusal: Exception, caplog: pytest.LogCaptureFixture) -> None:
    group, tried = Group(), []

    def work() -> str:
        tried.append(group.device)
        if group.device is not None:
            raise refusal
        return "done"

    with caplog.at_level(logging.WARNING):
        assert lane("gpu:0").compute(group, work) == "done"  # type: ignore[arg-type]
    assert tried == [torch.device("cpu"), None]
    first_line = str(refusal).split("\n")[0]
    assert caplog.messages == [f"some.weight is computed on the CPU, not on gpu:0: {first_line}"]


def test_an_error_of_the_work_itself_is_raised() -> None:
    with pytest.raises(RuntimeError, match="wrong shape"):
        lane("gpu:0").compute(Group(), lambda: (_ for _ in ()).throw(RuntimeError("wrong shape")))  # type: ignore[arg-type]


class Memory:
    """A file in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        self.size_bytes = len(self.content)

    def read_into(self, start_byte: int, buffer: memoryview) -> None:
        buffer[:] = self.content[start_byte : start_byte + len(buffer)]

    def close(self) -> None:
        pass


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("staged", [False, True])
def test_a_group_hands_out_the_same_values_on_a_device(transposed: bool, staged: bool) -> None:
    stored, shape = (6, 4), (4, 6) if transposed else (6, 4)
    spec = TensorSpec("w", DTYPES["BF16"], stored, "model.safetensors", 0, 48)
    settings = Settings(None, (None,) * 4, (1.0,) * 4)
    job = TensorJob(
        index=0, name="w", kind="linear", shape=stored, dtype=spec.dtype, output=0, start_byte=0, end_byte=48,
        action="merge", base=spec, inputs=(), settings=settings, transposed=transposed,
    )  # fmt: skip
    base, model = (Slot(spec, Memory(random(*stored, seed=i).bfloat16())) for i in (0, 1))
    factors = LowRank(random(shape[0], 2, seed=2), random(2, shape[1], seed=3), 0.5)
    dense = (factors.dense().T if transposed else factors.dense()).reshape(-1)
    low_rank = AdapterDelta(lambda: dense, lambda: factors)
    other = AdapterDelta(lambda: dense.double(), lambda: None)
    versions = Versions(job, base, (model, low_rank, other, None), torch.float32)
    if staged:
        versions.stage(0, spec.numel)
    models = [factories.pinned(f"org/{i}") for i in range(4)]
    plan = factories.plan(factories.recipe(models[0], models), models[0], models)
    group = ChunkGroup(plan, versions, settings, Scratch(), whole=True)

    def values() -> list[torch.Tensor]:
        group.move(0, spec.numel)
        known = [f for i in range(4) if (f := group.factors(i)) is not None]
        assert [f.rank for f in known] == [2, 0]
        found = [group.base(), *map(group.model, range(4)), *map(group.delta, range(4))]
        return [*found, *(t for f in known for t in (f.up, f.down))]

    here = [v.clone() for v in values()]
    assert {tuple(v.shape) for v in here[:9]} == {shape}
    with Present(), group.on(ELSEWHERE):
        for buffer in values()[1:9]:
            buffer.mul_(2)  # models and deltas may be overwritten
        there = values()
    for found in there:
        assert isinstance(found, Elsewhere)
    for a, b, c in zip(there, here, values(), strict=True):
        assert torch.equal(a.values, b)  # type: ignore[attr-defined]
        assert torch.equal(c, b)
