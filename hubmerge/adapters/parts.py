"""From an adapter's headers to the parameters of the base that it changes.

A part's kind says how its values come about. ``low_rank``: the base plus something that depends on the adapter alone.
``generic``: a function of the base's values. ``replace``: the adapter stores the whole parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hubmerge.adapters.config import is_plain_lora, kind_of, lora_rank
from hubmerge.adapters.kinds import PREFIXES, TOKENS, WRAPPERS, AdapterKind
from hubmerge.errors import SourceError, UnsupportedAdapterError
from hubmerge.spec import AdapterPart, TensorSpec

ROOT = "base_model.model."
BASE_LAYER = "base_layer."
TOKEN_ADAPTER = "token_adapter."  # noqa: S105 (a name in PEFT's files)


def roles(part: AdapterPart) -> dict[str, TensorSpec]:
    """A part's stored tensors by their name below the module; shared ones by their name at the top."""
    return {_role(spec.name, part.module): spec for spec in part.tensors}


def _is_optional(part: AdapterPart) -> bool:
    """Whether the base may lack this parameter: IA3 scales a module's bias if there is one."""
    return part.kind == "generic" and part.parameter == "bias" and roles(part).keys() == {"ia3_l"}


def _role(name: str, module: str) -> str:
    own = f"{ROOT}{module}." if module else ROOT
    return name.removeprefix(own) if name.startswith(own) else name.removeprefix("base_model.")


@dataclass(slots=True)
class _Sorted:
    """The adapter's tensors, told apart by their names."""

    adapted: dict[str, dict[str, TensorSpec]] = field(default_factory=dict)
    full: dict[tuple[str, str], TensorSpec] = field(default_factory=dict)
    wrapped: dict[tuple[str, str], TensorSpec] = field(default_factory=dict)
    shared: dict[str, TensorSpec] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def inventory(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], where: str) -> tuple[AdapterPart, ...]:
    """Every parameter of the base that the adapter changes, from headers alone.

    Args:
        config: The parsed ``adapter_config.json``, as ``check_config`` accepts it.
        tensors: The stored tensors by name.
        where: The adapter's name, for messages.

    Returns:
        One part for each parameter, in the order of the stored tensors.

    Raises:
        UnsupportedAdapterError: A stored tensor has a name that this kind of adapter does not use.
        SourceError: A tensor is missing or does not fit the config.
    """
    kind = kind_of(config, where)
    found = _sort(config, kind, tensors)
    if found.unknown:
        raise UnsupportedAdapterError(
            f"{where}: {len(found.unknown)} stored tensors are not known for a {kind.peft_type} adapter: "
            + _few(found.unknown),
            hint="If it targets torch's MultiheadAttention or parameters of expert blocks, it cannot be merged here.",
        )
    missing = sorted(kind.shared - found.shared.keys())
    if missing:
        raise SourceError(f"{where}: the {kind.peft_type} adapter lacks its shared tensors {', '.join(missing)}")
    parts = [part for module in found.adapted for part in _module_parts(config, kind, module, found, where)]
    for (module, parameter), spec in (found.full | found.wrapped).items():
        parts.append(AdapterPart(module, parameter, "replace", (spec,)))
    if not parts:
        raise SourceError(f"{where}: the adapter stores no tensors")
    order = {spec.name: i for i, spec in enumerate(tensors.values())}
    ordered = sorted(parts, key=lambda part: order[part.tensors[0].name])
    return tuple(replace(part, shape=_shape(part), optional=_is_optional(part)) for part in ordered)


def _sort(config: Mapping[str, Any], kind: AdapterKind, tensors: Mapping[str, TensorSpec]) -> _Sorted:
    found = _Sorted()
    suffixes = sorted(kind.tensors | {TOKEN_ADAPTER + TOKENS}, key=len, reverse=True)
    saved = tuple(config.get("modules_to_save") or ())
    for name, spec in tensors.items():
        path, top = name.removeprefix(ROOT), name.removeprefix("base_model.")
        module, _, parameter = path.rpartition(".")
        wrapped = module.removesuffix(".base_layer")
        suffix = next((s for s in suffixes if path.endswith(f".{s}")), None)
        if top in kind.shared:
            found.shared[top] = spec
        elif path == name or not _is_plain(owner := path.removesuffix(f".{suffix}") if suffix else wrapped):
            found.unknown.append(name)
        elif suffix is not None:
            found.adapted.setdefault(owner, {})[suffix] = spec
        elif parameter in kind.copies:
            continue
        elif wrapped != module:
            found.wrapped[wrapped, parameter] = spec
        elif _is_plain(parameter) and (parameter in ("weight", "bias") or _is_saved(module, saved)):
            found.full[module, parameter] = spec
        else:
            found.unknown.append(name)
    return found


def _is_plain(path: str) -> bool:
    """Whether no component of the path belongs to PEFT."""
    return not any(part in WRAPPERS or part.startswith(PREFIXES) for part in path.split("."))


def _is_saved(module: str, saved: tuple[str, ...]) -> bool:
    """Whether the module, or one that contains it, is named in ``modules_to_save``."""
    parts = module.split(".")
    return any(".".join(parts[:i]).endswith(saved) for i in range(1, len(parts) + 1)) if saved else False


def _module_parts(
    config: Mapping[str, Any], kind: AdapterKind, module: str, found: _Sorted, where: str
) -> Iterable[AdapterPart]:
    own = found.adapted[module]
    weight = found.wrapped.pop((module, "weight"), None)
    bias = found.wrapped.pop((module, "bias"), None) or found.full.pop((module, "bias"), None)
    if (module, "weight") in found.full:
        raise SourceError(
            f"{where}: {module} has both adapter tensors and a full weight ({found.full[module, 'weight'].name})"
        )
    missing = sorted(kind.required - own.keys()) if TOKEN_ADAPTER + TOKENS not in own else []
    if missing:
        raise SourceError(f"{where}: {module} lacks {', '.join(missing)}")
    if kind.peft_type == "LN_TUNING":
        return [AdapterPart(module, role.rpartition(".")[2], "replace", (spec,)) for role, spec in own.items()]
    if kind.peft_type == "LORA" and TOKEN_ADAPTER + TOKENS not in own:
        return _lora_parts(config, module, own, weight, bias, where)
    if TOKEN_ADAPTER + TOKENS in own and len(own) > 1:
        raise UnsupportedAdapterError(f"{where}: {module} has trainable tokens and other adapter tensors at once")
    tensors = (*own.values(), *found.shared.values(), *_some(weight))
    parts = [AdapterPart(module, "weight", "generic", tensors)]
    if kind.peft_type == "IA3" and not is_feedforward(config, module):
        parts.append(AdapterPart(module, "bias", "generic", (*own.values(), *_some(bias))))
    elif bias is not None:
        parts.append(AdapterPart(module, "bias", "replace", (bias,)))
    return parts


def _lora_parts(
    config: Mapping[str, Any],
    module: str,
    own: Mapping[str, TensorSpec],
    weight: TensorSpec | None,
    bias: TensorSpec | None,
    where: str,
) -> Iterable[AdapterPart]:
    own = dict(own)
    lora_bias = own.pop("lora_B.bias", None)
    down, up = (
        ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in own else ("lora_A.weight", "lora_B.weight")
    )
    expected = {down, up} | ({"lora_magnitude_vector"} if config.get("use_dora") else set())
    if own.keys() != expected:
        odd = sorted(own.keys() ^ expected)
        raise SourceError(
            f"{where}: {module} should store {', '.join(sorted(expected))}; missing or extra: {', '.join(odd)}"
        )
    rank = lora_rank(config, module)
    _check_rank(rank, own[up].shape, own[down].shape, f"{where}: {module}")
    kind: Literal["low_rank", "generic"] = "low_rank" if is_plain_lora(config) and weight is None else "generic"
    yield AdapterPart(module, "weight", kind, (*own.values(), *_some(weight)), rank)
    if lora_bias is not None:
        yield AdapterPart(module, "bias", "low_rank" if bias is None else "generic", (lora_bias, *_some(bias)))
    elif bias is not None:
        yield AdapterPart(module, "bias", "replace", (bias,))


def _check_rank(rank: int, up: tuple[int, ...], down: tuple[int, ...], what: str) -> None:
    if len(up) == len(down) > 2 and down[0] == rank and up[1] < rank and rank % up[1] == 0:
        raise UnsupportedAdapterError(f"{what} is a convolution with groups, whose LoRA cannot be merged")
    if len(up) != len(down) or (down[:1], up[1:2]) != ((rank,), (rank,)):
        raise SourceError(
            f"{what} has factors of shape {list(up)} and {list(down)}, but its rank in the config is {rank}",
            hint="If it is a quantised or sharded export, save it again with PEFT's save_pretrained.",
        )


def is_feedforward(config: Mapping[str, Any], module: str) -> bool:
    """Whether IA3 scales the module's inputs (as PEFT's ``_check_target_module_feedforward`` decides)."""
    names = config.get("feedforward_modules") or ()
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return module.endswith(tuple(names))


def _shape(part: AdapterPart) -> tuple[int, ...] | None:
    """Shape of the parameter a LoRA part is made for, from the shapes of its factors."""
    stored = roles(part)
    if "lora_embedding_A" in stored:
        return stored["lora_embedding_A"].shape[1], stored["lora_embedding_B"].shape[0]
    if "lora_A.weight" in stored:
        return stored["lora_B.weight"].shape[0], *stored["lora_A.weight"].shape[1:]
    if part.parameter == "bias" and "lora_B.bias" in stored:
        return stored["lora_B.bias"].shape
    return part.tensors[0].shape if part.kind == "replace" else None


def _some(spec: TensorSpec | None) -> tuple[TensorSpec, ...]:
    return () if spec is None else (spec,)


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
