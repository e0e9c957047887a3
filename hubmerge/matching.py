"""Each model seen from the base's namespace: which tensors take part, which are a task's own, and what does not fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hubmerge import align
from hubmerge.spec import AdapterPart, PinnedModel, Problem, TensorSpec

if TYPE_CHECKING:
    from hubmerge.recipe import Recipe


@dataclass(slots=True)
class Aligned:
    """One model seen from the base's namespace."""

    inputs: dict[str, TensorSpec | AdapterPart] = field(default_factory=dict)
    heads: dict[str, TensorSpec] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)
    prefix: str = ""
    """How its names become the base's: ``-bert.`` takes that away from their beginning, ``+model.`` adds it there."""


@dataclass(slots=True)
class Draft:
    """What the steps of planning pass on to each other."""

    recipe: Recipe
    base: PinnedModel
    models: tuple[PinnedModel, ...]
    aligned: list[Aligned] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    vocab_rows: int | None = None
    n_layers: int = 0

    def problem(self, severity: Any, message: str, hint: str | None = None) -> None:
        """Note something that the plan will report."""
        self.problems.append(Problem(severity, message, hint))


def check_models(draft: Draft) -> None:
    """Report what is odd about the models themselves, before any tensor is matched."""
    for note in [*draft.recipe.notes, *(n for m in draft.models for n in m.notes)]:
        draft.problem("note", note)
    base_type = draft.base.config.get("model_type")
    for model in draft.models:
        kind = model.config.get("model_type")
        if model.adapter is None and base_type and kind and kind != base_type:
            draft.problem("warning", f"{model.repo}: model_type is {kind!r}, the base's is {base_type!r}")
    for name, spec in draft.base.tensors.items():
        if _is_quantised(name, spec):
            draft.problem(
                "error",
                f"{draft.base.repo}: tensor {name!r} is stored as {spec.dtype.name}, a quantised format",
                "use the unquantised checkpoint",
            )
            break


def _is_quantised(name: str, spec: TensorSpec) -> bool:
    """Float8, or a matrix of weights stored as integers; other integer tensors are buffers and tables."""
    kind = spec.dtype.torch_name
    return kind.startswith("float8") or ("int" in kind and len(spec.shape) > 1 and "weight" in name.rpartition(".")[2])


def align_full(draft: Draft, model: PinnedModel) -> Aligned:
    """A full checkpoint in the base's namespace."""
    found = align.align(draft.base.tensors, model.tensors)
    draft.problems += align.structure_problems(model.repo, draft.base.tensors, found)
    out = Aligned(prefix=found.prefix)
    if found.prefix:
        what = "without the prefix" if found.prefix.startswith("-") else "with the prefix"
        draft.problem("note", f"{model.repo}: names are matched {what} {found.prefix[1:]!r}")
    if not found.tensors:
        return out
    out.untied, repeated = align.untied_outputs(draft.base.tensors, draft.base.config, found.extra, model.config)
    for name, spec in found.extra.items():
        if name in out.untied:
            out.inputs[name] = spec
        elif name not in repeated and spec.dtype.mergeable:
            _extra(draft, model, out, name, spec)
    for name, spec in found.tensors.items():
        _matched(draft, model, out, name, spec)
    _tied_outputs(draft, model, out)
    return out


def _matched(draft: Draft, model: PinnedModel, out: Aligned, name: str, spec: TensorSpec) -> None:
    base = draft.base.tensors[name]
    if not draft.recipe.takes_part(name) or not base.dtype.mergeable:
        return
    if not spec.dtype.mergeable:
        draft.problem(
            "error",
            f"{model.repo}: tensor {name!r} is stored as {spec.dtype.name}, the base's as {base.dtype.name}",
            "use the unquantised checkpoint, or exclude the tensor",
        )
    elif spec.shape == base.shape:
        out.inputs[name] = spec
    elif align.is_vocabulary(name, base.shape, spec.shape):
        if draft.recipe.vocab == "strict":
            draft.problem(
                "error",
                f"tensor {name!r}: {base.shape[0]} vocabulary rows in {draft.base.repo}, "
                f"{spec.shape[0]} in {model.repo}",
                "set `vocab: base` to keep the base's rows, or `vocab: union` to keep rows beyond them",
            )
        out.inputs[name] = spec
    elif align.is_head(name, spec.shape, model.config, draft.base.tensors):
        out.heads[spec.name] = spec
    else:
        draft.problem(
            "error",
            f"tensor {name!r}: shape {base.shape} in {draft.base.repo}, {spec.shape} in {model.repo}",
            "leave that model out, or exclude the tensor: it is then copied from the base",
        )


def _extra(draft: Draft, model: PinnedModel, out: Aligned, name: str, spec: TensorSpec) -> None:
    if not draft.recipe.takes_part(name):
        return
    if align.layer_of(name) is not None and not align.is_head(name, spec.shape, model.config, draft.base.tensors):
        draft.problem(
            "error",
            f"{model.repo}: tensor {name!r} {spec.shape} is not in the base",
            "use a fine-tune of the base with the same layers, or exclude the tensor",
        )
    else:
        out.heads[spec.name] = spec


def _tied_outputs(draft: Draft, model: PinnedModel, out: Aligned) -> None:
    """A model that ties its output embedding to its input merges the base's separate one from that input."""
    if not align.is_language_model(model.config):
        return
    for name, base in draft.base.tensors.items():
        source = None if name in out.inputs else align.tied_to(name, draft.base.tensors)
        tied = out.inputs.get(source) if source else None
        if isinstance(tied, TensorSpec) and tied.shape[1:] == base.shape[1:] and draft.recipe.takes_part(name):
            out.inputs[name] = tied


def align_adapter(draft: Draft, model: PinnedModel) -> Aligned:
    """An adapter in the base's namespace."""
    names = {part.target or part.name: part for part in model.parts}
    inner = {n: p for n, p in names.items() if p.kind != "replace"} or names
    prefix = align.choose_prefix(draft.base.tensors, inner)
    out = Aligned(prefix=prefix)
    for name, part in names.items():
        target = align.rename(name, prefix) if prefix and name not in draft.base.tensors else name
        base = draft.base.tensors.get(target)
        if part.kind == "replace":
            spec = part.tensors[0]
            if base is not None and spec.shape == base.shape:
                out.inputs[target] = spec
            elif base is None or align.is_head(target, spec.shape, model.config, draft.base.tensors):
                out.heads[name] = spec
            else:
                draft.problem(
                    "error", f"tensor {target!r}: shape {base.shape} in {draft.base.repo}, {spec.shape} in {model.repo}"
                )
        elif base is None and part.optional:
            continue
        elif base is None:
            draft.problem(
                "error",
                f"{model.repo}: the adapter changes {name!r}, which the base {draft.base.repo} does not store",
                "use the base the adapter was made for",
            )
        elif not part.fits(base.shape, transposed=align.is_transposed(target, base.shape, draft.base.config)):
            draft.problem(
                "error",
                f"{model.repo}: the adapter is made for {target!r} of shape {part.shape}; in "
                f"{draft.base.repo} it has {base.shape}",
                "use the base the adapter was made for",
            )
        elif draft.recipe.takes_part(target):
            out.inputs[target] = part
    if not out.inputs and not any(p.severity == "error" for p in draft.problems):
        draft.problem(
            "error", f"{model.repo}: the adapter changes nothing in this base", "use the base it was made for"
        )
    return out
