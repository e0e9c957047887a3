"""What a bundle codec is: how several fine-tunes of one base are stored together, and how each is got back.

A bundle covers tensors of its base, the *targets*. Of each target it keeps *parts*: shared ones, and private ones of
each task. A task's model is the base plus the deltas decoded from these parts. A codec sees neither files nor models:

- ``fixed`` fills in what is decided when a bundle is created, ``assign`` tells which targets are left out of what the
  codec does, and ``parts`` what is kept of a target, from its shape alone: a file can be laid out beforehand.
- ``sources`` tells which tensor's delta stands in each target's place. The one who reads the models hands deltas over
  accordingly, and puts decoded ones back to where they belong.
- ``encode`` and ``decode`` work on chunks (or on whole tensors, if ``unit`` says so), after the passes for statistics.
  Values are float32 or booleans; ``storage`` knows how they are stored.

All that is random is a function of the bundle's seed, the task's number and the tensor's name.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch

from hubmerge.spec import Algorithm, Kind, Params, Scope, TensorGroup
from hubmerge.storage import FORMS, Form, Storage, Stored

P = TypeVar("P", bound=Params)
Parts = Mapping[str, torch.Tensor]
"""Values by the part's name; flat, and of the chunk only, unless whole tensors are encoded."""


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the base that a bundle covers."""

    name: str
    shape: tuple[int, ...]
    """As stored."""
    kind: Kind
    transposed: bool = False
    """A linear weight stored [in, out]."""
    plain: bool = False
    """Left out of what the codec does: its deltas are summed, or kept as they are."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def as_plain(self, plain: bool) -> Target:
        """The same, assigned."""
        return replace(self, plain=plain)


@dataclass(frozen=True, slots=True)
class Part:
    """Something kept of a target, for all tasks or for each of them."""

    name: str
    """Empty for what a target consists of chiefly; else ``mask``, ``up`` and the like."""
    shape: tuple[int, ...]
    owner: Literal["shared", "task"]
    kind: Literal["float", "bits"] = "float"

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def form(self, storage: Storage) -> Form:
        """How it is stored: numbers in the bundle's storage form, booleans as bits."""
        return FORMS["bits" if self.kind == "bits" else storage]

    def stored(self, target: Target, storage: Storage) -> dict[str, Stored]:
        """The tensors that keep it, in the form's order, by their names in a bundle's files.

        ``h.0.weight``, ``h.0.weight:scales``, ``h.0.weight:up``, ``h.0.weight:up:scales``.
        """
        return {
            ":".join(word for word in (target.name, self.name, s.suffix) if word): s
            for s in self.form(storage).stored(self.shape)
        }


@dataclass(frozen=True, slots=True)
class Task:
    """A task as random bits know it."""

    id: int
    """Given when the task is added, and never again to another one."""
    seed: int
    """The bundle's."""


class Encoding(NamedTuple):
    """What is kept of a chunk."""

    shared: Parts
    tasks: tuple[Parts, ...]
    """A task without private parts has an empty entry."""


class CodecParams(Params):
    """Parameters that all codecs have."""

    scale: float = 1.0
    """λ, which multiplies a decoded delta when a task's model is retrieved; it is never part of what is stored."""
    storage: Storage = "float32"
    """How numbers are stored. int8 takes a quarter of what float32 takes, and adds 0.6 % of the stored values' norm as
    error; int4 an eighth, and 11 %. Only with float32 do added and removed tasks give the bits of a bundle made anew.
    """


class Codec(Algorithm):
    """A bundle codec: pure tensor algebra on one target at a time."""

    incremental: ClassVar[bool]
    """Whether a task can be added or removed without the other tasks' models."""

    def problem(self, p: Any, weights: Sequence[float]) -> str | None:
        """A bundle keeps models as they are; only ``scale`` multiplies their deltas, when they are retrieved."""
        return None if all(w == 1 for w in weights) else f"takes no weights, but they are {list(weights)}"

    def scope(self, p: Any) -> Scope:
        """Statistics are about all targets together."""
        return "model"

    def fixed(self, p: P, tasks: int) -> P:
        """The parameters that a bundle keeps, with what depends on the number of tasks it is created with."""
        return p

    def assign(self, p: Any, targets: Sequence[Target]) -> tuple[Target, ...]:
        """The targets, in canonical order, each told whether it is plain."""
        return tuple(targets)

    def sources(self, p: Any, targets: Sequence[Target], task: Task) -> Mapping[str, str]:
        """Which tensor's delta of this task stands in a target's place; in places not named, the tensor's own."""
        return {}

    @abstractmethod
    def parts(self, p: Any, target: Target, rank: int | None = None) -> tuple[Part, ...]:
        """What is kept of a target, shared parts first.

        Args:
            p: As ``fixed``.
            target: As assigned.
            rank: That the task's delta has at most; None if it is not known as factors. Shared parts do not depend
                on it.
        """

    @abstractmethod
    def encode(
        self,
        group: TensorGroup,
        target: Target,
        tasks: Sequence[Task],
        p: Any,
        stats: Any | None = None,
        onto: Parts | None = None,
    ) -> Encoding:
        """What is kept of a chunk, or of a whole tensor.

        Args:
            group: The tasks' deltas, those of other tensors where ``sources`` says so.
            target: As assigned.
            tasks: Of the group, in its order.
            p: As ``fixed``; the group has them as they hold for each task.
            stats: What the passes over the group's tasks found.
            onto: The shared parts of a bundle that these tasks are added to, if the codec is incremental; they may be
                overwritten. Adding one task after another gives the bits of encoding all at once, in that order.
        """

    def remove(self, shared: Parts, group: TensorGroup, target: Target, tasks: Sequence[Task], p: Any) -> Parts:
        """The shared parts without the group's tasks; what is given may be overwritten.

        Where adding the tasks was exact, as with bfloat16 models, the bits are those from before.
        """
        raise NotImplementedError(f"{self.name} cannot remove a task without the other tasks' models")

    @abstractmethod
    def decode(
        self,
        stored: Parts,
        target: Target,
        task: Task,
        p: Any,
        *,
        start: int = 0,
        facts: Mapping[str, float] | None = None,
    ) -> torch.Tensor:
        """A task's delta of the tensor that ``sources`` names for the target.

        Args:
            stored: The shared parts and the task's own; they may be overwritten.
            target: As assigned.
            task: Whose delta.
            p: As ``fixed``.
            start: Flat index of the chunk's first element.
            facts: The task's.

        Returns:
            The chunk, (n,), float32; from whole tensors all of it, flat, in the stored orientation.
        """

    def multiplier(self, target: Target, task: Task, p: Any, start: int) -> torch.Tensor | None:
        """What ``decode`` multiplies the one shared part by, if that is all it does, which can then be done on the way.

        Args:
            target: As assigned.
            task: Whose delta.
            p: As ``fixed``.
            start: Flat index of the chunk's first element.

        Returns:
            Factors of the elements from there on, float32, which repeat; 1 or -1, so that products are exact.
        """
        return None

    def facts(self, p: Any, stats: Any | None, count: int) -> tuple[Mapping[str, float], ...]:
        """Numbers about each of ``count`` tasks that decoding needs."""
        return ({},) * count

    def expected_error(
        self, group: TensorGroup, target: Target, p: Any, encoding: Encoding | None = None
    ) -> tuple[float, ...] | None:
        """What theory expects, for each task, as the squared norm of the chunk's retrieval error, at scale 1.

        Exact storage is taken for granted. None where there is no theory; sums over chunks and tensors are the whole
        model's. What ``encode`` made of the group, where it is known, spares doing dear things twice.
        """
        return None

    def errors_after(self, p: Any, norms: Sequence[float], errors: Sequence[float | None]) -> tuple[float | None, ...]:
        """The tasks' expected errors, as norms, after tasks were added to a bundle or removed.

        Args:
            p: As ``fixed``.
            norms: Of all tasks' deltas.
            errors: What was expected of each task before, of an added one as if it were alone. It still holds where
                tasks do not share anything.
        """
        return tuple(errors)
