"""A plan: every tensor of the output, what it is made of, and where it goes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hubmerge.spec.inputs import AdapterPart, Dtype, Kind, PinnedModel, TensorSpec

Input = TensorSpec | AdapterPart | None
"""Where a model's version of a tensor comes from: its own tensor, an adapter's change of the base, or None:
unchanged."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The method's parameters as they hold for one tensor."""

    params: Any
    per_model: tuple[Any, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class FactorPair:
    """How a merged low-rank delta is stored: two tensors of an adapter, one right after the other."""

    names: tuple[str, str]
    """The first is (rank, in), the second (out, rank); of an embedding, (rank, tokens) and (features, rank)."""
    rank: int
    embedding: bool = False

    def shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the two, for a delta (out, in), or (tokens, features) of an embedding."""
        rows, columns = shape
        return (
            ((self.rank, rows), (columns, self.rank)) if self.embedding else ((self.rank, columns), (rows, self.rank))
        )


@dataclass(frozen=True, slots=True)
class TensorJob:
    """One tensor of the output, or a range of its rows: what it is made of and where it goes."""

    index: int
    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: Dtype
    output: int
    """Index of the output file."""
    start_byte: int
    end_byte: int
    """Half-open byte range in the output file."""
    action: Literal["merge", "copy"]
    base: TensorSpec | None
    inputs: tuple[Input, ...]
    """One entry per model of the recipe; empty for a copy."""
    settings: Settings | None = None
    source: int = -1
    """For a copy: which model ``base`` belongs to; -1 is the base model."""
    method: str = ""
    """Another method than the plan's, for rows that not all models have."""
    transposed: bool = False
    """A linear weight stored [in, out], as GPT-2's Conv1D does."""
    layer: int | None = None
    """Number of the layer it belongs to; None outside the model's stack of layers."""
    factors: FactorPair | None = None
    """The delta is stored instead of the tensor, as two factors; ``shape`` is then the delta's, (out, in)."""

    @property
    def numel(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)


def is_factored(job: TensorJob) -> bool:
    """Whether everything that models change in the tensor is a matrix known as factors."""
    return len(job.shape) == 2 and all(
        i is None or (isinstance(i, AdapterPart) and i.kind == "low_rank" and i.parameter == "weight")
        for i in job.inputs
    )


@dataclass(frozen=True, slots=True)
class Truncation:
    """What a merged adapter lost to its rank, as fractions of the merged delta's Frobenius norm."""

    error: float
    """Of all tensors together."""
    worst: str
    """The tensor that lost most."""
    worst_error: float

    @classmethod
    def of(cls, squares: Mapping[str, tuple[float, float]]) -> Truncation | None:
        """From the squared norms of what was left out and of the whole, by tensor; None if nothing was left out."""
        if not any(left_out > 0 for left_out, _ in squares.values()):
            return None
        names = sorted(squares)
        errors = {n: (squares[n][0] / squares[n][1]) ** 0.5 if squares[n][1] else 0.0 for n in names}
        worst = max(names, key=lambda n: errors[n])
        left_out, whole = (math.fsum(squares[n][k] for n in names) for k in (0, 1))
        return cls((left_out / whole) ** 0.5, worst, errors[worst])

    def __str__(self) -> str:
        return (
            f"the adapter's rank leaves out {self.error:.2%} of the merged deltas' norm, "
            f"most in {self.worst} ({self.worst_error:.2%})"
        )


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A safetensors file of the result: its header and length are known before any weight is read."""

    path: str
    header: bytes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SmallFile:
    """A file that accompanies the weights: either copied from a source or generated."""

    path: str
    source: int | None = None
    """Model to copy from (-1 is the base); None when ``content`` is given."""
    content: bytes | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Something the plan found: an error stops the run, a warning is printed and recorded."""

    severity: Literal["error", "warning", "note"]
    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Every decision of a run, as plain values; nothing is decided while bytes move."""

    method: str
    base: PinnedModel
    models: tuple[PinnedModel, ...]
    jobs: tuple[TensorJob, ...]
    outputs: tuple[OutputFile, ...]
    files: tuple[SmallFile, ...]
    problems: tuple[Problem, ...]
    seed: int
    params: Any
    """The method's parameters where no per-tensor setting applies."""
    digest: str
    """sha256 over everything that decides the output's bytes."""

    def pinned(self, source: int) -> PinnedModel:
        """The model with this index; -1 is the base."""
        return self.base if source < 0 else self.models[source]
