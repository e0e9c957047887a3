"""Models put under the base's names where transformers stores an architecture under other names than it runs with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from hubmerge import adapters, align
from hubmerge.errors import SourceError, UnsupportedAdapterError
from hubmerge.spec import AdapterPart, PinnedModel


def under_base_names(model: PinnedModel, base: PinnedModel) -> PinnedModel:
    """The model with its tensors, or its adapter's targets, under the names by which the base stores them.

    transformers is loaded only if plain matching leaves names over; without its help the model stays as it is.

    Args:
        model: A full checkpoint or an adapter.
        base: The full checkpoint it was made from, in any format.

    Raises:
        SourceError: A tensor is stored merged with others, split or transposed on one side only.
        UnsupportedAdapterError: The adapter changes a parameter that the base stores in such a way.
    """
    names = {part.name: part.name for part in model.parts} if model.adapter is not None else _same(model.tensors)
    plain = _found(names, _same(base.tensors))
    if not _left(model, base, plain):
        return model
    known = adapters.naming_of(base.config)
    if known is None:
        return model
    own = adapters.naming_of(model.config) if model.adapter is None else None
    running, stored = (own or known).running(names), _unique(known.running(base.tensors))
    mapped = _found(running, stored)
    best = mapped if len(mapped) > len(plain) else plain
    _refuse_converted(model, base, best, own or known, known)
    return _renamed(model, plain, mapped) if best is mapped else model


def _same(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


def _unique(running: Mapping[str, str]) -> dict[str, str]:
    """Running name -> stored name, without those that several tensors share."""
    owners: dict[str, list[str]] = {}
    for stored, name in running.items():
        owners.setdefault(name, []).append(stored)
    return {name: stored[0] for name, stored in owners.items() if len(stored) == 1}


def _found(names: Mapping[str, str], stored: Mapping[str, str]) -> dict[str, str]:
    """A model's own name -> the base's tensor, for all that are in ``stored`` once prefixes agree."""
    prefix = align.choose_prefix(stored, dict.fromkeys(names.values()))
    found: dict[str, str] = {}
    taken: set[str] = set()
    for own, name in names.items():
        candidates = (align.rename(name, prefix) if prefix else name, name)
        target = next((stored[c] for c in candidates if c in stored), None)
        if target is not None and target not in taken:
            found[own] = target
            taken.add(target)
    return found


def _left(model: PinnedModel, base: PinnedModel, found: Mapping[str, str]) -> list[str]:
    """The model's names that should have a counterpart in the base and have none."""
    if model.adapter is not None:
        return [
            part.name
            for part in model.parts
            if part.name not in found and not part.optional and not (part.kind == "replace" and _head(part, base))
        ]
    if len(set(found.values())) == len(base.tensors):
        return []
    extra = align.align(base.tensors, {n: s for n, s in model.tensors.items() if n not in found}).extra
    return [
        spec.name
        for name, spec in extra.items()
        if spec.dtype.mergeable and not align.is_head(name, spec.shape, model.config, base.tensors)
    ]


def _head(part: AdapterPart, base: PinnedModel) -> bool:
    return align.is_head(part.name, part.tensors[0].shape, {}, base.tensors)


def _refuse_converted(
    model: PinnedModel, base: PinnedModel, found: Mapping[str, str], own: adapters.Naming, known: adapters.Naming
) -> None:
    names = own.running(_left(model, base, found))
    converted = next((name for name, running in names.items() if own.converts(running)), None)
    if converted is None:
        return
    if model.adapter is not None:
        raise UnsupportedAdapterError(
            f"{model.repo}: the adapter changes {converted!r}, which the base {base.repo} stores in another form "
            "(merged with other tensors, split or transposed)",
            hint="load the base with transformers, save it with save_pretrained(..., save_original_format=False), "
            "and use that as the base",
        )
    missing = known.running(set(base.tensors) - set(found.values()))
    counterpart = next((name for name, running in missing.items() if known.converts(running)), None)
    if counterpart is not None:
        raise SourceError(
            f"{model.repo}: {converted!r} is stored in another form than in the base {base.repo}, which has "
            f"{counterpart!r} (tensors are merged, split or transposed on one side)",
            hint="load the model with transformers and save it with save_pretrained in the base's format "
            "(save_original_format=True is the default)",
        )


def _renamed(model: PinnedModel, plain: Mapping[str, str], mapped: Mapping[str, str]) -> PinnedModel:
    example = next(name for name in mapped if name not in plain)
    note = f"{model.repo}: names are matched as transformers loads them: {example!r} is {mapped[example]!r} in the base"
    notes = (*model.notes, note)
    if model.adapter is not None:
        parts = tuple(replace(part, target=mapped.get(part.name)) for part in model.parts)
        return replace(model, parts=parts, notes=notes)
    return replace(model, tensors={mapped.get(n, n): spec for n, spec in model.tensors.items()}, notes=notes)
