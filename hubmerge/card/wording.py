"""What the cards of merges and of bundles tell in the same way: the author's words and the parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hubmerge.spec import Algorithm

if TYPE_CHECKING:
    from hubmerge.recipe import Card


@dataclass(frozen=True, slots=True)
class Setting:
    """A row of the table of parameters."""

    name: str
    value: str
    meaning: str


def uses(words: Card) -> tuple[tuple[str, str], ...]:
    """What the recipe's author says the result is for, and what not."""
    return _given(("Intended use", words.intended_use), ("Out-of-scope use", words.out_of_scope_use))


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


def compact(value: Any) -> str:
    """A value of a recipe, as a reader would write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _given(*sections: tuple[str, str | None]) -> tuple[tuple[str, str], ...]:
    return tuple((title, text) for title, text in sections if text)
