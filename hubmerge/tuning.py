"""How many threads run a plan and how much each has in hand, within the memory allowed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hubmerge.devices import LANE_THREADS, DeviceMap
from hubmerge.errors import BudgetError
from hubmerge.footprint import Footprint, footprint
from hubmerge.quantities import size
from hubmerge.ranking import GRAIN
from hubmerge.spec import Plan

if TYPE_CHECKING:
    from hubmerge.measuring import Meter

_REMOTE_WORKERS = 4


@dataclass(frozen=True, slots=True)
class Tuning:
    """How to run; none of it changes a bit of the result."""

    workers: int = 2
    chunk_elements: int = 8 * GRAIN
    piece_elements: int = 128 * GRAIN


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(workers: int | None, *, remote: bool, processes: int = 1) -> int:
    """How many, if not said: one for each core; over a network more, for some wait while others compute.

    Processes that run on this machine together share its cores.
    """
    return workers or max(cores() // processes, -(-_REMOTE_WORKERS // processes) if remote else 1)


def footprint_of(plan: Plan, tuning: Tuning, devices: DeviceMap, *, remote: bool, streaming: bool = False) -> Footprint:
    """What running the plan takes; ``remote``: inputs are read over a network; ``streaming``: outputs need no file."""
    return footprint(
        plan,
        tuning.workers,
        tuning.chunk_elements,
        tuning.piece_elements,
        remote,
        elsewhere=devices.places,
        feeders=LANE_THREADS * len(devices.lanes),
        streaming=streaming,
    )


def tuned(
    plan: Plan,
    devices: DeviceMap,
    *,
    remote: bool,
    workers: int | None = None,
    chunk_elements: int | None = None,
    max_memory_bytes: int | None = None,
    processes: int = 1,
    streaming: bool = False,
    diagnostics: Meter | None = None,
) -> Tuning:
    """Threads and sizes within the memory allowed; fewer threads and smaller pieces before giving up.

    Args:
        plan: What to run.
        devices: What accelerators take off the processor.
        remote: Whether inputs are read over a network.
        workers: Threads to begin with; by default one for each core, and more if remote.
        chunk_elements: Elements handled at once, to begin with.
        max_memory_bytes: No limit by default.
        processes: How many run on this machine together, and share its cores.
        streaming: Whether outputs are sent as they are made, without a file.
        diagnostics: What measures the run beside the merge; it is given the memory that merging can do without.

    Raises:
        BudgetError: Even the smallest does not fit.
    """
    default = Tuning()
    chunk = chunk_elements or default.chunk_elements
    found = Tuning(
        threads(workers, remote=remote, processes=processes), chunk, max(default.piece_elements // chunk, 1) * chunk
    )
    if max_memory_bytes is None:
        return found

    def needed(tuning: Tuning) -> int:
        return footprint_of(plan, tuning, devices, remote=remote, streaming=streaming).memory_bytes

    choices = [found, *_smaller_than(found)]
    least = needed(choices[-1])
    if least > max_memory_bytes:
        raise BudgetError(
            f"this merge needs about {size(least)} of memory with one worker, {size(max_memory_bytes)} are allowed",
            hint=f"raise --max-memory to {size(least * 1.005)}, or merge fewer models",
        )
    if diagnostics is not None:
        diagnostics.set_room(max_memory_bytes - least)
        max_memory_bytes -= diagnostics.memory_bytes
    return next(choice for choice in choices if needed(choice) <= max_memory_bytes)


def _smaller_than(given: Tuning) -> Iterator[Tuning]:
    """What takes less and less memory, down to the least of all."""
    smaller = _smaller(given)
    while smaller is not None:
        yield smaller
        smaller = _smaller(smaller)


def _smaller(given: Tuning) -> Tuning | None:
    """What takes a little less memory; None for the least of all."""
    chunk, piece = given.chunk_elements, given.piece_elements
    if given.workers > 1:
        return replace(given, workers=given.workers - 1)
    if piece > 4 * chunk:
        return Tuning(1, chunk, piece // 2 // chunk * chunk)
    return Tuning(1, GRAIN, max(piece // GRAIN, 1) * GRAIN) if chunk > GRAIN else None
