"""The value types and protocols that all layers share: what a tensor, a model, a method and a plan are."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch

Kind = Literal["linear", "embedding", "conv", "vector"]
Scope = Literal["tensor", "model"]


# --- dtypes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dtype:
    """A safetensors dtype: its torch name, its size, and whether a merge may compute with it."""

    name: str
    torch_name: str
    nbytes: int
    mergeable: bool = False

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype of the same name."""
        import torch

        dtype = getattr(torch, self.torch_name)
        assert isinstance(dtype, torch.dtype)
        return dtype


# Sub-byte formats (F4, F6) are left out on purpose: a checkpoint that uses them is quantised and refused by name.
DTYPES: Mapping[str, Dtype] = {
    d.name: d
    for d in (
        Dtype("F64", "float64", 8, True),
        Dtype("F32", "float32", 4, True),
        Dtype("F16", "float16", 2, True),
        Dtype("BF16", "bfloat16", 2, True),
        Dtype("F8_E4M3", "float8_e4m3fn", 1),
        Dtype("F8_E5M2", "float8_e5m2", 1),
        Dtype("F8_E8M0", "float8_e8m0fnu", 1),
        Dtype("I64", "int64", 8),
        Dtype("I32", "int32", 4),
        Dtype("I16", "int16", 2),
        Dtype("I8", "int8", 1),
        Dtype("U64", "uint64", 8),
        Dtype("U32", "uint32", 4),
        Dtype("U16", "uint16", 2),
        Dtype("U8", "uint8", 1),
        Dtype("BOOL", "bool", 1),
        Dtype("C64", "complex64", 8),
    )
}
DTYPE_BY_TORCH_NAME: Mapping[str, Dtype] = {d.torch_name: d for d in DTYPES.values()}


# --- inputs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One stored tensor: its type and the half-open byte range it occupies in a file of its model."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    file: str
    start_byte: int
    end_byte: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        n = 1
        for s in self.shape:
            n *= s
        return n

    @property
    def size_bytes(self) -> int:
        """Length of the byte range."""
        return self.end_byte - self.start_byte


@dataclass(frozen=True, slots=True)
class FileSpec:
    """A file of a pinned model: digests where the source knows them without reading the bytes."""

    path: str
    size_bytes: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """What an adapter does to one parameter of its base."""

    module: str
    """Path of the module in the adapter's own namespace, without ``base_model.model.``."""
    parameter: str
    """``weight`` or ``bias``."""
    kind: Literal["low_rank", "generic", "replace"]
    """Factors; anything else PEFT merges; or a full tensor that takes the base's place."""
    tensors: tuple[TensorSpec, ...]
    """The adapter's stored tensors it needs."""
    rank: int | None = None
    shape: tuple[int, ...] | None = None
    """Shape of the parameter it is made for, linear weights as (out, in); None where the stored tensors do not tell."""
    optional: bool = False
    """The base may lack the parameter, and then there is nothing to do."""
    target: str | None = None
    """The base's name for the parameter, where it is known to be another one."""

    def fits(self, shape: tuple[int, ...], *, transposed: bool) -> bool:
        """Whether a stored tensor of this shape can be the parameter."""
        if self.shape is None:
            return True
        return shape == (self.shape[::-1] if transposed and len(shape) == 2 else self.shape)

    @property
    def name(self) -> str:
        """The parameter's full name."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


@dataclass(frozen=True, slots=True)
class PinnedModel:
    """A model whose commit, files and tensor inventory are known; nothing but headers has been read."""

    role: Literal["base", "model"]
    name: str
    repo: str
    commit: str | None
    """The Hub commit; None for a local folder."""
    root: str | None
    """Folder of a local model; None for a Hub repo."""
    files: Mapping[str, FileSpec]
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    adapter: Mapping[str, Any] | None = None
    """``adapter_config.json`` of a PEFT adapter; None for a full checkpoint."""
    parts: tuple[AdapterPart, ...] = ()
    """What the adapter changes; empty for a full checkpoint."""
    card: Mapping[str, Any] = field(default_factory=dict)
    """Front matter of the model card."""
    notices: Mapping[str, bytes] = field(default_factory=dict)
    """Contents of the licence and notice files at the top, by their path."""
    notes: tuple[str, ...] = ()
    """What a person should know about how the model was found."""
    header_sha256: str = ""
    """Digest over the safetensors headers: identifies a local folder's layout without reading its weights."""

    @property
    def is_local(self) -> bool:
        """Whether the model is a folder on this machine."""
        return self.root is not None


class ByteSource(Protocol):
    """Random access to the bytes of one file; safe to call from several threads."""

    size_bytes: int

    def read_into(self, start_byte: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``start_byte`` on, or raise SourceError; never a short read."""

    def close(self) -> None:
        """Release the file or connection."""


# --- merge methods ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LowRank:
    """A matrix kept as factors: ``scale * up @ down``.

    Shapes: up (out, r), down (r, in), in the mathematical [out, in] orientation.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Number of columns of up; the product's rank is at most that."""
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def T(self) -> LowRank:  # noqa: N802 - torch's name
        """The transposed product."""
        return LowRank(self.down.T, self.up.T, self.scale)

    def to(self, device: torch.device) -> LowRank:
        """The same on a device."""
        return LowRank(self.up.to(device), self.down.to(device), self.scale)

    def dense(self) -> torch.Tensor:
        """The product, (out, in)."""
        return (self.up @ self.down).mul_(self.scale)

    def onto(self, base: torch.Tensor) -> torch.Tensor:
        """``base`` plus the product, computed in the base's dtype, in a new tensor."""
        return base.addmm(self.up.to(base.dtype), self.down.to(base.dtype), alpha=self.scale)


class Params(BaseModel):
    """Parameters of a method. Unknown keys are errors; every field carries a description.

    A field that may differ between models is declared with ``json_schema_extra={"per_model": True}``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TensorGroup(ABC):
    """All versions of one tensor, or of one chunk of it, as a merge method sees them.

    Values come in the compute dtype (float64 if any input is float64, else float32). An element-wise method gets a
    flat chunk (n,) that starts at element ``start`` of the tensor; a method that needs whole tensors gets them in
    their shape, 2-D weights of linear layers as (out, in) whatever their stored orientation.
    """

    name: str
    index: int
    """Position of the tensor in the model's canonical order."""
    kind: Kind
    shape: tuple[int, ...]
    """Shape of the whole tensor as stored."""
    start: int
    """Flat index of the chunk's first element; 0 for a whole tensor."""
    layer: int | None = None
    """Number of the layer the tensor belongs to; None outside the model's stack of layers."""
    tasks: tuple[str, ...]
    """The models' names, in the recipe's order."""
    weights: tuple[float, ...]
    """The models' coefficients, in the recipe's order."""
    params: tuple[Any, ...]
    """The method's parameters as they hold for each model."""
    seed: int

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def numel(self) -> int:
        """Elements in the whole tensor."""
        n = 1
        for s in self.shape:
            n *= s
        return n

    @abstractmethod
    def base(self) -> torch.Tensor:
        """The base's values; read-only."""

    @abstractmethod
    def model(self, i: int) -> torch.Tensor:
        """Model i's own values, in a fresh buffer that the caller may overwrite."""

    @abstractmethod
    def delta(self, i: int) -> torch.Tensor:
        """Model i minus base, in a fresh buffer that the caller may overwrite."""

    def factors(self, i: int) -> LowRank | None:
        """Model i's delta as factors, if it is known in that form; without the model's weight.

        A model that leaves the tensor as it is has factors of rank 0. A flat chunk has none.
        """
        return None

    def all_factors(self) -> list[LowRank] | None:
        """All deltas as factors; None if one of them is not known in that form."""
        found = []
        for i in range(len(self)):
            one = self.factors(i)
            if one is None:
                return None
            found.append(one)
        return found


@runtime_checkable
class Stats(Protocol):
    """What an observing pass learns. Sums are exact and independent of order and of how tensors are cut into chunks.

    It can be pickled: each process of a run sends what it has learnt to the first, which adds it up.
    """

    done: bool
    """No further pass is needed."""

    def __add__(self, other: Self) -> Self: ...

    def wants(self, name: str, start: int = 0, stop: int | None = None) -> bool:
        """Whether the next pass needs elements [start, stop) of this tensor.

        Without a range: whether it needs any of the tensor. A chunk that is not wanted need not be read; seeing it
        does no harm.
        """
        ...


class Algorithm(ABC):
    """What a merge method and a bundle codec have in common: parameters, and tensor algebra on chunks or whole tensors.

    One that needs to know more than the chunk in front of it (a threshold, a norm, the angle between two models)
    returns an initial ``Stats`` from ``begin``. The engine then repeats passes: it adds up ``observe`` over all chunks
    of the scope and hands the sum to ``settle``, until the result says ``done``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One sentence with the rule."""
    paper: ClassVar[str]
    """Title, authors' short form and arXiv id or DOI."""
    parameters: ClassVar[type[Params]]
    unit: ClassVar[Literal["element", "matrix"]] = "element"

    def problem(self, p: Any, weights: Sequence[float]) -> str | None:
        """Why these settings cannot be used, with the values; None if they can."""
        return None

    def whole(self, p: Any) -> bool:
        """Whether it needs whole tensors, not chunks of them."""
        return self.unit == "matrix"

    def scope(self, p: Any) -> Scope:
        """What the statistics are about: each tensor by itself, or the whole model."""
        return "tensor"

    def begin(self, p: Any) -> Any | None:
        """The Stats to start the first pass with; None if no pass is needed."""
        return None

    def observe(self, group: TensorGroup, p: Any, stats: Any) -> Any:
        """This chunk's contribution to the current pass (a Stats); ``stats`` is what the pass started with."""
        raise NotImplementedError(f"{self.name} has no observing pass")

    def settle(self, stats: Any, total: Any, p: Any) -> Any:
        """Turn the pass's total into what the next pass, or the work itself, needs; ``total`` is never None."""
        return total


class Method(Algorithm):
    """A merge method: pure tensor algebra on one tensor at a time; ``merge`` is called when all passes are done."""

    uses_base: ClassVar[bool] = True
    """Whether the result depends on the base's values."""
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None

    def exact(self, p: Any) -> bool:
        """Whether the result has the same bits on any machine."""
        return self.unit == "element"

    def matrices(self, p: Any) -> tuple[Kind, ...]:
        """The kinds of 2-D tensors that are hard work, on which an accelerator is worth its while."""
        return ("linear",) if self.whole(p) else ()

    def needs_layers(self, p: Any) -> bool:
        """Whether it changes the weights of numbered layers only, and would leave other models as they are."""
        return False

    def rank_problem(self, p: Any, weights: Sequence[float]) -> str | None:
        """Why the merged delta of low-rank deltas is not of low rank itself; None if it is.

        A method that answers None gives a LowRank from ``merge``, and observes, without forming a dense delta where
        all deltas are known as factors.
        """
        return f"{self.name} decides entry by entry, which leaves a delta of full rank"

    @abstractmethod
    def merge(self, group: TensorGroup, p: Any, stats: Any | None) -> torch.Tensor | LowRank:
        """The merged values of the chunk, base included; or a LowRank delta that is to be added to the base.

        Shapes: as the group's tensors.
        """


# --- plan -------------------------------------------------------------------------------------------------------


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
        n = 1
        for s in self.shape:
            n *= s
        return n


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


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts ``layers.2`` before ``layers.10``: the canonical order of tensors."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)
