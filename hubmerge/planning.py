"""Pinned models → Plan: every decision of a run, made from names, shapes and configs; no byte is read here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import hubmerge
from hubmerge import align, layout, merged_adapter
from hubmerge.matching import Aligned, Draft, align_adapter, align_full, check_models
from hubmerge.methods import get_method
from hubmerge.spec import (
    DTYPE_BY_TORCH_NAME,
    AdapterPart,
    Dtype,
    Input,
    OutputFile,
    PinnedModel,
    Plan,
    Settings,
    SmallFile,
    TensorJob,
    TensorSpec,
    natural_key,
)

if TYPE_CHECKING:
    from hubmerge.recipe import Recipe


def build_plan(recipe: Recipe, base: PinnedModel, models: tuple[PinnedModel, ...]) -> Plan:
    """Decide everything. Problems of severity ``error`` are collected in the plan; running such a plan is refused."""
    draft = Draft(recipe, base, models)
    draft.n_layers = 1 + max((n for name in base.tensors if (n := align.layer_of(name)) is not None), default=-1)
    check_models(draft)
    for model in models:
        draft.aligned.append(align_adapter(draft, model) if model.adapter is not None else align_full(draft, model))
    is_adapter = recipe.output.format == "adapter"
    jobs = merged_adapter.adapter_jobs(draft) if is_adapter else _model_jobs(draft)
    _check_settings(draft, jobs)
    if is_adapter:
        placed, outputs, files = _adapter_files(draft, jobs)
    else:
        placed, outputs = layout.pack(jobs, recipe.output.shard_size)
        files = _small_files(draft, placed, outputs)
    if recipe.heads == "keep":
        _add_heads(draft, placed, outputs, files)
    plan = Plan(
        method=recipe.method,
        base=base,
        models=models,
        jobs=tuple(placed),
        outputs=tuple(outputs),
        files=tuple(files),
        problems=tuple(draft.problems),
        seed=recipe.seed,
        params=recipe.params,
        digest="",
    )
    return dataclasses.replace(plan, digest=plan_digest(plan))


def plan_digest(plan: Plan) -> str:
    """sha256 over all that decides the output's bytes: sources, jobs, layout, seed, hubmerge's version."""

    def source(m: PinnedModel) -> list[Any]:
        # A folder has no commit; its headers identify the layout (its bytes are the user's to keep still).
        return [m.repo if m.commit else "", m.commit, m.header_sha256, dict(m.adapter) if m.adapter else None]

    def settings(s: Settings | None) -> Any:
        return s and [s.params.model_dump(mode="json"), [p.model_dump(mode="json") for p in s.per_model], s.weights]

    jobs = [
        [j.name, j.kind, j.shape, j.dtype.name, j.output, j.start_byte, j.action, j.method, j.source,
        settings(j.settings),
         *(_place(i) for i in (j.base, *j.inputs)), j.factors and [j.factors.names, j.factors.rank]]
        for j in plan.jobs
    ]  # fmt: skip
    files = [[f.path, f.source, hashlib.sha256(f.content).hexdigest() if f.content else None] for f in plan.files]
    facts = [hubmerge.__version__, plan.method, plan.seed, [source(m) for m in (plan.base, *plan.models)],
             [m.name for m in plan.models], jobs, [o.path for o in plan.outputs], files]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _place(given: Input) -> Any:
    if isinstance(given, TensorSpec):
        return [given.file, given.start_byte, given.end_byte]
    if isinstance(given, AdapterPart):
        return [given.name, given.kind]
    return None


def _check_settings(draft: Draft, jobs: Sequence[TensorJob]) -> None:
    """Settings that vary between tensors must each make sense, and agree on what whole-model statistics are about."""
    method = get_method(draft.recipe.method)
    shared = _of_the_model(draft.recipe.params)
    if jobs and method.needs_layers(draft.recipe.params) and draft.n_layers == 0:
        draft.problem(
            "error",
            f"{method.name} merges the weights of numbered layers, and no tensor's name has a layer's number",
            "set `rest: mean` to average all others, or use another method",
        )
    seen: set[int] = set()
    for job in jobs:
        if job.settings is None or job.method or id(job.settings) in seen:
            continue
        seen.add(id(job.settings))
        params = job.settings.params
        if (message := method.problem(params, job.settings.weights)) is not None:
            draft.problem("error", f"tensor {job.name!r}: {message}")
        scopes = {method.scope(params), method.scope(draft.recipe.params)}
        if len(scopes) > 1 or (scopes == {"model"} and _of_the_model(params) != shared):
            draft.problem(
                "error",
                f"tensor {job.name!r}: {method.name} looks at the whole model, so only its scale and "
                "per-model parameters may vary",
                "give one value for all tensors" + (", or set trim: tensor" if "trim" in shared else ""),
            )
            return


def _of_the_model(params: Any) -> dict[str, Any]:
    fields = type(params).model_fields
    varying = {
        n for n, f in fields.items() if isinstance(f.json_schema_extra, dict) and f.json_schema_extra.get("per_model")
    }
    return {k: v for k, v in params.model_dump().items() if k != "scale" and k not in varying}


# --- jobs -------------------------------------------------------------------------------------------------------


def _model_jobs(draft: Draft) -> list[TensorJob]:
    untied = {name: source for a in draft.aligned for name, source in a.untied.items()}
    if untied:
        draft.problem("note", f"{', '.join(untied)}: tied in the base, not in every model; kept as a tensor of its own")
    names = sorted([*draft.base.tensors, *untied], key=natural_key)
    jobs: list[TensorJob] = []
    for name in names:
        base = draft.base.tensors[untied.get(name, name)]
        inputs = tuple(_input(a, name, untied.get(name)) for a in draft.aligned)
        jobs += _tensor_jobs(draft, name, base, inputs, len(jobs))
    return jobs


def _input(aligned: Aligned, name: str, tied_source: str | None) -> Input:
    found = aligned.inputs.get(name)
    if found is None and tied_source is not None:
        return aligned.inputs.get(tied_source)
    return found


def _out_dtype(draft: Draft, spec: TensorSpec) -> Dtype:
    if draft.recipe.dtype is None or not spec.dtype.mergeable:
        return spec.dtype
    return DTYPE_BY_TORCH_NAME[draft.recipe.dtype]


def _tensor_jobs(draft: Draft, name: str, base: TensorSpec, inputs: tuple[Input, ...], index: int) -> list[TensorJob]:
    shape = base.shape
    common: dict[str, Any] = {
        "name": name,
        "kind": align.kind_of(name, shape),
        "dtype": _out_dtype(draft, base),
        "output": -1,
        "start_byte": 0,
        "end_byte": 0,
        "transposed": align.is_transposed(name, shape, draft.base.config),
        "layer": align.layer_of(name),
    }
    if not any(i is not None for i in inputs):
        return [TensorJob(index=index, shape=shape, action="copy", base=base, inputs=(), **common)]
    settings = draft.recipe.settings_for(name, common["layer"], draft.n_layers, align.is_input_embedding(name, shape))
    rows = {i.shape[0] for i in inputs if isinstance(i, TensorSpec) and i.shape != shape}
    if not rows:
        return [
            TensorJob(index=index, shape=shape, action="merge", base=base, inputs=inputs, settings=settings, **common)
        ]
    return _row_jobs(draft, base, inputs, settings, index, common)


def _row_jobs(
    draft: Draft, base: TensorSpec, inputs: tuple[Input, ...], settings: Settings, index: int, common: dict[str, Any]
) -> list[TensorJob]:
    """A vocabulary tensor whose row counts differ: one job for each range of rows that the same models have."""
    counts = {i.shape[0] for i in inputs if isinstance(i, TensorSpec)} | {base.shape[0]}
    top = max(counts) if draft.recipe.vocab == "union" else base.shape[0]
    draft.vocab_rows = top
    edges = [0, *sorted(c for c in counts if c < top), top]
    jobs: list[TensorJob] = []
    for low, high in pairwise(edges):
        part = tuple(_rows(i, low, high) if isinstance(i, TensorSpec) else i for i in inputs)
        own = _rows(base, low, high)
        if own is None:
            # Rows beyond the base's: the plain mean of the models that have them.
            merge = _mean_settings(settings, part)
            common = common | {"method": "linear"}
            part = tuple(p if isinstance(p, TensorSpec) else None for p in part)
        else:
            merge = settings
        present = any(p is not None for p in part)
        jobs.append(
            TensorJob(
                index=index + len(jobs),
                shape=(high - low, *base.shape[1:]),
                action="merge" if present else "copy",
                base=own,
                inputs=part if present else (),
                settings=merge if present else None,
                **common,
            )
        )
    return jobs


def _rows(spec: TensorSpec, low: int, high: int) -> TensorSpec | None:
    if spec.shape[0] < high:
        return None
    width = spec.size_bytes // spec.shape[0]
    return dataclasses.replace(
        spec,
        shape=(high - low, *spec.shape[1:]),
        start_byte=spec.start_byte + low * width,
        end_byte=spec.start_byte + high * width,
    )


def _mean_settings(settings: Settings, part: tuple[Input, ...]) -> Settings:
    params = get_method("linear").parameters()
    weights = tuple(1.0 if isinstance(p, TensorSpec) else 0.0 for p in part)
    return Settings(params, (params,) * len(part), weights)


# --- files ------------------------------------------------------------------------------------------------------


def _small_files(draft: Draft, jobs: Sequence[TensorJob], outputs: Sequence[OutputFile]) -> list[SmallFile]:
    source = _tokenizer_source(draft)
    tokenizer = draft.base if source < 0 else draft.models[source]
    files = [f for f in layout.companions(draft.base, tokenizer, source) if f.path != "config.json"]
    patch = _config_patch(draft)
    if "config.json" in draft.base.files:
        content = layout.to_json({**draft.base.config, **patch}) if patch else None
        files.append(SmallFile("config.json", source=None if content else -1, content=content))
    index = layout.index_file(jobs, outputs)
    return [*files, index] if index else files


def _adapter_files(
    draft: Draft, jobs: Sequence[TensorJob]
) -> tuple[list[TensorJob], list[OutputFile], list[SmallFile]]:
    """A merged adapter's weights and what accompanies them; a tokenizer only if the recipe names a model's."""
    if not jobs:
        return [], [], []
    placed, output = layout.place([[job] for job in jobs], merged_adapter.WEIGHTS, 0)
    files = [SmallFile(merged_adapter.CONFIG, content=merged_adapter.adapter_config(draft, jobs))]
    files += layout.notices(draft.base)
    if draft.recipe.tokenizer != "base":
        source = _tokenizer_source(draft)
        files += layout.tokenizer_files(draft.base if source < 0 else draft.models[source], source)
    return placed, [output], files


def _tokenizer_source(draft: Draft) -> int:
    wanted = draft.recipe.tokenizer
    if wanted == "union":
        sizes = {m.config.get("vocab_size") for m in (draft.base, *draft.models) if m.adapter is None}
        digests = {m.files[f].git_sha1 or m.files[f].sha256 or m.files[f].size_bytes
                   for m in (draft.base, *draft.models) for f in ("tokenizer.json",) if f in m.files}  # fmt: skip
        if len(sizes) > 1 or len(digests) > 1:
            draft.problem(
                "error",
                "tokenizer union: the models have different vocabularies, and building a new one is not supported",
                "set `tokenizer: base` with `vocab: base`, or `tokenizer: NAME` with `vocab: union`",
            )
        return -1
    if wanted == "base":
        return -1
    source = next(i for i, m in enumerate(draft.models) if m.name == wanted)
    if not any(
        f.path in draft.models[source].files for f in layout.companions(draft.base, draft.models[source], source)
    ):
        draft.problem(
            "error", f"tokenizer: {wanted}: {draft.models[source].repo} has no tokenizer files", "set `tokenizer: base`"
        )
    return source


def _config_patch(draft: Draft) -> dict[str, Any]:
    patch: dict[str, Any] = {}
    config = draft.base.config
    if draft.recipe.dtype is not None and config.get("dtype", config.get("torch_dtype")) != draft.recipe.dtype:
        patch["dtype"] = draft.recipe.dtype
        if "torch_dtype" in config:
            patch["torch_dtype"] = draft.recipe.dtype
    if draft.vocab_rows is not None and config.get("vocab_size") not in (None, draft.vocab_rows):
        patch["vocab_size"] = draft.vocab_rows
    if any(a.untied for a in draft.aligned):
        patch["tie_word_embeddings"] = False
    return patch


def _add_heads(draft: Draft, jobs: list[TensorJob], outputs: list[OutputFile], files: list[SmallFile]) -> None:
    """Keep what only one task has, in the dtype it has, next to the merged model."""
    for source, (model, aligned) in enumerate(zip(draft.models, draft.aligned, strict=True)):
        if not aligned.heads:
            continue
        groups = [
            [TensorJob(
                index=len(jobs) + n, name=name, kind=align.kind_of(name, spec.shape), shape=spec.shape,
                dtype=spec.dtype,
                output=-1, start_byte=0, end_byte=0, action="copy", base=spec, inputs=(), source=source,
            )]
            for n, (name, spec) in enumerate(sorted(aligned.heads.items(), key=lambda kv: natural_key(kv[0])))
        ]  # fmt: skip
        placed, output = layout.place(groups, f"heads/{model.name}.safetensors", len(outputs))
        jobs += placed
        outputs.append(output)
        if model.config:
            # Where the author's machine kept the model is nobody's business.
            config = {k: v for k, v in model.config.items() if k != "_name_or_path"}
            files.append(SmallFile(f"heads/{model.name}.config.json", content=layout.to_json(config)))
        draft.problem("note", f"{model.repo}: {len(groups)} tensors only this task has are kept in {output.path}")
