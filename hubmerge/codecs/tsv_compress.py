"""TSV-Compress: every task's delta by its leading singular vectors, matrix by matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field

from hubmerge.codec import Codec, CodecParams, Encoding, Part, Parts, Target, Task
from hubmerge.factors import balanced
from hubmerge.linalg import delta_of
from hubmerge.spec import LowRank, TensorGroup


class TsvCompressParams(CodecParams):
    """Parameters of ``tsv_compress``."""

    rank: int | None = Field(None, ge=1)
    """Singular vectors kept of each delta; by default the matrix's smaller side divided by the number of tasks."""
    budget: float | None = Field(None, gt=0.0)
    """Instead of a rank: what a task's vectors of a matrix may take, as a fraction of the matrix's own size."""
    tasks: int | None = Field(None, ge=1)
    """The number of tasks by which the smaller side is divided; by default those the bundle is created with."""
    include_embeddings: bool = False
    """Also decompose embeddings; otherwise their deltas are kept as they are, as those of all other tensors are."""


class TsvCompress(Codec):
    """``Δ̂_t = Σ_{j≤k} σ_j u_j v_jᵀ``, of each task alone; where that takes no less than the delta, the delta."""

    name = "tsv_compress"
    summary = "Keep, per task, the leading singular vectors of each matrix's delta, and other deltas as they are."
    paper = (
        "Task Singular Vectors: Reducing Task Interference in Model Merging (TSV-Compress), Gargiulo et al., 2025, "
        "arXiv 2412.00081"
    )
    parameters = TsvCompressParams
    unit = "matrix"
    incremental = True

    def fixed(self, p: Any, tasks: int) -> Any:
        """With the number of tasks: those added later are kept with the same rank."""
        return p if p.tasks is not None else p.model_copy(update={"tasks": tasks})

    def assign(self, p: TsvCompressParams, targets: Sequence[Target]) -> tuple[Target, ...]:
        """Plain is what is no matrix; its deltas are kept as they are, unless they are known as factors."""
        kinds = ("linear", "embedding") if p.include_embeddings else ("linear",)
        return tuple(t.as_plain(len(t.shape) != 2 or t.kind not in kinds) for t in targets)

    def parts(self, p: TsvCompressParams, target: Target, rank: int | None = None) -> tuple[Part, ...]:
        """Balanced factors, one singular triplet a row; or the delta; or nothing of a delta of rank 0.

        Shapes: up (k, out), down (k, in), whatever the matrix's stored orientation; the delta as stored.
        """
        kept = _kept(p, target, rank)
        if kept is None:
            return (Part("", target.shape, "task"),)
        if kept == 0:
            return ()
        rows, columns = reversed(target.shape) if target.transposed else target.shape
        return (Part("up", (kept, rows), "task"), Part("down", (kept, columns), "task"))

    def encode(
        self,
        group: TensorGroup,
        target: Target,
        tasks: Sequence[Task],
        p: TsvCompressParams,
        stats: Any | None = None,
        onto: Parts | None = None,
    ) -> Encoding:
        """Each task's factors, or its delta as stored.

        Source: arXiv 2412.00081, section 3.
        """
        return Encoding({}, tuple(_encoded(group, i, target, p) for i in range(len(tasks))))

    def remove(
        self, shared: Parts, group: TensorGroup, target: Target, tasks: Sequence[Task], p: TsvCompressParams
    ) -> Parts:
        """Nothing is shared."""
        return shared

    def decode(
        self,
        stored: Parts,
        target: Target,
        task: Task,
        p: TsvCompressParams,
        *,
        start: int = 0,
        facts: Mapping[str, float] | None = None,
    ) -> torch.Tensor:
        """The delta, flat, in the stored orientation."""
        if "up" in stored:
            delta = stored["up"].T @ stored["down"]
            return (delta.T if target.transposed else delta).reshape(-1)
        return stored[""].reshape(-1) if stored else torch.zeros(target.numel)

    def expected_error(
        self, group: TensorGroup, target: Target, p: TsvCompressParams, encoding: Encoding | None = None
    ) -> tuple[float, ...]:
        """What is left out, ``Σ_{j>k} σ_j²``: the delta's energy less that of the kept triplets (Eckart-Young)."""
        own = [_encoded(group, i, target, p) for i in range(len(group))] if encoding is None else encoding.tasks
        return tuple(_left_out(group, i, parts) for i, parts in enumerate(own))


def _kept(p: TsvCompressParams, target: Target, rank: int | None) -> int | None:
    """How many triplets are kept of a delta of at most that rank; None if the delta is kept instead."""
    if rank == 0:
        return 0
    if len(target.shape) != 2 or (target.plain and rank is None):
        return None
    side, ends = min(target.shape), sum(target.shape)
    if target.plain:
        most = side
    elif p.rank is not None:
        most = p.rank
    elif p.budget is not None:
        most = int(p.budget * target.numel / max(ends, 1))
    else:
        most = side // (p.tasks or 1)
    kept = min(max(most, 1), side, side if rank is None else rank)
    return kept if 0 < kept * ends < target.numel else None


def _encoded(group: TensorGroup, i: int, target: Target, p: TsvCompressParams) -> dict[str, torch.Tensor]:
    factors = group.factors(i)
    kept = _kept(p, target, None if factors is None else factors.rank)
    if kept is None:
        delta = group.delta(i)
        return {"": delta.T if target.transposed and delta.ndim == 2 else delta}
    if kept == 0:
        return {}
    up, down = balanced(delta_of(group, i), kept)
    return {"up": up, "down": down}


def _left_out(group: TensorGroup, i: int, parts: Parts) -> float:
    if "up" not in parts:
        return 0.0
    found = delta_of(group, i)
    if isinstance(found, LowRank):
        up, down = found.up.double() * found.scale, found.down.double()
        total = float(((up.T @ up) * (down @ down.T)).sum())
    else:
        total = float(found.double().square().sum())
    # The squared length of a row of a balanced factor is the singular value.
    return max(0.0, total - float(parts["up"].double().square().sum(1).square().sum()))
