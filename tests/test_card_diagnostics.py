"""What a card says of measured figures: a table, the plots with words for them, and nothing that a name could break."""

from __future__ import annotations

import dataclasses

import pytest
from markdown_it import MarkdownIt

from hubmerge.card import render_card
from tests.test_card import SECTIONS, facts, kinds, outline, section, split
from tests.test_plots import HOSTILE, diagnostics

TITLE = "How the tasks get along"


def card(*tasks: str, **options: bool) -> str:
    return split(render_card(dataclasses.replace(facts(), diagnostics=diagnostics(tasks, **options))))[1]


def test_the_section_stands_between_the_method_and_what_the_author_says() -> None:
    assert outline(card("a", "b")) == [*SECTIONS[:3], TITLE, *SECTIONS[3:]]
    assert TITLE not in render_card(facts())


def test_the_table_and_the_plots() -> None:
    told = section(card("red", "green"), TITLE)
    found = diagnostics(["red", "green"])
    for task in found.summary:
        numbers = (task.length, task.cosine, task.agreement, task.merged_cosine, task.distance)
        assert f"| {task.name} | {' | '.join(f'{n:.3g}'.replace('-', '−') for n in numbers)} |" in told
    for name in ("cosines", "interference", "spectrum"):
        assert f"](assets/{name}.svg)" in told
    assert "Singular values were computed of 9 of 12 weights" in told
    assert "in lengths of its task vector" in told


def test_one_task_without_spectra_has_a_table_and_no_plots() -> None:
    told = section(card("alone", spectra=False), TITLE)
    assert "| alone | " in told
    assert " | – | – | " in told
    assert "![" not in told


@pytest.mark.parametrize("names", [HOSTILE[:3], HOSTILE[3:], ("a](b)[c", "![x](y)", "| `a` |")])
def test_hostile_names_break_neither_table_nor_images(names: tuple[str, ...]) -> None:
    told = section(card(*names), TITLE)
    tokens = MarkdownIt("commonmark").enable("table").parse(told)
    inline = [t for token in tokens for t in (token.children or ())]
    assert [t.attrs["src"] for t in inline if t.type == "image"] == [
        f"assets/{n}.svg" for n in ("cosines", "interference", "spectrum")
    ]
    rows = sum(t.type == "tr_open" for t in tokens)
    cells = sum(t.type in ("td_open", "th_open") for t in tokens)
    assert (rows, cells) == (1 + len(names), 6 * (1 + len(names)))
    assert not {"link_open", "html_inline", "html_block"} & kinds(told)
