"""The deltas that stand in a target's place, as a codec sees them: read or made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from hubmerge.bundles.planning import BundleJob, BundlePlan
from hubmerge.factors import UP, balanced
from hubmerge.inputs import Inputs
from hubmerge.reader import Scratch, Slot
from hubmerge.spec import AdapterPart, LowRank, TensorGroup, TensorSpec

_KEPT_FACTORS = 64
"""Pairs of factors that are kept until the second one is asked for, and the next chunk."""
Balanced = Callable[[int, AdapterPart, int], tuple[torch.Tensor, torch.Tensor]]


def balanced_factors(inputs: Inputs) -> Balanced:
    """Task i's delta as balanced factors of so many rows, up and down; the latest are remembered."""

    @lru_cache(maxsize=_KEPT_FACTORS)
    def found(i: int, part: AdapterPart, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        factors = inputs.adapter_factors(i, part, torch.float32)
        assert factors is not None
        return balanced(factors, rank)

    return found


class Deltas(TensorGroup):
    """The deltas that stand in a target's place, read when they are asked for: a chunk of them, or all."""

    def __init__(self, plan: BundlePlan, job: BundleJob, inputs: Inputs, scratch: Scratch, pairs: Balanced) -> None:
        target = job.target
        self.name, self.index, self.kind, self.shape = target.name, job.index, target.kind, target.shape
        self.tasks = tuple(t.model.name for t in plan.tasks)
        self.weights, self.params, self.seed = (1.0,) * len(plan.tasks), plan.each, plan.seed
        self.start, self._n = 0, 0
        self.whole = plan.codec.whole(plan.params)
        self.compute = torch.float64 if any(b and b.dtype.name == "F64" for b in job.bases) else torch.float32
        self._job, self._inputs, self._scratch = job, inputs, scratch
        self._pairs = pairs
        self._bases = [Slot(b, inputs.open(-1, b.file)) if b is not None else None for b in job.bases]
        self._models = [
            Slot(given, inputs.open(i, given.file)) if isinstance(given, TensorSpec) else None
            for i, given in enumerate(job.inputs)
        ]
        self._dense: dict[int, torch.Tensor] = {}

    def stage(self, start: int, stop: int) -> None:
        """Fetch elements [start, stop) at once, from where small reads are dear."""
        for i, slot in enumerate(self._models):
            if slot is not None:
                if self._inputs.is_remote(i):
                    slot.stage(start, stop)
                if self._inputs.is_remote(-1) and (base := self._bases[i]) is not None:
                    base.stage(start, stop)

    def move(self, start: int, n: int) -> None:
        """Point at elements [start, start + n), all of them of a whole tensor, and take all buffers back."""
        self.start, self._n = start, n
        self._scratch.reset()

    def base(self) -> torch.Tensor:
        """Not defined: each delta has a base of its own."""
        raise NotImplementedError("codecs work on deltas")

    def model(self, i: int) -> torch.Tensor:
        """Not defined, as the base is not."""
        raise NotImplementedError("codecs work on deltas")

    def delta(self, i: int) -> torch.Tensor:
        """Task i's delta, in a buffer of its own."""
        out, slot, base = self._scratch.take(self._n, self.compute), self._models[i], self._bases[i]
        if slot is not None:
            assert base is not None
            out.copy_(slot.read(self.start, self._n, self._scratch))
            before = self._scratch.take(self._n, self.compute)
            out.sub_(before.copy_(base.read(self.start, self._n, self._scratch)))
        elif self._job.inputs[i] is None:
            out.zero_()
        else:
            out.copy_(self._adapted(i)[self.start : self.start + self._n])
        return self._shaped(out, i)

    def factors(self, i: int) -> LowRank | None:
        """Task i's delta as factors, if it is known so and the group is whole."""
        part = self._job.inputs[i]
        if not self.whole or not isinstance(part, AdapterPart):
            return None
        return self._inputs.adapter_factors(i, part, self.compute)

    def _adapted(self, i: int) -> torch.Tensor:
        """An adapter's delta of the whole tensor, flat."""
        if i not in self._dense:
            part, base = self._job.inputs[i], self._bases[i]
            assert isinstance(part, AdapterPart)
            if base is None:
                up, down = self._pairs(i, part, self.shape[0])
                self._dense[i] = (up if self._job.origins[i].endswith(UP) else down).reshape(-1)
                return self._dense[i]
            spec = base.spec
            if part.kind == "low_rank":
                values = torch.zeros((), dtype=self.compute).expand(spec.shape)
            else:
                values = base.read(0, spec.numel, Scratch()).to(self.compute, copy=True).view(spec.shape)
            with torch.inference_mode(False), torch.no_grad():
                found = self._inputs.adapter_delta(i, part, values, self._job.transposed[i])
            self._dense[i] = found.reshape(-1).to(self.compute)
        return self._dense[i]

    def _shaped(self, flat: torch.Tensor, i: int) -> torch.Tensor:
        if not self.whole:
            return flat
        full = flat.view(self.shape)
        return full.T if self._job.transposed[i] else full
