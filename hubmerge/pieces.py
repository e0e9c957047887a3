"""How tensors are cut into pieces and chunks, and what a method is given of each.

A piece is what a worker takes at a time; a chunk, what fits its cache. Some methods get a tensor whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Protocol

import torch

from hubmerge.devices import DeviceMap
from hubmerge.methods import get_method
from hubmerge.ranking import GRAIN
from hubmerge.reader import AdapterDelta, ChunkGroup, Scratch, Slot, Versions
from hubmerge.spec import AdapterPart, ByteSource, LowRank, Method, Plan, TensorJob, TensorSpec, is_factored
from hubmerge.tuning import Tuning


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


class Pieces:
    """Cuts the tensors of a plan.

    Args:
        plan: What is decided.
        sources: The inputs.
        tuning: Sizes of pieces and chunks.
        devices: Where matrices are decomposed.

    Raises:
        ValueError: Chunks or pieces that tensors must not be cut into.
    """

    def __init__(self, plan: Plan, sources: Sources, tuning: Tuning, devices: DeviceMap) -> None:
        if tuning.chunk_elements % GRAIN or tuning.piece_elements % tuning.chunk_elements:
            raise ValueError(f"chunks must be multiples of {GRAIN} elements, pieces multiples of chunks")
        self.method = get_method(plan.method)
        self._plan = plan
        self._sources = sources
        self._tuning = tuning
        self._devices = devices
        self._threads = torch.get_num_threads()
        # What is ranked together must be computed alike.
        together = self.method.scope(plan.params) == "model" and any(_needs_float64(j) for j in plan.jobs)
        self._compute = torch.float64 if together else None
        self._remote = any(sources.is_remote(s) for s in range(-1, len(plan.models)))

    def method_of(self, job: TensorJob) -> Method:
        """The plan's method, or the one that rows need which not all models have."""
        return get_method(job.method) if job.method else self.method

    def _in_one_piece(self, job: TensorJob) -> bool:
        return any(isinstance(i, AdapterPart) for i in job.inputs) or self._in_one_chunk(job)

    def _in_one_chunk(self, job: TensorJob, *, observing: bool = False) -> bool:
        """Whether the method gets the tensor whole: it asks for that, or it can work on factors alone."""
        if job.action != "merge":
            return False
        method, settings = self.method_of(job), job.settings
        assert settings is not None
        if job.factors is not None or method.whole(settings.params):
            return True
        # What is observed does not depend on the form; a merged tensor is PEFT's own only if it is made as PEFT does.
        return observing and is_factored(job) and method.rank_problem(settings.params, settings.weights) is None

    def ranges(self, job: TensorJob) -> Iterator[tuple[int, int]]:
        """The pieces of a tensor."""
        step = job.numel if self._in_one_piece(job) else self._tuning.piece_elements
        for start in range(0, job.numel, max(step, 1)):
            yield start, min(start + step, job.numel)

    def chunks(self, job: TensorJob, start: int, stop: int, *, observing: bool = False) -> list[tuple[int, int]]:
        """The ranges of a piece that are worked on at once."""
        if self._in_one_chunk(job, observing=observing):
            return [(start, stop)]
        size = self._tuning.chunk_elements
        return [(low, min(low + size, stop)) for low in range(start, stop, size)]

    def group(
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
        """A piece as a method is given it.

        Args:
            job: The tensor.
            start: First element.
            stop: Behind the last.
            scratch: Memory to compute in.
            observing: For a pass that learns, not for the merge.
            stage: Read what is far away at once.
            whole: Give all of it, whatever the method asks for.
        """
        base = Slot(job.base, self._sources.open(-1, job.base.file)) if job.base is not None else None
        models: list[Slot | AdapterDelta | None] = []
        compute = self._compute or (torch.float64 if _needs_float64(job) else torch.float32)
        for i, given in enumerate(job.inputs):
            if isinstance(given, TensorSpec):
                models.append(Slot(given, self._sources.open(i, given.file)))
            elif isinstance(given, AdapterPart):
                models.append(
                    AdapterDelta(
                        make=partial(self._adapter_delta, job, base, i, given),
                        factors=partial(self._sources.adapter_factors, i, given, compute),
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
        return ChunkGroup(self._plan, versions, job.settings, scratch, whole=whole)

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
                return self._sources.adapter_delta(source, part, values, job.transposed).reshape(-1)
        finally:
            torch.set_num_threads(1)


def _needs_float64(job: TensorJob) -> bool:
    """Whether an input is stored in float64, or is an adapter's change that float32 cannot hold exactly."""
    stored = [i for i in (job.base, *job.inputs) if isinstance(i, TensorSpec)]
    parts = [i for i in job.inputs if isinstance(i, AdapterPart)]
    if job.factors is not None:
        stored += [t for part in parts for t in part.tensors]
    return any(s.dtype.name == "F64" for s in stored) or any(part.kind == "generic" for part in parts)
