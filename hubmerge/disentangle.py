"""Adaptive weight disentanglement: what task vectors share, found by descent on the cosines of what is left of them.

For task vectors τ₁ … τ_T and a shared part δ, the objective is L(δ) = mean over a ≠ b of |cos(τₐ − δ, τᵦ − δ)| + α ‖δ‖.
Its value, and its gradient as a combination of the τₜ and δ, follow from inner products alone. So plain gradient
descent from δ = 0 never leaves the span of the τₜ and runs on the coefficients of δ = Σ cₜ τₜ, whatever the length of
the vectors. Adam scales every entry by itself, leaves the span, and needs the vectors.

Source: AWD, arXiv 2411.18729, section 4 (the equations; the published pseudocode counts pairs and α‖δ‖ repeatedly).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np
import torch

from hubmerge.spec import LowRank
from hubmerge.sums import Doubles, Sums

FIRST_STEP = 0.25
"""Of the vectors' mean squared length: carries the first step at most half-way to the mean of equally long vectors."""
SMALLEST_STEP = 1e-12
"""Of the vectors' mean squared length; where no longer one lowers the objective, the descent has arrived."""
ROUNDING = 1e-14
"""A squared length up to this fraction of its summands is what rounding leaves of a vector that δ equals."""
ADAM_RATE = 1e-4
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


class Slope(NamedTuple):
    """The objective and its gradient at some δ: ``Σ pulls[t] τₜ + shrink δ``."""

    value: float
    pulls: Doubles
    shrink: float


@dataclass(frozen=True, slots=True)
class Objective:
    """``L`` for task vectors of which none is zero.

    Shapes: gram (t, t), their inner products.
    """

    gram: Doubles
    alpha: float

    def at(self, overlaps: Doubles, square: float) -> Slope:
        """The slope where ⟨τₜ, δ⟩ are the overlaps, (t,), and ‖δ‖² is the square.

        Everything is done entry by entry or added up in a fixed order, so that no library decides the last bits.
        """
        count = len(self.gram)
        apart = self.gram - overlaps[:, None] - overlaps + square
        squares = apart.diagonal()
        directed = squares > ROUNDING * (self.gram.diagonal() + square)
        inverse = np.where(directed, 1.0 / np.sqrt(np.where(directed, squares, 1.0)), 0.0)
        cosines = apart * inverse[:, None] * inverse
        np.fill_diagonal(cosines, 0.0)
        share = 1.0 / (count * (count - 1))
        sums = np.add.reduce(np.abs(cosines), axis=0)
        # d cos(a, b) / dδ = -(τ̂ₐ + τ̂ᵦ) / (‖τ̂ₐ‖ ‖τ̂ᵦ‖) + cos(a, b) (τ̂ₐ / ‖τ̂ₐ‖² + τ̂ᵦ / ‖τ̂ᵦ‖²), and each pair counts twice.
        pulls = np.add.reduce(np.sign(cosines) * inverse[:, None], axis=0) - sums * inverse
        pulls *= -2.0 * share * inverse
        length = math.sqrt(max(square, 0.0))
        shrink = (self.alpha / length if length else 0.0) - float(np.add.reduce(pulls))
        return Slope(share * float(np.add.reduce(sums)) + self.alpha * length, pulls, shrink)


@dataclass(frozen=True, slots=True)
class Descent:
    """Where gradient descent arrived, and how."""

    coefficients: Doubles
    """c, (t,): the shared part is Σ cₜ τₜ."""
    values: tuple[float, ...]
    """The objective at δ = 0 and after each step; never increasing."""
    step_sizes: tuple[float, ...]


def descend(objective: Objective, steps: int, learning_rate: float | None = None) -> Descent:
    """Gradient descent from δ = 0 on its coefficients in the task vectors.

    Each step is twice as long as the one before, but no longer than the learning rate, and halved until the objective
    falls; a step as long as the task vectors could jump to a far minimum, where δ is longer than they are.

    Args:
        objective: Of at least two task vectors.
        steps: At most so many; fewer if no step lowers the objective any more.
        learning_rate: The longest step; by default a quarter of the task vectors' mean squared length.
    """
    gram = objective.gram
    unit = float(np.add.reduce(gram.diagonal())) / len(gram)
    longest = FIRST_STEP * unit if learning_rate is None else learning_rate
    coefficients, size = np.zeros(len(gram)), longest
    slope = _slope(objective, coefficients)
    values, step_sizes = [slope.value], list[float]()
    while len(step_sizes) < steps:
        gradient = slope.pulls + slope.shrink * coefficients
        size = min(2.0 * size, longest)
        while not (tried := _slope(objective, coefficients - size * gradient)).value < values[-1]:
            size *= 0.5
            if size <= SMALLEST_STEP * unit:
                return Descent(coefficients, tuple(values), tuple(step_sizes))
        coefficients, slope = coefficients - size * gradient, tried
        values.append(slope.value)
        step_sizes.append(size)
    return Descent(coefficients, tuple(values), tuple(step_sizes))


def _slope(objective: Objective, coefficients: Doubles) -> Slope:
    overlaps = np.add.reduce(objective.gram * coefficients[:, None], axis=0)
    return objective.at(overlaps, float(np.add.reduce(coefficients * overlaps)))


def multipliers(gram: Doubles, alpha: float, steps: int, learning_rate: float | None = None) -> tuple[float, ...]:
    """What gradient descent makes of each task vector in ``Σ (τₜ - δ) = Σ multiplierₜ τₜ``.

    Task vectors that are zero are left out, as if there were fewer tasks; without two others there is nothing to share.

    Args:
        gram: Inner products of all task vectors, (t, t).
        alpha: Weight of ‖δ‖.
        steps: At most so many.
        learning_rate: See ``descend``.
    """
    found = np.ones(len(gram))
    others = np.flatnonzero(gram.diagonal() > 0.0)
    if len(others) > 1 and bool(np.isfinite(gram).all()):
        descent = descend(Objective(gram[np.ix_(others, others)], alpha), steps, learning_rate)
        found[others] -= len(others) * descent.coefficients
    return tuple(found.tolist())


def shared_by_adam(
    vectors: Sequence[torch.Tensor], alpha: float, steps: int, learning_rate: float | None = None
) -> torch.Tensor:
    """δ as Adam finds it from 0, entry by entry: of the points on its way, the one with the lowest objective.

    Args:
        vectors: Task vectors, each (n,); none of them zero.
        alpha: Weight of ‖δ‖.
        steps: So many.
        learning_rate: Of Adam, 1e-4 by default.

    Returns:
        (n,)
    """
    delta, mean, variance, gradient, best = (torch.zeros_like(vectors[0]) for _ in range(5))
    gram = np.array([[float(a @ b) for b in vectors] for a in vectors])
    if len(vectors) < 2 or not bool(np.isfinite(gram).all()):
        return best
    objective, lowest = Objective(gram, alpha), np.inf
    rate = ADAM_RATE if learning_rate is None else learning_rate
    for step in range(1, steps + 2):
        slope = objective.at(np.array([float(v @ delta) for v in vectors]), float(delta @ delta))
        if slope.value < lowest:
            lowest = slope.value
            best.copy_(delta)
        if step > steps:
            break
        torch.mul(delta, slope.shrink, out=gradient)
        for vector, pull in zip(vectors, slope.pulls.tolist(), strict=True):
            gradient.add_(vector, alpha=pull)
        mean.lerp_(gradient, 1 - _BETAS[0])
        variance.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        divisor = torch.sqrt(variance, out=gradient).div_((1 - _BETAS[1] ** step) ** 0.5).add_(_EPSILON)
        delta.addcdiv_(mean, divisor, value=-rate / (1 - _BETAS[0] ** step))
    return best


def inner_products_of_factors(factors: Sequence[LowRank]) -> Sums:
    """Inner products of all pairs (i, j) with i ≤ j, in lexicographic order, of deltas known as factors.

    ⟨s B A, s' B' A'⟩ = s s' Σ (Bᵀ B') ⊙ (A A'ᵀ): in float64, and without the deltas.
    """
    up = torch.cat([f.up.double() * f.scale for f in factors], dim=1)
    down = torch.cat([f.down.double() for f in factors])
    ranks = [f.rank for f in factors]
    blocks = [torch.split(rows, ranks, dim=1) for rows in torch.split((up.T @ up) * (down @ down.T), ranks)]
    pairs = combinations_with_replacement(range(len(factors)), 2)
    return Sums((np.array([[float(blocks[i][j].sum()) for i, j in pairs]]),))
