"""How the task vectors of a merge lie to one another and to what was merged: lengths, angles, signs.

A task vector is a model minus the base. Inner products are summed in float64 per grain of 32768 elements, and grains
added exactly, so that no figure depends on how a tensor is cut into chunks.
"""

from __future__ import annotations

import math
import re
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import combinations
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from hubmerge.disentangle import inner_products_of_factors
from hubmerge.ranking import GRAIN
from hubmerge.spec import LowRank
from hubmerge.spectra import Spectra, number, numbers
from hubmerge.sums import Doubles

FORMAT_VERSION: Literal[1] = 1
SIGN_ENTRIES = 1 << 20
"""Entries of a product of factors whose signs are looked at, in rows evenly spread over it."""
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

Counts = npt.NDArray[np.int64]


# --- lengths, angles, signs -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Relations:
    """Inner products of T task vectors, the merged delta and the base, over any part of a model; they add up.

    Shapes: gram (T + 2, T + 2), in that order, zero where there is no base; same, both (T, T).
    """

    gram: Doubles
    same: Counts
    """Entries that are positive in both task vectors, or negative in both."""
    both: Counts
    """Entries that are zero in neither."""

    def __add__(self, other: Relations) -> Relations:
        return Relations(self.gram + other.gram, self.same + other.same, self.both + other.both)

    @property
    def tasks(self) -> int:
        """How many task vectors there are."""
        return len(self.gram) - 2

    @property
    def norms(self) -> Doubles:
        """Euclidean lengths of the task vectors, (T,)."""
        return np.sqrt(self.gram.diagonal()[:-2])

    @property
    def merged_norm(self) -> float:
        """Length of the merged delta."""
        return math.sqrt(self.gram[-2, -2])

    @property
    def base_norm(self) -> float:
        """Length of the base; 0 if it was not read."""
        return math.sqrt(self.gram[-1, -1])

    @property
    def cosines(self) -> Doubles:
        """Cosines of all pairs of task vectors, (T, T); NaN where one is zero."""
        return self._cosines[:-2, :-2]

    @property
    def merged_cosines(self) -> Doubles:
        """Cosine of each task vector and the merged delta, (T,); NaN where one is zero."""
        return self._cosines[-2, :-2]

    @property
    def _cosines(self) -> Doubles:
        lengths = np.sqrt(self.gram.diagonal())
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Doubles = np.clip(self.gram / (lengths[:, None] * lengths), -1.0, 1.0)
        return found

    @property
    def distances(self) -> Doubles:
        """``‖merged - Δₜ‖ / ‖Δₜ‖``, (T,): 0 if the task is kept as it is, 1 at the base; NaN where Δₜ is zero."""
        squares = self.gram.diagonal()
        apart = np.maximum(squares[-2] - 2 * self.gram[-2, :-2] + squares[:-2], 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Doubles = np.sqrt(apart / np.where(squares[:-2] > 0, squares[:-2], np.nan))
        return found

    @property
    def sign_agreement(self) -> Doubles:
        """Of the entries that two tasks both change, the fraction that they change in the same direction, (T, T)."""
        with np.errstate(invalid="ignore"):
            found: Doubles = self.same / self.both
        return found

    def to_json(self) -> dict[str, Any]:
        """As plain data; pairs in the order (0, 1), (0, 2), …, (1, 2), …; null where a vector is zero."""
        return {
            "norms": numbers(self.norms),
            "base_norm": number(self.base_norm),
            "cosines": numbers(pairs_of(self.cosines)),
            "sign_agreement": numbers(pairs_of(self.sign_agreement)),
            "merged": {
                "norm": number(self.merged_norm),
                "cosines": numbers(self.merged_cosines),
                "distances": numbers(self.distances),
            },
        }


class Tally:
    """Sums up one tensor's relations, whatever its chunks and their order; from several threads at once.

    Its memory is taken at the start: small results that live on between large ones that do not would keep the freed
    memory from being used again.

    Args:
        tasks: How many models are merged.
        numel: Elements of the tensor.
    """

    def __init__(self, tasks: int, numel: int) -> None:
        self.left = numel
        """Elements still to come."""
        self._grams = np.zeros((-(-numel // GRAIN), tasks + 2, tasks + 2))
        self._same, self._both = _no_signs(tasks)
        self._lock = threading.Lock()

    def add(self, start: int, deltas: Sequence[torch.Tensor], merged: torch.Tensor, base: torch.Tensor) -> None:
        """Elements [start, start + n) of the T deltas, the merged delta and the base; start is a multiple of 32768.

        Shapes: all (n,).
        """
        # As wide for a short last grain: how far rows lie apart decides how a product is computed, to the last bit.
        values = torch.empty((len(deltas) + 2, GRAIN), dtype=torch.float64)
        same, both = _no_signs(len(deltas))
        for low in range(0, len(merged), GRAIN):
            grain = [v[low : low + GRAIN] for v in (*deltas, merged, base)]
            rows = values[:, : len(grain[0])]
            for row, part in zip(rows, grain, strict=True):
                row.copy_(part)
            self._grams[(start + low) // GRAIN] = rows @ rows.T
            _count_signs(torch.stack(grain[:-2]), same, both)
        with self._lock:
            self._same += same
            self._both += both
            self.left -= len(merged)

    def relations(self) -> Relations:
        """The sums, correctly rounded."""
        shape = self._grams.shape[1:]
        totals = np.array([math.fsum(column) for column in self._grams.reshape(-1, math.prod(shape)).T])
        return Relations(totals.reshape(shape), self._same, self._both)


def relations_of_factors(deltas: Sequence[LowRank], merged: LowRank) -> Relations:
    """Of a tensor whose deltas and merged delta are factors; there is no base, and no delta is formed.

    Signs are looked at in rows evenly spread over the matrix, so many as have about a million entries.
    """
    count = len(deltas) + 1
    gram = np.zeros((count + 1, count + 1))
    upper = np.triu_indices(count)
    gram[upper] = inner_products_of_factors([*deltas, merged]).rows[0][0]
    gram[upper[1], upper[0]] = gram[upper]
    rows, columns = merged.shape
    wanted = min(rows, max(SIGN_ENTRIES // max(columns, 1), 1))
    some = torch.arange(wanted) * rows // max(wanted, 1)
    same, both = _no_signs(len(deltas))
    values = [(d.up[some].double() @ d.down.double()).mul_(d.scale).view(-1) for d in deltas]
    _count_signs(torch.stack(values), same, both)
    return Relations(gram, same, both)


def _count_signs(values: torch.Tensor, same: Counts, both: Counts) -> None:
    """Add, for pairs of rows of (T, n), how many entries have the same sign, and how many a sign in both."""
    # Sums of ones are exact in float32 up to 2^24.
    for part in torch.split(values, 1 << 22, dim=1):
        signs = part.sign().float()
        products = signs @ signs.T
        signs.abs_()
        present = signs @ signs.T
        same += ((present + products) / 2).long().numpy()
        both += present.long().numpy()


def _no_signs(count: int) -> tuple[Counts, Counts]:
    return np.zeros((count, count), np.int64), np.zeros((count, count), np.int64)


# --- the whole --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorFigures:
    """What was measured of one merged tensor."""

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, ...]
    relations: Relations
    spectra: Spectra | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        found = {"name": self.name, "kind": self.kind, "layer": self.layer, "shape": list(self.shape)}
        spectra = {"spectra": self.spectra.to_json()} if self.spectra else {}
        return found | self.relations.to_json() | spectra


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """A task in a few numbers, of all merged tensors together; NaN where one cannot be said."""

    name: str
    length: float
    """Of its task vector, as a fraction of the base's."""
    cosine: float
    """Mean over the other tasks."""
    agreement: float
    """Share of entries changed in the same direction, mean over the other tasks."""
    merged_cosine: float
    distance: float
    """Of the merged model, as a fraction of the task vector's length."""


@dataclass(frozen=True)
class Diagnostics:
    """What was measured of a merge.

    Args:
        tasks: The models' names, in the recipe's order.
        method: What merged them.
        plan: Digest of the plan.
        tensors: The merged tensors, in order.
        matrices: How many weights there are whose singular values could be measured.
    """

    tasks: tuple[str, ...]
    method: str
    plan: str
    tensors: tuple[TensorFigures, ...]
    matrices: int

    @cached_property
    def model(self) -> Relations:
        """Over all merged tensors."""
        nothing = Tally(len(self.tasks), 0).relations()
        return reduce(Relations.__add__, (t.relations for t in self.tensors), nothing)

    @property
    def summary(self) -> tuple[TaskSummary, ...]:
        """The main figures of each task."""
        model, table = self.model, self.model.cosines
        length = model.norms / (model.base_norm or math.nan)
        return tuple(
            TaskSummary(
                name,
                float(length[t]),
                _mean(table[t, o] for o in range(len(self.tasks)) if o != t),
                _mean(model.sign_agreement[t, o] for o in range(len(self.tasks)) if o != t),
                float(model.merged_cosines[t]),
                float(model.distances[t]),
            )
            for t, name in enumerate(self.tasks)
        )

    @cached_property
    def blocks(self) -> dict[int | None, Relations]:
        """By layer; None is what belongs to no layer."""
        found: defaultdict[int | None, list[Relations]] = defaultdict(list)
        for tensor in self.tensors:
            found[tensor.layer].append(tensor.relations)
        order = sorted(found, key=lambda layer: (layer is None, layer or 0))
        return {layer: reduce(Relations.__add__, found[layer]) for layer in order}

    @property
    def decomposed(self) -> tuple[TensorFigures, ...]:
        """The tensors whose singular values were measured."""
        return tuple(t for t in self.tensors if t.spectra is not None)

    def to_json(self) -> dict[str, Any]:
        """As plain data: the content of ``diagnostics.json``."""
        return {
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "plan_sha256": self.plan,
            "tasks": list(self.tasks),
            "pairs": [[self.tasks[i], self.tasks[j]] for i, j in combinations(range(len(self.tasks)), 2)],
            "matrices": self.matrices,
            "matrices_decomposed": len(self.decomposed),
            "model": self.model.to_json(),
            "blocks": [{"layer": layer, **found.to_json()} for layer, found in self.blocks.items()],
            "tensors": [t.to_json() for t in self.tensors],
        }


def kind_of(name: str) -> str:
    """A tensor's name with a star for each number in it: the same in all layers."""
    return _NUMBER.sub("*", name)


def _mean(values: Iterable[float]) -> float:
    """Of those that are numbers."""
    known = [float(v) for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan


def pairs_of(table: Doubles) -> Iterator[float]:
    """What a (T, T) table says of each pair i < j."""
    return (float(table[i, j]) for i, j in combinations(range(len(table)), 2))
