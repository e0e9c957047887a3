"""Run a Plan: read, merge, write and ship, overlapped, in cache-sized chunks, with nothing decided on the way.

Every result is the same for any chunk size, number of workers and order of completion: chunks start at multiples of
``GRAIN``, statistics add up exactly, and each output byte has one writer.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from hubmerge.devices import CPU, DeviceMap
from hubmerge.errors import IntegrityError
from hubmerge.linalg import of_rank
from hubmerge.measuring import Meter
from hubmerge.methods import get_method
from hubmerge.ranking import GRAIN
from hubmerge.ranks import ALONE, Ranks, dealt
from hubmerge.reader import AdapterDelta, ChunkGroup, Scratch, Slot, Versions
from hubmerge.schedule import Cancelled, Schedule
from hubmerge.shipping import Outputs, Sink
from hubmerge.spec import AdapterPart, ByteSource, FactorPair, LowRank, Method, Plan, TensorJob, TensorSpec, is_factored
from hubmerge.tuning import Tuning

T = TypeVar("T")


class Sources(Protocol):
    """Where the engine gets bytes from."""

    def open(self, source: int, file: str) -> ByteSource:
        """A file of a model (-1 is the base); the same object for the same file."""
        ...

    def is_remote(self, source: int) -> bool:
        """Whether small reads are dear, so that pieces are fetched whole."""
        ...

    def adapter_delta(self, source: int, part: AdapterPart, base: torch.Tensor, transposed: bool) -> torch.Tensor:
        """The dense delta an adapter makes of one parameter, in the stored orientation."""
        ...

    def adapter_factors(self, source: int, part: AdapterPart, dtype: torch.dtype) -> LowRank | None:
        """The same delta as factors, where the adapter keeps it so; a linear weight's as (out, in)."""
        ...


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
        if self.tuning.chunk_elements % GRAIN or self.tuning.piece_elements % self.tuning.chunk_elements:
            raise ValueError(f"chunks must be multiples of {GRAIN} elements, pieces multiples of chunks")
        self._progress = progress or (lambda _: None)
        self._devices = devices or DeviceMap()
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
        self._method = get_method(plan.method)
        self._threads = torch.get_num_threads()
        # What is ranked together must be computed alike.
        together = self._method.scope(plan.params) == "model" and any(_needs_float64(j) for j in plan.jobs)
        self._compute = torch.float64 if together else None
        self._remote = any(sources.is_remote(s) for s in range(-1, len(plan.models)))

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
        method, p = self._method, self.plan.params
        if method.scope(p) != "model" or not any(job.action == "merge" for job in self._due):
            return None
        stats = method.begin(p)
        jobs = [j for j in self.plan.jobs if j.action == "merge" and self._method_of(j) is method and self._is_mine(j)]
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
            return (stats, True) if total.value is None else (self._method.settle(stats, total.value, p), False)

        return self._ranks.from_first(settle)

    def _add_observers(self, job: TensorJob, p: Any, stats: Any, total: _Total, then: Callable[[], None]) -> None:
        """Queue one pass over a tensor; ``then`` runs after its last piece."""
        method = self._method_of(job)
        left = itertools.count(sum(1 for _ in self._pieces(job)) - 1, -1)

        def observe(scratch: Scratch, job: TensorJob, start: int, stop: int) -> None:
            mine = _Total()
            wanted = [c for c in self._chunks(job, start, stop, observing=True) if stats.wants(job.name, *c)]
            if wanted:
                # A pass that samples reads its few chunks by themselves, even where small reads are dear.
                few = 4 * sum(b - a for a, b in wanted) < stop - start
                group = self._group(job, start, stop, scratch, observing=True, stage=not few)
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
        method = self._method_of(job)
        assert job.settings is not None
        if model_stats is not None and method is self._method:
            self._add_merge(job, model_stats)
        elif (stats := method.begin(job.settings.params)) is None or job.numel == 0:
            self._add_merge(job, stats)
        else:
            self._next_pass(job, job.settings.params, stats)

    def _next_pass(self, job: TensorJob, p: Any, stats: Any) -> None:
        method = self._method_of(job)
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
        self._meter.add_spectra(self._group(job, 0, job.numel, Scratch(), stage=False, whole=True))

    # --- work on one piece ----------------------------------------------------------------------------------

    def _method_of(self, job: TensorJob) -> Method:
        return get_method(job.method) if job.method else self._method

    def _in_one_piece(self, job: TensorJob) -> bool:
        return any(isinstance(i, AdapterPart) for i in job.inputs) or self._in_one_chunk(job)

    def _in_one_chunk(self, job: TensorJob, *, observing: bool = False) -> bool:
        """Whether the method gets the tensor whole: it asks for that, or it can work on factors alone."""
        if job.action != "merge":
            return False
        method, settings = self._method_of(job), job.settings
        assert settings is not None
        if job.factors is not None or method.whole(settings.params):
            return True
        # What is observed does not depend on the form; a merged tensor is PEFT's own only if it is made as PEFT does.
        return observing and is_factored(job) and method.rank_problem(settings.params, settings.weights) is None

    def _pieces(self, job: TensorJob) -> Iterator[tuple[int, int]]:
        step = job.numel if self._in_one_piece(job) else self.tuning.piece_elements
        for start in range(0, job.numel, max(step, 1)):
            yield start, min(start + step, job.numel)

    def _add_pieces(self, job: TensorJob, work: Callable[[Scratch, TensorJob, int, int], None]) -> None:
        place = self._devices.places.get(job.index)
        lane = place.name if place is not None else CPU
        for start, stop in self._pieces(job):
            self._schedule.add((job.output, job.start_byte), lambda s, a=start, b=stop: work(s, job, a, b), lane)  # type: ignore[misc]

    def _add_merge(self, job: TensorJob, stats: Any | None) -> None:
        self._add_pieces(job, lambda scratch, job, start, stop: self._merge(scratch, job, start, stop, stats))

    def _chunks(self, job: TensorJob, start: int, stop: int, *, observing: bool = False) -> list[tuple[int, int]]:
        """The ranges of a piece that are worked on at once."""
        if self._in_one_chunk(job, observing=observing):
            return [(start, stop)]
        size = self.tuning.chunk_elements
        return [(low, min(low + size, stop)) for low in range(start, stop, size)]

    def _check_stopped(self) -> None:
        if self._schedule.error is not None:
            raise Cancelled

    def _group(
        self,
        job: TensorJob,
        start: int,
        stop: int,
        scratch: Scratch,
        *,
        observing: bool = False,
        stage: bool = True,
        whole: bool = False,
    ) -> ChunkGroup:
        base = Slot(job.base, self.sources.open(-1, job.base.file)) if job.base is not None else None
        models: list[Slot | AdapterDelta | None] = []
        compute = self._compute or (torch.float64 if _needs_float64(job) else torch.float32)
        for i, given in enumerate(job.inputs):
            if isinstance(given, TensorSpec):
                models.append(Slot(given, self.sources.open(i, given.file)))
            elif isinstance(given, AdapterPart):
                models.append(
                    AdapterDelta(
                        make=partial(self._adapter_delta, job, base, i, given),
                        factors=partial(self.sources.adapter_factors, i, given, compute),
                    )
                )
            else:
                models.append(None)
        whole = whole or self._in_one_chunk(job, observing=observing)
        versions = Versions(job, base, tuple(models), compute)
        afar = self._remote or job.index in self._devices.places
        if stage and afar and not (whole and is_factored(job) and observing):
            versions.stage(start, stop)
        assert job.settings is not None
        return ChunkGroup(self.plan, versions, job.settings, scratch, whole=whole)

    def _adapter_delta(self, job: TensorJob, base: Slot | None, source: int, part: AdapterPart) -> torch.Tensor:
        """The adapter's delta of the whole tensor, flat: its kinds need the matrix, not a chunk of it."""
        assert base is not None
        exact = torch.float64 if base.spec.dtype.name == "F64" else torch.float32
        if part.kind == "low_rank":  # needs no values of the base, only its shape and dtype
            values = torch.zeros((), dtype=exact).expand(job.shape)
        else:
            values = base.read(0, job.numel, Scratch()).to(exact, copy=True).view(job.shape)
        # PEFT's decompositions give other bits with other numbers of threads; its users run it with the default.
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self.sources.adapter_delta(source, part, values, job.transposed).reshape(-1)
        finally:
            torch.set_num_threads(1)

    def _in_place(self, job: TensorJob, group: ChunkGroup, work: Callable[[], T]) -> T:
        """The result of work on a group, done where the job has its place."""

        def unless_stopped() -> T:
            self._check_stopped()
            return work()

        lane = self._devices.places.get(job.index)
        return unless_stopped() if lane is None else lane.compute(group, unless_stopped)

    def _merge(self, scratch: Scratch, job: TensorJob, start: int, stop: int, stats: Any | None) -> None:
        group = self._group(job, start, stop, scratch)
        meter = self._meter if self._meter is not None and self._meter.wants(job) else None
        writer = self._outputs.writer(job.output) if job.output not in self._outputs.done else None
        for a, b in self._chunks(job, start, stop):
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
        merged = self._method_of(job).merge(group, job.settings.params, stats)
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
        for a, b in self._chunks(job, start, stop):
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


def _needs_float64(job: TensorJob) -> bool:
    """Whether an input is stored in float64, or is an adapter's change that float32 cannot hold exactly."""
    stored = [i for i in (job.base, *job.inputs) if isinstance(i, TensorSpec)]
    parts = [i for i in job.inputs if isinstance(i, AdapterPart)]
    if job.factors is not None:
        stored += [t for part in parts for t in part.tensors]
    return any(s.dtype.name == "F64" for s in stored) or any(part.kind == "generic" for part in parts)


def _cast(merged: torch.Tensor, job: TensorJob, scratch: Scratch) -> torch.Tensor:
    dtype = job.dtype.torch
    if merged.dtype == dtype:
        return merged.contiguous()
    return scratch.take(merged.numel(), dtype).copy_(merged)


__all__ = ["GRAIN", "Engine", "Progress", "Sink", "Sources", "Tuning"]
