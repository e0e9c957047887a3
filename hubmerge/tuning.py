"""How many threads run a plan and how much each has in hand, within the memory allowed."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from hubmerge.devices import LANE_THREADS, DeviceMap
from hubmerge.errors import BudgetError
from hubmerge.footprint import Footprint, footprint
from hubmerge.quantities import size
from hubmerge.ranking import GRAIN
from hubmerge.spec import Plan

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
    while True:
        needed = footprint_of(plan, found, devices, remote=remote, streaming=streaming).memory_bytes
        if needed <= max_memory_bytes:
            return found
        smaller = _smaller(found)
        if smaller is None:
            raise BudgetError(
                f"this merge needs about {size(needed)} of memory with one worker, "
                f"{size(max_memory_bytes)} are allowed",
                hint=f"raise --max-memory to {size(needed * 1.005)}, or merge fewer models",
            )
        found = smaller


def _smaller(given: Tuning) -> Tuning | None:
    """What takes a little less memory; None for the least of all."""
    chunk, piece = given.chunk_elements, given.piece_elements
    if given.workers > 1:
        return replace(given, workers=given.workers - 1)
    if piece > 4 * chunk:
        return Tuning(1, chunk, piece // 2 // chunk * chunk)
    return Tuning(1, GRAIN, max(piece // GRAIN, 1) * GRAIN) if chunk > GRAIN else None
