"""What a parameter is for a given tensor, and how a method's own checks reach every value a setting can take."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from hubmerge.recipe import Recipe
from hubmerge.recipe.parameters import MAX_COMBINATIONS, check
from hubmerge.recipe.settings import Gradient, Rule, Setting, depth, matches, slots
from hubmerge.spec import Method, Params, TensorGroup

HEAD = "method: ties\nbase: org/base\nmodels:\n"


def density(
    recipe: Recipe, name: str, layer: int | None, n: int = 5, *, embedding: bool = False, model: int = 0
) -> float:
    value = recipe.settings_for(name, layer, n, embedding).per_model[model].density
    assert isinstance(value, float)
    return value


# --- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "t", "value"),
    [
        ((3.0,), 0.7, 3.0),
        ((0.0, 1.0), 0.0, 0.0),
        ((0.0, 1.0), 1.0, 1.0),
        ((0.0, 1.0), 0.25, 0.25),
        ((0.0, 1.0, 0.0), 0.25, 0.5),
        ((0.0, 1.0, 0.0), 0.5, 1.0),
        ((0.0, 1.0, 0.0), 0.75, 0.5),
        ((0.0, 0.5, 0.3, 0.7, 1.0), 0.5, 0.3),
        ((0.0, 0.5, 0.3, 0.7, 1.0), 0.625, 0.5),
        ((1.0, 3.0), 1.5, 3.0),
        ((1.0, 3.0), -0.5, 1.0),
    ],
)
def test_gradient_by_hand(points: tuple[float, ...], t: float, value: float) -> None:
    assert Gradient(points).at(t) == pytest.approx(value, abs=1e-15)


@settings(derandomize=True)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9), st.floats(0, 1))
def test_gradient_stays_within_its_points(points: list[float], t: float) -> None:
    value = Gradient(tuple(points)).at(t)
    slack = 1e-9 * max(1.0, *map(abs, points))
    assert min(points) - slack <= value <= max(points) + slack


@settings(derandomize=True)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9))
def test_gradient_passes_through_its_points(points: list[float]) -> None:
    n = len(points)
    assert [Gradient(tuple(points)).at(i / (n - 1)) for i in range(n)] == pytest.approx(points, rel=1e-9, abs=1e-6)


def test_depth() -> None:
    assert [depth(i, 5, is_embedding=False) for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert depth(0, 1, is_embedding=False) == 1.0
    assert depth(None, 5, is_embedding=True) == 0.0
    assert depth(None, 5, is_embedding=False) == 1.0
    assert depth(None, 5, is_embedding=False, outside_at_start=True) == 0.0


def test_gradient_over_the_layers_of_a_model() -> None:
    recipe = Recipe.loads(
        HEAD + "  - {repo: org/a, weight: [1, 0], density: [0, 1, 0.5]}\n  - {repo: org/b, weight: 2}\n"
    )
    assert [density(recipe, f"h.{i}.w", i) for i in range(5)] == [0.0, 0.5, 1.0, 0.75, 0.5]
    assert [recipe.settings_for(f"h.{i}.w", i, 5, False).weights for i in (0, 2, 4)] == [
        (1.0, 2.0),
        (0.5, 2.0),
        (0.0, 2.0),
    ]
    assert density(recipe, "embed.weight", None, embedding=True) == 0.0
    assert density(recipe, "lm_head.weight", None) == 0.5
    assert density(recipe, "h.3.w", 3, model=1) == 0.2


# --- rules --------------------------------------------------------------------------------------------------------


def test_first_match_wins_and_no_match_falls_through() -> None:
    recipe = Recipe.loads(
        HEAD
        + "  - repo: org/a\n"
        + "    density: [{match: '*.mlp.*', value: 0.5}, {match: '*.0.*', value: 0.6}]\n"
        + "  - repo: org/b\n"
        + "parameters: {density: [{match: '*.1.*', value: [0.3, 0.4]}, {match: '*.bias', value: 1}]}\n"
    )
    assert density(recipe, "h.0.mlp.w", 0) == 0.5
    assert density(recipe, "h.0.attn.w", 0) == 0.6
    assert density(recipe, "h.1.attn.w", 2) == pytest.approx(
        0.35
    )  # the model's own does not match: the shared one decides
    assert density(recipe, "h.2.attn.bias", 2) == 1.0
    assert density(recipe, "h.2.attn.w", 2) == 0.2  # the method's default
    assert density(recipe, "h.0.mlp.w", 0, model=1) == 0.2
    assert recipe.settings_for("h.1.attn.w", 2, 5, False).params.density == pytest.approx(0.35)


def test_globs_are_case_sensitive_and_anchored() -> None:
    assert matches(["*.mlp.*"], "h.0.mlp.w")
    assert not matches(["*.MLP.*"], "h.0.mlp.w")
    assert not matches(["mlp"], "h.0.mlp.w")
    assert matches(["h.?.w", "x"], "h.3.w")
    assert matches(["h.[0-3].w"], "h.3.w")
    assert not matches([], "h.3.w")


def test_include_and_exclude() -> None:
    recipe = Recipe.loads(HEAD + "  - repo: org/a\ninclude: ['model.*']\nexclude: ['*.bias']\n")
    assert recipe.takes_part("model.x.weight")
    assert not recipe.takes_part("model.x.bias")
    assert not recipe.takes_part("lm_head.weight")


def test_equal_settings_are_one_object() -> None:
    recipe = Recipe.loads(HEAD + "  - {repo: org/a, density: [0.1, 0.3]}\n  - repo: org/b\n")
    first = recipe.settings_for("h.1.a", 1, 3, False)
    assert recipe.settings_for("h.1.b", 1, 3, False) is first
    assert recipe.settings_for("h.2.b", 2, 3, False) is not first
    assert first.per_model[1] is first.params  # and equal parameters are one object too
    assert recipe.settings_for("h.2.b", 2, 3, False).params is first.params


def test_weights_for_all_models_and_own() -> None:
    recipe = Recipe.loads(HEAD + "  - {repo: org/a, weight: 3}\n  - repo: org/b\nparameters: {weight: 0.5}\n")
    assert recipe.settings_for("w", None, 1, False).weights == (3.0, 0.5)


def test_parameters_may_stand_in_either_place() -> None:
    beside = Recipe.loads(HEAD + "  - {repo: org/a, weight: 0.5, density: 0.3}\n")
    below = Recipe.loads(HEAD + "  - {repo: org/a, parameters: {density: 0.3, weight: 0.5}}\n")
    mixed = Recipe.loads(HEAD + "  - {repo: org/a, weight: 0.5, parameters: {density: 0.3}}\n")
    assert beside == below == mixed


def test_params_leaves_what_varies_at_its_default() -> None:
    recipe = Recipe.loads(HEAD + "  - repo: org/a\nparameters: {scale: 0.7, density: [0, 1], aggregate: sum}\n")
    assert (recipe.params.scale, recipe.params.density, recipe.params.aggregate) == (0.7, 0.2, "sum")


# --- a method's own checks -----------------------------------------------------------------------------------------


class RangeParams(Params):
    low: float = 0.0
    """Lower end."""
    high: float = Field(1.0, json_schema_extra={"per_model": True})
    """Upper end."""
    rank: int | None = Field(None, ge=1)
    """A whole number."""
    layers: tuple[str, ...] | None = None
    """A list of names."""
    mode: Literal["a", "b"] = "a"
    """A choice."""

    @model_validator(mode="after")
    def _check(self) -> RangeParams:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class Range(Method):
    name = "range"
    summary = "Clamp."
    paper = "none"
    parameters = RangeParams

    def merge(self, group: TensorGroup, p: Any, stats: Any | None) -> torch.Tensor:
        return group.base().clamp(p.low, p.high)


class NeedsParams(Params):
    t: float = Field(ge=0, le=1)
    """Needed."""


class Needs(Range):
    name = "needs"
    parameters = NeedsParams


def problems(shared: Any, *own: Any, method: Method | None = None) -> list[tuple[tuple[str | int, ...], str]]:
    return check(method or Range(), shared, own)[1]


def test_slots_know_what_a_field_admits() -> None:
    known = slots(RangeParams)
    assert [name for name, slot in known.items() if slot.is_float] == ["weight", "low", "high"]
    assert [name for name, slot in known.items() if slot.is_list] == ["layers"]
    assert [name for name, slot in known.items() if slot.per_model] == ["weight", "high"]


def test_a_list_is_a_value_where_the_parameter_is_a_list() -> None:
    parameters, issues = check(Range(), {"layers": ["x", "y"]}, [{}])
    assert not issues
    assert parameters is not None
    assert parameters.settings_for("w", 0.0).params.layers == ("x", "y")


def test_combinations_are_checked_with_gradients_and_models() -> None:
    assert problems({"low": 0.4, "high": 0.5}, {}) == []
    assert problems({"low": [0, 3]}, {}) == [(("parameters",), "low 3.0 is above high 1.0")]
    assert problems({"low": 0.4}, {}, {"high": 0.2}) == [(("parameters",), "low 0.4 is above high 0.2")]
    rules = [{"match": "*.bias", "value": -1.0}]
    assert problems({}, {"high": rules}) == [(("parameters",), "low 0.0 is above high -1.0")]
    assert problems({"high": rules, "low": -2.0}, {}) == []


def test_many_combinations_vary_one_parameter_at_a_time() -> None:
    many = [i / 100 for i in range(MAX_COMBINATIONS)]
    assert problems({"low": [*many, 9.0], "high": [3.0, 4.0]}, {}) == [(("parameters",), "low 9.0 is above high 3.0")]


def test_whole_numbers_cannot_be_gradients() -> None:
    assert problems({"rank": [1, 2]}) == [
        (("parameters", "rank"), "rank is not a number with decimals, so it cannot be a gradient")
    ]
    assert problems({"rank": 1.5}) == [(("parameters", "rank"), "expected a whole number, found 1.5")]
    assert problems({"rank": True}) == [(("parameters", "rank"), "expected a whole number, found true")]
    assert problems({"rank": [{"match": "x", "value": 0}]}) == [
        (("parameters", "rank", 0, "value"), "must be at least 1, found 0")
    ]


def test_a_needed_parameter() -> None:
    assert problems({}, {}, method=Needs()) == [(("parameters",), "needs needs t")]
    assert problems({"t": [{"match": "x", "value": 0.5}]}, {}, method=Needs()) == [
        (("parameters", "t"), "tensors that match no entry have no value; add {match: '*', value: …}")
    ]
    parameters, issues = check(Needs(), {"t": [{"match": "x", "value": 0.5}, {"value": [0, 1]}]}, [{}])
    assert issues == []
    assert parameters is not None
    assert parameters.settings_for("x", 1.0).params.t == 0.5
    assert parameters.settings_for("y", 1.0).params.t == 1.0
    assert parameters.params().t == 0.5


def test_setting_in_its_shortest_notation() -> None:
    assert Setting((Rule("*", 1.0),)).plain() == 1.0
    assert Setting((Rule("*", Gradient((0.0, 1.0))),)).plain() == [0.0, 1.0]
    assert Setting((Rule("x", 1.0), Rule("*", 2.0))).plain() == [
        {"match": "x", "value": 1.0},
        {"match": "*", "value": 2.0},
    ]
