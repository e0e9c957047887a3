"""Run a Plan: read, merge, write and ship, overlapped, in cache-sized chunks, with nothing decided on the way.

Every result is the same for any chunk size, number of workers and order of completion: chunks start at multiples of
``GRAIN``, statistics add up exactly, and each output byte has one writer.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from hubmerge.devices import CPU, DeviceMap
from hubmerge.errors import IntegrityError
from hubmerge.linalg import of_rank
from hubmerge.measuring import Meter
from hubmerge.pieces import Pieces, Sources
from hubmerge.ranks import ALONE, Ranks, dealt
from hubmerge.reader import ChunkGroup, Scratch, Slot
from hubmerge.schedule import Cancelled, Schedule
from hubmerge.shipping import Outputs, Sink
from hubmerge.spec import FactorPair, LowRank, Plan, TensorJob
from hubmerge.tuning import Tuning

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Progress:
    """Reported after every finished piece."""

    done_bytes: int
    total_bytes: int
    finished: str | None = None
    """The output file that this piece completed."""


class Engine:
    """Runs one plan once.

    Args:
        plan: What is decided.
        sources: The inputs.
        sink: Where finished files go.
        tuning: Threads and sizes of pieces.
        progress: Told of every finished piece.
        devices: Where matrices are decomposed.
        done: Paths of output files that are finished from the start. Their inputs are read only where a method's
            statistics are about the whole model, or for what is measured.
        meter: Shown what is merged.
        ranks: The processes that run the plan together; each makes its share of the output files.
    """

    def __init__(
        self,
        plan: Plan,
        sources: Sources,
        sink: Sink,
        tuning: Tuning | None = None,
        progress: Callable[[Progress], None] | None = None,
        devices: DeviceMap | None = None,
        done: Collection[str] = (),
        meter: Meter | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.plan = plan
        self.sources = sources
        self.tuning = tuning or Tuning()
        self._progress = progress or (lambda _: None)
        self._devices = devices or DeviceMap()
        self._pieces = Pieces(plan, sources, self.tuning, self._devices)
        self._schedule = Schedule()
        self._ranks = ranks
        ranks.when_lost(self._schedule.stop)
        self._meter = meter
        self._owners = _owners(plan, done, ranks.size)
        theirs = {o.path for i, o in enumerate(plan.outputs) if self._owners[i] != ranks.rank and o.path not in done}
        self._outputs = Outputs(plan.outputs, sink, lambda: self._schedule.error is not None, theirs.union(done))
        self._due = [job for job in plan.jobs if self._is_due(job, done)]
        self._jobs = [job for job in self._due if self._is_mine(job)]
        self.truncation: dict[str, tuple[float, float]] = {}
        """Of merged factors: the squared norms of what their rank leaves out, and of the whole delta."""
        self._lock = threading.Lock()
        mine = [job for job in plan.jobs if plan.outputs[job.output].path not in theirs]
        self._total_bytes = sum(j.end_byte - j.start_byte for j in mine)
        self._done_bytes = self._total_bytes - sum(j.end_byte - j.start_byte for j in self._jobs)

    def run(self) -> None:
        """Produce every output file.

        Raises:
            HubMergeError: An input, the disk or the network failed; nothing unfinished is left under the sink's paths.
        """
        try:
            stats = self._model_stats()
            for job in self._jobs:
                if job.action == "copy":
                    self._add_pieces(job, lambda s, job, a, b: self._copy(s, job, a, b))
                else:
                    self._start(job, stats)
            self._add_spectra()
            self._outputs.ship_empty()
            self._schedule.run(self._devices.threads(self.tuning.workers))
        except BaseException:
            self._outputs.abort()
            raise

    # --- statistics -----------------------------------------------------------------------------------------

    def _model_stats(self) -> Any | None:
        """Passes over the whole model, for methods whose statistics are about all of it."""
        method, p = self._pieces.method, self.plan.params
        if method.scope(p) != "model" or not any(job.action == "merge" for job in self._due):
            return None
        stats = method.begin(p)
        jobs = [
            j
            for j in self.plan.jobs
            if j.action == "merge" and self._pieces.method_of(j) is method and self._is_mine(j)
        ]
        while stats is not None and not stats.done:
            total = _Total()
            for job in jobs:
                if stats.wants(job.name):
                    self._add_observers(job, p, stats, total, lambda: None)
            self._schedule.run(self._devices.threads(self.tuning.workers))
            stats, ended = self._settled(stats, total.value, p)
            if ended:
                break
        return stats

    def _settled(self, stats: Any, mine: Any | None, p: Any) -> tuple[Any, bool]:
        """What a pass has found, all ranks' parts of it together, and whether there was nothing to look at.

        The first rank settles it for all: another machine's rounding would not always come to the same.
        """
        total = _Total()
        for part in self._ranks.gather(mine):
            total.add(part)

        def settle() -> tuple[Any, bool]:
            return (stats, True) if total.value is None else (self._pieces.method.settle(stats, total.value, p), False)

        return self._ranks.from_first(settle)

    def _add_observers(self, job: TensorJob, p: Any, stats: Any, total: _Total, then: Callable[[], None]) -> None:
        """Queue one pass over a tensor; ``then`` runs after its last piece."""
        method = self._pieces.method_of(job)
        left = itertools.count(sum(1 for _ in self._pieces.ranges(job)) - 1, -1)

        def observe(scratch: Scratch, job: TensorJob, start: int, stop: int) -> None:
            mine = _Total()
            wanted = [c for c in self._pieces.chunks(job, start, stop, observing=True) if stats.wants(job.name, *c)]
            if wanted:
                # A pass that samples reads its few chunks by themselves, even where small reads are dear.
                few = 4 * sum(b - a for a, b in wanted) < stop - start
                group = self._pieces.group(job, start, stop, scratch, observing=True, stage=not few)
                for a, b in wanted:
                    group.move(a, b - a)
                    mine.add(self._in_place(job, group, lambda: method.observe(group, p, stats)))
            with self._lock:
                total.add(mine.value)
                last = next(left) == 0
            if last:
                then()

        self._add_pieces(job, observe)

    def _start(self, job: TensorJob, model_stats: Any | None) -> None:
        """Queue a tensor: straight to the merge, or through its own passes first."""
        method = self._pieces.method_of(job)
        assert job.settings is not None
        if model_stats is not None and method is self._pieces.method:
            self._add_merge(job, model_stats)
        elif (stats := method.begin(job.settings.params)) is None or job.numel == 0:
            self._add_merge(job, stats)
        else:
            self._next_pass(job, job.settings.params, stats)

    def _next_pass(self, job: TensorJob, p: Any, stats: Any) -> None:
        method = self._pieces.method_of(job)
        if stats.done:
            self._add_merge(job, stats)
            return
        total = _Total()
        self._add_observers(job, p, stats, total, lambda: self._next_pass(job, p, method.settle(stats, total.value, p)))

    # --- figures --------------------------------------------------------------------------------------------

    def _is_due(self, job: TensorJob, done: Collection[str]) -> bool:
        """Whether there is anything to do: what is written already is merged again only to be measured."""
        return self.plan.outputs[job.output].path not in done or (self._meter is not None and self._meter.wants(job))

    def _is_mine(self, job: TensorJob) -> bool:
        """Whether this process is the one to look at the tensor."""
        return self._owners[job.output] == self._ranks.rank

    def _add_spectra(self) -> None:
        """Queue the decompositions of deltas, behind everything else."""
        for number, job in enumerate(self._meter.spectral if self._meter is not None else ()):
            if self._is_mine(job):
                self._schedule.add((len(self.plan.outputs), number), lambda _, job=job: self._measure_spectra(job))  # type: ignore[misc]

    def _measure_spectra(self, job: TensorJob) -> None:
        assert self._meter is not None
        self._meter.add_spectra(self._pieces.group(job, 0, job.numel, Scratch(), stage=False, whole=True))

    # --- work on one piece ----------------------------------------------------------------------------------

    def _add_pieces(self, job: TensorJob, work: Callable[[Scratch, TensorJob, int, int], None]) -> None:
        place = self._devices.places.get(job.index)
        lane = place.name if place is not None else CPU
        for start, stop in self._pieces.ranges(job):
            self._schedule.add((job.output, job.start_byte), lambda s, a=start, b=stop: work(s, job, a, b), lane)  # type: ignore[misc]

    def _add_merge(self, job: TensorJob, stats: Any | None) -> None:
        self._add_pieces(job, lambda scratch, job, start, stop: self._merge(scratch, job, start, stop, stats))

    def _check_stopped(self) -> None:
        if self._schedule.error is not None:
            raise Cancelled

    def _in_place(self, job: TensorJob, group: ChunkGroup, work: Callable[[], T]) -> T:
        """The result of work on a group, done where the job has its place."""

        def unless_stopped() -> T:
            self._check_stopped()
            return work()

        lane = self._devices.places.get(job.index)
        return unless_stopped() if lane is None else lane.compute(group, unless_stopped)

    def _merge(self, scratch: Scratch, job: TensorJob, start: int, stop: int, stats: Any | None) -> None:
        group = self._pieces.group(job, start, stop, scratch)
        meter = self._meter if self._meter is not None and self._meter.wants(job) else None
        writer = self._outputs.writer(job.output) if job.output not in self._outputs.done else None
        for a, b in self._pieces.chunks(job, start, stop):
            group.move(a, b - a)
            merged = self._in_place(job, group, partial(self._merged, job, group, stats))
            out = _cast(merged, job, scratch)
            # A finite sum proves that every element is; only the other case needs the slow look.
            if not math.isfinite(float(out.sum())) and not bool(torch.isfinite(out).all()):
                raise group.non_finite(self._label)
            if writer is not None:
                writer.write(job.start_byte + a * job.dtype.nbytes, out.view(torch.uint8).numpy().data)
            if meter is not None:
                self._check_stopped()
                meter.add_chunk(group, a, out)
        self._finished(job, start, stop)

    def _merged(self, job: TensorJob, group: ChunkGroup, stats: Any | None) -> torch.Tensor:
        """What is stored of a merged group, flat."""
        assert job.settings is not None
        merged = self._pieces.method_of(job).merge(group, job.settings.params, stats)
        if job.factors is not None:
            assert isinstance(merged, LowRank)
            return self._as_factors(job, job.factors, merged).cpu()
        if isinstance(merged, LowRank):
            merged = merged.onto(group.base())
        if job.transposed and merged.ndim == 2:
            merged = merged.T
        return merged.reshape(-1).cpu()

    def _as_factors(self, job: TensorJob, pair: FactorPair, merged: LowRank) -> torch.Tensor:
        """What is stored of a merged delta: its two factors, one after the other, flat."""
        found, left_out, whole = of_rank(merged, pair.rank)
        with self._lock:
            self.truncation[job.name] = (left_out, whole)
        first, second = (found.up.T, found.down.T) if pair.embedding else (found.down, found.up)
        return torch.cat([first.reshape(-1), second.reshape(-1)])

    def _copy(self, scratch: Scratch, job: TensorJob, start: int, stop: int) -> None:
        spec = job.base
        assert spec is not None
        slot = Slot(spec, self.sources.open(job.source, spec.file))
        if self.sources.is_remote(job.source):
            slot.stage(start, stop)
        writer = self._outputs.writer(job.output)
        for a, b in self._pieces.chunks(job, start, stop):
            self._check_stopped()
            scratch.reset()
            values = slot.read(a, b - a, scratch)
            out = values if spec.dtype == job.dtype else self._converted(job, values)
            writer.write(job.start_byte + a * job.dtype.nbytes, out.view(torch.uint8).numpy().data)
        self._finished(job, start, stop)

    def _converted(self, job: TensorJob, values: torch.Tensor) -> torch.Tensor:
        """Copied values in the output's dtype; what was infinite before may stay so."""
        out = values.to(job.dtype.torch)
        if bool((torch.isfinite(values) & ~torch.isfinite(out)).any()):
            raise IntegrityError(
                f"tensor {job.name!r} of {self._label(job.source)} overflows {job.dtype.torch_name}, and it is copied",
                hint="choose dtype: bfloat16 or dtype: float32",
            )
        return out

    def _finished(self, job: TensorJob, start: int, stop: int) -> None:
        low, high = job.start_byte + start * job.dtype.nbytes, job.start_byte + stop * job.dtype.nbytes
        if job.factors is not None:
            low, high = job.start_byte, job.end_byte
        with self._lock:
            self._done_bytes += high - low
            done = self._done_bytes
        whole = job.output not in self._outputs.done and self._outputs.written(job.output, low, high)
        self._progress(Progress(done, self._total_bytes, self.plan.outputs[job.output].path if whole else None))

    def _label(self, source: int) -> str:
        model = self.plan.pinned(source)
        return f"{model.repo}@{model.commit[:12]}" if model.commit else model.repo


class _Total:
    """A running sum of Stats."""

    def __init__(self) -> None:
        self.value: Any = None

    def add(self, part: Any) -> None:
        if part is None:
            return
        if self.value is None:
            self.value = part
        else:
            self.value += part


def _owners(plan: Plan, done: Collection[str], count: int) -> dict[int, int]:
    """The rank that makes each output file; of finished ones, the rank that looks at their tensors if somebody must."""
    owners: dict[int, int] = {}
    for finished in (False, True):
        files = [o for o, output in enumerate(plan.outputs) if (output.path in done) == finished]
        owners |= dict(zip(files, dealt([plan.outputs[o].size_bytes for o in files], count), strict=True))
    return owners


def _cast(merged: torch.Tensor, job: TensorJob, scratch: Scratch) -> torch.Tensor:
    dtype = job.dtype.torch
    if merged.dtype == dtype:
        return merged.contiguous()
    return scratch.take(merged.numel(), dtype).copy_(merged)
