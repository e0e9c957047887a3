"""The plan of a merged adapter: LoRA factors of the merged deltas, and the config by which PEFT loads them.

Nothing here or later reads a weight of the base.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hubmerge import align, layout
from hubmerge.matching import Draft
from hubmerge.methods import get_method
from hubmerge.spec import DTYPE_BY_TORCH_NAME, DTYPES, AdapterPart, Dtype, FactorPair, Input, TensorJob, natural_key

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_ROOT = "base_model.model."
_LOCAL_PATH = re.compile(r"[./~]|[A-Za-z]:\\")
# For these PEFT expects the adapter to contain the head; a merged one has none, its parents' are kept beside it.
_TASKS_WITH_HEADS = frozenset({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"})
# Options that choose among the modules which target_modules names: with one of them, a union of names says too much.
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True, slots=True)
class _Changed:
    """A tensor of the base that adapters change."""

    name: str
    module: str
    """Its module's path as PEFT knows it."""
    shape: tuple[int, int]
    """Of the delta: (out, in), or (tokens, features) of an embedding."""
    parts: tuple[AdapterPart | None, ...]
    embedding: bool


def adapter_jobs(draft: Draft) -> list[TensorJob]:
    """One job for each tensor that the adapters change, without a place in a file; problems go to the draft."""
    for model in draft.models:
        if model.adapter is None:
            draft.problem(
                "error",
                f"{model.repo}: output.format adapter merges adapters only, and this is a full checkpoint",
                "set `output: {format: full}`",
            )
    method = get_method(draft.recipe.method)
    jobs = [_job(draft, found, index) for index, found in enumerate(_changed(draft))]
    for settings in (job.settings for job in jobs if job.settings is not None):
        if (reason := method.rank_problem(settings.params, settings.weights)) is not None:
            able = ", ".join(_methods_of_low_rank())
            draft.problem("error", f"output.format adapter: {reason}", f"use one of {able}; or output.format full")
            break
    return jobs


def _job(draft: Draft, found: _Changed, index: int) -> TensorJob:
    layer = align.layer_of(found.name)
    is_input = align.is_input_embedding(found.name, found.shape)
    return TensorJob(
        index=index,
        name=found.name,
        kind=align.kind_of(found.name, found.shape),
        shape=found.shape,
        dtype=_dtype(draft, found),
        output=-1,
        start_byte=0,
        end_byte=0,
        action="merge",
        base=None,
        inputs=found.parts,
        settings=draft.recipe.settings_for(found.name, layer, draft.n_layers, is_input),
        layer=layer,
        factors=_pair(found, draft.recipe.output.rank),
    )


def _methods_of_low_rank() -> list[str]:
    from hubmerge.methods import all_methods

    return [m.name for m in all_methods() if m.rank_problem(m.parameters(), [1.0, 1.0]) is None]


def _changed(draft: Draft) -> Iterable[_Changed]:
    names = {name for aligned in draft.aligned for name in aligned.inputs} & draft.base.tensors.keys()
    for name in sorted(names, key=natural_key):
        inputs = tuple(a.inputs.get(name) for a in draft.aligned)
        stored = draft.base.tensors[name].shape
        if any(_has_no_factors(draft, name, given, i) for i, given in enumerate(inputs)):
            continue
        parts = tuple(i if isinstance(i, AdapterPart) else None for i in inputs)
        present = [p for p in parts if p is not None]
        embedding = any(_is_embedding(p) for p in present)
        if embedding and not all(_is_embedding(p) for p in present):
            draft.problem("error", f"tensor {name!r} is an embedding to some adapters and a linear layer to others")
            continue
        transposed = align.is_transposed(name, stored, draft.base.config)
        rows, columns = stored[::-1] if transposed else stored
        yield _Changed(name, present[0].module, (rows, columns), parts, embedding)


def _has_no_factors(draft: Draft, name: str, given: Input, i: int) -> bool:
    if given is None or draft.models[i].adapter is None:
        return given is not None
    is_matrix = len(draft.base.tensors[name].shape) == 2
    if isinstance(given, AdapterPart) and given.kind == "low_rank" and given.parameter == "weight" and is_matrix:
        return False
    if not isinstance(given, AdapterPart):
        what = "replaces the whole tensor"
    elif given.kind == "low_rank":
        what = "changes a bias" if given.parameter == "bias" else "changes a convolution"
    else:
        config = draft.models[i].adapter or {}
        what = f"changes it in a way that depends on the base ({config.get('peft_type')})"
    draft.problem(
        "error",
        f"{draft.models[i].repo}: {name!r}: the adapter {what}, which factors cannot express",
        "exclude the tensor, or set `output: {format: full}`",
    )
    return True


def _is_embedding(part: AdapterPart) -> bool:
    return any(t.name.endswith("lora_embedding_A") for t in part.tensors)


def _pair(found: _Changed, limit: int | None) -> FactorPair:
    rank = min(sum(p.rank or 0 for p in found.parts if p is not None), *found.shape)
    first, second = ("lora_embedding_A", "lora_embedding_B") if found.embedding else ("lora_A.weight", "lora_B.weight")
    names = f"{_ROOT}{found.module}.{first}", f"{_ROOT}{found.module}.{second}"
    return FactorPair(names, rank if limit is None else min(rank, limit), found.embedding)


def _dtype(draft: Draft, found: _Changed) -> Dtype:
    """The recipe's, or the widest of the adapters' own: float32 where two half precisions meet."""
    if draft.recipe.dtype is not None:
        return DTYPE_BY_TORCH_NAME[draft.recipe.dtype]
    dtypes = {t.dtype for p in found.parts if p is not None for t in p.tensors}
    widest = max(d.nbytes for d in dtypes)
    ours = {d for d in dtypes if d.nbytes == widest}
    return ours.pop() if len(ours) == 1 else DTYPES["F32"]


# --- config -----------------------------------------------------------------------------------------------------


def adapter_config(draft: Draft, jobs: Sequence[TensorJob]) -> bytes:
    """``adapter_config.json`` of a plain LoRA adapter whose factors contain every scale (alpha = r)."""
    ranks = {_module(job): job.factors.rank for job in jobs if job.factors is not None}
    largest = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != largest}
    configs = [m.adapter or {} for m in draft.models]
    task = _agreed(configs, "task_type")
    data = {
        "alpha_pattern": others,
        "auto_mapping": _agreed(configs, "auto_mapping"),
        "base_model_name_or_path": _base_name(draft, configs),
        "bias": "none",
        "fan_in_fan_out": any(align.is_transposed(j.name, j.shape, draft.base.config) for j in jobs),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": largest,
        "rank_pattern": others,
        "revision": draft.base.commit,
        "target_modules": _target_modules(draft, set(ranks), configs),
        "task_type": task if task not in _TASKS_WITH_HEADS else None,
        "use_dora": False,
        "use_rslora": False,
    }
    return layout.to_json(data)


def _module(job: TensorJob) -> str:
    assert job.factors is not None
    return job.factors.names[0].removeprefix(_ROOT).rsplit(".lora_", 1)[0]


def _agreed(configs: Sequence[Mapping[str, Any]], option: str) -> Any:
    """What all adapters' configs say; None if they differ."""
    first = configs[0].get(option)
    return first if all(c.get(option) == first for c in configs) else None


def _base_name(draft: Draft, configs: Sequence[Mapping[str, Any]]) -> str | None:
    """The base's repo; for a local base what the adapters call it, unless that is a path of somebody's machine."""
    if not draft.base.is_local:
        return draft.base.repo
    named = _agreed(configs, "base_model_name_or_path")
    return named if isinstance(named, str) and named and not _LOCAL_PATH.match(named) else None


def _target_modules(draft: Draft, changed: set[str], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The adapters' own short names where together they mean exactly the changed modules, else full names."""
    meant = {part.module for m in draft.models for part in m.parts if part.parameter == "weight"}
    given = [c.get("target_modules") for c in configs]
    if (
        meant == changed
        and all(isinstance(g, list) for g in given)
        and not any(c.get(o) for c in configs for o in _NARROWING)
    ):
        return sorted({str(name) for names in given for name in names or ()})
    return sorted(changed, key=natural_key)
