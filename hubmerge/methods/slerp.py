"""Spherical interpolation between the base and one model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from hubmerge.arithmetic import onto_base, scaled_
from hubmerge.spec import Method, Params, TensorGroup
from hubmerge.sums import Sums, inner_products

COLINEAR = 0.9995
"""Beyond this absolute cosine, the arc is a line."""
SMALLEST_NORM = 1e-8
"""A shorter vector has no direction; it counts as orthogonal, as mergekit has it."""


class SlerpParams(Params):
    """Parameters of ``slerp``."""

    t: float = Field(0.5, ge=0.0, le=1.0)
    """Where on the way from the base (0) to the model (1)."""


class Slerp(Method):
    """``sin((1 - t) θ) / sin θ · W0 + sin(t θ) / sin θ · W1``, per tensor, with θ the angle between W0 and W1."""

    name = "slerp"
    summary = "Interpolate each tensor between the base and one model along the arc that joins their directions."
    paper = "Animating Rotation with Quaternion Curves, Shoemake, 1985, doi 10.1145/325334.325242"
    parameters = SlerpParams
    max_models = 1

    def problem(self, p: SlerpParams, weights: Sequence[float]) -> str | None:
        """The place on the arc decides alone."""
        return None if all(w == 1 for w in weights) else f"takes t instead of weights, but they are {list(weights)}"

    def begin(self, p: SlerpParams) -> Sums:
        """Nothing is known yet."""
        return Sums()

    def observe(self, group: TensorGroup, p: SlerpParams, stats: Any) -> Sums:
        """The chunk's part of the norms and the inner product."""
        return inner_products([group.base(), group.model(0)])

    def settle(self, stats: Any, total: Sums, p: SlerpParams) -> Sums:
        """The norms and the inner product."""
        return total.settled()

    def merge(self, group: TensorGroup, p: SlerpParams, stats: Any | None) -> torch.Tensor:
        """The merged chunk, (n,)."""
        assert isinstance(stats, Sums)
        shares = arc_shares(stats.totals, p.t)
        if shares is None:
            return onto_base(group.base(), group.delta(0), p.t)
        ours = scaled_(group.model(0), shares[1])
        return ours.add_(group.base() * shares[0])


def arc_shares(gram: Sequence[float], t: float) -> tuple[float, float] | None:
    """The factors of base and model at t on the arc; None where the arc is a line.

    Args:
        gram: Squared norm of the base, inner product, squared norm of the model.
        t: 0 at the base, 1 at the model.
    """
    norms = [math.sqrt(n) for n in (gram[0], gram[2])]
    cosine = gram[1] / math.prod(n if n >= SMALLEST_NORM else 1.0 for n in norms)
    if abs(cosine) > COLINEAR:
        return None
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
