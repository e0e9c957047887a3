"""What the cards of merges and of bundles tell in the same way: the author's words, parameters, the paper."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hubmerge.spec import Algorithm

if TYPE_CHECKING:
    from hubmerge.recipe import Card

_ARXIV = re.compile(r"arXiv[ :](\d{4}\.\d{4,5})")


@dataclass(frozen=True, slots=True)
class Setting:
    """A row of the table of parameters."""

    name: str
    value: str
    meaning: str


def sections(words: Card) -> tuple[tuple[str, str], ...]:
    """What the recipe's author says about the result's use."""
    return _given(
        ("Evaluation", words.evaluation),
        ("Intended use", words.intended_use),
        ("Out-of-scope use", words.out_of_scope_use),
        ("Limitations", words.limitations),
    )


def credits_of(words: Card) -> tuple[tuple[str, str], ...]:
    """What the recipe's author says about the people behind it."""
    return _given(("Authors", words.authors), ("Contact", words.contact), ("Acknowledgements", words.acknowledgements))


def settings_table(algorithm: Algorithm, given: Mapping[str, Any]) -> tuple[Setting, ...]:
    """The parameters that have a value, with their meaning."""
    return tuple(
        Setting(name, compact(given[name]), " ".join((info.description or "").split()))
        for name, info in algorithm.parameters.model_fields.items()
        if name in given
    )


def paper_url(algorithm: Algorithm) -> str | None:
    """Where a method's paper is."""
    found = _ARXIV.search(algorithm.paper)
    return f"https://arxiv.org/abs/{found[1]}" if found else None


def compact(value: Any) -> str:
    """A value of a recipe, as a reader would write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _given(*sections: tuple[str, str | None]) -> tuple[tuple[str, str], ...]:
    return tuple((title, text) for title, text in sections if text)
