"""mergekit files: read unchanged with mergekit's meaning, or refused with the reason and the place."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_recipe_faults import split_marks

from hubmerge.errors import RecipeError
from hubmerge.recipe import Recipe
from hubmerge.recipe.mergekit.methods import METHODS
from hubmerge.recipe.mergekit.values import glob
from hubmerge.recipe.settings import Rule, slots

DATA = Path(__file__).parent.parent / "data" / "mergekit"
SHARED = (
    "methods it shares: linear, slerp, task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs, breadcrumbs_ties, "
    "model_stock"
)


def test_every_ported_method_and_parameter_exists() -> None:
    from hubmerge.methods import get_method

    for name, port in METHODS.items():
        method = get_method(port.method)
        known = slots(method.parameters)
        targets = {p.to for p in port.parameters.values() if p.to is not None}
        assert targets | port.constants.keys() <= known.keys(), name
        if "rule" in known:
            assert port.constants["rule"] == "mergekit", name


# --- the examples --------------------------------------------------------------------------------------------------


def test_gradient_slerp() -> None:
    recipe = Recipe.load(DATA / "gradient-slerp.yml")
    assert recipe.method == "slerp"
    assert str(recipe.base) == "org/orca-13b"
    assert "platypus-13b" in recipe.names
    assert recipe.dtype == "float16"

    def t(name: str, layer: int | None) -> float:
        value = recipe.settings_for(name, layer, 40, False).params.t
        assert isinstance(value, float)
        return value

    assert t("model.layers.0.self_attn.q_proj.weight", 0) == 0.0
    assert t("model.layers.39.self_attn.q_proj.weight", 39) == 1.0
    # Layer 13 lies at 1/3, a third of the way from the second point (0.5 at 1/4) to the third (0.25 at 1/2).
    assert t("model.layers.13.self_attn.q_proj.weight", 13) == pytest.approx(0.5 - 0.25 / 3)
    assert t("model.layers.13.mlp.up_proj.weight", 13) == pytest.approx(0.5 + 0.25 / 3)
    assert t("model.layers.13.input_layernorm.weight", 13) == 0.5
    assert t("model.embed_tokens.weight", None) == 0.5
    with pytest.raises(RecipeError, match=r"layers 0 to 40 .* of models that have 32 layers"):
        recipe.settings_for("model.layers.0.mlp.up_proj.weight", 0, 32, False)


def test_ties() -> None:
    recipe = Recipe.load(DATA / "ties.yml")
    assert str(recipe.base) == "org/base-13b"
    assert recipe.names == ("orca-13b", "platypus-13b", "wizard-13b")  # the base among the models is no task
    assert recipe.params.model_dump() == {
        "scale": 1.0,
        "density": 1.0,
        "trim": "tensor",
        "aggregate": "weighted",
        "rule": "mergekit",
    }
    middle = recipe.settings_for("model.layers.2.mlp.up_proj.weight", 2, 5, False)
    assert [p.density for p in middle.per_model] == [0.7, 0.5, 0.33]
    assert middle.weights == pytest.approx((1.0, 0.5, 0.5))
    last = recipe.settings_for("model.layers.4.self_attn.k_proj.weight", 4, 5, False)
    assert [p.density for p in last.per_model] == [0.1, 0.5, 0.33]
    assert last.weights == (1.0, 1.0, 0.0)
    # mergekit puts what lies outside the layers at the start, the head as well.
    head = recipe.settings_for("lm_head.weight", None, 5, False)
    assert (head.per_model[0].density, head.weights) == (1.0, (1.0, 0.0, 0.0))


def test_bio_merge() -> None:
    recipe = Recipe.load(DATA / "bio-merge.yml")
    assert recipe.method == "ties"
    assert recipe.params.aggregate == "weighted"  # `normalize: yes`, as YAML 1.1 reads it
    settings = recipe.settings_for("w", None, 32, False)
    assert settings.weights == (0.5, 0.45)
    assert [p.density for p in settings.per_model] == [0.6, 0.55]
    assert recipe.tokenizer == "union"
    assert recipe.notes == ("mergekit computes in bfloat16 here; hubmerge computes in float32 and rounds once",)


def test_linear() -> None:
    recipe = Recipe.load(DATA / "linear.yml")
    assert (recipe.method, recipe.base, recipe.params.normalize) == ("linear", None, True)
    assert recipe.settings_for("w", None, 40, False).weights == (1.0, 0.3, 0.5)  # "5e-1" is a number to mergekit


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "arcee_fusion",
            (f"4:15: merge_method: mergekit's arcee_fusion is not one of the methods hubmerge has; {SHARED}",),
        ),
        (
            "orcamini-platy-44layer",
            (
                f"1:15: merge_method: mergekit's passthrough is not one of the methods hubmerge has; {SHARED}",
                "2:1: slices: hubmerge keeps the base's layers: slices are read only if there is one, "
                "with the same range [0, n] everywhere",
            ),
        ),
    ],
)
def test_refused_examples(name: str, lines: tuple[str, ...]) -> None:
    path = DATA / f"{name}.yml"
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert caught.value.message.splitlines() == [f"{path}:{line}" for line in lines]


@pytest.mark.parametrize("name", ["gradient-slerp", "ties", "bio-merge", "linear"])
def test_published_form_means_the_same(name: str) -> None:
    recipe = Recipe.load(DATA / f"{name}.yml")
    again = Recipe.loads(recipe.to_yaml())
    assert again == recipe
    assert Recipe.from_data(recipe.normalized()) == recipe
    for tensor, layer in (("model.layers.7.mlp.up_proj.weight", 7), ("lm_head.weight", None)):
        assert again.settings_for(tensor, layer, 40, False) == recipe.settings_for(tensor, layer, 40, False)


# --- semantics -----------------------------------------------------------------------------------------------------


def gta(method: str, parameters: str = "{}", model: str = "{weight: 1}") -> Recipe:
    return Recipe.loads(
        f"merge_method: {method}\nbase_model: org/base\nmodels:\n  - model: org/a\n    parameters: {model}\n"
        f"  - model: org/b\n    parameters: {model}\nparameters: {parameters}\n"
    )


@pytest.mark.parametrize(
    ("method", "parameters", "wanted"),
    [
        ("task_arithmetic", "{}", {"normalize": False, "scale": 1.0}),
        ("task_arithmetic", "{normalize: 1.0, lambda: 0.7, density: 0.1}", {"normalize": True, "scale": 0.7}),
        ("ties", "{}", {"aggregate": "weighted", "density": 1.0, "trim": "tensor", "rule": "mergekit", "scale": 1.0}),
        ("ties", "{normalize: false, density: 0.3, lambda: 2}", {"aggregate": "sum", "density": 0.3, "scale": 2.0}),
        ("dare_linear", "{}", {"density": 1.0, "rescale": "l1", "scale": 1.0}),
        (
            "dare_linear",
            "{rescale: false, density: 0.5, normalize: true}",
            {"normalize": True, "density": 0.5, "rescale": "none"},
        ),
        ("dare_ties", "{}", {"aggregate": "sum", "rescale": "l1", "trim_after": False, "density": 1.0}),
        ("dare_ties", "{normalize: true}", {"aggregate": "weighted"}),
        ("breadcrumbs", "{}", {"density": 1.0, "gamma": 0.01, "elect_sign": False, "scale": 1.0}),
        (
            "breadcrumbs_ties",
            "{density: 0.8, gamma: 0.05, normalize: true}",
            {"normalize": True, "density": 0.8, "gamma": 0.05, "elect_sign": True},
        ),
        ("model_stock", "{filter_wise: false}", {}),
    ],
)
def test_defaults_and_names(method: str, parameters: str, wanted: dict[str, object]) -> None:
    found = gta(method, parameters).params.model_dump()
    assert {key: found[key] for key in wanted} == wanted


def test_levels_fall_through() -> None:
    recipe = gta(
        "ties",
        "{density: [{filter: mlp, value: 0.5}], weight: 2}",
        "{density: {filter: attn, value: 0.25}, weight: {filter: attn, value: [0, 1]}}",
    )

    def at(name: str, layer: int | None) -> tuple[float, float]:
        settings = recipe.settings_for(name, layer, 3, False)
        return settings.per_model[0].density, settings.weights[0]

    assert at("h.1.attn.w", 1) == (0.25, 0.5)
    assert at("h.1.mlp.w", 1) == (0.5, 2.0)
    assert at("h.1.norm.w", 1) == (1.0, 2.0)
    assert at("lm_attn", None) == (0.25, 0.0)


def test_slice_level_comes_before_the_global_one() -> None:
    recipe = Recipe.loads(
        """
        merge_method: ties
        parameters: {density: 0.1, weight: 0.5}
        slices:
          - sources:
              - {model: org/base, layer_range: [0, 4]}
              - {model: org/a, layer_range: [0, 4], parameters: {weight: 3}}
              - {model: org/b, layer_range: [0, 4]}
            base_model: org/base
            parameters: {density: {filter: mlp, value: 0.2}}
        """
    )
    assert str(recipe.base) == "org/base"
    assert recipe.settings_for("mlp", 0, 4, False).weights == (3.0, 0.5)
    assert recipe.settings_for("mlp", 0, 4, False).params.density == 0.2
    assert recipe.settings_for("attn", 0, 4, False).params.density == 0.1


def test_normalize_may_have_filters() -> None:
    recipe = gta("ties", "{normalize: [{filter: mlp, value: true}, {value: false}, {filter: never, value: true}]}")
    assert recipe.settings_for("x.mlp.w", 0, 2, False).params.aggregate == "weighted"
    assert recipe.settings_for("x.attn.w", 0, 2, False).params.aggregate == "sum"


def test_a_filter_is_a_plain_part_of_the_name() -> None:
    assert glob("*") == glob("") == "*"
    for text, name, found in [
        ("mlp", "h.mlp.w", True),
        ("h.[0]", "x.h.[0].w", True),
        ("h.[0]", "x.h.0.w", False),
        ("a*b", "a*b", True),
        ("a*b", "axb", False),
        ("w?", "w?", True),
        ("w?", "wx", False),
    ]:
        assert Rule(glob(text), 0).applies(name) is found, (text, name)


def test_a_single_layer_lies_at_the_end() -> None:
    recipe = gta("ties", model="{weight: [0.25, 0.75]}")
    assert recipe.settings_for("h.0.w", 0, 1, False).weights == (0.75, 0.75)


def test_dtypes_names_and_tokenizers() -> None:
    recipe = Recipe.loads(
        """
        name: a title
        merge_method: task_arithmetic
        base_model: {model: {path: org/base, revision: v1}}
        models:
          - {model: one/m@main, parameters: {weight: 1}}
          - {model: two/m, parameters: {weight: 1}}
          - {model: "./my model", parameters: {weight: 1}}
        dtype: torch.bfloat16
        out_dtype: float32
        tokenizer_source: two/m
        """
    )
    assert str(recipe.base) == "org/base@v1"
    assert recipe.names == ("one-m-main", "two-m", "my-model")
    assert (recipe.dtype, recipe.tokenizer, recipe.card.title) == ("float32", "two-m", "a title")
    assert gta("ties", "{}\ntokenizer_source: org/base").tokenizer == "base"


def test_linear_with_a_base() -> None:
    listed = Recipe.loads(
        "merge_method: linear\nbase_model: org/a\nmodels:\n"
        "  - {model: org/a, parameters: {weight: 1}}\n  - {model: org/b, parameters: {weight: 2}}\n"
    )
    assert listed.names == ("a", "b")
    appended = Recipe.loads(
        "merge_method: linear\nbase_model: org/c\nmodels:\n  - model: org/a\n"
        "  - {model: org/b, parameters: {weight: 2}}\n"
        "parameters: {weight: 0.5}\n"
    )
    assert appended.names == ("a", "b", "c")
    assert appended.settings_for("w", None, 1, False).weights == (0.5, 2.0, 0.5)


def test_notes_on_what_has_no_effect() -> None:
    recipe = gta("model_stock", "{normalize: false, int8_mask: true}", "{weight: 1, density: 0.5}")
    assert recipe.notes[0] == "parameters.normalize has no effect: mergekit's model_stock does not look at it there"
    assert len(recipe.notes) == 5
    assert gta("ties", "{}", "{weight: 1, normalize: false}").params.aggregate == "weighted"


# --- refusals ------------------------------------------------------------------------------------------------------

HEAD = "merge_method: ties\nbase_model: org/base\n"
ONE = HEAD + "models:\n  - {model: org/a, parameters: {weight: 1}}\n"
SLICES = "hubmerge keeps the base's layers: slices are read only if there is one, with the same range [0, n] everywhere"
REFUSED: dict[str, tuple[str, ...]] = {
    "della": (
        "merge_method: «della\nbase_model: org/base\nmodels: [{model: org/a}]\n",
        f"merge_method: mergekit's della is not one of the methods hubmerge has; {SHARED}",
    ),
    "misspelt method": (
        "merge_method: «dare_tis\nbase_model: org/base\nmodels: [{model: org/a}]\n",
        f"merge_method: unknown method 'dare_tis'; did you mean 'dare_ties'?; {SHARED}",
    ),
    "modules": (
        "merge_method: linear\n«modules: {}\n",
        "modules: merging only some modules of a model is not something hubmerge does; "
        "exclude: in a recipe of its own keeps tensors of the base",
    ),
    "tokenizer": (
        ONE + "«tokenizer: {source: union}\n",
        "tokenizer: hubmerge does not build new tokenizers; use tokenizer_source: base, or a model's name",
    ),
    "chat template": (
        ONE + "«chat_template: chatml\n",
        "chat_template: hubmerge copies the tokenizer's files, its chat template included, byte for byte",
    ),
    "key that mergekit ignores": (
        ONE + "«normalise_everything: true\n",
        "normalise_everything: unknown key; mergekit ignores it, so remove it "
        "(a method's parameter belongs under parameters:)",
    ),
    "misspelt key": (ONE + "«dtpe: float16\n", "dtpe: unknown key; did you mean 'dtype'?"),
    "two slices": (
        HEAD + "«slices:\n  - sources: [{model: org/a, layer_range: [0, 4]}]\n"
        "  - sources: [{model: org/a, layer_range: [3, 8]}]\n",
        f"slices: {SLICES}",
    ),
    "other layers": (
        HEAD + "slices:\n  - sources: [{model: org/a, layer_range: «[2, 4]}]\n",
        f"slices[0].sources[0].layer_range: {SLICES}",
    ),
    "layers that differ": (
        HEAD + "slices:\n  - «sources: [{model: org/a, layer_range: [0, 4]}, {model: org/b, layer_range: [0, 5]}]\n",
        f"slices[0].sources: {SLICES}",
    ),
    "residual weight": (
        HEAD + "slices:\n  - sources: [{model: org/a, layer_range: [0, 4], parameters: {weight: 1}}]\n"
        "    «residual_weight: 1\n",
        "slices[0].residual_weight: hubmerge does not read residual_weight of a slice",
    ),
    "models and slices": (ONE + "«slices: []\n", "slices: models and slices exclude each other"),
    "no models": ("«merge_method: linear\n", "models is required"),
    "no base": (
        "«merge_method: ties\nmodels: [{model: org/a, parameters: {weight: 1}}]\n",
        "base_model is required: ties needs it",
    ),
    "no weight": (
        HEAD + "models:\n  - model: org/base\n  - model: «org/a\n",
        "models[1].model: weight of org/a is required: mergekit has no default for it",
    ),
    "weight for some tensors": (
        HEAD + "models:\n  - model: «org/a\n    parameters: {weight: {filter: mlp, value: 1}}\n",
        "models[0].model: weight of org/a needs a value without a filter as well: mergekit has no default for it",
    ),
    "no t": (
        "merge_method: slerp\nbase_model: org/a\nmodels: [{model: org/a}, {model: org/b}]\nparameters: «{}\n",
        "parameters: t is required",
    ),
    "t for some tensors": (
        "merge_method: slerp\nbase_model: org/a\nmodels: [{model: org/a}, {model: org/b}]\n"
        "parameters: «{t: {filter: mlp, value: 1}}\n",
        "parameters: t needs a value without a filter as well",
    ),
    "slerp of three": (
        "merge_method: slerp\nbase_model: org/a\nmodels: «[{model: org/c}, {model: org/b}]\nparameters: {t: 0.5}\n",
        "models: slerp takes exactly one model besides base_model, found 2",
    ),
    "model stock of one": (
        "merge_method: model_stock\nbase_model: org/a\nmodels: «[{model: org/a}, {model: org/b}]\n",
        "models: model_stock takes at least 2 models besides base_model, found 1",
    ),
    "linear with a base without weight": (
        "merge_method: linear\nbase_model: «org/c\nmodels: [{model: org/a, parameters: {weight: 1}}]\n",
        "base_model: mergekit merges base_model as one more input, and it has no weight; list it under models",
    ),
    "adapter on top": (
        HEAD + "models:\n  - {model: «org/a+org/lora, parameters: {weight: 1}}\n",
        "models[0].model: 'org/a+org/lora': a model with an adapter on top is not an input hubmerge has",
    ),
    "adapter in a mapping": (
        HEAD + "models:\n  - {model: {model: {path: org/a}, «lora: {path: org/l}}, parameters: {weight: 1}}\n",
        "models[0].model.lora: a model with an adapter on top is not an input hubmerge has",
    ),
    "another architecture": (
        HEAD + "models:\n  - {model: {model: {path: org/a}, «override_architecture: X}, parameters: {weight: 1}}\n",
        "models[0].model.override_architecture: hubmerge does not read override_architecture of a model reference",
    ),
    "listed twice": (
        HEAD + "models:\n  - {model: org/a, parameters: {weight: 1}}\n  - {model: «org/a, parameters: {weight: 2}}\n",
        "models[1].model: org/a is listed twice",
    ),
    "weight beside the model": (
        HEAD + "models:\n  - {model: org/a, «weight: 1}\n",
        "models[0].weight: unknown key; a parameter belongs under parameters:",
    ),
    "misspelt parameter": (
        ONE + "parameters: {«densty: 0.5}\n",
        "parameters.densty: unknown parameter, which mergekit would ignore; did you mean 'density'?",
    ),
    "parameter of another method": (
        ONE + "parameters: {«epsilon: 0.5}\n",
        "parameters.epsilon: unknown parameter, which mergekit would ignore; "
        "ties takes weight, density, lambda, normalize, rescale",
    ),
    "filter-wise": (
        "merge_method: model_stock\nbase_model: org/c\nmodels: [{model: org/a}, {model: org/b}]\n"
        "parameters: {filter_wise: «true}\n",
        "parameters.filter_wise: hubmerge's model_stock has nothing like filter_wise: true; only false",
    ),
    "rescaled ties": (
        ONE + "parameters: {rescale: «true}\n",
        "parameters.rescale: hubmerge's ties has nothing like rescale: true; only false",
    ),
    "gradient of truths": (
        ONE + "parameters: {normalize: «[true, false]}\n",
        "parameters.normalize: hubmerge has gradients of numbers only",
    ),
    "weight that is no number": (
        HEAD + "models:\n  - {model: org/a, parameters: {weight: «much}}\n",
        "models[0].parameters.weight: expected a number, found 'much'",
    ),
    "filter that is a number": (
        ONE + "parameters: {density: [{filter: «3, value: 1}]}\n",
        "parameters.density[0].filter: expected a part of a tensor's name, found 3",
    ),
    "filter without value": (
        ONE + "parameters: {density: [«{filter: mlp}]}\n",
        "parameters.density[0]: expected {filter, value}, found a mapping",
    ),
    "out of range": (ONE + "parameters: {density: «1.5}\n", "parameters.density: must be at most 1.0, found 1.5"),
    "integer dtype": (
        ONE + "dtype: «int64\n",
        "dtype: 'int64' is not one of bfloat16, float16, float32, float64",
    ),
    "foreign tokenizer": (
        ONE + "tokenizer_source: «org/z\n",
        "tokenizer_source: org/z is not a model of this file; hubmerge takes the tokenizer from one that is merged",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_gives_reason_and_place(name: str) -> None:
    marked, *expected = REFUSED[name]
    text, places = split_marks(marked)
    with pytest.raises(RecipeError) as caught:
        Recipe.loads(text, where="m.yml")
    wanted = [f"m.yml:{line}:{column}: {m}" for (line, column), m in zip(places, expected, strict=True)]
    assert caught.value.message.splitlines() == wanted


def test_advice_for_adapters() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.loads("merge_method: ties\nbase_model: org/a+org/l\nmodels: [{model: org/b, parameters: {weight: 1}}]\n")
    assert caught.value.hint == (
        "list the adapter itself as the model (hubmerge reads adapters) and its full model as base_model"
    )
