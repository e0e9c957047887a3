"""What strangers might send: everything but repositories of the Hub is refused, with words that a page can show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hubmerge.errors import BudgetError, UsageError
from hubmerge.space.orders import Order
from hubmerge.space.safety import Limits, check_order, check_recipe, check_sizes

LIMITS = Limits()
GOOD: dict[str, Any] = {"method": "task_arithmetic", "base": "org/base", "models": ["org/a", "org/b@v1"]}
TOKEN = "hf_" + "aB3" * 12


def text(**keys: Any) -> str:
    return json.dumps(GOOD | keys)


HOSTILE = {
    "base: absolute path": text(base="/etc/passwd"),
    "base: home": text(base="~/models"),
    "base: somebody's home": text(base="~root/models"),
    "base: relative path": text(base="./base"),
    "base: parent": text(base="../base"),
    "base: dot": text(base="."),
    "base: two dots": text(base=".."),
    "base: a folder that exists here": text(base="hubmerge"),
    "base: climbs": text(base="org/../../etc"),
    "base: a file's address": text(base="file:///etc/passwd"),
    "base: another host": text(base="https://evil.example/org/base"),
    "base: another host without a scheme": text(base="evil.example/org/base"),
    "base: a metadata service": text(base="http://169.254.169.254/latest"),
    "base: s3": text(base="s3://bucket/base"),
    "base: hf scheme": text(base="hf://org/base"),
    "base: backslashes": text(base="C:\\models\\base"),
    "base: a query": text(base="org/base?token=x"),
    "base: percent": text(base="org%2f..%2fbase"),
    "base: null": text(base="org/base\0"),
    "base: newline": text(base="org/base\nx"),
    "base: spaces": text(base="org/base --flag"),
    "base: substitution": text(base="$(id)"),
    "base: revision climbs": text(base="org/base@../../x"),
    "base: revision is a flag": text(base="org/base@--upload-pack=x"),
    "base: revision with a newline": text(base="org/base@v1\r\nX-Header: y"),
    "model: absolute path": text(models=["org/a", "/models/b"]),
    "model: path in a mapping": text(models=["org/a", {"repo": "./b", "name": "b"}]),
    "model: hidden folder": text(models=["org/a", ".ssh/b"]),
    "model: name climbs": text(models=["org/a", {"repo": "org/b", "name": "../b"}]),
    "model: name of a device": text(models=["org/a", {"repo": "org/b", "name": "con"}]),
    "mergekit: a path": json.dumps({
        "merge_method": "linear", "models": [{"model": "/models/a", "parameters": {"weight": 1}}], "dtype": "float16",
    }),
    "mergekit: an adapter in a path": json.dumps({
        "merge_method": "linear", "models": [{"model": "org/a+/models/b", "parameters": {"weight": 1}}],
    }),
    "card: a template": text(card={"template": "/etc/passwd"}),
    "card: a template beside": text(card={"template": "card.md.jinja"}),
    "card: a token": text(card={"description": f"my token is {TOKEN}"}),
    "card: a token behind escapes": text(card={"description": "X"}).replace("X", TOKEN.replace("h", "\\u0068")),
    "card: text direction": text(card={"title": "\u202egnp.exe"}),
    "card: escape sequences": text(card={"title": "\x1b[31m"}),
    "too many models": text(models=[f"org/m{i}" for i in range(17)]),
    "too many patterns": text(include=[f"*{i}*" for i in range(101)]),
    "too many rules": text(parameters={"scale": [{"match": f"*{i}*", "value": 1} for i in range(101)]}),
    "a shard for every byte": text(output={"shard_size": 1}),
    "a recipe without end": text(card={"description": "x" * 60_000}),
    "yaml: aliases that explode": "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{n}: &{n} [{', '.join(['*' + p] * 9)}]\n" for p, n in zip("abcdefg", "bcdefgh", strict=True)),
    "yaml: an object": "!!python/object/apply:os.system [id]",
    "yaml: a tag": "method: !!python/name:os.system\nbase: org/base\nmodels: [org/a]",
    "yaml: nested without end": "[" * 5000,
    "yaml: two documents": text() + "\n---\n" + text(),
    "yaml: nothing": "",
    "yaml: a list": "[1, 2]",
    "an unknown key": text(trust_remote_code=True),
    "an unknown method": text(method="os.system"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_refused_in_words(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hubmerge").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refused:
        check_recipe(HOSTILE[name], LIMITS)
    assert refused.value.message
    assert refused.value.hint
    assert TOKEN not in str(refused.value)


def test_a_decent_recipe_is_taken() -> None:
    found = check_recipe(text(card={"description": "Grüße ✨\n\tund mehr", "title": "x"}, dtype="bfloat16"), LIMITS)
    assert [str(m.ref) for m in found.models] == ["org/a", "org/b@v1"]
    assert check_recipe(found.to_yaml(), LIMITS) == found


MERGE = Order("merge", "ann/merged", recipe=text())
BUNDLE = json.dumps({"method": "tall_mask", "base": "org/base", "models": ["org/a"], "output": {"format": "bundle"}})
ADD = Order("bundle add", "ann/bundle", model="org/c")
RETRIEVE = Order("bundle retrieve", "ann/out", bundle="org/bundle@v2", task="c")
REFUSED = {
    "no target": replace(MERGE, target=""),
    "target without an owner": replace(MERGE, target="merged"),
    "target is a path": replace(MERGE, target="../merged"),
    "target is absolute": replace(MERGE, target="/tmp/merged"),
    "target climbs": replace(MERGE, target="ann/.."),
    "target with a revision": replace(MERGE, target="ann/merged@main"),
    "target elsewhere": replace(MERGE, target="https://e.example/x"),
    "target of a data set": replace(MERGE, target="datasets/ann/merged"),
    "target is a flag": replace(MERGE, target="-o/merged"),
    "target with a newline": replace(MERGE, target="ann/merged\n"),
    "a merge of a bundle's recipe": replace(MERGE, recipe=BUNDLE),
    "a bundle of a merge's recipe": replace(MERGE, kind="bundle create"),
    "nothing that is known": replace(MERGE, kind="shell"),  # type: ignore[arg-type]
    "a licence with a token": replace(ADD, license=TOKEN),
    "add: a path": replace(ADD, model="/models/c"),
    "add: another host": replace(ADD, model="https://e.example/c"),
    "add: nothing": replace(ADD, model=""),
    "add: a name that climbs": replace(ADD, task="../c"),
    "remove: nothing": replace(ADD, kind="bundle remove"),
    "remove: a path": replace(ADD, kind="bundle remove", task="/etc/passwd"),
    "retrieve: from a path": replace(RETRIEVE, bundle="./bundle"),
    "retrieve: from nothing": replace(RETRIEVE, bundle=""),
    "retrieve: a task that climbs": replace(RETRIEVE, task="../../c"),
    "retrieve: no task": replace(RETRIEVE, task=""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_order_is_refused_in_words(name: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_order(REFUSED[name], LIMITS)
    assert refused.value.hint
    assert TOKEN not in str(refused.value)


def test_decent_orders_are_taken_and_hold_no_more_than_they_need() -> None:
    merge = check_order(replace(MERGE, model="org/x", task="y"), LIMITS)
    assert (merge.model, merge.task) == ("", "")
    assert merge.recipe == check_recipe(MERGE.recipe, LIMITS).to_yaml()
    assert check_order(replace(MERGE, kind="bundle create", recipe=BUNDLE), LIMITS).kind == "bundle create"
    for order in (ADD, replace(ADD, kind="bundle remove", task="c"), RETRIEVE):
        assert check_order(replace(order, recipe="x"), LIMITS) == order


@pytest.mark.parametrize(("what", "sizes"), [("reads", (11, 1, 1)), ("writes", (1, 11, 1)), ("memory", (1, 1, 6))])
def test_what_is_too_large_is_refused_by_what_is_too_large(what: str, sizes: tuple[int, int, int]) -> None:
    limits = Limits(read_bytes=10, write_bytes=10, memory_bytes=10, workers=2)
    check_sizes(10, 10, 5, limits)
    with pytest.raises(BudgetError, match=what):
        check_sizes(*sizes, limits)
