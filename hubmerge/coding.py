"""Bundles of models that are in memory: the codecs' contract without files, plan or engine.

Whole weights are superposed without a base (PSP) by giving a base of zeros; adapters, as ``factors.superposable`` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hubmerge.align import kind_of
from hubmerge.codec import Codec, CodecParams, Part, Parts, Target, Task
from hubmerge.codecs import get_codec
from hubmerge.errors import UsageError
from hubmerge.memory import CHUNK, FLOATS, MemoryGroup, chunks, gather, model_params
from hubmerge.spec import LowRank, natural_key

Base = Mapping[str, torch.Tensor]
Model = Mapping[str, torch.Tensor | LowRank]
"""Tensors by name; one that is known as factors may be given as its delta."""


@dataclass(frozen=True, slots=True)
class EncodedTask:
    """What a bundle keeps for one task alone."""

    id: int
    stored: Base
    """By the stored tensors' names."""
    ranks: Mapping[str, int]
    """Of the targets whose deltas were given as factors."""
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Several models of one base, as a codec keeps them; without the base."""

    codec: str
    parameters: CodecParams
    seed: int
    targets: tuple[Target, ...]
    tasks: Mapping[str, EncodedTask]
    """By name, in the order they were added."""
    shared: Base
    """By the stored tensors' names."""
    next_id: int
    """The number of the next task; those of removed ones are not given again."""

    @property
    def size_bytes(self) -> int:
        """Of all stored tensors."""
        return sum(t.nbytes for one in (self.shared, *(t.stored for t in self.tasks.values())) for t in one.values())


def encode_tensors(
    codec: str,
    base: Base,
    models: Sequence[Model],
    *,
    parameters: Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
    chunk_elements: int = CHUNK,
) -> Encoded:
    """Store models held in memory as one bundle; the inputs stay as they are.

    Args:
        codec: Name of a codec.
        base: The base's tensors in their stored orientation. Models keep those of it that are not floating-point.
        models: The models' tensors, of the base's shapes.
        parameters: The codec's parameters; one that may differ between models may be a list with an entry per model.
        names: The tasks' names; "0", "1", … by default.
        seed: Of all that is random.
        chunk_elements: How much is worked on at once, a multiple of 32768; the result does not depend on it.

    Raises:
        UsageError: Arguments that do not fit together.
        IntegrityError: NaN or infinity in a model.
    """
    chosen = get_codec(codec)
    names = [str(i) for i in range(len(models))] if names is None else list(names)
    if not models or len(names) != len(models) or len(set(names)) < len(names):
        raise UsageError(f"names {names} for {len(models)} models", hint="give at least one, and each its own name")
    p, each = model_params(chosen, dict(parameters or {}), len(models))
    assert isinstance(p, CodecParams)
    p = chosen.fixed(p, len(models))
    floats = [Target(n, tuple(t.shape), kind_of(n, tuple(t.shape))) for n, t in base.items() if t.dtype in FLOATS]
    targets = chosen.assign(p, sorted(floats, key=lambda t: natural_key(t.name)))
    empty = Encoded(codec, p, seed, targets, {}, {}, 0)
    return _extended(empty, base, dict(zip(names, models, strict=True)), each, chunk_elements)


def add_task(
    encoded: Encoded, base: Base, model: Model, *, name: str, parameters: Mapping[str, Any] | None = None
) -> Encoded:
    """A bundle with one more task.

    Args:
        encoded: The bundle; it stays as it is.
        base: The tensors it was made with.
        model: The model's tensors.
        name: The task's name.
        parameters: Those that may differ between models; by default the bundle's.

    Raises:
        UsageError: The codec needs all models at once, the name is taken, or the tensors do not fit.
        IntegrityError: NaN or infinity in the model.
    """
    codec = _incremental(encoded)
    if name in encoded.tasks:
        raise UsageError(f"the bundle has a task {name!r} already", hint="give another name")
    _, each = model_params(codec, {**encoded.parameters.model_dump(), **(parameters or {})}, 1)
    return _extended(encoded, base, {name: model}, each, CHUNK)


def remove_task(encoded: Encoded, base: Base, model: Model, *, name: str) -> Encoded:
    """A bundle without one of its tasks.

    Args:
        encoded: The bundle; it stays as it is.
        base: The tensors it was made with.
        model: The tensors that were added for this task.
        name: The task's name.

    Raises:
        UsageError: The codec needs the other models, there is no such task, or the tensors do not fit.
    """
    codec, p = _incremental(encoded), encoded.parameters
    tasks = (_identity(encoded, name),)
    shared: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for target, group in _groups(codec, encoded, base, {name: model}, (p,), tasks):
            parts = _owned("shared", codec.parts(p, target))
            kept = []
            for a, b in _ranges(codec, target, CHUNK) if parts else ():
                before = _load(codec, encoded.shared, target, parts, p, a, b)
                kept.append(codec.remove(before, _part(codec, group, a, b), target, tasks, p))
            shared |= _stored(kept, target, parts, p)
    return replace(encoded, shared=shared, tasks={n: t for n, t in encoded.tasks.items() if n != name})


def decode_tensors(
    encoded: Encoded, base: Base, task: str, *, scale: float | None = None, chunk_elements: int = CHUNK
) -> dict[str, torch.Tensor]:
    """One task's model out of a bundle, in the base's dtypes.

    Args:
        encoded: The bundle.
        base: The tensors it was made with.
        task: The task's name.
        scale: λ, which multiplies the deltas; by default the bundle's.
        chunk_elements: How much is worked on at once, a multiple of 32768; the result does not depend on it.

    Raises:
        UsageError: No such task, or another base.
    """
    for target in encoded.targets:
        _check(target, base.get(target.name), "the base")
    scale = encoded.parameters.scale if scale is None else scale
    found = dict(base)
    for name, delta in decode_deltas(encoded, task, chunk_elements=chunk_elements).items():
        wide = base[name].to(torch.promote_types(base[name].dtype, torch.float32))
        found[name] = torch.add(wide, delta, alpha=scale).to(base[name].dtype)
    return found


def decode_deltas(encoded: Encoded, task: str, *, chunk_elements: int = CHUNK) -> dict[str, torch.Tensor]:
    """One task's deltas out of a bundle, float32, without λ; ``chunk_elements`` as for ``decode_tensors``.

    Raises:
        UsageError: No such task.
    """
    codec, p, who = get_codec(encoded.codec), encoded.parameters, _identity(encoded, task)
    own = encoded.tasks[task]
    stored = {**encoded.shared, **own.stored}
    sources = codec.sources(p, encoded.targets, who)
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for target in encoded.targets:
            parts = codec.parts(p, target, own.ranks.get(target.name))
            pieces = []
            for a, b in _ranges(codec, target, chunk_elements):
                values = _load(codec, stored, target, parts, p, a, b)
                pieces.append(codec.decode(values, target, who, p, start=a, facts=own.facts))
            found[sources.get(target.name, target.name)] = torch.cat(pieces).view(target.shape)
    return found


# --- models, chunk by chunk -------------------------------------------------------------------------------------


class _Group(MemoryGroup):
    """A target's deltas, each against the base's version of the tensor that it comes from."""

    def __init__(self, target: Target, index: int, bases: Sequence[torch.Tensor], models: Sequence[Any], **rest: Any):
        super().__init__(
            None, models, weights=(1.0,) * len(models), name=target.name, index=index, kind=target.kind, **rest
        )
        self._bases = bases
        if any(b.dtype == torch.float64 for b in bases):
            self.compute = torch.float64

    def delta(self, i: int) -> torch.Tensor:
        one = self._models[i]
        return super().delta(i) if isinstance(one, LowRank) else self._values(one).sub_(self._values(self._bases[i]))


def _groups(
    codec: Codec, encoded: Encoded, base: Base, models: Mapping[str, Model], each: Sequence[Any], tasks: Sequence[Task]
) -> Iterator[tuple[Target, _Group]]:
    """Every target with the deltas that stand in its place."""
    _check_models(encoded, base, models)
    sources = [codec.sources(encoded.parameters, encoded.targets, t) for t in tasks]
    for index, target in enumerate(encoded.targets):
        origins = [s.get(target.name, target.name) for s in sources]
        found = [m[n] for m, n in zip(models.values(), origins, strict=True)]
        if not codec.whole(encoded.parameters):  # or every chunk would form the whole product
            found = [m.dense() if isinstance(m, LowRank) else m for m in found]
        bases, rest = [base[n] for n in origins], {"tasks": tuple(models), "params": tuple(each), "seed": encoded.seed}
        yield target, _Group(target, index, bases, found, **rest)


def _extended(
    encoded: Encoded, base: Base, models: Mapping[str, Model], each: Sequence[Any], chunk_elements: int
) -> Encoded:
    """The bundle with these models added."""
    codec, p = get_codec(encoded.codec), encoded.parameters
    tasks = [Task(encoded.next_id + i, encoded.seed) for i in range(len(models))]
    groups = list(_groups(codec, encoded, base, models, each, tasks))
    shared: dict[str, torch.Tensor] = {}
    private: list[dict[str, torch.Tensor]] = [{} for _ in models]
    with torch.no_grad():
        stats = gather(codec, p, [c for _, g in groups for c in chunks(codec, p, g, chunk_elements)])
        for target, group in groups:
            common = _owned("shared", codec.parts(p, target))
            kept = []
            for a, b in _ranges(codec, target, chunk_elements):
                onto = _load(codec, encoded.shared, target, common, p, a, b) if encoded.shared else None
                kept.append(codec.encode(_part(codec, group, a, b), target, tasks, p, stats, onto))
            shared |= _stored([k.shared for k in kept], target, common, p)
            for i, mine in enumerate(private):
                own = _owned("task", codec.parts(p, target, _rank(group, i)))
                mine |= _stored([k.tasks[i] for k in kept], target, own, p)
    ranks = [{t.name: r for t, g in groups if (r := _rank(g, i)) is not None} for i in range(len(tasks))]
    facts = codec.facts(p, stats, len(tasks))
    added = [EncodedTask(*row) for row in zip((t.id for t in tasks), private, ranks, facts, strict=True)]
    return replace(
        encoded,
        tasks={**encoded.tasks, **dict(zip(models, added, strict=True))},
        shared=shared,
        next_id=encoded.next_id + len(tasks),
    )


def _rank(group: MemoryGroup, i: int) -> int | None:
    factors = group.factors(i)
    return None if factors is None else factors.rank


def _ranges(codec: Codec, target: Target, chunk_elements: int) -> list[tuple[int, int]]:
    """The ranges of elements that are worked on at once."""
    size = max(target.numel, 1) if codec.unit == "matrix" else chunk_elements
    return [(a, min(a + size, target.numel)) for a in range(0, max(target.numel, 1), size)]


def _part(codec: Codec, group: _Group, start: int, stop: int) -> MemoryGroup:
    return group if codec.unit == "matrix" else group.chunk(start, stop)


# --- stored parts -----------------------------------------------------------------------------------------------


def _owned(owner: str, parts: Sequence[Part]) -> list[Part]:
    return [q for q in parts if q.owner == owner]


def _stored(pieces: Sequence[Parts], target: Target, parts: Sequence[Part], p: CodecParams) -> dict[str, torch.Tensor]:
    """What is stored of a target's parts, given chunk by chunk."""
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        rows = [part.form(p.storage).encode(piece[part.name].reshape(-1), target.name) for piece in pieces]
        for i, (name, stored) in enumerate(part.stored(target, p.storage).items()):
            found[name] = torch.cat([row[i] for row in rows]).view(stored.shape)
    return found


def _load(
    codec: Codec, stored: Base, target: Target, parts: Sequence[Part], p: CodecParams, start: int, stop: int
) -> dict[str, torch.Tensor]:
    """The parts' values: of a chunk flat, of a whole tensor in each part's shape."""
    found = {}
    for part in parts:
        low, high = (0, part.numel) if codec.unit == "matrix" else (start, stop)
        spans = {name: s.span(low, high) for name, s in part.stored(target, p.storage).items()}
        values = part.form(p.storage).decode([stored[n].view(-1)[a:b] for n, (a, b) in spans.items()], high - low)
        found[part.name] = values.view(part.shape) if codec.unit == "matrix" else values
    return found


def _incremental(encoded: Encoded) -> Codec:
    codec = get_codec(encoded.codec)
    if not codec.incremental:
        raise UsageError(
            f"{codec.name} cannot add or remove a task without the other tasks' models",
            hint="create the bundle anew, with or without that task",
        )
    return codec


def _identity(encoded: Encoded, name: str) -> Task:
    if name not in encoded.tasks:
        raise UsageError(f"the bundle has no task {name!r}", hint=f"its tasks: {', '.join(encoded.tasks)}")
    return Task(encoded.tasks[name].id, encoded.seed)


def _check_models(encoded: Encoded, base: Base, models: Mapping[str, Model]) -> None:
    for where, model in models.items():
        if strange := [n for n in model if n not in base]:
            raise UsageError(
                f"{where}: the base has no {strange[0]!r} ({len(strange)} such tensors)",
                hint="leave out what only this model has, and keep it elsewhere",
            )
        for target in encoded.targets:
            _check(target, base.get(target.name), "the base")
            _check(target, model.get(target.name), where)


def _check(target: Target, given: torch.Tensor | LowRank | None, where: str) -> None:
    what = f"{where}: tensor {target.name!r}"
    if given is None:
        raise UsageError(f"{what} is missing", hint="where it is the base's, give the base's tensor")
    if not isinstance(given, LowRank) and given.dtype not in FLOATS:
        raise UsageError(f"{what} has dtype {given.dtype}", hint="convert it to a floating-point dtype first")
    if tuple(given.shape) != target.shape:
        raise UsageError(f"{what} has shape {tuple(given.shape)}, not {target.shape}", hint="use models of one base")
