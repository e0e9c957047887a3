"""A user's template: it replaces blocks of the card, and can do nothing else, whatever it tries."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import hubmerge
from hubmerge.card import render_card
from hubmerge.errors import PublishError, RecipeError, UsageError
from hubmerge.hub import Hub
from hubmerge.localhub import LocalHub
from hubmerge.recipe import Recipe
from hubmerge.remote import prepare
from hubmerge.templating import MAX_CARD_CHARS, environment
from tests.cards import SITUATIONS
from tests.end_to_end import support
from tests.test_card import SECTIONS, facts, kinds, outline, section, split

EXTENDS = '{% extends "model_card.md.jinja" %}\n'
BLOCKS = {
    "title", "summary", "description", "results", "usage", "inputs", "method", "parameters", "diagnostics", "uses",
    "reproduce", "provenance", "credits",
}  # fmt: skip


def card(folder: Path, template: str, **changes: Any) -> str:
    """The body of a card with this template."""
    path = folder / "mine.jinja"
    path.write_text(EXTENDS + template)
    words = {"template": str(path), **changes.pop("card", {})}
    return split(render_card(facts(card=words, **changes)))[1]


# --- what it can do ---------------------------------------------------------------------------------------------


def test_every_block_can_be_replaced(tmp_path: Path) -> None:
    source = (Path(__file__).parent.parent / "templates" / "model_card.md.jinja").read_text()
    assert set(re.findall(r"{% block (\w+) %}", source)) == BLOCKS
    for block in sorted(BLOCKS):
        mine = f"Mine: {block}.\n\n"
        assert mine in card(tmp_path, f"{{% block {block} %}}\n{mine}{{% endblock %}}") + "\n"


def test_a_block_can_be_added_to_and_left_out(tmp_path: Path) -> None:
    more = "{% block method %}{{ super() }}And *thanks*.\n\n{% endblock %}"
    body = card(tmp_path, more + "{% block usage %}{% endblock %}")
    assert outline(body) == SECTIONS[1:]
    assert "2212.04089" in section(body, "How it was merged")
    assert "And *thanks*.\n\n### Parameters" in body


def test_it_sees_the_facts_and_they_are_escaped(tmp_path: Path) -> None:
    template = (
        "{% block summary %}{% for p in facts.inputs %}{{ loop.index }}. {{ p.repo | upper }}, {{ p.license }} "
        "{{ loop.cycle('*a*', 'b') }}\n{% endfor %}\n{{ facts.title | e }} {{ range(3) | length }}\n\n{% endblock %}"
    )
    body = card(tmp_path, template, repo_id="me/![x](y)", ft={"card": {"license": "other", "license_name": "a_b"}})
    assert "1. ORG/BASE, mit \\*a\\*\n2. ORG/FT, other (a_b) b\n" in body
    assert "\n!\\[x\\](y) 3\n" in body
    assert "image" not in kinds(body)


def test_the_documentations_example(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "cards.md").read_text()
    [example] = re.findall(r"```jinja\n(.*?)```", page, flags=re.DOTALL)
    body = card(tmp_path, example.removeprefix(EXTENDS), card={"contact": "me@example.org"})
    assert "**story-merge**: 1 fine-tunes of org/base.\n" in body
    assert body.endswith("## Contact\n\nme@example.org\n\n\n## Thanks\n\nTo the authors of `base`, `ft`.\n")
    listed = re.findall(r"^\|.*\| (`.*`) \|$", page, re.MULTILINE)
    assert {name for row in listed for name in re.findall(r"\w+", row)} == BLOCKS


def test_what_a_licence_asks_to_be_shown_stays(tmp_path: Path) -> None:
    llama = {"card": {"license": "llama3.1"}}
    empty = "".join(f"{{% block {block} %}}{{% endblock %}}" for block in sorted(BLOCKS))
    body = card(tmp_path, empty, repo_id="me/Llama-3.1-x", base=llama, ft=llama)
    assert body.startswith("**Built with Llama**\n\n## Licence\n")


def test_it_lies_beside_the_recipe_and_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    for name, seed in (("base", 0), ("ft", 1)):
        support.save(tmp_path / name, support.tensors(seed))
    text = "method: task_arithmetic\nbase: ./base\nmodels: [./ft]\ncard: {title: T, template: mine.jinja}\n"
    (tmp_path / "sub" / "recipe.yaml").write_text(text)
    (tmp_path / "sub" / "mine.jinja").write_text(EXTENDS + "{% block summary %}Mine.\n\n{% endblock %}")
    monkeypatch.chdir(tmp_path)
    asked = Recipe.load("sub/recipe.yaml")
    assert asked.card.template == "sub/mine.jinja"
    assert Recipe.loads(asked.to_yaml()).card == asked.card
    hubmerge.merge(asked, tmp_path / "out")
    assert "# T\n\nMine.\n" in (tmp_path / "out" / "README.md").read_text()
    for name in ("hubmerge.yaml", "hubmerge.lock.json"):
        assert "mine.jinja" not in (tmp_path / "out" / name).read_text()
    plain = Recipe.loads(text.replace(", template: mine.jinja", ""))
    assert hubmerge.plan(plain).digest == hubmerge.plan(asked).digest
    assert asked == plain


# --- what it cannot do ------------------------------------------------------------------------------------------

FAULTS = {
    "{{ facts.nothing }}": "CardFacts object' has no attribute 'nothing'",
    "\n{% endfro %}": "unknown tag 'endfro'",
    "{{ 1 / 0 }}": "division by zero",
    "{{ facts.recipe.load('/etc/passwd') }}": "not safely callable",
    "{{ facts.recipe.parse_raw('x', content_type='a/pickle', allow_pickle=True) }}": (
        "not safely callable"
    ),
    "{{ facts.__class__ }}": "access to attribute '__class__'",
    "{{ ''.join(['a']) }}": "not safely callable",
    "{{ '{0.x}'.format(facts) }}": "not safely callable",
    "{{ facts.method.merge(1, 2, 3) }}": "not safely callable",
    "{% for i in range(100000) %}x{% endfor %}": "a range of 100000 numbers",
    "{{ 'x' * 1000000000 }}": "* is for numbers below a million",
    "{{ 9 ** 9999999 }}": "** is for numbers below a million",
    "{{ '%999999999d' % 1 }}": "% is for numbers below a million",
    "{{ '<b>' | safe }}": "No filter named 'safe'",
    "{{ 1 | format }}": "No filter named 'format'",
    "{{ cycler }}": "'cycler' is undefined",
    "{{ lipsum(9) }}": "'lipsum' is undefined",
    "{% include '/etc/passwd' %}": "'/etc/passwd'",
    "{% include '../pyproject.toml' %}": "../pyproject.toml",
    "{% import 'mine.jinja' as m %}": "mine.jinja",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "maximum recursion depth exceeded",
    "{% for a in range(999) %}{% for b in range(999) %}" + "x" * 200 + "{% endfor %}{% endfor %}": (
        f"more than {MAX_CARD_CHARS:,} characters"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("template", "message"), FAULTS.items())
def test_a_fault_is_told_with_its_line(template: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as told:
        card(tmp_path, f"\n\n{{% block summary %}}{template}{{% endblock %}}")
    assert re.match(rf"{re.escape(str(tmp_path / 'mine.jinja'))}(:[45])?: ", told.value.message)
    assert "docs/cards.md" in str(told.value.hint)


def test_lines_are_the_files_own(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"mine\.jinja:6: division by zero"):
        card(
            tmp_path, "{% block uses %}\n{{ super() }}\n{% for i in (1, 0) %}\n\n{{ 1 / i }}{% endfor %}{% endblock %}"
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# Mine\n", 'mine.jinja:1: expected {% extends "model_card.md.jinja" %}'),
        (b"{% extends 'bundle_card.md.jinja' %}", "mine.jinja:1: expected {% extends"),
        (b"{% extends facts.title %}", "mine.jinja:1: expected {% extends"),
        (b"\n\xff", "mine.jinja:2: not UTF-8 text"),
        (b" " * 1_000_001, "this is not a template"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_no_template(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(message)):
        render_card(facts(card={"template": str(path)}))


def test_filters_that_let_text_pass_for_markdown_are_not_there() -> None:
    filters = environment().filters
    assert {"safe", "forceescape", "tojson", "urlize", "xmlattr"}.isdisjoint(filters)
    assert str(filters["e"]("*a*")) == str(filters["escape"]("*a*")) == "\\*a\\*"


def test_a_bundle_has_no_template() -> None:
    data = {
        "method": "emr", "base": "o/b", "models": ["o/a", "o/c"], "output": {"format": "bundle"},
        "card": {"template": "x"},
    }  # fmt: skip
    with pytest.raises(RecipeError, match=re.escape("card.template: a bundle's card is made anew")):
        Recipe.from_data(data)
    assert "super()" not in SITUATIONS["bundle"]()


def test_a_job_does_not_see_it(hub: LocalHub) -> None:
    data = {"method": "linear", "models": ["o/a"], "card": {"template": "mine.jinja"}}
    with pytest.raises(UsageError, match=re.escape("mine.jinja is a file on this machine")):
        prepare(Recipe.from_data(data), (), Hub())


# --- before anything is done ------------------------------------------------------------------------------------


def test_a_bad_template_ends_a_merge_before_it_begins(tmp_path: Path) -> None:
    for name, seed in (("base", 0), ("ft", 1)):
        support.save(tmp_path / name, support.tensors(seed))
    (tmp_path / "mine.jinja").write_text(EXTENDS + "{% block uses %}{{ nothing }}{% endblock %}")
    words = {"template": str(tmp_path / "mine.jinja")}
    base, models = str(tmp_path / "base"), [str(tmp_path / "ft")]
    data = {"method": "task_arithmetic", "base": base, "models": models, "card": words}
    before = support.folder_state(tmp_path)
    with pytest.raises(UsageError, match=r"mine\.jinja:2: 'nothing' is undefined"):
        hubmerge.merge(Recipe.from_data(data), tmp_path / "out")
    assert support.folder_state(tmp_path) == before


def test_what_the_hub_does_not_accept_is_not_begun(hub: LocalHub, tmp_path: Path) -> None:
    for name, seed in (("base", 0), ("ft", 1)):
        support.save(tmp_path / name, support.tensors(seed))
    words = {"license": "no-such-licence"}
    base, models = str(tmp_path / "base"), [str(tmp_path / "ft")]
    data = {"method": "task_arithmetic", "base": base, "models": models, "card": words}
    hub.requests.clear()
    with pytest.raises(PublishError, match=re.escape("must be one of the identifiers the Hub knows")):
        hubmerge.push(Recipe.from_data(data), "local/merged")
    assert not hub.requests.find(None, "/api/repos/create|/preupload|/commit|lfs")
    assert hub.requests.find("POST", "/api/validate-yaml")
