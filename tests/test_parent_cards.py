"""What is quoted of a parent's card: its own words about its limitations and how it is cited, and nothing but words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hubmerge
from hubmerge.markdown import quoted
from hubmerge.parent_cards import LEFT_OUT, MAX_BIBTEX_CHARS, MAX_QUOTED_CHARS, quotes, read_card
from hubmerge.recipe import Recipe
from hubmerge.spec import Quotes
from tests.end_to_end import support
from tests.hostile import TEXTS

COMMON = settings(deadline=None, derandomize=True, max_examples=25)


@pytest.mark.parametrize(
    ("body", "limitations"),
    [
        ("## Limitations\n\nNone known.\n", ("None known.",)),
        ("# m\n\nLimitations\n---\nA\nb.\n\n# Next\n\nNo.\n", ("A b.",)),
        ("## Bias, Risks, and Limitations\n\nA.\n\n### Recommendations\n\nB.\n\n## Training\n\nC.\n", ("A.", "B.")),
        ("### Limitations and bias\n\nA.\n\n## Use\n\nB.\n\n# Known limits\n\nC.\n", ("A.", "C.")),
        ("## Limitations\n\n- one\n- two\n  more\n\n1. three\n", ("- one", "- two more", "- three")),
        ("## Limitations\n\n**A** [b](https://x.example) `c` <b>d</b> ![e](f.png) &amp; \\*g\n", ("A b c d & *g",)),
        ("## Limitations\n\nA:\n\n```python\nx = 1\n```\n\n| a |\n| - |\n| b |\n\nC.\n", ("A:", LEFT_OUT, "C.")),
        ("## Limitations\n\n<!-- What is wrong? -->\n\n[More Information Needed]\n", ()),
        ("## Limitations\n\n<div>A</div>\n", ()),
        ("## Limitations\n\n> A.\n", ("A.",)),
        ("```\n## Limitations\n\nA.\n```\n", ()),
        ("> ## Limitations\n>\n> A.\n", ()),
        ("## Unlimited use\n\nA.\n", ()),
        ("It has limitations.\n", ()),
    ],
)
def test_limitations(body: str, limitations: tuple[str, ...]) -> None:
    assert quotes(body).limitations == limitations


def test_what_is_long_is_cut_between_words() -> None:
    words = "## Limitations\n\n" + "nothing works " * 500
    [only] = quotes(words).limitations
    assert only.endswith((f" works {LEFT_OUT}", f" nothing {LEFT_OUT}"))
    assert MAX_QUOTED_CHARS - 20 < len(only) <= MAX_QUOTED_CHARS + len(LEFT_OUT)
    paragraphs = quotes("## Limitations\n\n" + "It is wrong.\n\n" * 500).limitations
    assert sum(map(len, paragraphs)) <= MAX_QUOTED_CHARS + len(LEFT_OUT) + 1
    assert paragraphs[-1].endswith(LEFT_OUT)


def test_bibtex_is_taken_from_blocks_of_code() -> None:
    one, two = "@misc{a,\n  title = {A}\n}", "@article{b, year = 2024}"
    assert quotes(f"## Cite\n\n```bibtex\n{one}\n```\n\n~~~\n{two}\n~~~\n").bibtex == f"{one}\n\n{two}"
    assert quotes("    @misc{a}\n").bibtex == "@misc{a}"
    assert quotes(f"```\npip install x\n```\n\nSee @misc{{a}}.\n\n{two}\n").bibtex == ""
    long = "@misc{c, note = {" + "x" * MAX_BIBTEX_CHARS + "}}"
    assert quotes(f"```\n{long}\n```\n\n```\n{two}\n```\n").bibtex == two


@pytest.mark.parametrize(
    ("text", "front"),
    [
        ("---\nlicense: mit\n---\n## Limitations\n\nA.\n", {"license": "mit"}),
        ("---\n- a\n---\n## Limitations\n\nA.\n", {}),
        ("---\na: [\n---\n## Limitations\n\nA.\n", {}),
        ("## Limitations\n\nA.\n", {}),
    ],
)
def test_a_card_without_readable_front_matter_still_has_a_text(text: str, front: dict[str, str]) -> None:
    assert read_card(text) == (front, Quotes(("A.",)))


@COMMON
@given(st.lists(st.sampled_from(TEXTS), max_size=4))
def test_any_card_is_quoted_within_bounds(parts: list[str]) -> None:
    found = quotes("## Limitations\n\nIt is small.\n\n" + "\n\n".join(parts) + "\n\n## End\n")
    assert found.limitations[0] == "It is small."
    assert sum(map(len, found.limitations)) <= MAX_QUOTED_CHARS + len(LEFT_OUT) + 1
    assert len(found.bibtex) <= MAX_BIBTEX_CHARS
    assert all(line.startswith(">") for line in quoted(found.limitations).split("\n"))


def test_the_card_of_a_merge_quotes_the_cards_of_its_models(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "ft")):
        support.save(tmp_path / name, support.tensors(seed))
        limits = f"---\nlicense: mit\n---\n# {name}\n\n## Limitations\n\nThe {name} is *small*.\n"
        (tmp_path / name / "README.md").write_text(limits + "\n```\n@misc{" + name + "}\n```\n")
    data = {"method": "task_arithmetic", "base": str(tmp_path / "base"), "models": [str(tmp_path / "ft")]}
    hubmerge.merge(Recipe.from_data(data), tmp_path / "out")
    made = (tmp_path / "out" / "README.md").read_text()
    assert "\nthe local base:\n\n> The base is small.\n>\n> \\[…\\]\n" in made
    assert "\nthe local model ft:\n\n> The ft is small.\n>\n> \\[…\\]\n" in made
    assert "The card of the local base says how to cite the base:\n\n```bibtex\n@misc{base}\n```\n" in made
    assert "@misc{ft}" not in made


def test_quotations_keep_paragraphs_and_lists_apart() -> None:
    assert str(quoted(("A.", "- b", "- c", "D *e*.", ""))) == "> A.\n>\n> - b\n> - c\n>\n> D \\*e\\*."
