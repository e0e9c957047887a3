"""What running a plan reads, writes and holds in memory, from sizes alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from hubmerge.io.checked import AHEAD_BYTES
from hubmerge.io.stream import STREAM_BYTES
from hubmerge.methods import get_method
from hubmerge.ranking import MAX_BINS_LOG2
from hubmerge.spec import AdapterPart, Method, Plan, TensorJob, TensorSpec, is_factored


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a run reads, writes and holds, in bytes."""

    read_bytes: int
    write_bytes: int
    largest_output_bytes: int
    push_disk_bytes: int
    """What of the outputs lies on the disk at a time, when they are pushed."""
    memory_bytes: int


# Python with torch and the Hub client loaded, and what they keep for connections and threads; measured.
_PROCESS_BYTES = 350_000_000


def footprint(
    plan: Plan,
    workers: int,
    chunk_elements: int,
    piece_elements: int,
    remote: bool,
    *,
    elsewhere: Collection[int] = (),
    feeders: int = 0,
    streaming: bool = False,
) -> Footprint:
    """What running the plan takes on this machine's processor.

    Args:
        plan: What to run.
        workers: Threads that compute.
        chunk_elements: Elements worked on at once.
        piece_elements: Elements fetched at once, where small reads are dear.
        remote: Whether they are.
        elsewhere: Indices of the jobs that accelerators compute.
        feeders: Threads that keep those busy.
        streaming: Whether outputs are sent as they are made, without a file.
    """
    read = sum(i.size_bytes for j in plan.jobs for i in (j.base, *j.inputs) if isinstance(i, TensorSpec))
    read += sum(sum(t.size_bytes for t in _adapter_tensors(plan, i)) for i in range(len(plan.models)))
    versions = len(plan.models) + 1
    method = get_method(plan.method)
    chunks = chunk_elements * 8 * (versions + 2)
    here = [j for j in plan.jobs if j.index not in elsewhere]
    matrices = max((working_set_bytes(j, method, len(plan.models)) for j in here), default=0)
    passing = max((_passing_bytes(j) for j in plan.jobs if j.index in elsewhere), default=0)
    staged = max((_staged_bytes(j, piece_elements) for j in here), default=0) if remote else 0
    waiting = min(AHEAD_BYTES, workers * staged)  # what came early, until its digest can be taken
    # Every thread counts into histograms of its own, which are then added up.
    statistics = len(plan.models) * 8 * (1 << MAX_BINS_LOG2) if method.begin(plan.params) is not None else 0
    largest = max((o.size_bytes for o in plan.outputs), default=0)
    return Footprint(
        read_bytes=read,
        write_bytes=sum(o.size_bytes for o in plan.outputs),
        largest_output_bytes=largest,
        push_disk_bytes=0 if streaming else largest,
        memory_bytes=_PROCESS_BYTES
        + workers * (chunks + matrices + staged)
        + waiting
        + feeders * passing
        + (workers + feeders + 1) * statistics
        + (STREAM_BYTES if streaming else 0),
    )


def _adapter_tensors(plan: Plan, source: int) -> set[TensorSpec]:
    """An adapter's stored tensors that the plan reads; some kinds share them between modules."""
    parts = (job.inputs[source] for job in plan.jobs if job.inputs)
    return {t for part in parts if isinstance(part, AdapterPart) for t in part.tensors}


def working_set_bytes(job: TensorJob, method: Method, n_models: int) -> int:
    """What a tensor takes that is worked on as a whole: for an adapter's delta, or by a method that needs all of it."""
    if job.settings is None:
        return 0
    if method.whole(job.settings.params) or job.factors is not None:
        if is_factored(job):
            dense = 0 if job.factors is not None else job.numel * 16
            return dense + _factored_bytes(job)
        if method.unit == "matrix" and job.kind in method.matrices(job.settings.params):
            # Decompositions work in float64; measured on square matrices with three models.
            return job.numel * (30 * n_models + 90)
        # An element-wise method that asks for whole tensors iterates on them: gradients, moments, candidates.
        return job.numel * 4 * (n_models + (3 if method.unit == "matrix" else 9))
    if any(isinstance(i, AdapterPart) for i in job.inputs):
        return job.numel * 4 * (n_models + 3)
    return 0


def _factored_bytes(job: TensorJob) -> int:
    """What a matrix method takes for deltas in factors: all of them in float64 a few times, and DRM's rows."""
    ranks = sum(i.rank or 0 for i in job.inputs if isinstance(i, AdapterPart))
    rows = len(job.inputs) * min(ranks, *job.shape) * max(job.shape)
    return 8 * (6 * ranks * sum(job.shape) + 3 * rows)


def _passing_bytes(job: TensorJob) -> int:
    """What a tensor takes in this machine's memory that an accelerator works on: its versions, then the result."""
    if job.factors is not None:
        return _factored_bytes(job)
    stored = sum(i.size_bytes for i in (job.base, *job.inputs) if isinstance(i, TensorSpec))
    made_here = sum(isinstance(i, AdapterPart) and i.kind == "generic" for i in job.inputs)
    return stored + job.numel * 12 * (1 + made_here)


def _staged_bytes(job: TensorJob, piece_elements: int) -> int:
    """What is fetched at once for one piece of a tensor: every version of it."""
    stored = [i for i in (job.base, *job.inputs) if isinstance(i, TensorSpec)]
    return sum(min(piece_elements, i.numel) * i.dtype.nbytes for i in stored)
