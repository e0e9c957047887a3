"""PEFT adapters: what one changes in its base, and the changed values, bit for bit as PEFT merges them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hubmerge.adapters.config import check_base, check_config
from hubmerge.adapters.naming import Naming, naming_of
from hubmerge.adapters.parts import inventory
from hubmerge.errors import SourceError
from hubmerge.spec import AdapterPart

if TYPE_CHECKING:
    import torch

    from hubmerge.adapters.plain import Load
    from hubmerge.spec import LowRank

__all__ = [
    "AdapterPart",
    "Naming",
    "check_base",
    "check_config",
    "delta",
    "factors",
    "inventory",
    "merged",
    "naming_of",
]


def merged(
    part: AdapterPart, config: Mapping[str, Any], load: Load, base: torch.Tensor | None, *, transposed: bool = False
) -> torch.Tensor:
    """The parameter with the adapter merged into it, as PEFT's ``merge_and_unload`` gives it.

    Args:
        part: One entry of ``inventory``.
        config: The parsed ``adapter_config.json``.
        load: Reads one of the adapter's stored tensors.
        base: The base's stored tensor in any floating dtype; may be None for a part of kind ``replace``. Not changed.
        transposed: Whether a linear weight is stored as [in, out].

    Returns:
        A new tensor of the base's shape, float32 (float64 if the base is float64).

    Raises:
        SourceError: The adapter's tensors are damaged or do not fit the base.
        UnsupportedAdapterError: PEFT has no merge for this kind of module.
    """
    from hubmerge.adapters import plain

    if part.kind == "replace":
        return plain.fetch(part.tensors[0], load, plain.compute_dtype(base)).clone()
    assert base is not None
    start = plain.start_value(part, load, base)
    if part.kind == "low_rank":
        return start + plain.low_rank_delta(part, config, load, start, transposed=transposed)
    direct = plain.direct_merge(part, config, load, start, transposed=transposed)
    if direct is not None:
        return direct
    from hubmerge.adapters.skeleton import merge_module

    return merge_module(part, config, load, start, transposed=transposed)


def delta(
    part: AdapterPart, config: Mapping[str, Any], load: Load, base: torch.Tensor, *, transposed: bool = False
) -> torch.Tensor:
    """The merged parameter minus the base, such that ``base + delta``, rounded to the compute dtype, is ``merged``.

    Args:
        part: One entry of ``inventory``.
        config: The parsed ``adapter_config.json``.
        load: Reads one of the adapter's stored tensors.
        base: The base's stored tensor in any floating dtype; not changed.
        transposed: Whether a linear weight is stored as [in, out].

    Returns:
        A new tensor of the base's shape. Kind ``low_rank``: in the compute dtype, PEFT's own addend. Other kinds:
        float64, because the difference of two float32 numbers need not be a float32 number.

    Raises:
        SourceError: The adapter's tensors are damaged or do not fit the base.
        UnsupportedAdapterError: PEFT has no merge for this kind of module.
    """
    from hubmerge.adapters import plain

    if part.kind == "low_rank":
        return plain.low_rank_delta(part, config, load, base, transposed=transposed)
    values = merged(part, config, load, base, transposed=transposed)
    if values.shape != base.shape:
        raise SourceError(
            f"{part.name}: the adapter stores shape {list(values.shape)}, the base has {list(base.shape)}",
            hint="The adapter belongs to another base, or to one whose vocabulary was resized.",
        )
    return values.double() - base.double()


def factors(
    part: AdapterPart, config: Mapping[str, Any], load: Load, dtype: torch.dtype | None = None
) -> LowRank | None:
    """A plain LoRA matrix as factors, float32 unless another dtype is given; None for every other part.

    The product is (out, in) for a linear weight whatever its stored orientation, (tokens, features) for an embedding.
    ``delta`` is the bit-exact form: an embedding's product of factors may round differently.
    """
    import torch

    from hubmerge.adapters.plain import lora_factors

    return lora_factors(part, config, load, dtype or torch.float32)
