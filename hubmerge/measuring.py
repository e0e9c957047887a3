"""The figures of a merge, taken from what the engine has in hand; of which weights singular values are computed.

Nothing here reaches the result: the engine shows what it has read and what it has written, and goes on.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Literal

import torch

from hubmerge.analysis import Diagnostics, Relations, Tally, TensorFigures, kind_of, relations_of_factors
from hubmerge.ranking import GRAIN
from hubmerge.reader import ChunkGroup
from hubmerge.spec import AdapterPart, LowRank, OutputFile, Plan, TensorJob, is_factored
from hubmerge.spectra import SMALL, Spectra, measure_spectra

Sampling = Literal["sample", "all", "none"]

BUDGET_OPERATIONS = 3e12
"""What the decompositions of a sample may take: about two minutes on two cores."""
ROOM_BYTES = 450_000_000
"""What decompositions at work at the same time hold, unless a single one needs more or less is there."""


class Nowhere:
    """A sink for runs that only measure: everything is finished from the start."""

    def __init__(self, outputs: Sequence[OutputFile]) -> None:
        self.written = list(outputs)

    def place(self, output: OutputFile, stopped: Callable[[], bool]) -> Path | None:
        """There is none."""
        return None

    def finished(self, output: OutputFile, path: Path, sha256: str) -> None:
        """Nothing is."""


class Meter:
    """Collects the figures of one run; safe to use from several threads.

    Args:
        plan: What is run.
        sampling: Of which weights singular values are computed: all of them, or a sample that ``sampled`` chooses.
    """

    def __init__(self, plan: Plan, sampling: Sampling = "sample") -> None:
        self._plan = plan
        self._sampling: Sampling = sampling
        self._candidates = matrices(plan)
        self._tallies: dict[int, Tally] = {}
        self._relations: dict[int, Relations] = {}
        self._spectra: dict[int, Spectra] = {}
        self._lock = threading.Lock()
        self.set_room(math.inf)

    def set_room(self, size_bytes: float) -> None:
        """Choose what is decomposed; a weight that takes more memory than there is for it is left out."""
        possible = [job for job in self._candidates if _working_bytes(job) <= size_bytes]
        budget = {"none": 0.0, "sample": BUDGET_OPERATIONS, "all": math.inf}[self._sampling]
        self.spectral = sampled(possible, len(self._plan.models), budget)
        """The jobs of whose weights singular values are computed, the cheapest first."""
        needed = [_working_bytes(job) for job in self.spectral]
        self.memory_bytes = int(min(sum(needed), size_bytes, max(ROOM_BYTES, *needed, 0)))
        """What decompositions at work hold at most."""
        self._room = _Room(self.memory_bytes)

    def wants(self, job: TensorJob) -> bool:
        """Whether a merged tensor has task vectors: rows that the base lacks have none."""
        return job.action == "merge" and job.numel > 0 and (job.base is not None or job.factors is not None)

    def add_chunk(self, group: ChunkGroup, start: int, stored: torch.Tensor) -> None:
        """Elements [start, start + n) of what is stored of a merged tensor, (n,); or all of a merged delta's factors.

        Args:
            group: The tensor's versions; what its own buffers hold stays as it is.
            start: A multiple of 32768.
            stored: In the output's dtype.
        """
        job = group.job
        if job.factors is not None:
            self._relations[job.index] = relations_of_factors(_all_factors(group), _stored_factors(job, stored))
            return
        with self._lock:
            tally = self._tallies.setdefault(job.index, Tally(len(group), job.numel))
        flat = group.flat()
        for low in range(0, len(stored), 8 * GRAIN):
            part = stored[low : low + 8 * GRAIN]
            flat.move(start + low, len(part))
            deltas = [_delta(group, flat, i) for i in range(len(group))]
            base = flat.base()
            tally.add(start + low, deltas, part.to(base.dtype).sub_(base), base)
        with self._lock:
            if tally.left == 0 and self._tallies.pop(job.index, None) is not None:
                self._relations[job.index] = tally.relations()

    def add_spectra(self, group: ChunkGroup) -> None:
        """Decompose the deltas of a whole weight, when there is room for that."""
        job = group.job
        with self._room.taken(_working_bytes(job)):
            group.move(0, job.numel)
            found = measure_spectra(group.each_delta(), len(group))
        with self._lock:
            self._spectra[job.index] = found

    def found(self) -> tuple[Mapping[int, Tally], Mapping[int, Spectra]]:
        """What was measured so far, for another process of the run to take over; by the number of the job."""
        return self._tallies, self._spectra

    def take_over(self, found: tuple[Mapping[int, Tally], Mapping[int, Spectra]]) -> None:
        """Add what another process has measured, of other tensors."""
        tallies, spectra = found
        with self._lock:
            self._tallies.update(tallies)
            self._spectra.update(spectra)

    def diagnostics(self) -> Diagnostics:
        """The figures of the whole run, once it has ended."""
        jobs: defaultdict[str, list[TensorJob]] = defaultdict(list)
        for job in self._plan.jobs:
            if job.index in self._relations:
                jobs[job.name].append(job)
        tensors = tuple(self._figures(rows) for rows in jobs.values())
        plan = self._plan
        return Diagnostics(tuple(m.name for m in plan.models), plan.method, plan.digest, tensors, len(self._candidates))

    def _figures(self, jobs: Sequence[TensorJob]) -> TensorFigures:
        """Of one tensor, which may have been merged in several ranges of rows."""
        first = jobs[0]
        found = reduce(Relations.__add__, (self._relations[job.index] for job in jobs))
        shape = (sum(job.shape[0] for job in jobs), *first.shape[1:]) if len(jobs) > 1 else first.shape
        spectra = self._spectra.get(first.index) if len(jobs) == 1 else None
        return TensorFigures(first.name, first.kind, first.layer, shape, found, spectra)


class _Room:
    """Memory, of which work takes its share before it begins."""

    def __init__(self, size_bytes: int) -> None:
        self._free_bytes = self._size_bytes = size_bytes
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, size_bytes: int) -> Iterator[None]:
        """Wait for so much; what is more than all there is waits for all of it."""
        size_bytes = min(size_bytes, self._size_bytes)
        with self._changed:
            self._changed.wait_for(lambda: self._free_bytes >= size_bytes)
            self._free_bytes -= size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._free_bytes += size_bytes
                self._changed.notify_all()


# --- values -----------------------------------------------------------------------------------------------------


def _delta(group: ChunkGroup, flat: ChunkGroup, i: int) -> torch.Tensor:
    """Task vector i of the flat chunk; of factors, of which the whole product is never formed, in float64."""
    factors = group.factors(i)
    if factors is None:
        return flat.delta(i)
    stored = factors.T if group.job.transposed else factors
    columns = stored.shape[1]
    first, last = flat.start // columns, -(-(flat.start + flat.size) // columns)
    rows = (stored.up[first:last].double() @ stored.down.double()).mul_(stored.scale)
    skipped = flat.start - first * columns
    return rows.view(-1)[skipped : skipped + flat.size]


def _all_factors(group: ChunkGroup) -> list[LowRank]:
    found = group.all_factors()
    assert found is not None, "merged adapters are made of factors"
    return found


def _stored_factors(job: TensorJob, stored: torch.Tensor) -> LowRank:
    """The merged delta from its two tensors as they lie in the file, flat."""
    assert job.factors is not None
    first, second = job.factors.shapes(job.shape)
    cut = first[0] * first[1]
    a, b = stored[:cut].view(first), stored[cut:].view(second)
    return LowRank(a.T, b.T) if job.factors.embedding else LowRank(b, a)


# --- which weights ----------------------------------------------------------------------------------------------


def matrices(plan: Plan) -> list[TensorJob]:
    """The merged weights of linear layers: those whose singular values tell something."""
    times = Counter(job.name for job in plan.jobs)
    return [
        job for job in plan.jobs
        if job.action == "merge" and job.kind == "linear" and len(job.shape) == 2 and min(job.shape) > 1
        and (job.base is not None or job.factors is not None) and times[job.name] == 1
    ]  # fmt: skip


def sampled(jobs: Sequence[TensorJob], tasks: int, budget: float) -> tuple[TensorJob, ...]:
    """As many weights as the budget allows, of each kind the same layers as far as possible; the cheapest first.

    A kind is a name without its numbers. Each round takes one more layer of every kind, the cheapest kind first: the
    middle one, the first, the last, then those in the middle of the widest gaps.
    """
    kinds: defaultdict[str, list[TensorJob]] = defaultdict(list)
    for job in jobs:
        kinds[kind_of(job.name)].append(job)
    queues = [[kind[i] for i in _spread(len(kind))] for kind in kinds.values()]
    queues.sort(key=lambda queue: (_operations(queue[0], tasks), queue[0].index))
    chosen: list[TensorJob] = []
    for round_ in range(max(map(len, queues), default=0)):
        for queue in queues:
            if round_ < len(queue) and _operations(queue[round_], tasks) <= budget:
                budget -= _operations(queue[round_], tasks)
                chosen.append(queue[round_])
    return tuple(sorted(chosen, key=lambda job: (_operations(job, tasks), job.index)))


def _spread(count: int) -> list[int]:
    """0 … count - 1: the middle, the ends, then always the one farthest from all before."""
    order = list(dict.fromkeys(i for i in (count // 2, 0, count - 1) if 0 <= i < count))
    while len(order) < count:
        order.append(max(range(count), key=lambda i: (min(abs(i - j) for j in order), -i)))
    return order


def _operations(job: TensorJob, tasks: int) -> float:
    """Multiplications and additions, roughly: Gram matrices, eigenvectors, and inner products of all that is kept."""
    n, m = sorted(job.shape)
    if is_factored(job):
        ranks = sum(i.rank or 0 for i in job.inputs if isinstance(i, AdapterPart))
        return 8.0 * (m + n) * ranks * ranks
    alone = 6.0 * m * n * n + 20.0 * n**3 if n <= SMALL else 1.0 * m * n * n + 4.0 * n**3
    return tasks * alone + 2.0 * (m + n) * n * n


def _working_bytes(job: TensorJob) -> int:
    """What the decompositions of a weight hold: the base and a delta, the subspaces, and a Gram matrix's eigenvectors.

    Measured on matrices with three times as many rows as columns, of eight tasks.
    """
    n, m = sorted(job.shape)
    if is_factored(job):
        ranks = sum(i.rank or 0 for i in job.inputs if isinstance(i, AdapterPart))
        return 8 * (2 * ranks * (m + n) + 4 * ranks * ranks)
    return 20 * m * n + 40 * n * n
