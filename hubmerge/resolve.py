"""Recipe → pinned models: commits, file lists, tensor inventories and configs, from headers and small files only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from hubmerge import adapters
from hubmerge.errors import IntegrityError, RecipeError, SourceError
from hubmerge.io import threads
from hubmerge.io.header import Header, read_header
from hubmerge.io.local import FileSource
from hubmerge.layout import is_notice
from hubmerge.licenses.texts import MAX_TEXT_BYTES
from hubmerge.parent_cards import read_card
from hubmerge.recipe.algorithms import get_algorithm
from hubmerge.renaming import under_base_names
from hubmerge.spec import FileSpec, Method, PinnedModel, Quotes, TensorSpec

if TYPE_CHECKING:
    from hubmerge.hub import Hub
    from hubmerge.recipe import Recipe

_MAX_SMALL_BYTES = 32_000_000
_MAX_CARD_BYTES = 1_000_000
_MAX_NOTICES = 16
_WEIGHTS, _INDEX, _ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_QUANTISED_FILES = (".gguf", ".ggml")
Role = Literal["base", "model"]


@dataclass(frozen=True, slots=True)
class _Repo:
    """What is needed of a model's place, be it a Hub repo or a folder."""

    label: str
    repo: str
    commit: str | None
    root: Path | None
    files: Mapping[str, FileSpec]
    read: Callable[[str], bytes]
    read_range: Callable[[str, int, int], bytes]


def pin_recipe(recipe: Recipe, hub: Hub) -> tuple[PinnedModel, tuple[PinnedModel, ...]]:
    """Pin the base and all models of a recipe.

    A recipe without a base takes it from its adapters' configs, or else its first model stands in (methods that need
    no base).

    Raises:
        AccessError: A repository is missing or not accessible.
        SourceError: A model cannot be merged; the message says why.
    """
    with threads.pool(8) as pool:
        pending = [pool.submit(pin_model, hub, m.repo, m.revision, "model", m.name) for m in recipe.models]
        given = (
            pool.submit(pin_model, hub, recipe.base.repo, recipe.base.revision, "base", "base") if recipe.base else None
        )
        base = given.result() if given else None
        models = tuple(p.result() for p in pending)
    if base is None:
        base = _implied_base(recipe, models, hub)
    if base.adapter is not None:
        raise SourceError(f"{base.repo}: the base is an adapter", hint="give the full model it was made for as base")
    return base, tuple(on_base(m, base) for m in models)


def on_base(model: PinnedModel, base: PinnedModel) -> PinnedModel:
    """A model in the base's names, an adapter with what is to be said about its base; wrong ones are refused here."""
    note = None if model.adapter is None else adapters.check_base(model.adapter, base.repo, base.commit, model.repo)
    return under_base_names(replace(model, notes=(note,)) if note else model, base)


def _implied_base(recipe: Recipe, models: tuple[PinnedModel, ...], hub: Hub) -> PinnedModel:
    named = {
        str(m.adapter["base_model_name_or_path"]): m
        for m in models
        if m.adapter and m.adapter.get("base_model_name_or_path")
    }
    if len(named) > 1:
        raise SourceError(
            f"the adapters name different bases: {', '.join(repr(n) for n in named)}",
            hint="set `base:` to the one to use",
        )
    if named:
        name, adapter = next(iter(named.items()))
        revision = (adapter.adapter or {}).get("revision")
        return pin_model(hub, name, str(revision) if revision else None, "base", "base")
    method = get_algorithm(recipe.method)
    if not isinstance(method, Method) or method.uses_base:
        raise RecipeError(
            f"{recipe.method} needs a base, and no model is an adapter that names one",
            hint="set `base:` (--base) to the common base",
        )
    first = recipe.models[0]
    return pin_model(hub, first.repo, first.revision, "base", "base")


def pin_model(hub: Hub, repo: str, revision: str | None, role: Role, name: str) -> PinnedModel:
    """Pin one model: its commit, its files, and the header of every weight file."""
    place = _local(repo, revision) if _is_folder(repo) else _remote(hub, repo, revision)
    config = _json(place, "config.json") if "config.json" in place.files else {}
    _refuse_quantised(place, config)
    adapter = None
    if "adapter_config.json" in place.files and not {_WEIGHTS, _INDEX} & place.files.keys():
        adapter = _json(place, "adapter_config.json")
        adapters.check_config(adapter, place.label)
    weights = [_ADAPTER] if adapter is not None else _weight_files(place)
    if _ADAPTER in weights and _ADAPTER not in place.files:
        raise SourceError(
            f"{place.label}: adapter_config.json is there, {_ADAPTER} is not",
            hint="save the adapter again with save_pretrained(..., safe_serialization=True)",
        )
    tensors, digest = _inventory(place, weights)
    parts = adapters.inventory(adapter, tensors, place.label) if adapter is not None else ()
    card, quotes = _card(place)
    return PinnedModel(
        role=role,
        name=name,
        repo=place.repo,
        commit=place.commit,
        root=str(place.root) if place.root else None,
        files=place.files,
        tensors=tensors,
        config=config,
        adapter=adapter,
        parts=parts,
        card=card,
        quotes=quotes,
        notices=_notices(place),
        header_sha256=digest,
    )


def _is_folder(repo: str) -> bool:
    return repo.startswith((".", "/", "~")) or Path(repo).is_dir()


def _local(repo: str, revision: str | None) -> _Repo:
    root = Path(repo).expanduser()
    if not root.is_dir():
        raise SourceError(
            f"{repo}: no such folder", hint="give a folder with config.json and *.safetensors, or a Hub repo id"
        )
    if revision:
        raise SourceError(f"{repo}@{revision}: a local folder has no revisions", hint="leave the @revision out")
    files = {
        p.relative_to(root).as_posix(): FileSpec(p.relative_to(root).as_posix(), p.stat().st_size)
        for p in sorted(root.rglob("*"))
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts)
    }

    def read_range(path: str, start: int, end: int) -> bytes:
        source = FileSource(root / path)
        try:
            data = bytearray(end - start)
            source.read_into(start, memoryview(data))
            return bytes(data)
        finally:
            source.close()

    return _Repo(repo, repo, None, root.resolve(), files, lambda p: read_range(p, 0, files[p].size_bytes), read_range)


def _remote(hub: Hub, repo: str, revision: str | None) -> _Repo:
    commit = hub.pin(repo, revision)
    files = {f.path: f for f in hub.list_files(repo, commit)}

    def read_range(path: str, start: int, end: int) -> bytes:
        data = bytearray(end - start)
        hub.open(repo, commit, files[path]).read_into(start, memoryview(data))
        return bytes(data)

    return _Repo(
        f"{repo}@{commit[:12]}", repo, commit, None, files, lambda p: hub.read_small(repo, commit, p), read_range
    )


def _json(place: _Repo, path: str) -> dict[str, Any]:
    if place.files[path].size_bytes > _MAX_SMALL_BYTES:
        raise IntegrityError(f"{place.label}/{path}: {place.files[path].size_bytes} bytes is too large for this file")
    try:
        value = json.loads(place.read(path))
    except (ValueError, RecursionError) as e:
        raise IntegrityError(
            f"{place.label}/{path}: not valid JSON ({str(e)[:100]})", hint="repair or download it again"
        ) from e
    if not isinstance(value, dict):
        raise IntegrityError(f"{place.label}/{path}: not a JSON object", hint="repair or download it again")
    return value


def _refuse_quantised(place: _Repo, config: Mapping[str, Any]) -> None:
    quantisation = config.get("quantization_config") or config.get("compression_config")
    if quantisation:
        kind = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else "unknown"
        raise SourceError(
            f"{place.label}: quantised weights ({kind}) cannot be merged faithfully",
            hint="use the unquantised checkpoint it was made from",
        )


def _weight_files(place: _Repo) -> list[str]:
    files = place.files
    if _INDEX in files:
        return _indexed(place)
    if _WEIGHTS in files:
        return [_WEIGHTS]
    top = [
        p
        for p in files
        if p.endswith(".safetensors") and "/" not in p and p != _ADAPTER and not p.startswith("consolidated")
    ]
    if len(top) == 1:
        return top
    if top:
        raise SourceError(
            f"{place.label}: {len(top)} safetensors files and no {_INDEX}: {', '.join(top[:4])}",
            hint="save the model again with save_pretrained, which writes the index",
        )
    pickles = [p for p in files if p.endswith(_PICKLES)]
    if pickles:
        raise SourceError(
            f"{place.label}: no safetensors weights, only {pickles[0]}, a format that can run code when loaded",
            hint="convert it once: AutoModel.from_pretrained(...).save_pretrained(...), or use a revision with "
            "converted weights (often refs/pr/1)",
        )
    if any(p.endswith(_QUANTISED_FILES) for p in files):
        raise SourceError(
            f"{place.label}: only GGUF files, which are quantised", hint="use the checkpoint they were made from"
        )
    raise SourceError(
        f"{place.label}: no weights found (no {_WEIGHTS}, no {_INDEX})", hint="check the repo id and revision"
    )


def _indexed(place: _Repo) -> list[str]:
    weight_map = _json(place, _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise IntegrityError(
            f"{place.label}/{_INDEX}: has no weight_map", hint="save the model again with save_pretrained"
        )
    names = sorted(set(weight_map.values()))
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or name not in place.files:
            raise IntegrityError(
                f"{place.label}/{_INDEX}: names the shard {name!r}, which is not in the repo",
                hint="the upload was incomplete: use another revision",
            )
    return names


def _inventory(place: _Repo, weights: list[str]) -> tuple[dict[str, TensorSpec], str]:
    def header(path: str) -> Header:
        size = place.files[path].size_bytes
        return read_header(lambda a, b: place.read_range(path, a, b), size, path, f"{place.label}/{path}")

    with threads.pool(8) as pool:
        headers = list(pool.map(header, weights))
    tensors: dict[str, TensorSpec] = {}
    digest = hashlib.sha256()
    for path, found in zip(weights, headers, strict=True):
        digest.update(found.raw)
        for name, spec in found.tensors.items():
            if name in tensors:
                raise IntegrityError(f"{place.label}: tensor {name!r} is in {tensors[name].file} and in {path}")
            tensors[name] = spec
    if not tensors:
        raise SourceError(f"{place.label}: its weight files hold no tensors", hint="check the repo id and revision")
    return tensors, digest.hexdigest()


def _card(place: _Repo) -> tuple[Mapping[str, Any], Quotes]:
    """The card's metadata and what may be quoted of it; an unreadable card is no reason to stop a merge."""
    spec = place.files.get("README.md")
    if spec is None or spec.size_bytes > _MAX_CARD_BYTES:
        return {}, Quotes()
    return read_card(place.read("README.md").decode("utf-8", "replace"))


def _notices(place: _Repo) -> dict[str, bytes]:
    """The licence and notice files; what is too large for one, or one too many, is none."""
    found = [p for p, f in sorted(place.files.items()) if is_notice(p) and f.size_bytes <= MAX_TEXT_BYTES]
    return {path: place.read(path) for path in found[:_MAX_NOTICES]}
