"""What a method and a codec get and give: tensors of all models, low-rank deltas, and what passes over them learn."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

from pydantic import BaseModel, ConfigDict

from hubmerge.spec.inputs import Kind

if TYPE_CHECKING:
    import torch

Scope = Literal["tensor", "model"]


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
        return math.prod(self.shape)

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
    """Title, authors' short form, year and arXiv id or DOI: ``Title (NICKNAME), First et al., 2024, arXiv 2401.01234``;
    cards make links and BibTeX of it."""
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
