"""Recipes from command-line flags, and how light the package is before one is read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hubmerge.errors import RecipeError, UnknownMethodError
from hubmerge.recipe import Card, Recipe
from hubmerge.recipe.mergekit.methods import METHODS, REFUSED_METHODS


def test_flags_and_file_mean_the_same() -> None:
    flags = Recipe.from_flags(
        "ties",
        "org/base@v1",
        ["org/a@refs/pr/1:0.4", "/data/x:y/c:2", "/data/x:y/d", "org/b"],
        ["scale=0.7", "density=[0.1, 0.9]", "trim=tensor"],
        dtype="bfloat16",
        seed=3,
        tokenizer=None,
    )
    file = Recipe.loads(
        """
        method: ties
        base: org/base@v1
        models:
          - {repo: org/a@refs/pr/1, weight: 0.4}
          - {repo: "/data/x:y/c", weight: 2}
          - {repo: "/data/x:y/d"}
          - org/b
        parameters: {scale: 0.7, density: [0.1, 0.9], trim: tensor}
        dtype: bfloat16
        seed: 3
        """
    )
    assert flags == file


FAULTS = [
    (("tis", None, ["org/a"], []), "command line: --method: unknown method 'tis'; did you mean 'ties'?"),
    (
        ("superpositon", None, ["org/a"], []),
        "command line: --method: unknown method 'superpositon'; did you mean 'superposition'?",
    ),
    (
        ("linear", "a b", ["org/a"], []),
        "command line: --base: 'a b' is neither a repo id (org/name) nor a folder that exists; "
        "write ./ before a folder",
    ),
    (
        ("linear", None, ["org/a:heavy"], []),
        "command line: --model org/a:heavy: the weight after the colon is not a number: 'heavy'",
    ),
    (("linear", None, ["org/a:nan"], []), "command line: --model org/a:nan: the weight is not a finite number: nan"),
    (("linear", None, ["org/a"], ["normalize"]), "command line: --param normalize: expected KEY=VALUE"),
    (("linear", None, ["org/a"], ["normalize=1"]), "command line: --param normalize: expected true or false, found 1"),
    (
        ("linear", None, ["org/a"], ["normalise=true"]),
        "command line: --param normalise: unknown key; did you mean 'normalize'?",
    ),
    (
        ("linear", None, ["org/a"], ["normalize=true", "normalize=false"]),
        "command line: --param normalize: given twice",
    ),
    (
        ("linear", None, ["org/a", "me/a"], []),
        "command line: --model me/a: 2 models are called 'a'; give each a name: of its own",
    ),
    (("linear", None, [], []), "command line: --model: linear takes at least 1 model, found 0"),
]


@pytest.mark.parametrize(("flags", "message"), FAULTS, ids=lambda f: f if isinstance(f, str) else None)
def test_faults_name_the_flag(flags: tuple[str, str | None, list[str], list[str]], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_flags(*flags)
    assert caught.value.message == message


def test_fault_in_the_notation_of_a_parameter() -> None:
    with pytest.raises(RecipeError, match=r"^command line: --param t:1:6: YAML: "):
        Recipe.from_flags("linear", None, ["org/a"], ["t=[0, 1"])
    with pytest.raises(RecipeError, match="command line: --seed: must be at least 0, found -1"):
        Recipe.from_flags("linear", None, ["org/a"], seed=-1)
    with pytest.raises(UnknownMethodError):
        Recipe.from_flags("x", None, ["org/a"])


def test_import_is_light() -> None:
    code = (
        "import sys; from hubmerge.recipe import Recipe; "
        "heavy = {'torch', 'transformers', 'ruamel.yaml', 'huggingface_hub', 'numpy'} & sys.modules.keys(); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_examples_of_the_documentation_are_recipes() -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text(encoding="utf-8")
    own, foreign = [Recipe.loads(block) for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)]
    assert own.names == ("base-math", "code", "my-adapter")
    assert foreign.compat == "mergekit"
    documented = set(re.findall(r"`([a-z_]+)[`.]", text))
    assert Recipe.model_fields.keys() | Card.model_fields.keys() <= documented
    assert {*METHODS, *REFUSED_METHODS} <= documented
