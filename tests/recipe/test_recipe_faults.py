"""What a wrong recipe is told: the exact words, and the exact place, which ``«`` marks in each text."""

from __future__ import annotations

import textwrap

import pytest

from hubmerge.errors import HubMergeError, RecipeError, UnknownMethodError
from hubmerge.recipe import Recipe

HEAD = "method: ties\nbase: org/base\n"
TWO = HEAD + "models:\n  - repo: org/a\n  - repo: org/b\n"
KEYS = "known: method, base, models, parameters, dtype, seed, tokenizer, vocab, heads, include, exclude, output, card"
UNSAFE = "cannot be a file name on every system; give a name: of letters, digits, '.', '_' and '-'"

# Each row: the text, then one line for each fault in the order of the file.
FAULTS: dict[str, tuple[str, ...]] = {
    # keys
    "the example of the documentation": (
        "method: linear\nmodels:\n  - repo: org/a\n    weight: 0.6\n  - repo: org/b\n    «weigth: 0.4\n",
        "models[1].weigth: unknown key; did you mean 'weight'?",
    ),
    "unknown key": (TWO + "«speed: 3\n", "speed: unknown key; did you mean 'seed'?"),
    "unknown key, nothing near": (TWO + "«zzz: 3\n", f"zzz: unknown key; {KEYS}"),
    "parameter at the top": (
        TWO + "«density: 0.2\n",
        "density: density is a parameter of ties; write it under parameters:",
    ),
    "unknown key in output": (TWO + "output: {«fromat: full}\n", "output.fromat: unknown key; did you mean 'format'?"),
    "unknown key in card": (TWO + "card:\n  «licence: mit\n", "card.licence: unknown key; did you mean 'license'?"),
    "unknown key in base": (
        "method: ties\nbase: {repo: org/base, «rev: x}\nmodels: [org/a]\n",
        "base.rev: unknown key; known: repo, revision",
    ),
    "unknown key of a model": (
        HEAD + "models:\n  - {repo: org/a, «nmae: x}\n",
        "models[0].nmae: unknown key; did you mean 'name'?",
    ),
    "duplicate key": (TWO + "seed: 1\n«seed: 2\n", "seed: duplicate key; first given at 6:1"),
    "duplicate key of a model": (
        HEAD + "models:\n  - repo: org/a\n    «repo: org/b\n",
        "models[0].repo: duplicate key; first given at 4:5",
    ),
    "missing method": ("«models: [org/a]\n", "method is required"),
    "missing models": ("«method: linear\n", "models is required"),
    "missing repo": (HEAD + "models:\n  - «name: x\n", "models[0]: repo is required"),
    # types
    "method is a number": ("method: «5\nmodels: [org/a]\n", "method: expected text, found 5"),
    "models is text": ("method: linear\nmodels: «org/a\n", "models: expected a list, found 'org/a'"),
    "models is empty": ("method: linear\nmodels: «[]\n", "models: linear takes at least 1 model, found 0"),
    "a model is a number": ("method: linear\nmodels: [«3]\n", "models[0]: expected a mapping, found 3"),
    "revision is a number": (
        HEAD + "models:\n  - repo: org/a\n    revision: «1234\n",
        "models[0].revision: expected text, found 1234",
    ),
    "seed with decimals": (TWO + "seed: «1.5\n", "seed: expected a whole number, found 1.5"),
    "seed is negative": (TWO + "seed: «-1\n", "seed: must be at least 0, found -1"),
    "seed beyond 64 bits": (
        TWO + "seed: «18446744073709551616\n",
        "seed: must be less than 18446744073709551616, found 18446744073709551616",
    ),
    "seed is true": (TWO + "seed: «true\n", "seed: expected a whole number, found true"),
    "unknown dtype": (
        TWO + "dtype: «bfloat\n",
        "dtype: 'bfloat' is not one of bfloat16, float16, float32, float64; did you mean 'bfloat16'?",
    ),
    "unknown vocab": (TWO + "vocab: «all\n", "vocab: 'all' is not one of strict, base, union"),
    "unknown heads": (TWO + "heads: «kep\n", "heads: 'kep' is not one of keep, drop; did you mean 'keep'?"),
    "unknown tokenizer": (TWO + "tokenizer: «c\n", "tokenizer: 'c' is not a model of this recipe; known: base, a, b"),
    "union tokenizer": (
        TWO + "tokenizer: «union\n",
        "tokenizer: 'union' is not a model of this recipe; known: base, a, b",
    ),
    "include is text": (TWO + "include: «model.*\n", "include: expected a list, found 'model.*'"),
    "include is empty": (
        TWO + "include: «[]\n",
        "include: no tensor would take part; leave include out, or write ['*']",
    ),
    "exclude has a number": (TWO + "exclude: [a, «1]\n", "exclude[1]: expected text, found 1"),
    "exclude has nothing": (TWO + "exclude: [«'']\n", "exclude[0]: expected text that is not empty, found ''"),
    "parameters is a list": (TWO + "parameters: «[1]\n", "parameters: expected a mapping, found a list"),
    "card is text": (TWO + "card: «hello\n", "card: expected a mapping, found 'hello'"),
    "language is a number": (TWO + "card: {language: [«1]}\n", "card.language[0]: expected text, found 1"),
    "summary is true": (TWO + "card: {title: yes, summary: «true}\n", "card.summary: expected text, found true"),
    # output
    "bundle by a method": (
        TWO + "output: {format: «bundle}\n",
        "output.format: a bundle needs a codec as its method, and ties is none",
    ),
    "rank of a full model": (
        TWO + "output: {rank: «8}\n",
        "output.rank: only a merged adapter has a rank; the format is full",
    ),
    "rank 0": (
        TWO + "output: {format: adapter, rank: «0}\n",
        "output.rank: must be at least 1, found 0",
    ),
    "unknown format": (TWO + "output: {format: «gguf}\n", "output.format: 'gguf' is not one of full, adapter, bundle"),
    "shard size": (
        TWO + "output: {shard_size: «5XB}\n",
        "output.shard_size: expected a size such as 5GB, 500MB or 4GiB, found '5XB'",
    ),
    "shard size of nothing": (
        TWO + "output: {shard_size: «0}\n",
        "output.shard_size: a shard needs at least one byte, found 0",
    ),
    # references and names
    "repo id with a space": (
        HEAD + "models: [«org/a b]\n",
        "models[0]: 'org/a b' is neither a repo id (org/name) nor a folder that exists; write ./ before a folder",
    ),
    "repo id with two slashes": (
        HEAD + "models:\n  - repo: «a/b/c\n",
        "models[0].repo: 'a/b/c' is neither a repo id (org/name) nor a folder that exists; write ./ before a folder",
    ),
    "revision that git would refuse": (
        HEAD + "models:\n  - repo: «org/a@x..y\n",
        "models[0].repo: 'x..y' cannot be a revision",
    ),
    "revision twice": (
        HEAD + "models:\n  - «repo: org/a@x\n    revision: y\n",
        "models[0]: the revision is given twice: 'x' in repo and 'y' as revision",
    ),
    "no revision after @": (
        "method: ties\nbase: «org/base@\nmodels: [org/a]\n",
        "base: no revision after the @ in 'org/base@'",
    ),
    "revision of a folder": (
        "method: ties\nbase: «{repo: ./x, revision: y}\nmodels: [org/a]\n",
        "base: a local folder has no revision",
    ),
    "same name twice": (
        HEAD + "models:\n  - repo: one/m\n  - repo: «two/m\n",
        "models[1].repo: 2 models are called 'm'; give each a name: of its own",
    ),
    "names that differ in case": (
        HEAD + "models:\n  - {repo: one/m, name: A}\n  - {repo: two/m, name: «a}\n",
        "models[1].name: 2 models are called 'a'; give each a name: of its own",
    ),
    "name that is a path": (
        HEAD + "models:\n  - {repo: org/a, name: «../a}\n",
        f"models[0].name: '../a' {UNSAFE}",
    ),
    "name that is a device": (
        HEAD + "models:\n  - {repo: org/a, name: «NUL}\n",
        f"models[0].name: 'NUL' {UNSAFE}",
    ),
    "folder whose name is no file name": (
        HEAD + "models:\n  - repo: «./my model\n",
        f"models[0].repo: 'my model' {UNSAFE}",
    ),
    "reserved name": (
        HEAD + "models:\n  - repo: «org/base\n",
        "models[0].repo: 'base' means something else in a recipe; give the model another name:",
    ),
    # methods and parameters
    "unknown method": ("method: «tis\nmodels: [org/a]\n", "method: unknown method 'tis'; did you mean 'ties'?"),
    "parameter of another method": (
        "method: linear\nmodels: [org/a]\nparameters: {«density: 0.5}\n",
        "parameters.density: density is not a parameter of linear; its parameters are normalize, weight",
    ),
    "misspelt parameter": (
        TWO + "parameters:\n  «densty: 0.5\n",
        "parameters.densty: unknown key; did you mean 'density'?",
    ),
    "unknown parameter of a model": (
        HEAD + "models:\n  - repo: org/a\n    «gamma: 1\n",
        "models[0].gamma: gamma is not a parameter of ties; its parameters per model are density, weight",
    ),
    "parameter in the wrong place": (
        HEAD + "models:\n  - repo: org/a\n    «scale: 1\n",
        "models[0].scale: scale holds for all models at once; write it under the recipe's parameters:",
    ),
    "parameter twice": (
        HEAD + "models:\n  - repo: org/a\n    weight: «1\n    parameters: {weight: 2}\n",
        "models[0].weight: given both here and under parameters",
    ),
    "out of range": (TWO + "parameters: {density: «1.5}\n", "parameters.density: must be at most 1.0, found 1.5"),
    "out of range, one model": (
        HEAD + "models:\n  - {repo: org/a, parameters: {density: «-0.5}}\n",
        "models[0].parameters.density: must be at least 0.0, found -0.5",
    ),
    "number as text": (TWO + "parameters: {scale: «'1'}\n", "parameters.scale: expected a number, found '1'"),
    "truth for a number": (TWO + "parameters: {scale: «true}\n", "parameters.scale: expected a number, found true"),
    "number for a truth": (
        "method: linear\nmodels: [org/a]\nparameters: {normalize: «1}\n",
        "parameters.normalize: expected true or false, found 1",
    ),
    "yes for a truth": (
        "method: linear\nmodels: [org/a]\nparameters: {normalize: «yes}\n",
        "parameters.normalize: expected true or false, found 'yes'",
    ),
    "unknown choice": (
        TWO + "parameters: {trim: «tensors}\n",
        "parameters.trim: 'tensors' is not one of tensor, model; did you mean 'tensor'?",
    ),
    "infinite parameter": (
        TWO + "parameters: {scale: «.inf}\n",
        "parameters.scale: expected a finite number, found inf",
    ),
    "weight that is no number": (
        HEAD + "models:\n  - {repo: org/a, weight: «.nan}\n  - {repo: org/b, weight: «heavy}\n"
        "  - {repo: org/c, weight: «true}\n"
        "  - {repo: org/d, weight: «'1'}\n  - {repo: org/e, weight: «-.INF}\n  - {repo: org/f, weight: «null}\n",
        "models[0].weight: expected a finite number, found nan",
        "models[1].weight: expected a number, found 'heavy'",
        "models[2].weight: expected a number, found true",
        "models[3].weight: expected a number, found '1'",
        "models[4].weight: expected a finite number, found -inf",
        "models[5].weight: expected a number, found nothing",
    ),
    "weights that cancel": (
        "method: linear\nmodels:\n  - {repo: org/a, weight: 1}\n  - {repo: org/b, weight: -1}\n"
        "parameters: «{normalize: true}\n",
        "parameters: the weights [1.0, -1.0] add up to 0 and cannot be normalised; change one or set normalize: false",
    ),
    # settings
    "setting is a mapping": (
        TWO + "parameters: {density: «{match: x, value: 1}}\n",
        "parameters.density: expected a value, a gradient [a, b] or a list of {match, value}, found a mapping",
    ),
    "entry without a value": (
        TWO + "parameters: {density: [«{match: x}]}\n",
        "parameters.density[0]: value is missing",
    ),
    "misspelt entry": (
        TWO + "parameters: {density: [{«mach: x, value: 1}]}\n",
        "parameters.density[0].mach: unknown key; did you mean 'match'?",
    ),
    "entry of another kind": (
        TWO + "parameters: {density: [{match: x, value: 1}, «0.5]}\n",
        "parameters.density[1]: expected {match, value} as in the other entries, found 0.5",
    ),
    "match is a number": (
        TWO + "parameters: {density: [{match: «3, value: 1}]}\n",
        "parameters.density[0].match: expected a glob such as '*.mlp.*', found 3",
    ),
    "entry that is never used": (
        TWO + "parameters: {density: [{value: 1}, «{match: x, value: 0}]}\n",
        "parameters.density[1]: never used: the entry before it matches every tensor",
    ),
    "entry out of range": (
        TWO + "parameters:\n  density:\n    - {match: x, value: 0.5}\n    - {match: y, value: «3}\n",
        "parameters.density[1].value: must be at most 1.0, found 3",
    ),
    "gradient of words": (
        TWO + "parameters: {trim: «[tensor, model]}\n",
        "parameters.trim: trim is not a number with decimals, so it cannot be a gradient",
    ),
    "gradient out of range": (
        TWO + "parameters: {density: [0, 0.5, «2]}\n",
        "parameters.density[2]: must be at most 1.0, found 2.0",
    ),
    "gradient in an entry": (
        TWO + "parameters: {density: [{match: x, value: [0, «7]}]}\n",
        "parameters.density[0].value[1]: must be at most 1.0, found 7.0",
    ),
    "gradient of nothing": (
        TWO + "parameters: {density: «[]}\n",
        "parameters.density: a gradient needs at least one value",
    ),
    "gradient with text": (
        TWO + "parameters: {density: [0, «'1']}\n",
        "parameters.density[1]: expected a number, found '1'",
    ),
    "gradient of gradients": (
        TWO + "parameters: {density: [0, «[1]]}\n",
        "parameters.density[1]: expected a number, found a list",
    ),
    # several
    "everything at once": (
        "method: ties\nbase: «b b\nmodels:\n  - {repo: org/a, «weigth: 1}\n"
        "parameters: {«denisty: 0.1, scale: «x}\nseed: «-1\n«fo: 1\n",
        "base: 'b b' is neither a repo id (org/name) nor a folder that exists; write ./ before a folder",
        "models[0].weigth: unknown key; did you mean 'weight'?",
        "parameters.denisty: unknown key; did you mean 'density'?",
        "parameters.scale: expected a number, found 'x'",
        "seed: must be at least 0, found -1",
        f"fo: unknown key; {KEYS}",
    ),
    # YAML
    "not a mapping": ("«- method: ties\n", "a recipe is a mapping of keys to values, this is not"),
    "tab": ("models:\n«\t- repo: org/a\n", r"YAML: found character '\t' that cannot start any token"),
    "unclosed list": (
        "models: [a, b\nmethod«: ties\n",
        "YAML: expected ',' or ']', but got ':'",
    ),
    "control character": ("method: a\nbase: «\x01\n", r"YAML: the character '\x01' is not allowed"),
    "python tag": (
        TWO + "seed: «!!python/object/apply:os.system ['true']\n",
        "seed: YAML tags are not allowed, found 'tag:yaml.org,2002:python/object/apply:os.system'",
    ),
    "local tag": (TWO + "seed: «!env HOME\n", "seed: YAML tags are not allowed, found '!env'"),
    "unknown alias": (TWO + "seed: «*x\n", "the alias *x has no anchor &x before it"),
    "alias of itself": ("models: &m [«*m]\n", "the alias *m has no anchor &m before it"),
    "second document": (
        "method: ties\n«---\nmethod: ties\n",
        "a second YAML document starts here; a recipe is one document",
    ),
    "key that is a list": ("«[a]: 1\n", "a key must be plain text"),
    "too deep": ("method: " + "[" * 32 + "«[\n", "nested more than 32 levels deep"),
}


def split_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without its marks, and the line and column of each."""
    places, clean = [], ""
    for char in text:
        if char == "«":
            places.append((clean.count("\n") + 1, len(clean) - clean.rfind("\n")))
        else:
            clean += char
    return clean, places


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named_where_it_stands(name: str) -> None:
    marked, *expected = FAULTS[name]
    text, places = split_marks(marked)
    with pytest.raises(RecipeError) as caught:
        Recipe.loads(text, where="merge.yaml")
    wanted = [f"merge.yaml:{line}:{column}: {m}" for (line, column), m in zip(places, expected, strict=True)]
    assert caught.value.message.splitlines() == wanted


def test_unknown_method_has_its_own_error_and_lists_the_methods() -> None:
    with pytest.raises(UnknownMethodError) as caught:
        Recipe.loads("method: linaer\nmodels: [org/a]\nseed: -1\n")
    assert caught.value.message.startswith("recipe.yaml:1:9: method: unknown method 'linaer'; did you mean 'linear'?\n")
    assert caught.value.hint is not None
    assert "known methods: " in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "null\n"])
def test_empty_file(text: str) -> None:
    with pytest.raises(RecipeError, match="the recipe is empty"):
        Recipe.loads(text)


def test_alias_bomb_is_stopped_early() -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{c}: &{c} [{', '.join([f'*{p}'] * 10)}]" for p, c in zip("abcdefgh", "bcdefghi", strict=True)]
    with pytest.raises(RecipeError, match="more than 50,000 values after expanding aliases"):
        Recipe.loads("\n".join(lines))


def test_ten_thousand_brackets() -> None:
    with pytest.raises(RecipeError, match="nested more than 32 levels deep"):
        Recipe.loads("method: " + "[" * 10_000)


def test_files(tmp_path) -> None:
    with pytest.raises(RecipeError, match=r"missing\.yaml: cannot be read: No such file or directory"):
        Recipe.load(tmp_path / "missing.yaml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        Recipe.load(tmp_path)
    large = tmp_path / "large.yaml"
    large.write_bytes(b"# x\n" * 250_001)
    with pytest.raises(RecipeError, match="larger than 1,000,000 bytes"):
        Recipe.load(large)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"method: ties\nbase: \xff\n")
    with pytest.raises(RecipeError, match=r"binary\.yaml:2: not UTF-8 text \(byte 0xff\)"):
        Recipe.load(binary)
    marked = tmp_path / "bom.yaml"
    marked.write_bytes(b"\xef\xbb\xbfmethod: linear\nmodels: [org/a]\n")
    assert Recipe.load(marked).method == "linear"


def test_plain_data_has_faults_without_positions() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_data({"method": "linear", "models": [{"repo": "org/a", "weigth": 1}]})
    assert caught.value.message == "recipe: models[0].weigth: unknown key; did you mean 'weight'?"


def test_positions_in_a_longer_file() -> None:
    text = textwrap.dedent("""\
        # A merge.
        method: ties            # Yadav et al.

        base:
          repo: org/base
          revision: main

        models:
          - repo: org/a

          - repo: >-
              org/b
            density:
              - match: "*.mlp.*"
                value: [0.1,
                        1.1]
        """)
    with pytest.raises(HubMergeError) as caught:
        Recipe.loads(text, "x.yaml")
    assert caught.value.message == "x.yaml:16:17: models[1].density[0].value[1]: must be at most 1.0, found 1.1"
