"""Serve a bundle's tasks: a transformers model of one task, which is turned into another one's in place.

A switch writes every parameter anew, from the base's file and the bundle's, which stay mapped into memory as they are
stored. No weights are held twice and nothing accumulates: each switch gives the bits of a retrieved model.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from hubmerge.bundles.building import Design, adopt, build, check_same_design, design_of, resize
from hubmerge.bundles.manifest import TaskEntry
from hubmerge.bundles.parallel import Work, side_by_side
from hubmerge.bundles.places import Piece, Places, locate, tensors_of
from hubmerge.bundles.store import Bundle, open_bundle
from hubmerge.bundles.turns import Turns
from hubmerge.bundles.weights import Files, TaskWeights, Weight
from hubmerge.errors import UsageError
from hubmerge.hub import Hub
from hubmerge.memory import FLOATS
from hubmerge.reader import Scratch
from hubmerge.spec import DTYPES, PinnedModel


def load_bundle(place: str | Path, *, base: str | Path | None = None, hub: Hub | None = None) -> ServedBundle:
    """Open a bundle to use its tasks' models; files from the Hub are kept in the Hugging Face cache.

    Args:
        place: A folder, or a repository with ``@revision`` if need be.
        base: The folder of the base, if it is not where the bundle's manifest says.
        hub: Where repositories are.

    Raises:
        SourceError: There is no bundle, or its base cannot be used.
        IntegrityError: The bundle's files are damaged.
        AccessError: A repository is missing or not accessible.
    """
    return ServedBundle(open_bundle(str(place), hub or Hub(), base=None if base is None else str(base)))


@dataclass(slots=True)
class _Served:
    """What is known about a model that was made here."""

    naming: TaskEntry
    """The task it was made for, whose names the places have."""
    places: Places
    unused: frozenset[str]
    """Tensors of that task that the model has no use for."""
    lost: tuple[str, ...]
    """Of the model, whose place in the checkpoint is unknown."""
    turns: Turns
    design: Design
    task: str
    scale: float


class ServedBundle:
    """A bundle whose tasks' models are used in this process; all of it may be called from any thread.

    Forward passes of a model and switches exclude each other: a switch waits for the passes that are running, and
    passes that begin meanwhile wait for the switch. ``generate`` is many passes; ``holding`` keeps them together.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._files = Files(bundle, bundle.base())
        self._opened: dict[str, tuple[TaskWeights, Design]] = {}
        self._models: WeakKeyDictionary[Any, _Served] = WeakKeyDictionary()
        self._lock = threading.RLock()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in the order they were added."""
        return tuple(t.name for t in self._bundle.manifest.tasks)

    def task_of(self, model: Any) -> str:
        """The task whose weights the model has.

        Raises:
            UsageError: It was not made by this bundle.
        """
        return self._record(model).task

    def model(self, task: str, *, dtype: torch.dtype | None = None, scale: float | None = None) -> Any:
        """A task's model with its head: what transformers makes of the retrieved task.

        Args:
            task: The task's name.
            dtype: Of its parameters; by default the one that most of the base is stored in, as in a retrieved model.
            scale: λ; by default the bundle's.

        Returns:
            A ``PreTrainedModel`` on the CPU, in evaluation mode. It may be moved to another device or dtype; a copy of
            it is an ordinary model, which cannot be switched.

        Raises:
            UsageError: No such task.
            SourceError: The installed transformers has no class for it.
            IntegrityError: A file of the task is damaged.
        """
        weights, design = self._of(task)
        scale = self._scale(scale)
        dtype = dtype or _common_dtype(self._files.base)
        with torch.inference_mode(False):  # whoever makes a model there may train it elsewhere
            given = _decoded(weights, dtype, scale)
            model, missing = build(design, given, dtype)
            places, lost = locate(model, given, missing)
        record = _Served(
            weights.task, places, frozenset(given.keys() - places.keys()), tuple(lost), Turns(), design, task, scale
        )
        record.turns.guard(model)
        with self._lock:
            self._models[model] = record
        return model

    def switch(self, model: Any, task: str, *, scale: float | None = None) -> None:
        """Turn a model into another task's, or into its own as it was, in place.

        Parameters keep their identity, dtype and device, but for a head that has other labels, which gets new ones.
        Whether the model is being trained stays as it is.

        Args:
            model: From ``model``.
            task: The task's name.
            scale: λ; by default the bundle's.

        Raises:
            UsageError: No such task, one whose model is of another design, a model of other origin, or one that this
                thread is ``holding``. The model stays as it was.
            IntegrityError: A file of the task is damaged; the model stays as it was.
        """
        record, (weights, design) = self._record(model), self._of(task)
        with record.turns.alone():
            _change(model, record, weights, design, self._scale(scale))

    @contextmanager
    def holding(self, model: Any, task: str | None = None, *, scale: float | None = None) -> Iterator[str]:
        """Keep a model as it is for the length of a ``with`` block: for ``generate``, or several passes in a row.

        Other threads may run passes meanwhile, and wait if they want to switch.

        Args:
            model: From ``model``.
            task: Which task it shall be; switched to first, unless it is that one already. None leaves it as it is.
            scale: λ; by default the bundle's.

        Yields:
            The task's name.

        Raises:
            UsageError: As ``switch``.
        """
        record = self._record(model)
        if task is None:
            with record.turns.hold():
                yield record.task
            return
        (weights, design), wanted = self._of(task), (task, self._scale(scale))
        with record.turns.hold(
            lambda: not record.turns.torn and (record.task, record.scale) == wanted,
            lambda: _change(model, record, weights, design, wanted[1]),
        ):
            yield task

    # --- what is known

    def _record(self, model: Any) -> _Served:
        with self._lock:
            found = self._models.get(model)
        if found is None:
            raise UsageError(
                f"this {type(model).__name__} was not made by the bundle {self._bundle.label}",
                hint="make it with bundle.model(task); a copy of such a model is an ordinary one",
            )
        return found

    def _of(self, task: str) -> tuple[TaskWeights, Design]:
        entry = self._bundle.manifest.task(task)
        with self._lock:
            if task not in self._opened:
                design = design_of(self._bundle, self._files.base, entry)
                self._opened[task] = TaskWeights(self._files, entry), design
            return self._opened[task]

    def _scale(self, scale: float | None) -> float:
        return self._files.params.scale if scale is None else scale


# --- switching --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Step:
    """One tensor of the checkpoint, and where it goes."""

    pieces: tuple[Piece, ...]
    memories: tuple[torch.Tensor, ...]
    weight: Weight


@torch.inference_mode(False)
def _change(model: Any, record: _Served, weights: TaskWeights, design: Design, scale: float) -> None:
    """Write a task's tensors; what can be refused is refused before the first one."""
    check_same_design(record.design, design)
    steps = _steps(model, record, weights)
    devices = {m.device for s in steps for m in s.memories if m.device.type != "cpu"}
    record.turns.torn = True
    steps = [_resized(model, step) for step in steps]
    _settle(devices)  # passes of other threads may still be running there
    side_by_side(work for step in steps for work in _works(step, weights, scale))
    _settle(devices)
    adopt(model, design)
    record.design, record.task, record.scale = design, weights.task.name, scale
    record.turns.torn = False


def _steps(model: Any, record: _Served, weights: TaskWeights) -> list[_Step]:
    """What goes where.

    Raises:
        UsageError: The task's tensors do not fit into the model.
    """
    hint = f"make another model: bundle.model({weights.task.name!r})"
    task = f"task {weights.task.name!r}"
    if record.lost:
        raise UsageError(
            f"transformers converts {record.lost[0]!r} when it loads a {record.design.name}, in a way that cannot be "
            "followed",
            hint=hint,
        )
    named = weights.named_as(record.naming, absent=True)
    other = [n for n in weights.heads if n not in record.places and n not in record.unused]
    absent = [n for n in record.places if n not in named]
    if other or absent:
        what = f"has {other[0]!r}, which the model lacks" if other else f"has no {absent[0]!r}, which the model has"
        raise UsageError(f"{task} {what}", hint=hint)
    owned = tensors_of(model)
    steps = [_Step(ps, tuple(p.memory(owned) for p in ps), named[name]) for name, ps in record.places.items()]
    for name, step in zip(record.places, steps, strict=True):
        _check_writable(step, name in weights.heads, f"{task}: {name!r}")
    return steps


def _check_writable(step: _Step, head: bool, what: str) -> None:
    hint = "make a new model with bundle.model, and leave its structure as it is"
    shape, values = step.weight.shape, step.weight.values
    for memory in step.memories:
        if memory.is_meta or memory.is_floating_point() != values.is_floating_point():
            raise UsageError(f"{what}: the model's is {memory.dtype} on {memory.device}", hint=hint)
    if _differs(step) and not head:
        raise UsageError(f"{what}: {tuple(step.memories[0].shape)} in the model, not {shape}", hint=hint)


def _differs(step: _Step) -> bool:
    """Whether the parameter has another shape."""
    return step.pieces[0].part is None and step.memories[0].shape != step.weight.shape


def _resized(model: Any, step: _Step) -> _Step:
    if not _differs(step):
        return step
    return replace(step, memories=(resize(model, step.pieces[0].name, step.weight.shape),))


def _works(step: _Step, weights: TaskWeights, scale: float) -> Iterator[Work]:
    """The work of writing one tensor: straight into the model's memory where that is the processor's."""
    memory = step.memories[0]
    if len(step.memories) == 1 and memory.device.type == "cpu" and memory.is_contiguous():
        yield from _straight(weights, step.weight, memory, scale)
    else:
        yield partial(_by_way_of_here, step, weights, scale)


def _straight(weights: TaskWeights, weight: Weight, out: torch.Tensor, scale: float) -> Iterator[Work]:
    flat = out.view(-1)
    for a, b in weights.ranges(weight):
        yield partial(weights.write, weight, a, flat[a:b], scale)


def _by_way_of_here(step: _Step, weights: TaskWeights, scale: float, scratch: Scratch) -> None:
    here = torch.empty(step.weight.shape, dtype=step.weight.values.dtype)
    for work in _straight(weights, step.weight, here, scale):
        work(scratch)
    for piece, memory in zip(step.pieces, step.memories, strict=True):
        rows = here if piece.part is None else here[piece.part.rows]
        memory.copy_(rows.view(memory.shape))


def _settle(devices: set[torch.device]) -> None:
    for device in devices:
        torch.accelerator.synchronize(device)


def _decoded(weights: TaskWeights, dtype: torch.dtype, scale: float) -> dict[str, torch.Tensor]:
    """The task's checkpoint, in new memory."""
    named = weights.named_as(weights.task, absent=False)
    found = {
        name: torch.empty(w.shape, dtype=dtype if w.values.dtype in FLOATS else w.values.dtype)
        for name, w in named.items()
    }
    side_by_side(work for name, w in named.items() for work in _straight(weights, w, found[name], scale))
    return found


def _common_dtype(base: PinnedModel) -> torch.dtype:
    """What most of the base's parameters are stored in."""
    sizes: Counter[str] = Counter()
    for spec in base.tensors.values():
        if spec.dtype.mergeable:
            sizes[spec.dtype.name] += spec.numel
    return DTYPES[sizes.most_common(1)[0][0]].torch if sizes else torch.float32
