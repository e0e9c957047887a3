"""Recipes and command lines that are wrong."""

from __future__ import annotations

from collections.abc import Callable

from tests.end_to_end.scene import Arguments, Case, Scene, with_flags

CORRECT = "correct it and run again"

RECIPE = """\
method: task_arithmetic
base: {base}
models:
  - repo: {a}
    name: one
    weight: 0.5
  - repo: {b}
    name: two
parameters:
  scale: 1.0
output:
  shard_size: 5GB
card:
  title: Two in one
"""


def edited(old: str, new: str) -> Callable[[Scene], Arguments]:
    """The recipe with one thing changed."""

    def arrange(scene: Scene) -> Arguments:
        assert RECIPE.count(old) == 1, old
        scene.write(scene.filled(RECIPE.replace(old, new)))
        return ["merge", scene.recipe, "--out", scene.out]

    return arrange


def text(content: str | bytes) -> Callable[[Scene], Arguments]:
    """A recipe file with this in it."""

    def arrange(scene: Scene) -> Arguments:
        scene.recipe.write_bytes(content.encode() if isinstance(content, str) else content)
        return ["merge", scene.recipe, "--out", scene.out]

    return arrange


def flags(*more: str, model: str = "{a}", method: str = "task_arithmetic") -> Callable[[Scene], Arguments]:
    """The merge as flags, and some more of them."""

    def arrange(scene: Scene) -> Arguments:
        model_flag = scene.filled(model)
        return ["merge", "--method", method, "--base", scene.base, "--model", model_flag, "--out", scene.out, *more]

    return arrange


def missing_recipe(scene: Scene) -> Arguments:
    return ["merge", scene.tmp / "nowhere.yaml", "--out", scene.out]


def folder_as_recipe(scene: Scene) -> Arguments:
    return ["merge", scene.base, "--out", scene.out]


def recipe_and_flags(scene: Scene) -> Arguments:
    return [*scene.merge(), "--base", "org/other", "--seed", "3"]


RECIPE_CASES = [
    Case(
        "unknown key",
        2,
        edited("base:", "bases:"),
        ("merge.yaml:2:1: bases: unknown key", "did you mean 'base'?"),
        CORRECT,
    ),
    Case(
        "unknown key of a model",
        2,
        edited("weight", "weigth"),
        ("merge.yaml:6:5: models[0].weigth: unknown key", "did you mean 'weight'?"),
        CORRECT,
    ),
    Case(
        "unknown parameter",
        2,
        edited("scale", "scael"),
        ("merge.yaml:10:3: parameters.scael: unknown key", "did you mean 'scale'?"),
        CORRECT,
    ),
    Case(
        "unknown key of the output",
        2,
        edited("shard_size", "shardsize"),
        ("merge.yaml:12:3: output.shardsize: unknown key", "did you mean 'shard_size'?"),
        CORRECT,
    ),
    Case(
        "unknown key of the card",
        2,
        edited("title", "titel"),
        ("merge.yaml:14:3: card.titel: unknown key", "did you mean 'title'?"),
        CORRECT,
    ),
    Case(
        "parameter of another method",
        2,
        edited("scale: 1.0", "density: 0.5"),
        ("merge.yaml:10:3", "density", "task_arithmetic", "scale"),
        CORRECT,
    ),
    Case(
        "duplicate names",
        2,
        edited("two", "one"),
        ("merge.yaml:8:11: models[1].name", "2 models are called 'one'", "give each a name: of its own"),
        CORRECT,
    ),
    Case(
        "weight is text",
        2,
        edited("0.5", "much"),
        ("merge.yaml:6:13: models[0].weight", "expected a number", "'much'"),
        CORRECT,
    ),
    Case(
        "weight is not finite",
        2,
        edited("0.5", ".nan"),
        ("merge.yaml:6:13: models[0].weight", "finite", "nan"),
        CORRECT,
    ),
    Case(
        "unknown method",
        2,
        edited("task_arithmetic", "task_arithmetics"),
        ("merge.yaml:1:9: method", "'task_arithmetics'", "did you mean 'task_arithmetic'?"),
        "known methods: awd, ",
    ),
    Case(
        "value out of range",
        2,
        edited("task_arithmetic", "ties\nseed: -1"),
        ("merge.yaml:2:7: seed", "at least 0", "-1"),
        CORRECT,
    ),
    Case(
        "unknown dtype",
        2,
        edited("base:", "dtype: bfloat\nbase:"),
        ("merge.yaml:2:8: dtype", "'bfloat'", "did you mean 'bfloat16'?"),
        CORRECT,
    ),
    Case(
        "tokenizer of nobody",
        2,
        edited("base:", "tokenizer: three\nbase:"),
        ("merge.yaml:2:12: tokenizer", "'three'", "known: base, one, two"),
        CORRECT,
    ),
    Case(
        "too many models",
        2,
        lambda s: s.merge(method="slerp", parameters={"t": 0.5}),
        ("merge.yaml:4:", "models: slerp takes 1 model, found 2"),
        CORRECT,
    ),
    Case(
        "size without a unit",
        2,
        edited("5GB", "5 pieces"),
        ("merge.yaml:12:15: output.shard_size", "'5 pieces'", "such as 5GB"),
        CORRECT,
    ),
    Case(
        "bundle by a merge method",
        2,
        edited("shard_size: 5GB", "format: bundle"),
        ("merge.yaml:12:11: output.format", "a bundle needs a codec as its method"),
        CORRECT,
    ),
    Case(
        "adapter of full checkpoints",
        1,
        edited("shard_size: 5GB", "format: adapter"),
        ("output.format adapter merges adapters only", "this is a full checkpoint"),
        "set `output: {format: full}`",
    ),
    Case(
        "a key twice",
        2,
        edited("base:", "method: ties\nbase:"),
        ("merge.yaml:2:1: method", "duplicate key; first given at 1:1"),
        CORRECT,
    ),
    Case(
        "revision of a folder",
        2,
        edited("name: one", "revision: main"),
        ("merge.yaml:4", "models[0]", "a local folder has no revision"),
        CORRECT,
    ),
    Case(
        "bad repo id",
        2,
        edited("{a}", "org/team/model"),
        ("merge.yaml:4:11: models[0].repo", "'org/team/model'", "write ./ before a folder"),
        CORRECT,
    ),
    Case("not YAML", 2, text("method: [ties\nbase: x\n"), ("merge.yaml:2:5: YAML:",), CORRECT),
    Case("tabs", 2, text("models:\n\t- repo: a\n"), ("merge.yaml:2:1: YAML:",), "indent with spaces"),
    Case("a list", 2, text("- ties\n"), ("merge.yaml:1:1", "a recipe is a mapping"), CORRECT),
    Case("empty file", 2, text(""), ("merge.yaml: the recipe is empty",), "method: and models:"),
    Case("not text", 2, text(b"method: \xff\xfe\x00"), ("merge.yaml:1", "not UTF-8", "0xff"), CORRECT),
    Case("too big", 2, text("#" * 1_000_001), ("merge.yaml: larger than 1,000,000 bytes",), CORRECT),
    Case(
        "no such recipe", 2, missing_recipe, ("{tmp}/nowhere.yaml: cannot be read: No such file or directory",), CORRECT
    ),
    Case("folder instead of a recipe", 2, folder_as_recipe, ("'{base}' is a directory",), "hubmerge merge --help"),
    Case(
        "recipe and flags",
        2,
        recipe_and_flags,
        ("--base, --seed given together with the recipe {tmp}/merge.yaml",),
        "put it into the recipe",
    ),
    Case("no recipe", 2, lambda s: ["merge", "--out", s.out], ("no recipe",), "give --method, --base and --model"),
    Case(
        "parameter without a value",
        2,
        flags("--param", "scale"),
        ("command line: --param scale: expected KEY=VALUE",),
        CORRECT,
    ),
    Case(
        "unknown parameter flag",
        2,
        flags("--param", "scael=1"),
        ("command line: --param scael: unknown key", "did you mean 'scale'?"),
        CORRECT,
    ),
    Case(
        "weight flag is text",
        2,
        flags(model="org/model:heavy"),
        ("--model org/model:heavy", "not a number: 'heavy'"),
        CORRECT,
    ),
    Case(
        "unknown method flag",
        2,
        flags(method="magic"),
        ("command line: --method", "'magic'"),
        "known methods: awd, ",
    ),
    Case(
        "bad shard size flag",
        2,
        flags("--shard-size", "big"),
        ("command line: --shard-size", "'big'", "such as 5GB"),
        CORRECT,
    ),
    Case(
        "bad memory size",
        2,
        with_flags("--max-memory", "lots"),
        ("--max-memory: expected a size", "'lots'", "such as 5GB"),
        "--help after a command",
    ),
    Case(
        "bad disk size",
        2,
        with_flags("--max-disk", "-5GB"),
        ("--max-disk: expected a size", "'-5GB'", "such as 5GB"),
        "--help after a command",
    ),
    Case(
        "no workers", 2, with_flags("--workers", "0"), ("--workers", "0 is not in the range"), "hubmerge merge --help"
    ),
    Case("unknown fetch", 2, with_flags("--fetch", "magic"), ("--fetch", "'magic'", "auto"), "hubmerge merge --help"),
    Case("unknown flag", 2, with_flags("--quietly"), ("No such option", "--quietly"), "hubmerge merge --help"),
    Case("no target", 2, lambda s: ["merge", s.described()], ("Missing option '--out'",), "hubmerge merge --help"),
    Case("unknown command", 2, lambda s: ["blend"], ("No such command 'blend'",), "hubmerge --help"),
]
