"""Whatever a recipe holds, it is read or refused with a RecipeError: nothing else gets out."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.errors import RecipeError
from hubmerge.recipe import Recipe

NAMES = ("repo", "revision", "name", "weight", "density", "t", "match", "value", "model", "path", "filter")
FOREIGN = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "sources",
    "layer_range",
    "parameters",
    "normalize",
    "lora",
)
KEYS = st.sampled_from([*Recipe.model_fields, *NAMES])
MERGEKIT_KEYS = st.sampled_from([*FOREIGN, *NAMES, "dtype", "tokenizer_source"])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**70, -(10**400)]),
    st.floats(),
    st.sampled_from(
        [
            "ties",
            "linear",
            "slerp",
            "org/a",
            "./x",
            "a@b",
            "@",
            "~nobody/x",
            "/",
            "",
            "a\0b",
            "./a\0b",
            "x" * 5000,
            "base",
        ]
    ),
    st.text(max_size=5),
)


def trees(keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        SCALARS,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=4)),
        max_leaves=12,
    )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.dictionaries(KEYS, trees(KEYS), max_size=6), st.sampled_from(["ties", "linear", "model_stock"]))
def test_any_data(data: dict[str, Any], method: str) -> None:
    for recipe in (data, {"models": [{"repo": "org/a"}]} | data | {"method": method}):
        with suppress(RecipeError):
            Recipe.from_data(recipe).normalized()


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.dictionaries(MERGEKIT_KEYS, trees(MERGEKIT_KEYS), max_size=6), st.sampled_from(["ties", "linear", "slerp", 3])
)
def test_any_mergekit_data(data: dict[str, Any], method: Any) -> None:
    models = [{"model": "org/a", "parameters": {"weight": 1}}]
    for recipe in (data, {"models": models, "base_model": "org/b"} | data, {"models": models, "parameters": data}):
        with suppress(RecipeError):
            Recipe.from_data({**recipe, "merge_method": method}).normalized()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(st.sampled_from(" \n\t-:{}[]&*!|>'\"%@`#,?ab1.~"), max_size=40))
def test_any_text(text: str) -> None:
    with suppress(RecipeError):
        Recipe.loads(text)
    with suppress(RecipeError):
        Recipe.loads(f"method: ties\nmodels: {text}")
    with suppress(RecipeError):
        Recipe.from_flags("linear", None, [text], [f"normalize={text}"])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(trees(KEYS))
def test_json_is_yaml(data: Any) -> None:
    """JSON text is read as the same data."""
    from hubmerge.recipe.load import parse_value

    text = json.dumps(data)
    if not any(word in text for word in ("NaN", "Infinity", "\\u", "\\/")):
        assert json.dumps(parse_value(text, "x", "y").plain()) == text
