"""The few element-wise kernels that several merge methods share: weighted sums, sign election, adding to the base.

``add_(x, alpha=w)`` is a fused multiply-add, rounded once, on every processor with such an instruction (x86 since 2013,
all 64-bit Arm) and on GPUs; also in the scalar tail of a vectorised loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch

Aggregate = Literal["mean", "sum", "weighted"]

NEGLIGIBLE_WEIGHT = 1e-8
"""mergekit divides by 1 instead of a total weight smaller than this."""


def scaled_(values: torch.Tensor, factor: float) -> torch.Tensor:
    """``values * factor``, in place."""
    return values if factor == 1.0 else values.mul_(factor)


def weighted_sum(values: Callable[[int], torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Sum of ``weights[i] * values(i)``, in order; ``values`` hands out buffers that may be overwritten."""
    total = scaled_(values(0), weights[0])
    for i in range(1, len(weights)):
        total.add_(values(i), alpha=weights[i])
    return total


def total_weight(weights: Sequence[float], *, lenient: bool = False) -> float:
    """Sum of the weights, by which to normalise; ``lenient`` replaces a negligible sum by 1, as mergekit does."""
    total = math.fsum(weights)
    return 1.0 if lenient and abs(total) < NEGLIGIBLE_WEIGHT else total


def zero_weight_problem(weights: Sequence[float]) -> str | None:
    """The message for weights that cannot be normalised; None if they can."""
    if math.fsum(weights) != 0.0:
        return None
    return f"the weights {list(weights)} add up to 0 and cannot be normalised; change one or set normalize: false"


def sum_all(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the parts, in order, in a new buffer."""
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    return total


def elected_sign(parts: Sequence[torch.Tensor], zero_sign: int) -> torch.Tensor:
    """Sign of the sum of the parts: -1 or 1, and ``zero_sign`` (-1, 0 or 1) where they cancel."""
    sign = sum_all(parts).sign_()
    if zero_sign:
        sign.add_(0.5 * zero_sign).sign_()
    return sign


def elect_and_merge(
    parts: Sequence[torch.Tensor], weights: Sequence[float], *, aggregate: Aggregate, zero_sign: int = 0
) -> torch.Tensor:
    """Keep the entries whose sign is the elected one and aggregate them; the parts are overwritten.

    Args:
        parts: Weighted deltas, all of one shape (n,).
        weights: The weights already contained in the parts; used as divisors by ``weighted``.
        aggregate: ``sum``; ``mean`` divides by the number of agreeing entries, ``weighted`` by the sum of their
            weights.
        zero_sign: The sign elected where the parts cancel exactly; 0 elects none, and the result is 0 there.

    Source: TIES, arXiv 2306.01708, section 3 (steps 2 and 3).
    """
    sign = elected_sign(parts, zero_sign)
    for part in parts:
        # A product with ±1 is exact, so the positive part is exactly the set of agreeing entries.
        part.mul_(sign).relu_()
    total = parts[0]
    if aggregate == "sum":
        for part in parts[1:]:
            total.add_(part)
        return total.mul_(sign)
    shares = [1.0] * len(parts) if aggregate == "mean" else list(weights)
    divisor = scaled_(total.sign(), shares[0])
    for part, share in zip(parts[1:], shares[1:], strict=True):
        total.add_(part)
        divisor.add_(scaled_(part.sign_(), share))
    if min(shares) > 0:
        # Where nothing agrees the total is 0, and any positive divisor will do.
        divisor.clamp_min_(min(1.0, min(shares)) / 2)
    else:
        divisor.masked_fill_(divisor == 0, 1.0)
    return total.div_(divisor).mul_(sign)


def onto_base(base: torch.Tensor, delta: torch.Tensor, scale: float) -> torch.Tensor:
    """``base + scale * delta``, in the delta's buffer."""
    return torch.add(base, delta, alpha=scale, out=delta)
