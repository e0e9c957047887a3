"""Pinned models → what a bundle of them, or one more task in a bundle, will consist of; from headers alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import hubmerge
from hubmerge import align, layout
from hubmerge.bundles.checkpoints import Naming, as_stored, config_of, naming
from hubmerge.bundles.manifest import Manifest, Origin, TargetEntry
from hubmerge.bundles.placement import Files, HeadCopy, Owner, PlacedPart
from hubmerge.codec import Codec, CodecParams, Target, Task
from hubmerge.codecs import get_codec
from hubmerge.errors import PlanError, RecipeError
from hubmerge.factors import DOWN, UP
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

if TYPE_CHECKING:
    from hubmerge.recipe import Recipe


@dataclass(frozen=True, slots=True)
class BundleJob:
    """One target: which deltas stand in its place, and where what is kept of them goes."""

    index: int
    target: Target
    base: TensorSpec | None
    """The target's own tensor in the base; None for a factor, which has none."""
    origins: tuple[str, ...]
    """For each new task, the target whose delta stands in this one's place …"""
    inputs: tuple[Input, ...]
    """… the task's version of it …"""
    bases: tuple[TensorSpec | None, ...]
    """… and the base's."""
    transposed: tuple[bool, ...]
    """Whether that one is stored [in, out]."""
    shared: tuple[PlacedPart, ...]
    private: tuple[tuple[PlacedPart, ...], ...]
    action: str = "encode"
    source: int = -1


@dataclass(frozen=True, slots=True)
class NewTask:
    """A task that is about to enter the bundle."""

    identity: Task
    model: PinnedModel
    aligned: Aligned
    ranks: Mapping[str, int]
    naming: Naming

    @property
    def modules(self) -> dict[str, str]:
        """An adapter's own names of modules, by tensor, where they are not the tensor's without ``.weight``."""
        parts = {n: p for n, p in self.aligned.inputs.items() if isinstance(p, AdapterPart)}
        return {n: p.module for n, p in parts.items() if p.module != n.removesuffix(".weight")}


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
    factors: bool
    """Whether targets are the two balanced factors of adapters' deltas, and not tensors of the base."""
    digest: str

    @property
    def models(self) -> tuple[PinnedModel, ...]:
        """The new tasks' models."""
        return tuple(t.model for t in self.tasks)

    def pinned(self, source: int) -> PinnedModel:
        """The model with this index; -1 is the base."""
        return self.base if source < 0 else self.models[source]


def plan_bundle(recipe: Recipe, base: PinnedModel, models: Sequence[PinnedModel]) -> BundlePlan:
    """Plan a new bundle.

    Raises:
        PlanError: The models cannot be bundled; the message says why.
        RecipeError: A setting that means nothing for bundles.
    """
    _refuse_settings(recipe)
    codec = get_codec(recipe.method)
    draft = _aligned(recipe, base, models)
    settings = [recipe.settings_for("", None, draft.n_layers, False)]
    params = codec.fixed(settings[0].params, len(models))
    factors = codec.name == "superposition" and all(map(_is_plain_adapter, draft.models, draft.aligned))
    floats = _factor_targets(draft) if factors else _tensor_targets(draft)
    targets = codec.assign(params, floats)
    each = tuple(codec.fixed(q, len(models)) for q in settings[0].per_model)
    shard_bytes = recipe.output.shard_size
    return _plan(draft, codec, params, each, recipe.seed, targets, 0, shard_bytes, factors=factors)


def _refuse_settings(recipe: Recipe) -> None:
    """Settings of merges that mean nothing for bundles, and would be passed over in silence."""
    unused = {"dtype": None, "tokenizer": "base", "vocab": "strict"}
    for key, default in unused.items():
        if (given := getattr(recipe, key)) != default:
            raise RecipeError(
                f"{key}: {given}: a bundle gives every model back in the base's types, with its own tokenizer and the "
                "base's vocabulary",
                hint=f"leave {key} out",
            )
    data = recipe.normalized()
    for where, given in [("parameters", data["parameters"]), *((m["name"], m["parameters"]) for m in data["models"])]:
        for key, value in given.items():
            if isinstance(value, list):
                raise RecipeError(f"{where}: {key} differs between tensors; a bundle has one value for all of them")


def _tensor_targets(draft: Draft) -> list[Target]:
    """Every floating-point tensor of the base that takes part."""
    base = draft.base
    return [
        Target(name, spec.shape, align.kind_of(name, spec.shape), align.is_transposed(name, spec.shape, base.config))
        for name, spec in sorted(base.tensors.items(), key=lambda kv: natural_key(kv[0]))
        if spec.dtype.mergeable and draft.recipe.takes_part(name)
    ]


def _factor_targets(draft: Draft) -> list[Target]:
    """The two factors of every tensor that an adapter changes, with as many rows as the largest rank there."""
    found: list[Target] = []
    names = {name for aligned in draft.aligned for name in aligned.inputs}
    for name in sorted(names, key=natural_key):
        parts = [p for a in draft.aligned if isinstance(p := a.inputs.get(name), AdapterPart)]
        rank = max(p.rank or 0 for p in parts)
        rows, columns = parts[0].shape or (0, 0)
        found += [Target(name + UP, (rank, rows), "linear"), Target(name + DOWN, (rank, columns), "linear")]
    return found


def _is_plain_adapter(model: PinnedModel, aligned: Aligned) -> bool:
    """Whether all that a model changes are products of factors."""
    return model.adapter is not None and all(
        isinstance(i, AdapterPart)
        and i.kind == "low_rank"
        and i.parameter == "weight"
        and len(i.shape or ()) == 2
        and not any("lora_embedding" in t.name for t in i.tensors)
        for i in aligned.inputs.values()
    )


def _check_factors(draft: Draft, targets: Sequence[Target]) -> None:
    """A further adapter of a bundle of adapters must fit the room there is."""
    model, aligned = draft.models[0], draft.aligned[0]
    if not _is_plain_adapter(model, aligned):
        draft.problem(
            "error",
            f"{model.repo}: the bundle holds LoRA adapters as factors, and this is none, or changes more than products",
            "make a bundle of full models, or leave it out",
        )
        return
    room = {t.name.removesuffix(UP): t.shape[0] for t in targets if t.name.endswith(UP)}
    for name, part in aligned.inputs.items():
        rank = part.rank or 0 if isinstance(part, AdapterPart) else 0
        if rank > room.get(name, 0):
            has = f"has room for rank {room[name]}" if name in room else "does not cover it"
            draft.problem(
                "error",
                f"{model.repo}: {name!r} has rank {rank}, the bundle {has}",
                "create the bundle anew with this adapter among its models",
            )


def plan_addition(manifest: Manifest, recipe: Recipe, base: PinnedModel, model: PinnedModel) -> BundlePlan:
    """Plan one more task of a bundle; ``recipe`` holds the base, the one model, and how its tensors are treated.

    Raises:
        PlanError: The model does not fit; the message says why.
    """
    codec, params = manifest.codec_of()
    draft = _aligned(recipe, base, (model,))
    targets = tuple(t.target() for t in manifest.targets)
    if manifest.factors:
        _check_factors(draft, targets)
    first, shard_bytes = manifest.next_id, recipe.output.shard_size
    return _plan(draft, codec, params, (params,), manifest.seed, targets, first, shard_bytes, factors=manifest.factors)


def _aligned(recipe: Recipe, base: PinnedModel, models: Sequence[PinnedModel]) -> Draft:
    draft = Draft(recipe, base, tuple(models))
    draft.n_layers = 1 + max((n for name in base.tensors if (n := align.layer_of(name)) is not None), default=-1)
    check_models(draft)
    for model in models:
        aligned = align_adapter(draft, model) if model.adapter is not None else align_full(draft, model)
        as_stored(base, model, aligned)
        draft.aligned.append(aligned)
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
    *,
    factors: bool,
) -> BundlePlan:
    sized = targets if codec.whole(params) else ()
    known = factors or codec.whole(params)
    tasks = tuple(_task(draft, i, Task(first_id + i, seed), sized, factors=known) for i in range(len(draft.models)))
    keep = draft.recipe.heads == "keep"
    owners = [Owner(t.identity.id, t.model.name, t.ranks, t.aligned.heads if keep else {}) for t in tasks]
    files = Files(codec, params, targets, owners, shard_bytes)
    jobs = [_job(draft, files, codec, params, targets, tasks, i, factors=factors) for i in range(len(targets))]
    _refuse_other_vocabularies(draft)
    for owner in owners:
        if owner.heads:
            what = f"{len(owner.heads)} of its tensors, which the base does not have"
            draft.problem("note", f"{owner.name}: {what}, are kept in heads/{owner.name}.safetensors")
    errors = [p for p in draft.problems if p.severity == "error"]
    if errors:
        rest = "".join(f"\n{p.message}" for p in errors[1:6])
        raise PlanError(errors[0].message + rest, hint=errors[0].hint)
    plan = BundlePlan(
        codec, params, each, seed, draft.base, tasks, targets, (*jobs, *files.heads), tuple(files.outputs),
        tuple(_small_files(draft)), tuple(draft.problems), factors, "",
    )  # fmt: skip
    return replace(plan, digest=_digest(plan))


def _task(draft: Draft, i: int, identity: Task, sized: Sequence[Target], *, factors: bool) -> NewTask:
    """A new task. Of ``sized`` targets that it leaves as they are nothing is kept: their deltas have rank 0."""
    model, aligned = draft.models[i], draft.aligned[i]
    ranks = {t.name: 0 for t in sized if aligned.inputs.get(t.name) is None}
    known = ranks | (_ranks(aligned) if factors else {})
    return NewTask(identity, model, aligned, known, naming(draft.base, model, aligned))


def _refuse_other_vocabularies(draft: Draft) -> None:
    for model, aligned in zip(draft.models, draft.aligned, strict=True):
        for name, given in aligned.inputs.items():
            if isinstance(given, TensorSpec) and given.shape != draft.base.tensors[name].shape:
                message = (
                    f"{model.repo}: tensor {name!r} has {given.shape[0]} rows, the base has "
                    f"{draft.base.tensors[name].shape[0]}; a bundle keeps tensors of the base's shapes"
                )
                hint = "leave that model out, or exclude the tensor: it then stays the base's"
                draft.problems.insert(0, Problem("error", message, hint))


def _ranks(aligned: Aligned) -> dict[str, int]:
    """Ranks of the deltas that are known as factors, by tensor."""
    parts = {n: i for n, i in aligned.inputs.items() if isinstance(i, AdapterPart) and i.kind == "low_rank"}
    return {n: p.rank for n, p in parts.items() if p.rank is not None and p.parameter == "weight"}


def _job(
    draft: Draft, files: Files, codec: Codec, params: CodecParams, targets: Sequence[Target],
    tasks: Sequence[NewTask], index: int, *, factors: bool,
) -> BundleJob:  # fmt: skip
    target = targets[index]
    origins = [codec.sources(params, targets, t.identity).get(target.name, target.name) for t in tasks]
    tensors = [n.removesuffix(UP).removesuffix(DOWN) if factors else n for n in origins]
    shared = [q for q in codec.parts(params, target) if q.owner == "shared"]
    private = [
        files.placed(i, target, [q for q in codec.parts(params, target, t.ranks.get(target.name)) if q.owner == "task"])
        for i, t in enumerate(tasks)
    ]
    bases = [None if factors else draft.base.tensors[n] for n in tensors]
    return BundleJob(
        index=index,
        target=target,
        base=None if factors else draft.base.tensors[target.name],
        origins=tuple(origins),
        inputs=tuple(t.aligned.inputs.get(n) for t, n in zip(tasks, tensors, strict=True)),
        bases=tuple(bases),
        transposed=tuple(b is not None and align.is_transposed(n, b.shape, draft.base.config)
                         for n, b in zip(tensors, bases, strict=True)),
        shared=files.placed(-1, target, shared),
        private=tuple(private),
    )  # fmt: skip


def _small_files(draft: Draft) -> list[SmallFile]:
    """The base's config, licence files, and each task's own config."""
    files = [SmallFile("config.json", source=-1)] if "config.json" in draft.base.files else []
    files += layout.notices(draft.base)
    for model, aligned in zip(draft.models, draft.aligned, strict=True):
        if (config := config_of(draft.base, model, aligned)) is not None:
            files.append(SmallFile(f"heads/{model.name}.config.json", content=layout.to_json(config)))
        if model.adapter is not None:
            own = dict(model.adapter)
            if str(own.get("base_model_name_or_path") or "").startswith(("/", ".", "~")):
                own["base_model_name_or_path"] = None
            files.append(SmallFile(f"heads/{model.name}.adapter_config.json", content=layout.to_json(own)))
    return files


def _digest(plan: BundlePlan) -> str:
    """sha256 over all that decides the bundle's bytes."""
    origins = [Origin.of(m).model_dump() for m in (plan.base, *plan.models)]
    targets = [TargetEntry.of(t).model_dump() for t in plan.targets]
    facts = [hubmerge.__version__, plan.codec.name, plan.params.model_dump(mode="json"), plan.seed, origins, targets,
             [t.identity.id for t in plan.tasks], [o.path for o in plan.outputs]]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
