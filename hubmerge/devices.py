"""Which device computes which tensors: matrices go to accelerators as their memory allows, all else to the CPU."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from hubmerge.errors import UsageError
from hubmerge.footprint import working_set_bytes
from hubmerge.methods import get_method
from hubmerge.ranks import ALONE, Ranks
from hubmerge.recipe.schema import parse_size
from hubmerge.spec import Plan, TensorJob

if TYPE_CHECKING:
    from hubmerge.reader import ChunkGroup

log = logging.getLogger(__name__)
T = TypeVar("T")

CPU = "cpu"
LANE_THREADS = 2
"""One reads what the other will work on next."""
_NAME = re.compile(r"[a-z]+(:\d+)?")
_USED_FRACTION = 0.9
"""Of an accelerator's free memory; the rest is for what its libraries allocate beside the tensors."""


@dataclass(frozen=True)
class Lane:
    """A device, which works on one tensor at a time."""

    name: str
    device: torch.device
    memory_bytes: int
    """What the work on one tensor may take on the device."""
    _turn: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def compute(self, group: ChunkGroup, work: Callable[[], T]) -> T:
        """The result of ``work``, for which the group hands out its values on the device.

        What a device refuses is done on the CPU: for want of memory or of an operation, because its own decomposition
        did not converge, or because the work uses NumPy. An error of the work itself is raised there again.
        """
        group.prepare()  # meanwhile the lane's other thread may have its turn
        with self._turn:
            try:
                with group.on(self.device):
                    return work()
            except (RuntimeError, TypeError) as e:
                reason = str(e).partition("\n")[0]
                log.warning("%s is computed on the CPU, not on %s: %s", group.name, self.name, reason)
            # Only now is the error gone, and with it what its traceback kept on the device.
            if (release := getattr(getattr(torch, self.device.type, None), "empty_cache", None)) is not None:
                release()
            return work()


@dataclass(frozen=True, slots=True)
class DeviceMap:
    """Where tensors are computed: those that have no place here, on the CPU."""

    lanes: tuple[Lane, ...] = ()
    places: Mapping[int, Lane] = field(default_factory=dict)
    """Index of a job → its lane."""
    notes: tuple[str, ...] = ()
    """What stays on the CPU although an accelerator was meant to do it, and why."""

    def threads(self, workers: int) -> dict[str, int]:
        """How many threads each lane has, if the CPU has so many."""
        return {CPU: workers} | {lane.name: LANE_THREADS for lane in self.lanes}

    def shares(self, plan: Plan) -> dict[str, tuple[int, int]]:
        """For each lane, and the CPU, how many matrices are computed there and how many elements they have."""
        found = {lane.name: (0, 0) for lane in self.lanes} | {CPU: (0, 0)}
        for job in matrix_jobs(plan):
            name = self.places[job.index].name if job.index in self.places else CPU
            count, elements = found[name]
            found[name] = count + 1, elements + job.numel
        return found


def device_map(
    plan: Plan, device: str = "auto", limits: Mapping[str, int] | None = None, ranks: Ranks = ALONE
) -> DeviceMap:
    """Where to compute the plan's tensors on this machine.

    Args:
        plan: What to compute.
        device: As ``parse_device`` takes it.
        limits: Bytes that may be used of a device, by its name or its kind; by default most of what is free there.
        ranks: The processes among which this machine's devices are shared out.

    Raises:
        UsageError: A device that is not here.
    """
    limits = limits or {}
    wanted, sharers = share(chosen(device, limits), ranks.local_rank, ranks.local_size)
    if not wanted or not matrix_jobs(plan):
        return DeviceMap()  # without a look at the devices, which would take memory there
    able = [d for d in wanted if has_float64(d)]
    found = assign(plan, [Lane(str(d), d, _memory_bytes(d, limits) // sharers) for d in able])
    unable = tuple(
        f"{d} is not used: it has no float64, in which matrices are decomposed" for d in wanted if d not in able
    )
    return DeviceMap(found.lanes, found.places, unable + found.notes)


def chosen(device: str, limits: Mapping[str, int]) -> tuple[torch.device, ...]:
    """The accelerators that are meant; arguments as ``device_map`` takes them.

    Raises:
        UsageError: A device that is not here.
    """
    present = accelerators()
    for name in limits:
        parse_device(name, present)
    return parse_device(device, present)


def share(devices: Sequence[torch.device], rank: int, size: int) -> tuple[tuple[torch.device, ...], int]:
    """The devices for one of several processes, and how many processes use them.

    Each process has some for itself, or, if there are too few, one together with others.
    """
    if len(devices) >= size or not devices:
        return tuple(devices[rank::size]), 1
    number = rank % len(devices)
    return (devices[number],), len(range(number, size, len(devices)))


# --- names and sizes --------------------------------------------------------------------------------------------


def accelerators() -> tuple[torch.device, ...]:
    """The devices that PyTorch can compute on here, beside the CPU."""
    if not torch.accelerator.is_available():
        return ()
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return tuple(torch.device(kind.type, i) for i in range(torch.accelerator.device_count()))


def parse_device(name: str, present: Sequence[torch.device]) -> tuple[torch.device, ...]:
    """The accelerators that a name means; none for the CPU.

    Args:
        name: ``auto`` for all that are there, ``cpu``, a kind such as ``cuda`` for all of it, or one: ``cuda:1``.
        present: The accelerators of this machine.

    Raises:
        UsageError: Nothing here has that name.
    """
    if name in ("auto", CPU):
        return tuple(present) if name == "auto" else ()
    found = tuple(d for d in present if name in (d.type, str(d)))
    if not found:
        here = ", ".join(map(str, present))
        raise UsageError(
            f"device {name!r}: this machine has {here or 'no accelerator that PyTorch can use'}",
            hint=f"give auto, cpu, {here}" if here else "leave the device out, or install a build of PyTorch for it",
        )
    return found


def parse_memory(text: str) -> dict[str, int]:
    """Bytes for each device from ``10GB``, which is the host's, or from ``cuda:0=20GB,cuda:1=10GB,cpu=8GB``.

    Raises:
        ValueError: It is neither.
    """
    if "=" not in text:
        return {CPU: parse_size(text)}
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (side.strip() for side in part.partition("="))
        if not _NAME.fullmatch(name) or name == "auto" or name in found:
            raise ValueError(f"expected DEVICE=SIZE once for each device, such as cuda:0=20GB,cpu=8GB; found {part!r}")
        found[name] = parse_size(size)
    return found


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64; Apple's and some of Intel's do not."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device).add_(1).cpu()
    except (RuntimeError, TypeError):
        return False
    return True


def _memory_bytes(device: torch.device, limits: Mapping[str, int]) -> int:
    limit = limits.get(str(device), limits.get(device.type))
    free_bytes = getattr(getattr(torch, device.type), "mem_get_info", None)
    if free_bytes is not None:
        free = int(_USED_FRACTION * free_bytes(device)[0])
        return free if limit is None else min(free, limit)
    if limit is None:
        raise UsageError(
            f"device {device}: PyTorch does not tell how much of its memory is free",
            hint=f"say how much to use, for example --max-memory {device}=16GB, or give --device cpu",
        )
    return limit


# --- the map ----------------------------------------------------------------------------------------------------


def matrix_jobs(plan: Plan) -> list[TensorJob]:
    """The jobs that an accelerator is good at: tensors that a method treats as matrices."""
    return [job for job in plan.jobs if _is_matrix(job, plan.method)]


def _is_matrix(job: TensorJob, method: str) -> bool:
    if job.action != "merge" or job.settings is None or len(job.shape) != 2 or job.numel == 0:
        return False
    return job.kind in get_method(job.method or method).matrices(job.settings.params)


def assign(plan: Plan, lanes: Sequence[Lane]) -> DeviceMap:
    """Give each matrix to a lane that has the memory to work on it; what none has, is left to the CPU.

    The matrices of a layer go to one lane unless some of them fit another one only.
    """
    jobs = matrix_jobs(plan)
    if not lanes:
        return DeviceMap()
    needs = {job.index: working_set_bytes(job, get_method(job.method or plan.method), len(plan.models)) for job in jobs}
    largest = max(lanes, key=lambda lane: lane.memory_bytes)
    fitting = [job for job in jobs if needs[job.index] <= largest.memory_bytes]
    layers = _dealt(_layers(fitting), len(lanes))
    places = {
        job.index: lane if needs[job.index] <= lane.memory_bytes else largest
        for layer, lane in zip(layers, _lane_of_each(layers, lanes), strict=True)
        for job in layer
    }
    return DeviceMap(tuple(lanes), places, _left_out([j for j in jobs if j.index not in places], needs, largest))


def _left_out(jobs: Sequence[TensorJob], needs: Mapping[int, int], largest: Lane) -> tuple[str, ...]:
    if not jobs:
        return ()
    worst = max(jobs, key=lambda job: needs[job.index])
    return (
        f"{len(jobs)} of the matrices are computed on the CPU: {worst.name!r} takes "
        f"{needs[worst.index] / 1e9:.3g} GB to work on, and {largest.name} has {largest.memory_bytes / 1e9:.3g} GB",
    )


def _layers(jobs: Sequence[TensorJob]) -> list[list[TensorJob]]:
    """The jobs of each layer; a tensor outside all layers is one by itself."""
    found: dict[str, list[TensorJob]] = {}
    for job in jobs:
        stack, number, _ = job.name.partition(f".{job.layer}.")
        found.setdefault(stack + number if number else job.name, []).append(job)
    return list(found.values())


def _dealt(layers: Sequence[list[TensorJob]], count: int) -> list[list[TensorJob]]:
    """Every count-th layer, then the ones after them, and so on.

    A device map gives each device a stretch of layers. Dealt out like this, all devices work on the same part of the
    model at any time, hence on the same output file; with one file at a time, others would have to wait.
    """
    return [layer for start in range(count) for layer in layers[start::count]]


class _Layer(nn.ParameterList):
    """Tensors that stay together, without values."""

    def __init__(self, jobs: Sequence[TensorJob]) -> None:
        empty = (torch.empty(job.shape, device="meta") for job in jobs)
        super().__init__(nn.Parameter(values, requires_grad=False) for values in empty)


def _lane_of_each(layers: Sequence[Sequence[TensorJob]], lanes: Sequence[Lane]) -> list[Lane]:
    """The lane of each layer, by accelerate's device map: shares in proportion to the lanes' memory.

    The weights do not stay on a device but pass through it, so the budgets are shares of the model. Each is a number of
    whole layers, rounded up, and the last lane gets the rest: accelerate's own ``get_balanced_memory`` adds more than a
    layer to each, which leaves the last of eight devices without work.
    """
    from accelerate import infer_auto_device_map

    if not layers:
        return []
    sizes = [sum(job.numel for job in layer) * torch.float32.itemsize for layer in layers]
    largest, total, memory = max(sizes), sum(sizes), sum(lane.memory_bytes for lane in lanes)
    budgets = {i: -(-total * lane.memory_bytes // (memory * largest)) * largest for i, lane in enumerate(lanes)}
    budgets[len(lanes) - 1] += 2 * total
    # On its first device, accelerate keeps room for the largest layer that is still to come; one more keeps that so.
    budgets[0] += largest
    model = nn.ModuleList(_Layer(layer) for layer in (*layers, layers[sizes.index(largest)]))
    found = infer_auto_device_map(model, budgets, no_split_module_classes=[_Layer.__name__], clean_result=False)
    return [lanes[found[str(number)]] for number in range(len(layers))]
