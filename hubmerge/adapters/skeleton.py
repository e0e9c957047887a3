"""PEFT's own merge on one module at a time: the only code that imports peft."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import torch
from torch import nn

from hubmerge.adapters.config import match_pattern
from hubmerge.adapters.parts import BASE_LAYER, ROOT, is_feedforward, roles
from hubmerge.adapters.plain import Load, fetch
from hubmerge.adapters.quiet import quiet
from hubmerge.errors import HubMergeError, SourceError, UnsupportedAdapterError
from hubmerge.spec import AdapterPart

_SHAPE_GIVER = "shape_of_the_largest_module"
# Entries of a layer's state that its own stored tensors do not fill: views of shared tensors, and a constant.
_NOT_OWN = (".vera_A.", ".vera_B.", ".randlora_A.", ".randlora_B.", ".ranknum.")
# Options that select modules or describe training: the skeleton's only module is always the target.
_NEUTRAL: Mapping[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "ensure_weight_tying": False,
    "exclude_modules": None,
    "inference_mode": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "revision": None,
    "task_type": None,
    "trainable_token_indices": None,
}


def parse_config(config: Mapping[str, Any], where: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """PEFT's config object.

    Args:
        config: The parsed ``adapter_config.json``.
        where: The adapter's or module's name, for messages.
        overrides: Options to set instead.

    Raises:
        UnsupportedAdapterError: PEFT does not know an option, or rejects a value.
    """
    with quiet():
        from peft import PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        peft_type = str(config["peft_type"]).upper()
        if peft_type not in PeftType.__members__:
            raise UnsupportedAdapterError(
                f"{where}: the installed PEFT has no {peft_type} adapters", hint="Update peft."
            )
        cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in config.items() if key != "runtime_config"}
        unknown = sorted(key for key, value in values.items() if key not in known and value)
        if unknown:
            raise UnsupportedAdapterError(
                f"{where}: adapter_config.json sets options unknown to the installed PEFT: {', '.join(unknown)}",
                hint=f"Update peft; the adapter was written by version {config.get('peft_version') or 'unknown'}.",
            )
        values |= {key: value for key, value in (overrides or {}).items() if key in known}
        try:
            return cls(**{key: value for key, value in values.items() if key in known})
        except (TypeError, ValueError) as error:
            raise UnsupportedAdapterError(f"{where}: PEFT rejects adapter_config.json: {error}") from error


def merge_module(
    part: AdapterPart, config: Mapping[str, Any], load: Load, start: torch.Tensor, *, transposed: bool
) -> torch.Tensor:
    """The module's merged weight, computed by PEFT on a model that holds nothing but this module.

    Args:
        part: A part of kind ``generic`` whose parameter is ``weight``.
        config: The adapter's config.
        load: Reads one of the adapter's stored tensors.
        start: The weight the adapter is applied to, in the compute dtype; not changed.
        transposed: Whether a linear weight is stored as [in, out].

    Returns:
        A new tensor like ``start``.

    Raises:
        SourceError: The adapter's tensors do not fit, or the result is not finite.
        UnsupportedAdapterError: PEFT has no layer of this kind for this module.
    """
    state = {spec.name: fetch(spec, load, start.dtype) for spec in part.tensors if BASE_LAYER not in spec.name}
    peft_config = parse_config(config, part.name, _module_options(part, config, state, transposed=transposed))
    try:
        # Callers may be in inference mode, whose tensors cannot become parameters.
        with torch.inference_mode(False), torch.no_grad():
            with quiet():
                layer = _build(part, peft_config, state, start, transposed=transposed)
            layer.merge(safe_merge=True)
    except HubMergeError:
        raise
    except (TypeError, NotImplementedError) as error:
        raise UnsupportedAdapterError(f"{part.name}: PEFT cannot merge this module: {_first_line(error)}") from error
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        raise SourceError(
            f"{part.name}: PEFT cannot apply it to a tensor of shape {list(start.shape)}: {_first_line(error)}",
            hint="The adapter belongs to another base, or its file is damaged.",
        ) from error
    return layer.get_base_layer().weight.data  # type: ignore[no-any-return]


def _module_options(
    part: AdapterPart, config: Mapping[str, Any], state: Mapping[str, torch.Tensor], *, transposed: bool
) -> dict[str, Any]:
    """The config's options narrowed down to one module: patterns that name other modules would only warn."""
    options = dict(_NEUTRAL) | {"fan_in_fan_out": transposed, "target_modules": [part.module]}
    for name, value in config.items():
        if name.endswith("_pattern") and isinstance(value, Mapping):
            if str(config["peft_type"]).upper() == "ADALORA":
                options[name] = {k: v for k, v in value.items() if k.replace(".default", "") == f"{part.module}.lora_E"}
            else:
                key = match_pattern(value, part.module)
                options[name] = {} if key is None else {key: value[key]}
    if str(config["peft_type"]).upper() == "IA3":
        options["feedforward_modules"] = [part.module] if is_feedforward(config, part.module) else []
    if _largest_shape(state, (1, 1)) is not None:
        options["target_modules"] = [part.module, _SHAPE_GIVER]
    return options


def _largest_shape(state: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> tuple[int, int] | None:
    """(out, in) that the shared projections were made for; None for kinds without them."""
    if "base_model.vera_A" in state:
        return state["base_model.vera_B"].shape[0], state["base_model.vera_A"].shape[1]
    if "base_model.randlora_A" in state:
        large, small = state["base_model.randlora_B"].shape[0], state["base_model.randlora_A"].shape[-1]
        # RandLoRA puts the smaller side first whichever it is; a wrong guess would make the pair's maximum too large.
        return (large, small) if shape[1] <= small else (small, large)
    return None


def _build(
    part: AdapterPart, peft_config: Any, state: Mapping[str, torch.Tensor], start: torch.Tensor, *, transposed: bool
) -> Any:
    from peft import get_peft_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    root = nn.Module()
    embedding = any("_embedding_" in role for role in roles(part))
    # A copy, because some kinds write into the weight while they initialise.
    _place(root, part.module, _bare_module(start.clone(), embedding=embedding, transposed=transposed))
    out_in = (start.shape[1], start.shape[0]) if transposed else (start.shape[0], start.shape[-1])
    largest = _largest_shape(state, out_in)
    if largest is not None:
        _place(root, _SHAPE_GIVER, _bare_module(torch.zeros(1).expand(largest), embedding=False, transposed=False))
    model = get_peft_model(root, peft_config, adapter_name="default")
    result: Any = set_peft_model_state_dict(model, dict(state), adapter_name="default")
    own = f"{ROOT}{part.module}."
    absent = [
        key
        for key in result.missing_keys
        if key.startswith(own) and not key.startswith(own + BASE_LAYER) and not any(name in key for name in _NOT_OWN)
    ]
    if result.unexpected_keys or absent:
        odd = ", ".join([*result.unexpected_keys, *absent])
        raise SourceError(f"{part.name}: the stored tensors are not the ones PEFT needs: {odd}")
    layer = model.get_submodule(f"base_model.model.{part.module}")
    if not isinstance(layer, BaseTunerLayer):
        raise UnsupportedAdapterError(f"{part.name}: PEFT does not adapt this module")
    return layer


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


def _bare_module(weight: torch.Tensor, *, embedding: bool, transposed: bool) -> nn.Module:
    """A module of the class that PEFT expects, with this weight and without a bias."""
    shape = weight.shape
    module: nn.Module
    if weight.ndim > 2:
        conv: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
        module = conv(shape[1], shape[0], tuple(shape[2:]), bias=False, device="meta")
    elif embedding:
        module = nn.Embedding(shape[0], shape[1], device="meta")
    elif transposed:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            module = cast("nn.Module", Conv1D(shape[1], shape[0]))  # type: ignore[no-untyped-call]
        module.register_parameter("bias", None)
    else:
        module = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
