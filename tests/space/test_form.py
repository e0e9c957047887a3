"""Controls from every method's schema, and recipes from what they are set to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.errors import RecipeError, UsageError
from hubmerge.recipe import Recipe
from hubmerge.recipe.settings import slots
from hubmerge.space.form import DEFAULT, Control, MethodForm, ModelChoice, form_of, forms, to_recipe, value_of
from hubmerge.space.safety import Limits, check_recipe

FORMS = {form.name: form for form in forms()}
STEPS = 1000


def values(control: Control) -> st.SearchStrategy[Any]:
    """What a page may give for a control."""
    if control.widget == "switch":
        found: st.SearchStrategy[Any] = st.booleans()
    elif control.widget == "choice":
        found = st.sampled_from(control.choices)
    elif control.whole:
        found = st.integers(int(control.minimum or 0) + 1, 40).flatmap(lambda n: st.sampled_from([n, float(n), str(n)]))
    elif control.widget == "slider":
        low, high = control.minimum, control.maximum
        assert low is not None
        assert high is not None
        found = st.integers(0, STEPS).map(lambda i: low + (high - low) * i / STEPS)
    else:
        found = st.integers(1, STEPS).map(lambda i: i / 100)
    return st.one_of(found, st.sampled_from(["", None])) if control.optional else found


def choices(form: MethodForm) -> st.SearchStrategy[list[ModelChoice]]:
    least = max(form.min_models, 2) if form.max_models != 1 else 1
    own = st.fixed_dictionaries({}, optional={c.name: values(c) for c in form.per_model})
    one = st.tuples(own)
    return st.lists(one, min_size=least, max_size=form.max_models or 4).map(
        lambda given: [ModelChoice(f"org/m{i}", "" if i else "first", v) for i, (v,) in enumerate(given)]
    )


def recipe_of(plain: dict[str, Any]) -> tuple[Recipe | None, str]:
    try:
        return Recipe.from_data(plain), ""
    except RecipeError as error:
        return None, error.message


@pytest.mark.parametrize("name", FORMS)
@given(data=st.data())
@settings(deadline=None, derandomize=True, max_examples=25)
def test_what_controls_are_set_to_is_what_the_recipe_says(name: str, data: st.DataObject) -> None:
    form = FORMS[name]
    shared = data.draw(st.fixed_dictionaries({}, optional={c.name: values(c) for c in form.shared}))
    models = data.draw(choices(form))
    plain = to_recipe(form, "org/base", models, shared, seed=7, dtype=None)
    recipe, refused = recipe_of(plain)
    if recipe is None:  # settings that exclude one another: the method says which
        assert {c.name for c in form.controls if c.name in refused}, refused
        return
    written = recipe.normalized()
    assert (written["seed"], written["method"]) == (7, name)
    for control in form.shared:
        wanted = value_of(control, shared.get(control.name))
        assert written["parameters"][control.name] == (control.default if wanted is None else wanted)
    for model, entry in zip(models, written["models"], strict=True):
        wanted = {c.name: value_of(c, (model.values or {}).get(c.name)) for c in form.per_model}
        assert entry["parameters"] == {k: v for k, v in wanted.items() if v is not None}
    assert check_recipe(recipe.to_yaml(), Limits()) == recipe


@pytest.mark.parametrize("name", FORMS)
def test_every_parameter_has_a_control_and_every_control_words(name: str) -> None:
    from hubmerge.recipe.algorithms import get_algorithm

    form = FORMS[name]
    known = slots(get_algorithm(name).parameters)
    assert {"weight", *(c.name for c in form.controls)} == known.keys()
    own = {c.name for c in form.per_model}
    assert own | {"weight"} == {s.name for s in known.values() if s.per_model}
    assert ("weight" in own) == (form.kind == "method" and name not in ("model_stock", "slerp"))
    for control in form.controls:
        assert control.label
        assert control.help
        assert control.default is not None or control.optional
        assert control.widget != "choice" or control.default is None or control.default in control.choices
        if control.widget == "slider":
            assert control.minimum <= control.default <= control.maximum  # type: ignore[operator]


def test_what_stands_at_its_default_is_not_mentioned() -> None:
    form = form_of("ties")
    plain = to_recipe(form, "org/base", [ModelChoice("org/a")], {c.name: c.default for c in form.shared}, card={})
    assert plain == {"method": "ties", "base": "org/base", "models": [{"repo": "org/a"}]}


def test_controls_as_the_schema_has_them() -> None:
    density = next(c for c in form_of("dare_ties").controls if c.name == "density")
    assert (density.widget, density.minimum, density.maximum, density.per_model) == ("slider", 0.001, 1.0, True)
    rank = next(c for c in form_of("tsv_merge").controls if c.name == "rank")
    assert (rank.widget, rank.whole, rank.optional, rank.default, rank.choices) == ("number", True, True, None, ())
    granularity = next(c for c in form_of("awd").controls if c.name == "granularity")
    assert granularity.choices == (DEFAULT, "model", "tensor")
    assert (form_of("slerp").min_models, form_of("slerp").max_models) == (1, 1)
    assert [c.name for c in form_of("ties").per_model] == ["weight", "density"]


@pytest.mark.parametrize(
    ("control", "value"),
    [("density", "much"), ("density", True), ("density", [1]), ("trim", "neither"), ("scale", {}), ("scale", "1e")],
)
def test_values_that_a_control_cannot_have(control: str, value: Any) -> None:
    with pytest.raises(UsageError, match="cannot be set"):
        to_recipe(form_of("ties"), "org/base", [], {control: value})


def test_settings_that_a_method_does_not_have() -> None:
    with pytest.raises(UsageError, match="did you mean 'density'"):
        to_recipe(form_of("ties"), "org/base", [ModelChoice("org/a", values={"densty": 1})], {})
