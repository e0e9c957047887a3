"""Encode deltas into a bundle's files, and decode a task's model from them: chunk by chunk, on a few threads.

Every result is the same for any chunk size, number of threads and order of completion.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hubmerge.bundles.deltas import Balanced, Deltas, balanced_factors
from hubmerge.bundles.placement import HeadCopy, PlacedPart
from hubmerge.bundles.planning import BundleJob, BundlePlan
from hubmerge.codec import Codec, Encoding, Part, Target
from hubmerge.engine import Progress
from hubmerge.factors import UP
from hubmerge.inputs import Inputs
from hubmerge.ranking import GRAIN
from hubmerge.reader import Scratch, Slot
from hubmerge.schedule import Cancelled, Schedule
from hubmerge.shipping import Outputs, Sink
from hubmerge.spec import AdapterPart, ByteSource, LowRank, TensorSpec
from hubmerge.storage import Storage

_NOTHING = torch.zeros(0, 1), torch.zeros(0, 1)
CHUNK = 8 * GRAIN
PIECE = 128 * GRAIN


def ranges(codec: Codec, params: Any, numel: int, size: int) -> list[tuple[int, int]]:
    """The ranges of elements that are worked on at once."""
    step = max(numel, 1) if codec.whole(params) else size
    return [(a, min(a + step, numel)) for a in range(0, max(numel, 1), step)]


# --- stored parts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredParts:
    """What a bundle's files keep, by the stored tensors' names."""

    specs: Mapping[str, TensorSpec]
    open: Callable[[str], ByteSource]

    def load(
        self, target: Target, parts: Sequence[Part], storage: Storage, start: int, stop: int, *, whole: bool
    ) -> dict[str, torch.Tensor]:
        """The parts' values: of a chunk flat, of a whole tensor in each part's shape."""
        found = {}
        for part in parts:
            low, high = (0, part.numel) if whole else (start, stop)
            raw = [self._read(name, *s.span(low, high)) for name, s in part.stored(target, storage).items()]
            values = part.form(storage).decode(raw, high - low)
            found[part.name] = values.view(part.shape) if whole else values
        return found

    def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Flat elements [start, stop) of a stored tensor."""
        spec = self.specs[name]
        width = spec.dtype.nbytes
        raw = torch.empty((stop - start) * width, dtype=torch.uint8)
        if stop > start:
            self.open(spec.file).read_into(spec.start_byte + start * width, raw.numpy().data)
        return raw.view(spec.dtype.torch)


# --- encoding ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Findings:
    """What an encoding run learned about each new task."""

    facts: tuple[Mapping[str, float], ...]
    norms: tuple[float, ...]
    """Frobenius norms of the deltas."""
    errors: tuple[float, ...] | None
    """Norms of the errors that theory expects at scale 1; None without theory."""


Before = Callable[[Target, Sequence[Part], int, int], Mapping[str, torch.Tensor]]


@dataclass(slots=True)
class Encoder:
    """Runs one plan once.

    Args:
        plan: What to encode.
        inputs: Where models and base are read.
        sink: Where finished files go.
        workers: Threads.
        before: The shared parts of the bundle that the tasks are added to, or taken out of; None for a new one.
        remove: Take the tasks out.
        progress: Called after every finished piece.
    """

    plan: BundlePlan
    inputs: Inputs
    sink: Sink
    workers: int = 2
    before: StoredParts | None = None
    remove: bool = False
    progress: Callable[[Progress], None] = lambda _: None
    chunk_elements: int = CHUNK
    _pairs: Balanced = field(init=False)
    _schedule: Schedule = field(init=False, default_factory=Schedule)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)
    _squares: dict[tuple[int, int], tuple[list[float], list[float] | None]] = field(init=False, default_factory=dict)
    _done_bytes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._pairs = balanced_factors(self.inputs)

    def run(self) -> Findings:
        """Produce every file.

        Raises:
            HubMergeError: An input, the disk or the network failed; nothing is left under the sink's paths.
        """
        outputs = Outputs(self.plan.outputs, self.sink, stopped=lambda: self._schedule.error is not None)
        try:
            stats = None if self.remove else self._statistics()
            for job in self.plan.jobs:
                if isinstance(job, HeadCopy):
                    self._schedule.add((job.output, job.start_byte), lambda s, j=job: self._copy(s, j, outputs))  # type: ignore[misc]
                else:
                    for a, b in self._pieces(job):
                        self._schedule.add(
                            _priority(job, a),
                            lambda s, j=job, a=a, b=b: self._encode(s, j, a, b, stats, outputs),  # type: ignore[misc]
                        )
            outputs.ship_empty()
            self._schedule.run({"cpu": self.workers})
        except BaseException:
            outputs.abort()
            raise
        facts = self.plan.codec.facts(self.plan.params, stats, len(self.plan.tasks))
        return Findings(facts, *self._norms())

    def _pieces(self, job: BundleJob) -> list[tuple[int, int]]:
        adapted = any(isinstance(i, AdapterPart) for i in job.inputs)
        size = max(job.target.numel, 1) if adapted else PIECE
        return ranges(self.plan.codec, self.plan.params, job.target.numel, size)

    def _group(self, job: BundleJob, scratch: Scratch, start: int, stop: int) -> Deltas:
        group = Deltas(self.plan, job, self.inputs, scratch, self._pairs)
        group.stage(start, stop)
        return group

    def _chunks(self, start: int, stop: int, *, whole: bool) -> Iterator[tuple[int, int]]:
        step = max(stop - start, 1) if whole else self.chunk_elements
        for a in range(start, max(stop, start + 1), step):
            if self._schedule.error is not None:
                raise Cancelled
            yield a, min(a + step, stop)

    def _statistics(self) -> Any | None:
        """Passes over all targets, for codecs that need to know more than a chunk."""
        codec, p = self.plan.codec, self.plan.params
        stats = codec.begin(p)
        while stats is not None and not stats.done:
            total: list[Any] = []

            def observe(scratch: Scratch, job: BundleJob, start: int, stop: int, stats: Any, total: list[Any]) -> None:
                group = self._group(job, scratch, start, stop)
                for a, b in self._chunks(start, stop, whole=group.whole):
                    if stats.wants(job.target.name, a, b):
                        group.move(a, b - a)
                        part = codec.observe(group, p, stats)
                        with self._lock:
                            total[:] = [total[0] + part] if total else [part]

            for job in self.plan.jobs:
                if isinstance(job, BundleJob) and stats.wants(job.target.name):
                    for a, b in self._pieces(job):
                        self._schedule.add(
                            _priority(job, a),
                            lambda s, j=job, a=a, b=b, st=stats, to=total: observe(s, j, a, b, st, to),  # type: ignore[misc]
                        )
            self._schedule.run({"cpu": self.workers})
            if not total:
                break
            stats = codec.settle(stats, total[0], p)
        return stats

    def _encode(self, scratch: Scratch, job: BundleJob, start: int, stop: int, stats: Any, outputs: Outputs) -> None:
        group = self._group(job, scratch, start, stop)
        for a, b in self._chunks(start, stop, whole=group.whole):
            group.move(a, b - a)
            encoded = self._encoded(group, job, a, b, stats)
            for placed, values in self._placed(job, encoded):
                self._write(placed, values, job.target, a, b, outputs, whole=group.whole)
            group.move(a, b - a)
            self._measure(group, job, a, encoded)
        for placed, _ in self._placed(job, None):
            low, high = (0, placed.part.numel) if group.whole else (start, stop)
            for place in placed.places:
                self._finished(outputs, place.output, *place.span(low, high))

    def _encoded(self, group: Deltas, job: BundleJob, start: int, stop: int, stats: Any) -> Encoding:
        codec, p, tasks = self.plan.codec, self.plan.params, [t.identity for t in self.plan.tasks]
        onto = None
        if self.before is not None and job.shared:
            parts = [placed.part for placed in job.shared]
            onto = self.before.load(job.target, parts, p.storage, start, stop, whole=group.whole)
        if self.remove:
            assert onto is not None
            return Encoding(codec.remove(onto, group, job.target, tasks, p), ({},) * len(tasks))
        return codec.encode(group, job.target, tasks, p, stats, onto)

    def _placed(self, job: BundleJob, encoded: Encoding | None) -> Iterator[tuple[PlacedPart, torch.Tensor]]:
        """Every part that is written, with its values where there are some."""
        nothing = torch.empty(0)
        for placed in job.shared:
            yield placed, nothing if encoded is None else encoded.shared[placed.part.name]
        for i, own in enumerate(() if self.remove else job.private):
            for placed in own:
                yield placed, nothing if encoded is None else encoded.tasks[i][placed.part.name]

    def _write(
        self, placed: PlacedPart, values: torch.Tensor, target: Target, start: int, stop: int, outputs: Outputs,
        *, whole: bool,
    ) -> None:  # fmt: skip
        low, high = (0, placed.part.numel) if whole else (start, stop)
        stored = placed.part.form(self.plan.params.storage).encode(values.reshape(-1), target.name)
        for place, one in zip(placed.places, stored, strict=True):
            at, _ = place.span(low, high)
            outputs.writer(place.output).write(at, one.contiguous().view(torch.uint8).numpy().data)

    def _finished(self, outputs: Outputs, output: int, start_byte: int, end_byte: int) -> None:
        is_last = outputs.written(output, start_byte, end_byte)
        with self._lock:
            self._done_bytes += end_byte - start_byte
            done = self._done_bytes
        total = sum(o.size_bytes - len(o.header) for o in self.plan.outputs)
        self.progress(Progress(done, total, self.plan.outputs[output].path if is_last else None))

    def _copy(self, scratch: Scratch, job: HeadCopy, outputs: Outputs) -> None:
        slot = Slot(job.base, self.inputs.open(job.source, job.base.file))
        width = job.base.dtype.nbytes
        for a, b in self._chunks(0, job.base.numel, whole=False):
            scratch.reset()
            values = slot.read(a, b - a, scratch)
            outputs.writer(job.output).write(job.start_byte + a * width, values.view(torch.uint8).numpy().data)
        self._finished(outputs, job.output, job.start_byte, job.start_byte + job.base.size_bytes)

    # --- what the card says

    def _measure(self, group: Deltas, job: BundleJob, start: int, encoded: Encoding) -> None:
        """The chunk's part of the deltas' norms, and of the errors that theory expects."""
        if self.plan.factors:
            self._measure_factors(job, start)
            return
        squares = []
        for i in range(len(group)):
            factors = group.factors(i)
            delta = group.delta(i) if factors is None else None
            squares.append(_square(delta, factors))
        codec, p = self.plan.codec, self.plan.params
        expected = None if self.remove else codec.expected_error(group, job.target, p, encoded)
        with self._lock:
            self._squares[job.index, start] = (squares, None if expected is None else list(expected))

    def _measure_factors(self, job: BundleJob, start: int) -> None:
        """The norms of adapters' deltas; how far they are from what factors give back, no theory says."""
        if start == 0 and job.target.name.endswith(UP):
            parts = [part if isinstance(part, AdapterPart) else None for part in job.inputs]
            pairs = [self._pairs(i, p, job.target.shape[0]) if p is not None else None for i, p in enumerate(parts)]
            squares = [_square(None, LowRank(up.T, down)) for up, down in (p or _NOTHING for p in pairs)]
            with self._lock:
                self._squares[job.index, 0] = (squares, None)

    def _norms(self) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
        rows = [self._squares[key] for key in sorted(self._squares)]
        count = len(self.plan.tasks)
        norms = tuple(math.sqrt(math.fsum(own[i] for own, _ in rows)) for i in range(count))
        if any(expected is None for _, expected in rows):
            return norms, None
        return norms, tuple(math.sqrt(math.fsum((e or [])[i] for _, e in rows)) for i in range(count))


def _square(delta: torch.Tensor | None, factors: LowRank | None) -> float:
    """Squared Frobenius norm, in float64."""
    if delta is not None:
        flat = delta.reshape(-1).double()
        return float(torch.dot(flat, flat))
    assert factors is not None
    up, down = factors.up.double() * factors.scale, factors.down.double()
    return float(((up.T @ up) * (down @ down.T)).sum())


def _priority(job: BundleJob, start: int) -> tuple[int, ...]:
    first = min((p.output for placed in job.shared for p in placed.places), default=0)
    return (first, job.index, start)
