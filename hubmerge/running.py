"""How a plan is run: by threads, devices and processes, within what memory and disk may be used."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import hubmerge
from hubmerge.card import CardFacts
from hubmerge.devices import DeviceMap, device_map
from hubmerge.errors import PlanError, UsageError
from hubmerge.inputs import Fetch, Inputs
from hubmerge.journal import TAG_LENGTH, Resumable
from hubmerge.output import Written
from hubmerge.ranks import ALONE, Ranks
from hubmerge.recipe import Recipe
from hubmerge.spec import Plan, Truncation
from hubmerge.tuning import Tuning, tuned

if TYPE_CHECKING:
    from hubmerge.engine import Progress
    from hubmerge.measuring import Meter, Sampling

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run; none of it changes a bit of the result, but where a device decomposes matrices in its own way."""

    workers: int | None = None
    """Threads of each process; default: its share of the cores it may use, and more when inputs are streamed."""
    fetch: Fetch = "auto"
    max_memory_bytes: int | None = None
    """What all processes on this machine may hold together; likewise of the disk."""
    max_disk_bytes: int | None = None
    """Beside a folder's files. A push that may use two shards' room writes the next one while one is uploaded."""
    upload: Literal["file", "stream"] = "file"
    """How a push sends its shards: each from a file when it is finished, or while it is made, without a file. A server
    that takes no streams gets files."""
    chunk_elements: int | None = None
    """Elements handled at once; a multiple of 32768."""
    device: str = "auto"
    """Where matrices are decomposed: the accelerators there are (auto), ``cpu``, all of a kind (``cuda``), or one
    (``cuda:1``)."""
    device_memory_bytes: Mapping[str, int] = field(default_factory=dict)
    """What may be used of an accelerator's memory, by its name or kind; by default most of what is free."""


class Clock:
    """Laps of a run."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End a lap."""
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now

    def timings(self) -> dict[str, float]:
        """All laps and their total."""
        return {**{k: round(v, 3) for k, v in self._laps.items()}, "total_s": round(self._last - self._start, 3)}


def runnable(planned: Plan) -> Plan:
    """The plan.

    Raises:
        PlanError: It names problems because of which it cannot be run.
    """
    errors = [p for p in planned.problems if p.severity == "error"]
    if errors:
        rest = "".join(f"\n{p.message}" for p in errors[1:6])
        more = f"\n… and {len(errors) - 6} more (hubmerge plan lists them)" if len(errors) > 6 else ""
        raise PlanError(errors[0].message + rest + more, hint=errors[0].hint)
    return planned


def share_of(options: RunOptions, ranks: Ranks) -> RunOptions:
    """The options as they hold for one of several processes on this machine."""
    memory, disk = (b and b // ranks.local_size for b in (options.max_memory_bytes, options.max_disk_bytes))
    return replace(options, max_memory_bytes=memory, max_disk_bytes=disk)


def facts_of(planned: Plan, work: Resumable, asked: Mapping[str, Any]) -> dict[str, str]:
    """What all processes of a run must agree on, from what tells most to what tells that there is anything at all."""
    models = {f"commit of {m.repo}": m.commit[:TAG_LENGTH] for m in (planned.base, *planned.models) if m.commit}
    return {
        "version of hubmerge": hubmerge.__version__,
        **{f"value of {name}": str(value) for name, value in asked.items()},
        **models,
        "plan (of digest)": planned.digest[:TAG_LENGTH],
        "state of local files (of digest)": work.tag,
        "choice to resume": str(work.resume),
    }


def tuning_for(
    planned: Plan, options: RunOptions, devices: DeviceMap, *, remote: bool, processes: int = 1,
    meter: Meter | None = None,
) -> Tuning:  # fmt: skip
    """Threads and sizes of pieces, for each of so many processes on this machine."""
    return tuned(
        planned,
        devices,
        remote=remote,
        workers=options.workers,
        chunk_elements=options.chunk_elements,
        max_memory_bytes=options.max_memory_bytes,
        processes=processes,
        streaming=options.upload == "stream",
        diagnostics=meter,
    )


def meter_for(planned: Plan, recipe: Recipe, sampling: Sampling = "sample") -> Meter:
    """What measures a run.

    Raises:
        UsageError: There is no base.
    """
    from hubmerge.measuring import Meter

    if not CardFacts(planned, recipe).has_base:
        raise UsageError(
            "without a base there are no task vectors to measure: they are models minus the base",
            hint="name the models' common base in the recipe (base: …), or leave out the diagnostics",
        )
    return Meter(planned, sampling)


def run(
    planned: Plan,
    inputs: Inputs,
    sink: Any,
    options: RunOptions,
    progress: Callable[[Progress], None] | None,
    meter: Meter | None = None,
    ranks: Ranks = ALONE,
) -> Truncation | None:
    """Produce the output files, the sink's list of which then is that of all processes."""
    from hubmerge.engine import Engine

    remote = any(inputs.is_remote(s) for s in range(-1, len(planned.models)))
    devices = device_map(planned, options.device, options.device_memory_bytes, ranks)
    for note in devices.notes:
        log.warning("%s", note)
    done = frozenset(w.path for w in sink.written)
    tuning = tuning_for(planned, options, devices, remote=remote, processes=ranks.local_size, meter=meter)
    engine = Engine(planned, inputs, sink, tuning, progress, devices, done, meter, ranks)
    engine.run()
    written: dict[str, Written] = {}
    lost: dict[str, tuple[float, float]] = {}
    mine = meter.found() if meter is not None else None
    for part, squares, measured in ranks.gather((sink.written, engine.truncation, mine)):
        written |= {w.path: w for w in part}
        lost |= squares
        if meter is not None and measured is not None:
            meter.take_over(measured)
    sink.written, truncation = ranks.from_first(lambda: (list(written.values()), Truncation.of(lost)))
    return truncation


def peaks_of(disk_bytes: int) -> dict[str, int]:
    """What ``Result`` says of memory and disk."""
    return {"peak_rss_bytes": peak_rss_bytes(), "peak_disk_bytes": disk_bytes}


def peak_rss_bytes() -> int:
    """The most memory this process has held."""
    import resource

    # Linux hands down ru_maxrss to the programs that a process starts.
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
