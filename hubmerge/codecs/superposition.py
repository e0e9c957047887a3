"""Superposition: all deltas in one sum, told apart by random signs and by the layers they stand in."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from hubmerge.arithmetic import sum_all
from hubmerge.codec import Codec, CodecParams, Encoding, Part, Parts, Target, Task
from hubmerge.rng import permutation, signs, stream_key
from hubmerge.spec import TensorGroup

_LAYER = re.compile(r"(?:(?<=\.)|^)[0-9]+(?=\.|$)", re.ASCII)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_SHORTEST = 4096
"""Sign vectors are repeated up to this length: a shorter inner loop would cost more than its arithmetic."""


class SuperpositionParams(CodecParams):
    """Parameters of ``superposition``."""

    signs: bool = True
    """Multiply the columns of every delta by random signs before they are added up, and again after retrieval."""
    shuffle: bool = True
    """Let each task's layers stand in random places among the layers of the same shape and name."""
    targets: Literal["all", "linear", "mlp", "attention"] = "all"
    """Which tensors this is done to: all, the weights of linear layers, or those of a layer's feed-forward or
    attention block. The deltas of the others are added up as they are."""
    skip_rate: int = Field(1, ge=1)
    """Only every k-th of these tensors, in canonical order, is treated so; 1 takes all."""
    same_signs: bool = False
    """Tensors with equally many columns have the same signs; otherwise every tensor has its own."""
    shift: int | None = None
    """Instead of shuffling at random, move each layer up, in a circle, by this number times the task's number."""


class Superposition(Codec):
    """``T_k = Σ_m Δ_m^σₘ(k) C_m^k`` with random signs C and permutations σ of layers; ``Δ̂_m^σₘ(k) = T_k C_m^k``."""

    name = "superposition"
    summary = "Add up all deltas after giving each task random signs and its own order of layers, which are undone."
    paper = "RanDeS: Randomized Delta Superposition for Multi-Model Compression, Zhou et al., 2025, arXiv 2505.11204"
    parameters = SuperpositionParams
    incremental = True

    def assign(self, p: SuperpositionParams, targets: Sequence[Target]) -> tuple[Target, ...]:
        """Plain is what ``targets`` leaves out or ``skip_rate`` skips."""
        chosen = [t.name for t in targets if _is_chosen(p, t)][p.skip_rate - 1 :: p.skip_rate]
        treated = frozenset(chosen)
        return tuple(t.as_plain(t.name not in treated) for t in targets)

    def sources(self, p: SuperpositionParams, targets: Sequence[Target], task: Task) -> Mapping[str, str]:
        """A permutation within each group of layers."""
        if not p.shuffle:
            return {}
        found: dict[str, str] = {}
        for (pattern, shape), names in _groups(targets).items():
            if p.shift is None:
                order = permutation(stream_key("shuffle", task.seed, task.id, pattern, *shape), len(names)).tolist()
            else:
                order = [(place + task.id * p.shift) % len(names) for place in range(len(names))]
            found.update({name: names[i] for name, i in zip(names, order, strict=True)})
        return found

    def parts(self, p: SuperpositionParams, target: Target, rank: int | None = None) -> tuple[Part, ...]:
        """The sum."""
        return (Part("", target.shape, "shared"),)

    def encode(
        self,
        group: TensorGroup,
        target: Target,
        tasks: Sequence[Task],
        p: SuperpositionParams,
        stats: Any | None = None,
        onto: Parts | None = None,
    ) -> Encoding:
        """The sum, in the tasks' order, and float32 whatever the models are.

        It starts from zeros, not from the first delta: so it is never -0, which adding and removing would not restore.
        """
        total = None if onto is None else onto[""]
        for i, task in enumerate(tasks):
            delta = _signed_(group.delta(i).float(), target, task, p, group.start)
            total = (torch.zeros_like(delta) if total is None else total).add_(delta)
        assert total is not None
        return Encoding({"": total}, ({},) * len(tasks))

    def remove(
        self, shared: Parts, group: TensorGroup, target: Target, tasks: Sequence[Task], p: SuperpositionParams
    ) -> Parts:
        """The sum without these tasks."""
        total = shared[""]
        for i, task in enumerate(tasks):
            total.sub_(_signed_(group.delta(i).float(), target, task, p, group.start))
        return {"": total}

    def decode(
        self,
        stored: Parts,
        target: Target,
        task: Task,
        p: SuperpositionParams,
        *,
        start: int = 0,
        facts: Mapping[str, float] | None = None,
    ) -> torch.Tensor:
        """The sum with the task's signs, (n,)."""
        return _signed_(stored[""], target, task, p, start)

    def multiplier(self, target: Target, task: Task, p: SuperpositionParams, start: int) -> torch.Tensor:
        """The signs."""
        if not p.signs or target.plain:
            return torch.ones(1)
        return _factors(task, None if p.same_signs else target.name, _width(target.shape), start)

    def expected_error(
        self, group: TensorGroup, target: Target, p: SuperpositionParams, encoding: Encoding | None = None
    ) -> tuple[float, ...] | None:
        """With signs, the other tasks' energy; where nothing is random, the energy of their sum.

        Signs of a column are independent, so the expected inner product of two tasks' deltas is 0, and
        ``E ‖Δ̂_m - Δ_m‖² = Σ_{j≠m} ‖Δ_j‖²``. Layers that are only shuffled remain correlated: no theory.
        """
        if p.shuffle and not p.signs and not target.plain:
            return None
        deltas = [group.delta(i).double() for i in range(len(group))]
        if p.signs and not target.plain:
            energies = [float(d.square().sum()) for d in deltas]
            return tuple(sum(energies[:m] + energies[m + 1 :]) for m in range(len(energies)))
        total = sum_all(deltas)
        return tuple(float((total - d).square().sum()) for d in deltas)

    def errors_after(
        self, p: SuperpositionParams, norms: Sequence[float], errors: Sequence[float | None]
    ) -> tuple[float | None, ...]:
        """The other tasks' energy, where everything has signs; elsewhere norms alone do not tell it."""
        if not p.signs or p.targets != "all" or p.skip_rate != 1:
            return (None,) * len(norms)
        others = ([*norms[:m], *norms[m + 1 :]] for m in range(len(norms)))
        return tuple(math.sqrt(math.fsum(n * n for n in rest)) for rest in others)


def _is_chosen(p: SuperpositionParams, target: Target) -> bool:
    if p.targets == "all":
        return True
    if target.kind != "linear" or p.targets == "linear":
        return target.kind == "linear"
    attention = bool(_ATTENTION.search(target.name))
    return attention if p.targets == "attention" else not attention and bool(_LAYER.search(target.name))


def _groups(targets: Sequence[Target]) -> dict[tuple[str, tuple[int, ...]], list[str]]:
    """Names that differ in the layer's number only, of tensors of one shape, in the order of these numbers."""
    found: dict[tuple[str, tuple[int, ...]], list[tuple[int, str]]] = {}
    for target in targets:
        layer = _LAYER.search(target.name)
        if layer is not None and not target.plain:
            pattern = f"{target.name[: layer.start()]}*{target.name[layer.end() :]}"
            found.setdefault((pattern, target.shape), []).append((int(layer.group()), target.name))
    return {group: [name for _, name in sorted(members)] for group, members in found.items()}


def _signed_(values: torch.Tensor, target: Target, task: Task, p: SuperpositionParams, start: int) -> torch.Tensor:
    """The values (n,), elements of the target from ``start`` on, times their columns' signs, in place.

    Columns are the last stored dimension: the inputs of a linear layer, the outputs of one stored [in, out]; of a
    convolution, all that goes into an output, (in, height, width): a kernel's width alone would be a handful of signs.
    """
    if not p.signs or target.plain:
        return values
    row = _row(target, task, p, start).to(values.device)
    n, period = values.numel(), row.numel()
    body = n // period * period
    values[:body].view(-1, period).mul_(row)
    if body < n:
        values[body:].mul_(row[: n - body])
    return values


def _row(target: Target, task: Task, p: SuperpositionParams, start: int) -> torch.Tensor:
    """The signs of the columns from that element on, until they repeat; int8."""
    return _from(_columns(task, None if p.same_signs else target.name, _width(target.shape)), start)


def _from(row: torch.Tensor, start: int) -> torch.Tensor:
    phase = start % row.numel()
    return row.roll(-phase) if phase else row


@lru_cache(maxsize=8192)
def _factors(task: Task, name: str | None, width: int, start: int) -> torch.Tensor:
    """The signs of the columns from that element on, until they repeat; float32, read-only."""
    return _from(_columns(task, name, width), start).float()


def _width(shape: Sequence[int]) -> int:
    """Number of columns."""
    return math.prod(shape[1:]) if len(shape) > 2 else math.prod(shape[-1:])


@lru_cache(maxsize=8192)  # whoever serves a bundle decodes the same tasks again and again
def _columns(task: Task, name: str | None, width: int) -> torch.Tensor:
    """Signs of the columns of one row, or of several rows if they are short; int8, read-only."""
    key = stream_key("signs", task.seed, task.id, *(() if name is None else (name,)))
    rows = np.empty((max(1, -(-_SHORTEST // max(width, 1))), width), np.int8)
    rows[:] = signs(key, width)
    return torch.from_numpy(rows).view(-1)
