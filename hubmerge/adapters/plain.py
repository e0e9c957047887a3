"""The arithmetic of plain adapters, in PEFT's order of operations and without importing PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hubmerge.adapters.config import is_plain_lora, lora_scale
from hubmerge.adapters.kinds import TOKENS
from hubmerge.adapters.parts import BASE_LAYER, TOKEN_ADAPTER, roles
from hubmerge.errors import SourceError, UnsupportedAdapterError
from hubmerge.spec import AdapterPart, LowRank, TensorSpec

Load = Callable[[TensorSpec], torch.Tensor]
_TOKEN_ROLES = (TOKEN_ADAPTER + TOKENS, TOKENS)


def compute_dtype(base: torch.Tensor | None) -> torch.dtype:
    """float64 for a float64 base, else float32: PEFT keeps half-precision adapters in float32."""
    return torch.float64 if base is not None and base.dtype == torch.float64 else torch.float32


def fetch(spec: TensorSpec, load: Load, dtype: torch.dtype) -> torch.Tensor:
    """A stored tensor in the compute dtype.

    Raises:
        SourceError: It holds NaN or infinity, as a diverged training run leaves it.
    """
    value = load(spec).to(dtype)
    if not torch.isfinite(value).all():
        raise SourceError(
            f"{spec.file}: {spec.name} holds NaN or infinity", hint="The adapter is broken; leave it out."
        )
    return value


def lora_factors(part: AdapterPart, config: Mapping[str, Any], load: Load, dtype: torch.dtype) -> LowRank | None:
    """Up and down factors of a plain LoRA matrix; None for everything else.

    A linear weight's product is (out, in) whatever its stored orientation; an embedding's is as stored.
    """
    stored = roles(part)
    if part.kind != "low_rank" or part.parameter != "weight":
        return None
    scale = lora_scale(config, part.module)
    if "lora_embedding_A" in stored:
        tokens = fetch(stored["lora_embedding_A"], load, dtype)
        features = fetch(stored["lora_embedding_B"], load, dtype)
        return LowRank(tokens.T, features.T, scale)
    if len(stored["lora_A.weight"].shape) != 2:
        return None
    return LowRank(fetch(stored["lora_B.weight"], load, dtype), fetch(stored["lora_A.weight"], load, dtype), scale)


def low_rank_delta(
    part: AdapterPart, config: Mapping[str, Any], load: Load, base: torch.Tensor, *, transposed: bool
) -> torch.Tensor:
    """LoRA's own term, in the shape of the base's stored tensor (PEFT's ``get_delta_weight``).

    Args:
        part: A LoRA weight or bias.
        config: The adapter's config.
        load: Reads one of the adapter's stored tensors.
        base: The base's stored tensor; only its shape and dtype matter.
        transposed: Whether a linear weight is stored as [in, out].
    """
    dtype, scale, stored = compute_dtype(base), lora_scale(config, part.module), roles(part)
    if part.parameter == "bias":
        return fetch(stored["lora_B.bias"], load, dtype) * scale
    if "lora_embedding_A" in stored:
        up, down = fetch(stored["lora_embedding_B"], load, dtype), fetch(stored["lora_embedding_A"], load, dtype)
        product = (up @ down).T
    else:
        up, down = fetch(stored["lora_B.weight"], load, dtype), fetch(stored["lora_A.weight"], load, dtype)
        product = _conv_product(up, down) if down.ndim > 2 else up @ down
        if transposed and product.ndim == 2:
            product = product.T
    if product.shape != base.shape:
        raise SourceError(
            f"{part.name}: the adapter is made for shape {list(product.shape)}, the base has {list(base.shape)}",
            hint="The adapter belongs to another base, or to one whose vocabulary was resized.",
        )
    return product.mul_(scale).contiguous()


def _conv_product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The kernel of two convolutions in a row: up (out, r, 1…), down (r, in, k…) → (out, in, k…)."""
    if down.ndim == 4 and down.shape[2:] == (1, 1):
        return (up[:, :, 0, 0] @ down[:, :, 0, 0])[:, :, None, None]
    convolve = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}[down.ndim]
    kernel: torch.Tensor = convolve(down.transpose(0, 1), up)
    return kernel.transpose(0, 1)


def direct_merge(
    part: AdapterPart, config: Mapping[str, Any], load: Load, start: torch.Tensor, *, transposed: bool
) -> torch.Tensor | None:
    """The merged tensor of the generic kinds that need no PEFT; None for the others.

    Args:
        part: A part of kind ``generic``.
        config: The adapter's config.
        load: Reads one of the adapter's stored tensors.
        start: What the adapter is applied to: the base's tensor, or the adapter's own copy of it.
        transposed: Whether a linear weight is stored as [in, out].
    """
    stored = roles(part)
    for role in _TOKEN_ROLES:
        if role in stored:
            return _replace_rows(
                part, token_indices(config, part.module), fetch(stored[role], load, start.dtype), start
            )
    if part.parameter == "bias" and "ia3_l" in stored:
        return start * fetch(stored["ia3_l"], load, start.dtype).reshape(start.shape)
    if part.parameter == "bias" or is_plain_lora(config):
        return start + low_rank_delta(part, config, load, start, transposed=transposed)
    return None


def token_indices(config: Mapping[str, Any], module: str) -> list[int]:
    """The rows of an embedding that were trained, in the order in which they are stored.

    Raises:
        UnsupportedAdapterError: The config does not say which rows the module's tensor holds.
    """
    indices = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(indices, Mapping):
        indices = next((rows for name, rows in indices.items() if module.endswith(name)), None)
    if not isinstance(indices, list) or not all(isinstance(i, int) for i in indices):
        raise UnsupportedAdapterError(f"{module}: the config does not say which tokens were trained")
    return indices


def _replace_rows(part: AdapterPart, rows: list[int], values: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    if values.shape != (len(rows), *start.shape[1:]) or any(not 0 <= row < start.shape[0] for row in rows):
        raise SourceError(
            f"{part.name}: token rows of shape {list(values.shape)} do not fit the base's shape {list(start.shape)}",
            hint="The adapter belongs to another base, or to one whose vocabulary was resized.",
        )
    return start.index_copy(0, torch.tensor(rows), values)


def start_value(part: AdapterPart, load: Load, base: torch.Tensor) -> torch.Tensor:
    """What the adapter is applied to, in the compute dtype: its own copy of the base's tensor if it stores one."""
    dtype = compute_dtype(base)
    stored = roles(part)
    own = stored.get(BASE_LAYER + part.parameter) or stored.get(part.parameter)
    return base.to(dtype) if own is None else fetch(own, load, dtype)
