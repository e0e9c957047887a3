"""Pinned models → what a bundle of them, or one more task in a bundle, will consist of; from headers alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import hubmerge
from hubmerge import align, layout
from hubmerge.bundles.manifest import Manifest, Origin, TargetEntry
from hubmerge.codec import Codec, CodecParams, Part, Target, Task
from hubmerge.codecs import get_codec
from hubmerge.errors import PlanError
from hubmerge.io.header import build_header
from hubmerge.matching import Aligned, Draft, align_adapter, align_full, check_models
from hubmerge.spec import (
    AdapterPart,
    Input,
    OutputFile,
    PinnedModel,
    Problem,
    SmallFile,
    TensorSpec,
    natural_key,
)
from hubmerge.storage import Storage, Stored

if TYPE_CHECKING:
    from hubmerge.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored tensor will lie."""

    stored: Stored
    output: int
    start_byte: int

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The bytes of the file that keep the part's values [start, stop)."""
        a, b = self.stored.span(start, stop)
        return self.start_byte + a * self.stored.dtype.nbytes, self.start_byte + b * self.stored.dtype.nbytes


@dataclass(frozen=True, slots=True)
class PlacedPart:
    """A part of a target, and where the tensors that keep it will lie."""

    part: Part
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class BundleJob:
    """One target: which deltas stand in its place, and where what is kept of them goes."""

    index: int
    target: Target
    base: TensorSpec
    """The target's own tensor in the base."""
    inputs: tuple[Input, ...]
    """For each new task, its version of the tensor that stands in the target's place …"""
    bases: tuple[TensorSpec, ...]
    """… and the base's."""
    transposed: tuple[bool, ...]
    """Whether that one is stored [in, out]."""
    shared: tuple[PlacedPart, ...]
    private: tuple[tuple[PlacedPart, ...], ...]
    action: str = "encode"
    source: int = -1


@dataclass(frozen=True, slots=True)
class HeadCopy:
    """A tensor that only one task has, kept as it is."""

    source: int
    base: TensorSpec
    """The tensor; named as jobs of a merge name what they copy."""
    output: int
    start_byte: int
    inputs: tuple[Input, ...] = ()
    action: str = "copy"


@dataclass(frozen=True, slots=True)
class NewTask:
    """A task that is about to enter the bundle."""

    identity: Task
    model: PinnedModel
    aligned: Aligned
    ranks: Mapping[str, int]
    prefix: str
    """As ``align`` found it: ``-bert.`` was stripped from the model's names, or ``+bert.`` added to them."""
    absent: tuple[str, ...]
    """Tensors of the base that the model does not have."""


@dataclass(frozen=True, slots=True)
class BundlePlan:
    """Every decision about the encoding of tasks, as plain values."""

    codec: Codec
    params: CodecParams
    each: tuple[Any, ...]
    """The parameters as they hold for each new task."""
    seed: int
    base: PinnedModel
    tasks: tuple[NewTask, ...]
    targets: tuple[Target, ...]
    jobs: tuple[BundleJob | HeadCopy, ...]
    outputs: tuple[OutputFile, ...]
    files: tuple[SmallFile, ...]
    problems: tuple[Problem, ...]
    digest: str

    @property
    def models(self) -> tuple[PinnedModel, ...]:
        """The new tasks' models."""
        return tuple(t.model for t in self.tasks)

    def pinned(self, source: int) -> PinnedModel:
        """The model with this index; -1 is the base."""
        return self.base if source < 0 else self.models[source]

    def own_outputs(self, i: int) -> tuple[str, ...]:
        """Paths of the files that new task i alone has."""
        mine = {self.outputs[p.output].path for j in self.jobs if isinstance(j, BundleJob)
                for part in j.private[i] for p in part.places}  # fmt: skip
        return tuple(sorted(mine))


def plan_bundle(recipe: Recipe, base: PinnedModel, models: Sequence[PinnedModel]) -> BundlePlan:
    """Plan a new bundle.

    Raises:
        PlanError: The models cannot be bundled; the message says why.
    """
    codec = get_codec(recipe.method)
    draft = _aligned(recipe, base, models)
    settings = [recipe.settings_for("", None, draft.n_layers, False)]
    params = codec.fixed(settings[0].params, len(models))
    floats = [
        Target(
            name,
            spec.shape,
            align.kind_of(name, spec.shape),
            align.is_transposed(name, spec.shape, base.config),
        )
        for name, spec in sorted(base.tensors.items(), key=lambda kv: natural_key(kv[0]))
        if spec.dtype.mergeable and recipe.takes_part(name)
    ]
    targets = codec.assign(params, floats)
    each = tuple(codec.fixed(q, len(models)) for q in settings[0].per_model)
    return _plan(draft, codec, params, each, recipe.seed, targets, 0, recipe.output.shard_size)


def plan_addition(manifest: Manifest, recipe: Recipe, base: PinnedModel, model: PinnedModel) -> BundlePlan:
    """Plan one more task of a bundle; ``recipe`` holds the base, the one model, and how its tensors are treated.

    Raises:
        PlanError: The model does not fit; the message says why.
    """
    codec, params = manifest.codec_of()
    draft = _aligned(recipe, base, (model,))
    targets = tuple(t.target() for t in manifest.targets)
    return _plan(draft, codec, params, (params,), manifest.seed, targets, manifest.next_id, recipe.output.shard_size)


def _aligned(recipe: Recipe, base: PinnedModel, models: Sequence[PinnedModel]) -> Draft:
    draft = Draft(recipe, base, tuple(models))
    draft.n_layers = 1 + max((n for name in base.tensors if (n := align.layer_of(name)) is not None), default=-1)
    check_models(draft)
    for model in models:
        draft.aligned.append(align_adapter(draft, model) if model.adapter is not None else align_full(draft, model))
    return draft


def _plan(
    draft: Draft,
    codec: Codec,
    params: CodecParams,
    each: tuple[Any, ...],
    seed: int,
    targets: tuple[Target, ...],
    first_id: int,
    shard_bytes: int,
) -> BundlePlan:
    tasks = tuple(_task(draft, codec, params, i, Task(first_id + i, seed)) for i in range(len(draft.models)))
    files = _Files(draft, codec, params, targets, tasks, shard_bytes)
    jobs = [_job(draft, files, codec, params, targets, tasks, i) for i in range(len(targets))]
    _refuse_other_vocabularies(draft)
    errors = [p for p in draft.problems if p.severity == "error"]
    if errors:
        rest = "".join(f"\n{p.message}" for p in errors[1:6])
        raise PlanError(errors[0].message + rest, hint=errors[0].hint)
    plan = BundlePlan(
        codec, params, each, seed, draft.base, tasks, targets, (*jobs, *files.heads), tuple(files.outputs),
        tuple(_small_files(draft)), tuple(draft.problems), "",
    )  # fmt: skip
    return replace(plan, digest=_digest(plan))


def _task(draft: Draft, codec: Codec, params: CodecParams, i: int, identity: Task) -> NewTask:
    model, aligned = draft.models[i], draft.aligned[i]
    return NewTask(identity, model, aligned, _ranks(codec, params, aligned), *_naming(draft, model, aligned))


def _refuse_other_vocabularies(draft: Draft) -> None:
    for model, aligned in zip(draft.models, draft.aligned, strict=True):
        for name, given in aligned.inputs.items():
            if isinstance(given, TensorSpec) and given.shape != draft.base.tensors[name].shape:
                draft.problem(
                    "error",
                    f"{model.repo}: tensor {name!r} has {given.shape[0]} rows, the base has "
                    f"{draft.base.tensors[name].shape[0]}; a bundle keeps tensors of the base's shapes",
                    "leave that model out, or exclude the tensor: it then stays the base's",
                )


def _ranks(codec: Codec, params: CodecParams, aligned: Aligned) -> dict[str, int]:
    """Ranks of the deltas that a codec of matrices gets as factors."""
    if not codec.whole(params):
        return {}
    parts = {n: i for n, i in aligned.inputs.items() if isinstance(i, AdapterPart) and i.kind == "low_rank"}
    return {n: p.rank for n, p in parts.items() if p.rank is not None and p.parameter == "weight"}


def _naming(draft: Draft, model: PinnedModel, aligned: Aligned) -> tuple[str, tuple[str, ...]]:
    """How a checkpoint's names differ from the base's, and what it lacks; an adapter leaves the base's as they are."""
    if model.adapter is not None:
        return "", ()
    found = align.align(draft.base.tensors, model.tensors)
    absent = tuple(n for n in draft.base.tensors if n not in found.tensors and n not in aligned.inputs)
    return found.prefix, absent


class _Files:
    """The weight files of the bundle that this plan writes."""

    def __init__(
        self, draft: Draft, codec: Codec, params: CodecParams, targets: Sequence[Target], tasks: Sequence[NewTask],
        shard_bytes: int,
    ) -> None:  # fmt: skip
        self.outputs: list[OutputFile] = []
        self.places: dict[tuple[int, str, str], tuple[Place, ...]] = {}
        self.heads: list[HeadCopy] = []
        storage = params.storage
        shared = [_stored(codec, params, t, None, "shared", storage) for t in targets]
        self._pack(-1, targets, shared, shard_bytes)
        for i, task in enumerate(tasks):
            own = [_stored(codec, params, t, task.ranks.get(t.name), "task", storage) for t in targets]
            self._write(i, f"tasks/{task.identity.id}.safetensors", list(zip(targets, own, strict=True)))
            self._heads(draft, i, task)

    def _pack(self, owner: int, targets: Sequence[Target], stored: Sequence[_Stored], shard_bytes: int) -> None:
        """Shards of the shared parts, in canonical order, greedily."""
        shards: list[list[tuple[Target, _Stored]]] = [[]]
        size = 0
        for target, parts in zip(targets, stored, strict=True):
            own = sum(_bytes(s) for _, ones in parts for _, s in ones)
            if shards[-1] and size + own > shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append((target, parts))
            size += own
        for i, shard in enumerate(shards):
            self._write(owner, f"bundle-{i + 1:05d}-of-{len(shards):05d}.safetensors", shard)

    def _write(self, owner: int, path: str, content: Sequence[tuple[Target, _Stored]]) -> None:
        """One file, the widest dtype first, so that every tensor is aligned."""
        entries = [(t.name, part.name, name, s) for t, parts in content for part, ones in parts for name, s in ones]
        if not entries:
            return
        ordered = sorted(entries, key=lambda e: -e[3].dtype.nbytes)
        header, spans = build_header((name, s.dtype, s.shape) for _, _, name, s in ordered)
        output = len(self.outputs)
        self.outputs.append(OutputFile(path, header, spans[-1][1]))
        found = {name: Place(s, output, start) for (_, _, name, s), (start, _) in zip(ordered, spans, strict=True)}
        for target, parts in content:
            for part, ones in parts:
                self.places[owner, target.name, part.name] = tuple(found[name] for name, _ in ones)

    def _heads(self, draft: Draft, i: int, task: NewTask) -> None:
        specs = sorted(task.aligned.heads.items(), key=lambda kv: natural_key(kv[0]))
        if draft.recipe.heads == "drop" or not specs:
            return
        ordered = sorted(specs, key=lambda kv: -kv[1].dtype.nbytes)
        header, spans = build_header((name, s.dtype, s.shape) for name, s in ordered)
        output = len(self.outputs)
        self.outputs.append(OutputFile(f"heads/{task.model.name}.safetensors", header, spans[-1][1]))
        self.heads += [HeadCopy(i, s, output, start) for (_, s), (start, _) in zip(ordered, spans, strict=True)]

    def placed(self, owner: int, target: Target, parts: Iterable[Part]) -> tuple[PlacedPart, ...]:
        """The parts of a target with their places."""
        return tuple(PlacedPart(q, self.places[owner, target.name, q.name]) for q in parts)


_Stored = list[tuple[Part, list[tuple[str, Stored]]]]


def _stored(
    codec: Codec, params: CodecParams, target: Target, rank: int | None, owner: str, storage: Storage
) -> _Stored:
    parts = [q for q in codec.parts(params, target, rank) if q.owner == owner]
    return [(q, list(q.stored(target, storage).items())) for q in parts]


def _bytes(stored: Stored) -> int:
    n = stored.dtype.nbytes
    for s in stored.shape:
        n *= s
    return n


def _job(
    draft: Draft, files: _Files, codec: Codec, params: CodecParams, targets: Sequence[Target],
    tasks: Sequence[NewTask], index: int,
) -> BundleJob:  # fmt: skip
    target = targets[index]
    names = [codec.sources(params, targets, t.identity).get(target.name, target.name) for t in tasks]
    shared = [q for q in codec.parts(params, target) if q.owner == "shared"]
    private = [
        files.placed(i, target, [q for q in codec.parts(params, target, t.ranks.get(target.name)) if q.owner == "task"])
        for i, t in enumerate(tasks)
    ]
    bases = draft.base.tensors
    return BundleJob(
        index=index,
        target=target,
        base=bases[target.name],
        inputs=tuple(t.aligned.inputs.get(n) for t, n in zip(tasks, names, strict=True)),
        bases=tuple(bases[n] for n in names),
        transposed=tuple(align.is_transposed(n, bases[n].shape, draft.base.config) for n in names),
        shared=files.placed(-1, target, shared),
        private=tuple(private),
    )


def _small_files(draft: Draft) -> list[SmallFile]:
    """The base's config, licence files, and each task's own config."""
    files = [SmallFile("config.json", source=-1)] if "config.json" in draft.base.files else []
    files += layout.notices(draft.base)
    for model in draft.models:
        if model.config:
            # Where the author's machine kept the model is nobody's business.
            config = {k: v for k, v in model.config.items() if k != "_name_or_path"}
            files.append(SmallFile(f"heads/{model.name}.config.json", content=layout.to_json(config)))
    return files


def _digest(plan: BundlePlan) -> str:
    """sha256 over all that decides the bundle's bytes."""
    origins = [Origin.of(m).model_dump() for m in (plan.base, *plan.models)]
    targets = [TargetEntry.of(t).model_dump() for t in plan.targets]
    facts = [hubmerge.__version__, plan.codec.name, plan.params.model_dump(mode="json"), plan.seed, origins, targets,
             [t.identity.id for t in plan.tasks], [o.path for o in plan.outputs]]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
