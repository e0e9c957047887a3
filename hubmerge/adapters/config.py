"""Reading ``adapter_config.json``: what can be merged, which base it belongs to, and the scale of each module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from hubmerge.adapters.kinds import KINDS, REFUSED, AdapterKind
from hubmerge.errors import SourceError, UnsupportedAdapterError

_LORA_OPTIONS: Mapping[str, str] = {
    "alora_invocation_tokens": "activated LoRA acts only after certain tokens of the input",
    "arrow_config": "Arrow chooses between adapters for each token",
    "layer_replication": "the adapter repeats layers of its base, so it fits no single set of base weights",
    "use_qalora": "QA-LoRA pools the inputs of a quantised layer, which a weight cannot express",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "kasa_config": "KaSA truncates the base's weights before it adds to them",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA samples its factors at random",
    "megatron_config": "Megatron's parallel layers split the weights in their own way",
    "target_parameters": "adapted parameters of expert blocks are stored without the parameter's name",
}

_INERT_INITS = frozenset({"true", "false", "gaussian", "eva", "orthogonal", "mica"})
_BASE_CHANGING_INITS = frozenset({"pissa", "olora"})
_REFUSED_INITS: Mapping[str, str] = {
    "pissa_niter": "its base was changed by a randomised decomposition that cannot be repeated",
    "corda": "its base was changed by CorDA with data that the adapter does not contain",
    "lora_ga": "its base was changed by LoRA-GA with gradients that the adapter does not contain",
    "loftq": "its base was changed by LoftQ's quantisation",
}
_CONVERT_HINT = (
    "Convert it to a plain LoRA adapter where it was trained, with PEFT's "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...), and merge that."
)

# Every option of LoRA that PEFT 0.21 knows. An option that is set and not listed may change the arithmetic.
_LORA_FIELDS = frozenset(_LORA_OPTIONS) | {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "trainable_token_indices", "use_dora",
    "use_rslora",
}  # fmt: skip

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_QUANTISED_NAME = re.compile(r"[-_.](unsloth-)?(bnb-)?(4bit|8bit|int4|int8|gptq|awq|nf4)(-.*)?$", re.IGNORECASE)


def kind_of(config: Mapping[str, Any], where: str) -> AdapterKind:
    """The table entry of the adapter's kind.

    Raises:
        UnsupportedAdapterError: The kind is missing, unknown, or one that cannot be merged.
    """
    peft_type = config.get("peft_type")
    if isinstance(peft_type, str):
        name = peft_type.upper()
        if name in KINDS:
            return KINDS[name]
        reason = REFUSED.get(name, "hubmerge has no tested way to merge this kind")
        raise UnsupportedAdapterError(
            f"{where}: {name} adapters cannot be merged: {reason}",
            hint="Leave this model out of the recipe, or use an adapter of a kind that changes weights: "
            + ", ".join(sorted(KINDS)).lower(),
        )
    raise UnsupportedAdapterError(
        f"{where}: adapter_config.json has no peft_type (found {peft_type!r})",
        hint="Save the adapter again with PEFT's save_pretrained.",
    )


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse an adapter that cannot be merged into weights faithfully.

    Args:
        config: The parsed ``adapter_config.json``.
        where: The adapter's name, for messages.

    Raises:
        UnsupportedAdapterError: With the kind or option by name, and the reason.
        SourceError: An option has a value that makes no sense.
    """
    kind = kind_of(config, where)
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise SourceError(f"{where}: modules_to_save in adapter_config.json is not a list of names: {saved!r}")
    if kind.peft_type == "LORA":
        _check_lora(config, where)
        return
    if kind.shared and not config.get("save_projection", True):
        raise UnsupportedAdapterError(
            f"{where}: this {kind.peft_type} adapter was saved without its shared projections (save_projection=false), "
            "and random numbers differ between systems",
            hint="Save it again with save_projection=True.",
        )
    if kind.peft_type == "IA3" and config.get("feedforward_modules") is None:
        raise UnsupportedAdapterError(
            f"{where}: the IA3 adapter does not say which modules are feed-forward (feedforward_modules is null)",
            hint="Add feedforward_modules to its adapter_config.json.",
        )
    # PEFT itself knows the options of the rarer kinds; plain LoRA must not pay for importing it.
    from hubmerge.adapters.skeleton import parse_config

    parse_config(config, where)


def _check_lora(config: Mapping[str, Any], where: str) -> None:
    for option, reason in _LORA_OPTIONS.items():
        if config.get(option):
            raise UnsupportedAdapterError(
                f"{where}: LoRA with {option} cannot be merged: {reason}", hint="Leave this model out of the recipe."
            )
    unknown = sorted(key for key, value in config.items() if value and key not in _LORA_FIELDS)
    if unknown:
        raise UnsupportedAdapterError(
            f"{where}: adapter_config.json sets options that this version does not know: {', '.join(unknown)} "
            f"(written by PEFT {config.get('peft_version') or 'of unknown version'})",
            hint="Update hubmerge, or remove the options if they do not change what the adapter computes.",
        )
    init = init_of(config)
    for prefix, reason in _REFUSED_INITS.items():
        if init.startswith(prefix):
            raise UnsupportedAdapterError(
                f"{where}: LoRA with init_lora_weights={init!r} cannot be merged: {reason}", hint=_CONVERT_HINT
            )
    if init not in _INERT_INITS | _BASE_CHANGING_INITS:
        raise UnsupportedAdapterError(
            f"{where}: LoRA with init_lora_weights={init!r} is not known; it may have changed the base's weights",
            hint=_CONVERT_HINT,
        )
    _check_numbers(config, where)


def _check_numbers(config: Mapping[str, Any], where: str) -> None:
    """Refuse values that the arithmetic cannot use, before they turn into an error of Python's."""
    values: dict[str, Any] = {option: config.get(option, 8) for option in ("r", "lora_alpha")}
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(option) or {}
        if not isinstance(patterns, Mapping):
            raise SourceError(f"{where}: {option} in adapter_config.json is not a mapping: {patterns!r}")
        for pattern, value in patterns.items():
            values[f"{option}[{pattern!r}]"] = value
            try:
                re.compile(pattern)
            except re.error as error:
                raise SourceError(f"{where}: {option} has an invalid pattern {pattern!r}: {error}") from error
    for name, value in values.items():
        is_rank = name.startswith("r")
        if isinstance(value, bool) or not isinstance(value, int if is_rank else int | float) or (is_rank and value < 1):
            wanted = "a positive integer" if is_rank else "a number"
            raise SourceError(f"{where}: {name} in adapter_config.json is {value!r}, not {wanted}")


def init_of(config: Mapping[str, Any]) -> str:
    """LoRA's initialisation in lower case; ``"true"`` where the config has none."""
    init = config.get("init_lora_weights", True)
    return str(init).lower()


def is_plain_lora(config: Mapping[str, Any]) -> bool:
    """Whether each weight is the base plus a product of the adapter's own factors."""
    return (
        str(config.get("peft_type")).upper() == "LORA"
        and not config.get("use_dora")
        and init_of(config) not in _BASE_CHANGING_INITS
    )


def match_pattern(patterns: Mapping[str, Any] | None, module: str) -> str | None:
    """The first key of a PEFT ``*_pattern`` option that fits the module (PEFT's ``get_pattern_key``)."""
    for key in patterns or {}:
        if re.match(rf"(.*\.)?({key})$", module):
            return key
    return None


def lora_rank(config: Mapping[str, Any], module: str) -> int:
    """LoRA's rank for one module, as the config has it."""
    key = match_pattern(config.get("rank_pattern"), module)
    return int(config["rank_pattern"][key] if key is not None else config.get("r", 8))


def lora_scale(config: Mapping[str, Any], module: str) -> float:
    """The factor on ``B @ A``: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv:2312.03732)."""
    key = match_pattern(config.get("alpha_pattern"), module)
    alpha = config["alpha_pattern"][key] if key is not None else config.get("lora_alpha", 8)
    rank = lora_rank(config, module)
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return float(scale)


def check_base(config: Mapping[str, Any], base_repo: str, base_revision: str | None, where: str) -> str | None:
    """Compare the base an adapter was trained on with the recipe's base.

    Args:
        config: The parsed ``adapter_config.json``.
        base_repo: The recipe's base: a Hub id or a folder.
        base_revision: The recipe's revision or commit of the base, if any.
        where: The adapter's name, for messages.

    Returns:
        A note where the two cannot be compared or differ harmlessly; None when they agree.

    Raises:
        SourceError: The adapter names another Hub model as its base.
    """
    trained_on = config.get("base_model_name_or_path")
    if not isinstance(trained_on, str) or not trained_on:
        return f"{where}: the adapter does not say which base it was trained on; {base_repo} is assumed"
    if trained_on.lower() == base_repo.lower():
        revision = config.get("revision")
        if revision and base_revision and revision != base_revision:
            return f"{where}: trained on revision {revision} of {base_repo}; the recipe's base is at {base_revision}"
        return None
    if not _HUB_ID.fullmatch(trained_on):
        if trained_on.lower() == base_repo.rpartition("/")[2].lower():
            return None
        return (
            f"{where}: the adapter was trained on {trained_on!r}, not a Hub id; {base_repo} is assumed to be the same"
        )
    if not _HUB_ID.fullmatch(base_repo):
        return f"{where}: the adapter was trained on {trained_on}; the folder {base_repo} is assumed to be the same"
    if _plain_name(trained_on) == _plain_name(base_repo):
        return f"{where}: the adapter was trained on {trained_on}, a copy by its name; it is merged into {base_repo}"
    raise SourceError(
        f"{where}: adapter of another base: it was trained on {trained_on}, the recipe's base is {base_repo}",
        hint=f"Set base to {trained_on}, or choose an adapter of {base_repo}.",
    )


def _plain_name(repo: str) -> str:
    """A repo's name without owner and quantisation ending, so that mirrors and 4-bit copies agree."""
    return _QUANTISED_NAME.sub("", repo.rpartition("/")[2]).lower()
