"""Laws of the recipe's written forms: what is written is read back the same, and only meaning counts."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.recipe import ModelRef, Output, Recipe
from hubmerge.recipe.load import parse
from hubmerge.recipe.schema import parse_size
from hubmerge.recipe.write import format_size

numbers = st.one_of(st.integers(-5, 5), st.floats(-100, 100, allow_nan=False))
fractions = st.one_of(st.sampled_from([0, 1]), st.floats(0, 1))
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=30)
lines = st.text(st.sampled_from("a:#- \n\té"), min_size=1, max_size=12)
globs = st.sampled_from(["*.mlp.*", "model.layers.[0-3].*", "*bias", "?", "a: b", "- x", "# no", "yes", "*é*"])


def setting(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    value = st.one_of(values, st.lists(values, min_size=1, max_size=4))
    rules = st.lists(st.fixed_dictionaries({"match": globs, "value": value}), min_size=1, max_size=3)
    return st.one_of(value, rules, st.tuples(rules, value).map(lambda rv: [*rv[0], {"value": rv[1]}]))


@st.composite
def model(draw: st.DrawFn, index: int) -> dict[str, Any]:
    own: dict[str, Any] = draw(
        st.fixed_dictionaries({}, optional={"weight": setting(numbers), "density": setting(fractions)})
    )
    repo = draw(st.sampled_from([f"org/m{index}", f"m{index}", f"./m{index}", f"/data/m{index}", f"~/m{index}"]))
    entry: dict[str, Any] = {"repo": repo}
    if not repo.startswith((".", "/", "~")) and draw(st.booleans()):
        entry["revision"] = draw(st.sampled_from(["main", "refs/pr/3", "1e10", "0123", "no", "v1.0"]))
    if draw(st.booleans()):
        entry["name"] = draw(st.sampled_from([f"n-{index}", f"{index}", f"1e{index}", f"n_{index}.x"]))
    if draw(st.booleans()):
        return entry | own
    return entry | ({"parameters": own} if own else {})


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    models = [draw(model(i)) for i in range(draw(st.integers(1, 3)))]
    optional = {
        "base": st.sampled_from(["org/base", "org/base@v1", {"repo": "org/base", "revision": "v1"}, "../base"]),
        "parameters": st.fixed_dictionaries(
            {},
            optional={
                "scale": setting(numbers),
                "density": setting(fractions),
                "trim": st.sampled_from(["tensor", "model"]),
                "weight": setting(numbers),
            },
        ),
        "dtype": st.sampled_from([None, "bfloat16", "float64"]),
        "seed": st.integers(0, 2**64 - 1),
        "vocab": st.sampled_from(["strict", "base", "union"]),
        "heads": st.sampled_from(["keep", "drop"]),
        "include": st.lists(globs, min_size=1, max_size=3),
        "exclude": st.lists(globs, max_size=3),
        "output": st.fixed_dictionaries({}, optional={"shard_size": st.sampled_from([1, 999, "5GB", "1GiB", "1.5MB"])}),
        "card": st.fixed_dictionaries(
            {},
            optional={
                "title": words,
                "summary": words,
                "limitations": st.just("Two lines,\n\nand: one more.\n"),
                "intended_use": lines,
                "language": st.one_of(st.just("no"), st.lists(st.sampled_from(["no", "en", "yes"]), max_size=3)),
                "tags": st.lists(words, max_size=3),
            },
        ),
    }
    rest: dict[str, Any] = draw(st.fixed_dictionaries({}, optional=optional))
    return {"method": "ties", "models": models} | rest


def shuffled(data: Any, rng: random.Random) -> Any:
    """The same data with the keys of every mapping in another order."""
    if isinstance(data, dict):
        items = [(k, shuffled(v, rng)) for k, v in data.items()]
        rng.shuffle(items)
        return dict(items)
    return [shuffled(v, rng) for v in data] if isinstance(data, list) else data


@settings(max_examples=80, deadline=None, derandomize=True)
@given(recipes())
def test_yaml_round_trip(data: dict[str, Any]) -> None:
    recipe = Recipe.from_data(data)
    text = recipe.to_yaml()
    again = Recipe.loads(text)
    assert again == recipe
    assert again.to_yaml() == text
    assert hash(again) == hash(recipe)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(recipes(), st.randoms(use_true_random=False))
def test_order_of_keys_does_not_matter(data: dict[str, Any], rng: random.Random) -> None:
    one, other = Recipe.from_data(data), Recipe.from_data(shuffled(data, rng))
    assert json.dumps(one.normalized()) == json.dumps(other.normalized())
    assert one.to_yaml() == other.to_yaml()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(recipes())
def test_normalized_form_is_json_and_a_fixed_point(data: dict[str, Any]) -> None:
    normal = Recipe.from_data(data).normalized()
    again = Recipe.from_data(json.loads(json.dumps(normal, allow_nan=False)))
    assert json.dumps(again.normalized()) == json.dumps(normal)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(recipes(), st.integers(0, 7), st.booleans())
def test_settings_survive_the_round_trip(data: dict[str, Any], layer: int, embedding: bool) -> None:
    recipe = Recipe.from_data(data)
    again = Recipe.loads(recipe.to_yaml())
    for name, at in (("model.layers.2.mlp.weight", layer), ("embed.bias", None)):
        assert again.settings_for(name, at, 8, embedding) == recipe.settings_for(name, at, 8, embedding)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(recipes())
def test_any_yaml_reader_sees_the_same_text(data: dict[str, Any]) -> None:
    text = Recipe.from_data(data).to_yaml()
    # PyYAML reads YAML 1.1, to which an unquoted `no` is a boolean and `1e10` is text.
    assert yaml.safe_load(text) == parse(text, "x").plain()


def test_notation_of_numbers_and_defaults_does_not_matter() -> None:
    short = Recipe.loads("method: ties\nbase: org/base\nmodels: [org/a, org/b]\n")
    long = Recipe.loads(
        """
        # the same with everything said
        models:
          - {repo: org/a, name: a}
          - {name: b, parameters: {}, repo: org/b}
        parameters: {density: 0.2, scale: 1, weight: [1, 1.0], trim: model, aggregate: mean, rule: exact}
        base: {repo: org/base}
        method: "ties"
        dtype: null
        seed: 0x0
        output: {shard_size: 5000MB, format: full}
        """
    )
    assert short == long
    assert short != Recipe.loads("method: ties\nbase: org/base\nmodels: [org/b, org/a]\n")
    assert short != "ties"


def test_the_file_that_is_published() -> None:
    recipe = Recipe.loads(
        """
        seed: 7
        method: ties
        models:
          - {weight: 1, repo: org/a@v1, density: [{value: [0.5, 1], match: "*.mlp.*"}, {value: 1}]}
          - {repo: ./b, name: task-b}
        base: org/base
        parameters: {scale: 1}
        card: {language: no, title: "Two: merged"}
        output: {shard_size: 2000MB}
        """
    )
    assert recipe.to_yaml() == (
        "method: ties\n"
        "base: org/base\n"
        "models:\n"
        "  - repo: org/a@v1\n"
        "    density:\n"
        "      - match: '*.mlp.*'\n"
        "        value: [0.5, 1.0]\n"
        "      - match: '*'\n"
        "        value: 1.0\n"
        "    weight: 1.0\n"
        "  - repo: ./b\n"
        "    name: task-b\n"
        "parameters:\n"
        "  scale: 1.0\n"
        "seed: 7\n"
        "output:\n"
        "  shard_size: 2GB\n"
        "card:\n"
        "  title: 'Two: merged'\n"
        "  language: ['no']\n"
    )


def test_anchors_mean_what_they_stand_for() -> None:
    recipe = Recipe.loads(
        """
        method: ties
        base: org/base
        models:
          - {repo: org/a, density: &d [{match: "*.mlp.*", value: 0.5}, {value: 0.1}]}
          - {repo: org/b, density: *d}
        """
    )
    assert recipe.models[0].parameters == recipe.models[1].parameters


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500 MB", 5 * 10**8),
        ("4GiB", 2**32),
        ("1.5kb", 1500),
        ("12", 12),
        ("7B", 7),
        ("2tib", 2**41),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert Output(shard_size=text).shard_size == size  # type: ignore[arg-type]


@settings(derandomize=True)
@given(st.integers(1, 10**16))
def test_size_round_trip(size: int) -> None:
    written = format_size(size)
    assert (parse_size(written) if isinstance(written, str) else written) == size


def test_references(tmp_path, monkeypatch) -> None:
    assert ModelRef.parse("org/a@refs/pr/1").model_dump() == {"repo": "org/a", "revision": "refs/pr/1"}
    assert not ModelRef.parse("gpt2").is_local
    assert ModelRef.parse("./x@y").is_local
    assert str(ModelRef.parse("./x@y")) == "./x@y"
    assert ModelRef.parse("~/m").path.is_absolute()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "a@b").mkdir(parents=True)
    found = ModelRef.parse("org/a@b")
    assert (found.repo, found.revision, found.is_local) == ("./org/a@b", None, True)
    recipe = Recipe.loads("method: linear\nmodels: [{repo: org/a@b, name: x}, .]\n")
    assert recipe.models[0].ref == found
    assert recipe.names == ("x", tmp_path.name)


def test_a_recipe_is_frozen() -> None:
    recipe = Recipe.loads("method: linear\nmodels: [org/a]\n")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
