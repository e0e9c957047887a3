"""A task's tensors, written into memory that is given: base + scale · delta, from files mapped into memory.

Mapped pages are the system's cache of the files: many tasks, and many processes, share one copy of the base and of what
a bundle keeps, and it goes when memory is short. Values meet in buffers that stay in the processor's cache, so that
memory is passed once.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch

from hubmerge import align
from hubmerge.bundles.lora import factors_of
from hubmerge.bundles.manifest import TaskEntry
from hubmerge.bundles.store import Bundle
from hubmerge.codec import Part, Target
from hubmerge.ranking import GRAIN
from hubmerge.reader import Scratch
from hubmerge.spec import LowRank, PinnedModel, TensorSpec
from hubmerge.storage import BLOCK, Stored

CHUNK = 32 * GRAIN
"""Four times that of a bundle's other readers: threads pay for every turn they take in the interpreter."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """A part of a target and the mapped tensors that keep it, flat."""

    part: Part
    stored: tuple[Stored, ...]
    values: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a task's model."""

    shape: tuple[int, ...]
    values: torch.Tensor
    """Mapped: the base's values, or the task's own, flat, in the stored dtype."""
    target: Target | None = None
    """Where the delta stands, if it is kept as a tensor …"""
    kept: tuple[_Kept, ...] = ()
    factors: LowRank | None = None
    """… or the delta in the stored orientation, if it is kept as factors."""


class Files:
    """The base and the bundle's shared files, mapped; checked once against the manifest.

    Args:
        bundle: The bundle.
        base: Its base, pinned.

    Raises:
        IntegrityError: A file of the bundle is damaged.
        HubMergeError: A file cannot be fetched.
    """

    def __init__(self, bundle: Bundle, base: PinnedModel) -> None:
        self.bundle, self.base = bundle, base
        self.codec, self.params = bundle.manifest.codec_of()
        self.targets = tuple(t.target() for t in bundle.manifest.targets)
        self.of_base = mapped(self._base_path, base.tensors.values())
        self._checked: set[str] = set()
        shared = bundle.shared_files()
        self.check(shared)
        self.shared = mapped(bundle.path, bundle.tensors(shared).values())
        bundle.close()  # mapped pages need no open file

    def check(self, names: Iterable[str]) -> None:
        """Compare files of the bundle with the manifest, each of them once.

        Raises:
            IntegrityError: A file differs; the message names it.
        """
        new = [n for n in names if n not in self._checked]
        self.bundle.check(new)
        self._checked.update(new)

    def _base_path(self, file: str) -> Path:
        if self.base.root is not None:
            return Path(self.base.root) / file
        assert self.base.commit is not None
        return self.bundle.hub.download(self.base.repo, self.base.commit, file)


class TaskWeights:
    """All tensors of one task's model.

    Args:
        files: The base and the shared parts.
        task: The task, whose private files are opened.

    Raises:
        IntegrityError: A file of the task is damaged.
        HubMergeError: A file cannot be fetched.
    """

    def __init__(self, files: Files, task: TaskEntry) -> None:
        self.task, self._files = task, files
        bundle = files.bundle
        self._identity = bundle.manifest.identity(task)
        heads = bundle.head_files(task)
        files.check([*bundle.files(task=task), *heads])
        specs = bundle.tensors(heads)
        own = mapped(bundle.path, specs.values())
        self.heads: Mapping[str, Weight] = {n: Weight(s.shape, own[n]) for n, s in specs.items()}
        """What only this task has, by the names of its own checkpoint."""
        self.of_base: Mapping[str, Weight] = self._adapted() if bundle.manifest.factors else self._decoded()
        """By the base's names; what the task's model lacks is the base's."""
        bundle.close()

    def _decoded(self) -> dict[str, Weight]:
        """The base's tensors with the parts that their deltas are decoded from."""
        files, task = self._files, self.task
        parts = {n: s for n, s in files.bundle.parts(task).specs.items() if n not in files.shared}
        stored = files.shared | mapped(files.bundle.path, parts.values())
        sources = files.codec.sources(files.params, files.targets, self._identity)
        found = {name: Weight(spec.shape, files.of_base[name]) for name, spec in files.base.tensors.items()}
        for target in files.targets:
            name = sources.get(target.name, target.name)
            if name not in task.absent:
                kept = tuple(self._kept(q, target, stored) for q in self._parts(target))
                found[name] = replace(found[name], target=target, kept=kept)
        return found

    def _parts(self, target: Target) -> tuple[Part, ...]:
        return self._files.codec.parts(self._files.params, target, self.task.ranks.get(target.name))

    def _kept(self, part: Part, target: Target, stored: Mapping[str, torch.Tensor]) -> _Kept:
        found = part.stored(target, self._files.params.storage)
        return _Kept(part, tuple(found.values()), tuple(stored[n] for n in found))

    def _adapted(self) -> dict[str, Weight]:
        """The base's tensors with the adapter's factors, which are small enough to be decoded once."""
        base = self._files.base
        factors = factors_of(self._files.bundle, self.task)
        found = {}
        for name, spec in base.tensors.items():
            delta = factors.get(name)
            if delta is not None and align.is_transposed(name, spec.shape, base.config):
                delta = LowRank(delta.down.T, delta.up.T)
            found[name] = Weight(spec.shape, self._files.of_base[name], factors=delta)
        return found

    def named_as(self, naming: TaskEntry, *, absent: bool) -> dict[str, Weight]:
        """The tensors under the names that another task's checkpoint has for them; a head takes the base's place.

        Args:
            naming: The task whose names are wanted.
            absent: Also the base's tensors that this task's model lacks.
        """
        shown = {n: w for n, w in self.of_base.items() if absent or n not in self.task.absent}
        return {naming.own_name(n): w for n, w in shown.items()} | dict(self.heads)

    def ranges(self, weight: Weight) -> list[tuple[int, int]]:
        """The ranges of elements that can be written one by one, in any order."""
        whole = weight.factors is not None or (
            weight.target is not None and self._files.codec.whole(self._files.params)
        )
        size, step = weight.values.numel(), weight.values.numel()
        if not whole and size > CHUNK:
            row = self._multiplier(weight, 0)
            # Chunks of whole rows, if their signs repeat so that blocks of stored values begin with them.
            grain = BLOCK if row is None or row.numel() % BLOCK else row.numel()
            step = -(-size // -(-size // CHUNK))  # as many chunks as needed, alike
            step = -(-step // grain) * grain
        return [(a, min(a + step, size)) for a in range(0, size, max(step, 1))]

    def write(self, weight: Weight, start: int, out: torch.Tensor, scale: float, scratch: Scratch) -> None:
        """Write a range of a tensor; the bits are those of a retrieved one.

        Args:
            weight: One of this task's.
            start: The range's first element.
            out: (n,), contiguous, in the processor's memory; of another dtype than the base's, it is rounded again.
            scale: λ.
            scratch: Buffers, which are taken back.
        """
        scratch.reset()
        stop = start + out.numel()
        base = weight.values[start:stop]
        if weight.target is None and weight.factors is None:
            out.copy_(base)
            return
        wide = torch.promote_types(base.dtype, torch.float32)
        total = out if base.dtype == wide == out.dtype else scratch.take(stop - start, wide)
        row = self._multiplier(weight, start) if scale == 1 and wide == torch.float32 else None
        if row is not None:
            _add_products(_widened(base, total), self._sum(weight, start, stop, scratch), row, total)
        else:
            torch.add(_widened(base, total), self._delta(weight, start, stop, scratch), alpha=scale, out=total)
        if total is not out:  # rounded to the base's dtype, as ``Retrieval.merged`` does
            out.copy_(total if out.dtype == base.dtype else total.to(base.dtype))

    def _delta(self, weight: Weight, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
        if weight.target is None:
            assert weight.factors is not None
            delta = scratch.take(stop - start, torch.float32)
            torch.mm(weight.factors.up, weight.factors.down, out=delta.view(weight.shape))
            return delta
        codec, p = self._files.codec, self._files.params
        whole = codec.whole(p)
        stored = {k.part.name: self._values(k, start, stop, scratch, whole=whole) for k in weight.kept}
        return codec.decode(stored, weight.target, self._identity, p, start=start, facts=self.task.facts)

    def _multiplier(self, weight: Weight, start: int) -> torch.Tensor | None:
        if weight.target is None:
            return None
        return self._files.codec.multiplier(weight.target, self._identity, self._files.params, start)

    def _sum(self, weight: Weight, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
        """The one shared part, to be read only: where it is mapped, if it is stored as float32."""
        (kept,) = weight.kept
        if self._files.params.storage == "float32":
            return kept.values[0][start:stop]
        return self._values(kept, start, stop, scratch, whole=False)

    def _values(self, kept: _Kept, start: int, stop: int, scratch: Scratch, *, whole: bool) -> torch.Tensor:
        part = kept.part
        low, high = (0, part.numel) if whole else (start, stop)
        spans = (s.span(low, high) for s in kept.stored)
        raw = [v[a:b] for v, (a, b) in zip(kept.values, spans, strict=True)]
        buffer = scratch.take(high - low, torch.bool if part.kind == "bits" else torch.float32)
        values = part.form(self._files.params.storage).decode(raw, high - low, buffer)
        return values.view(part.shape) if whole else values


def _widened(base: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """The base's values in the buffer's dtype: themselves, if they have it."""
    return base if base.dtype == buffer.dtype else buffer.copy_(base)


def _add_products(base: torch.Tensor, values: torch.Tensor, row: torch.Tensor, out: torch.Tensor) -> None:
    """``out = base + values · row``, (n,), where the row repeats; the memory is passed once."""
    n, period = values.numel(), row.numel()
    body = n // period * period
    if body == n:
        torch.addcmul(base.view(-1, period), values.view(-1, period), row, out=out.view(-1, period))
        return
    if body:
        rows = [t[:body].view(-1, period) for t in (base, values, out)]
        torch.addcmul(rows[0], rows[1], row, out=rows[2])
    if body < n:
        torch.addcmul(base[body:], values[body:], row[: n - body], out=out[body:])


def mapped(path: Callable[[str], Path], specs: Iterable[TensorSpec]) -> dict[str, torch.Tensor]:
    """Tensors of safetensors files as parts of the mapped files: flat, and to be read only.

    The mapping is private: nothing that were written there would reach the file.
    """
    found: dict[str, torch.Tensor] = {}
    for file, members in groupby(sorted(specs, key=lambda s: s.file), key=lambda s: s.file):
        with path(file).open("rb") as opened:
            pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        for spec in members:
            dtype = spec.dtype.torch
            found[spec.name] = (
                torch.frombuffer(pages, dtype=dtype, count=spec.numel, offset=spec.start_byte)
                if spec.numel
                else torch.empty(0, dtype=dtype)
            )
    return found
