"""One chunk of all versions of a tensor, read into buffers that stay in the processor's cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from hubmerge.errors import IntegrityError
from hubmerge.spec import ByteSource, LowRank, Plan, Settings, TensorGroup, TensorJob, TensorSpec


class Scratch:
    """Buffers of one worker, handed out in turn and taken back all at once before the next chunk.

    A fresh allocation of a megabyte costs four times the arithmetic done on it; reuse keeps chunks cache-hot.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._used = 0

    @property
    def used(self) -> int:
        """How many buffers are out."""
        return self._used

    def reset(self, used: int = 0) -> None:
        """Take all buffers back, but the first so many."""
        self._used = used

    def take(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised (n,) tensor, valid until the next reset."""
        size_bytes = n * dtype.itemsize
        if self._used == len(self._buffers):
            self._buffers.append(self._memory(size_bytes))
        buffer = self._buffers[self._used]
        if buffer.numel() < size_bytes:
            buffer = self._buffers[self._used] = self._memory(size_bytes)
        self._used += 1
        return buffer[:size_bytes].view(dtype)

    def _memory(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8)


@dataclass(slots=True)
class Slot:
    """One version of the tensor: where its bytes are."""

    spec: TensorSpec
    source: ByteSource
    staged: torch.Tensor | None = None
    """Bytes of elements [staged_from, …) already fetched, for sources where small reads are dear."""
    staged_from: int = 0

    def stage(self, start: int, stop: int) -> None:
        """Fetch elements [start, stop) at once."""
        width = self.spec.dtype.nbytes
        self.staged = torch.empty((stop - start) * width, dtype=torch.uint8)
        self.staged_from = start
        if stop > start:
            self.source.read_into(self.spec.start_byte + start * width, self.staged.numpy().data)

    def read(self, start: int, n: int, scratch: Scratch) -> torch.Tensor:
        """Elements [start, start+n) in the stored dtype; read-only, shape (n,)."""
        dtype = self.spec.dtype
        if self.staged is not None:
            low = (start - self.staged_from) * dtype.nbytes
            return self.staged[low : low + n * dtype.nbytes].view(dtype.torch)
        raw = scratch.take(n * dtype.nbytes, torch.uint8)
        if n:
            self.source.read_into(self.spec.start_byte + start * dtype.nbytes, raw.numpy().data)
        return raw.view(dtype.torch)


@dataclass(slots=True)
class AdapterDelta:
    """An adapter's delta of the whole tensor, computed when it is asked for."""

    make: Callable[[], torch.Tensor]
    """The dense delta, flat."""
    factors: Callable[[], LowRank | None]
    """The same as factors, where it is known so."""
    found: torch.Tensor | None = None

    def dense(self) -> torch.Tensor:
        """The dense delta, flat; read-only."""
        if self.found is None:
            self.found = self.make()
        return self.found


@dataclass(slots=True)
class Versions:
    """The base's and the models' versions of one tensor, ready to be read chunk by chunk."""

    job: TensorJob
    base: Slot | None
    models: tuple[Slot | AdapterDelta | None, ...]
    """A slot to read from, what an adapter makes of the base, or None where the model leaves the base as it is."""
    compute: torch.dtype
    slots: list[Slot] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = [s for s in (self.base, *self.models) if isinstance(s, Slot)]

    def stage(self, start: int, stop: int) -> None:
        """Fetch elements [start, stop) of every version."""
        for slot in self.slots:
            slot.stage(start, stop)

    def prepare(self) -> None:
        """Make those of the adapters' deltas that are no factors."""
        for version in self.models:
            if isinstance(version, AdapterDelta) and version.factors() is None:
                version.dense()


class ChunkGroup(TensorGroup):
    """A chunk of ``Versions``, or all of it, as a merge method sees it; values are read when asked for, one by one."""

    def __init__(
        self, plan: Plan, versions: Versions, settings: Settings, scratch: Scratch, *, whole: bool = False
    ) -> None:
        job = versions.job
        self.name, self.index, self.kind, self.shape, self.layer = job.name, job.index, job.kind, job.shape, job.layer
        self.tasks = tuple(m.name for m in plan.models)
        self.seed = plan.seed
        self.weights, self.params = settings.weights, settings.per_model
        self.start = 0
        self._n = 0
        self._whole = whole
        self.job = job
        self._versions = versions
        self._scratch = scratch
        self._base: torch.Tensor | None = None
        self._device: torch.device | None = None
        self._flat: ChunkGroup | None = None

    @property
    def size(self) -> int:
        """Elements in the chunk."""
        return self._n

    def flat(self) -> ChunkGroup:
        """The same versions in flat chunks, on the processor, with buffers of their own."""
        if self._flat is None:
            self._flat = copy.copy(self)
            self._flat._whole, self._flat._scratch, self._flat._device = False, Scratch(), None
        return self._flat

    def prepare(self) -> None:
        """Do in advance what the values need of the processor."""
        self._versions.prepare()

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Hand out values on a device, in buffers of its own, instead of in the processor's."""
        self._device, self._base = device, None
        try:
            yield
        finally:
            self._device, self._base = None, None

    def move(self, start: int, n: int) -> None:
        """Point at elements [start, start+n), all of them of a whole tensor, and take all buffers back."""
        self.start, self._n = start, n
        self._base = None
        self._scratch.reset()

    def _shaped(self, flat: torch.Tensor) -> torch.Tensor:
        if not self._whole:
            return flat
        full = flat.view(self.shape)
        return full.T if self._versions.job.transposed else full

    def _buffer(self) -> torch.Tensor:
        if self._device is None:
            return self._scratch.take(self._n, self._versions.compute)
        return torch.empty(self._n, dtype=self._versions.compute, device=self._device)

    def _fresh(self, slot: Slot) -> torch.Tensor:
        return self._copied(slot.read(self.start, self._n, self._scratch))

    def _copied(self, values: torch.Tensor) -> torch.Tensor:
        """The values in a buffer. They travel as they are stored, and a device converts them itself."""
        out = self._buffer()
        return out.copy_(values.to(out.device))

    def _flat_base(self) -> torch.Tensor:
        if self._base is None:
            slot = self._versions.base
            self._base = self._fresh(slot) if slot is not None else self._buffer().zero_()
        return self._base

    def base(self) -> torch.Tensor:
        """The base's values; read-only."""
        return self._shaped(self._flat_base())

    def model(self, i: int) -> torch.Tensor:
        """Model i's own values, in a buffer of its own."""
        version = self._versions.models[i]
        if isinstance(version, Slot):
            return self._shaped(self._fresh(version))
        out = self._copied(self._flat_base())
        if version is not None:
            out += version.dense()[self.start : self.start + self._n].to(out.device)
        return self._shaped(out)

    def delta(self, i: int) -> torch.Tensor:
        """Model i minus base, in a buffer of its own."""
        version = self._versions.models[i]
        if isinstance(version, Slot):
            base = self._flat_base()
            return self._shaped(self._fresh(version).sub_(base))
        if version is None:
            return self._shaped(self._buffer().zero_())
        return self._shaped(self._copied(version.dense()[self.start : self.start + self._n]))

    def factors(self, i: int) -> LowRank | None:
        """Model i's delta as factors, if it is known in that form and the group is whole."""
        version = self._versions.models[i]
        if not self._whole or len(self.shape) != 2 or isinstance(version, Slot):
            return None
        if version is not None:
            found = version.factors()
            return found if found is None or self._device is None else found.to(self._device)
        rows, columns = self.shape[::-1] if self.job.transposed else self.shape
        empty = torch.empty(0, dtype=self._versions.compute, device=self._device)
        return LowRank(empty.view(rows, 0), empty.view(0, columns))

    def each_delta(self) -> Iterator[torch.Tensor | LowRank]:
        """The deltas, as factors where they are known so; each may take the buffer of the one before."""
        for i in range(len(self)):
            if (found := self.factors(i)) is not None:
                yield found
                continue
            self._flat_base()
            used = self._scratch.used
            yield self.delta(i)
            self._scratch.reset(used)

    def non_finite(self, label: Callable[[int], str]) -> IntegrityError:
        """The error that says which input holds the first NaN or infinity of this chunk; -1 labels the base."""
        n = self._n
        self.move(self.start, n)
        sources = [(-1, self._flat_base)] + [(i, partial(self.model, i)) for i in range(len(self))]
        for i, values in sources:
            if i < 0 and self._versions.base is None:
                continue
            bad = (~torch.isfinite(values().reshape(-1))).nonzero()
            if len(bad):
                where = self.start + int(bad[0])
                return IntegrityError(
                    f"tensor {self.name!r} of {label(i)} holds NaN or infinity (element {where}, "
                    f"{len(bad)} in this chunk)",
                    hint="that checkpoint is damaged: use another revision of it, or exclude the tensor",
                )
        return IntegrityError(
            f"tensor {self.name!r}: the result overflows {self._versions.job.dtype.torch_name!s} near "
            f"element {self.start}",
            hint="choose a smaller scale, or dtype: float32",
        )
