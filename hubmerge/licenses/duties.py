"""What publishing asks: the union over all parents, and for each duty whether hubmerge sees to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hubmerge.licenses.table import RANK, Rule

NOTICE_NAME = "NOTICE"


@dataclass(frozen=True, slots=True)
class Duty:
    """Something that licences ask of whoever publishes the result."""

    kind: str
    of: tuple[str, ...]
    """The licences that ask it."""
    text: str
    """As the end of a sentence that begins with "You must"."""
    done: str | None
    """How hubmerge sees to it; None leaves it to whoever publishes."""

    def __str__(self) -> str:
        return f"{self.text} ({', '.join(self.of)}): {self.done or 'left to you'}"

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"of": list(self.of)}


@dataclass(frozen=True, slots=True)
class Situation:
    """What decides whether a duty is seen to."""

    texts: frozenset[str]
    """The licences whose text goes with the result."""
    terms: str | None
    """What the result's card states."""
    name: str | None
    """What the result is called, as far as that is known."""
    local: frozenset[str] = frozenset()
    """The licences that some local folder is under, whose authors the card cannot link to."""


_Told = tuple[str, str | None]
# Each asks the same, whichever licences ask it.
_COMMON: Mapping[str, Callable[[Sequence[Rule], Situation], _Told]] = {
    "terms": lambda rules, s: (
        f"publish the result under {s.terms or 'a licence that satisfies all of them'}, with nothing added to it",
        "the card states it" if s.terms else None,
    ),
    "notices": lambda rules, s: (
        "keep the parents' copyright and licence notices",
        "their licence and notice files are copied, where they have any",
    ),
    "credit": lambda rules, s: (
        "name the parents' authors",
        None if any(r.id in s.local for r in rules) else "the card names and links every parent",
    ),
    "changes": lambda rules, s: ("say that the models were changed", "the card says so"),
    "source": lambda rules, s: (
        "give what the result is made from",
        "the recipe and the lock beside it name every input and step",
    ),
    "rename": lambda rules, s: ("not use a name that the parents' authors reserve", None),
}


def duties_of(rules: Sequence[Rule], situation: Situation) -> tuple[Duty, ...]:
    """All duties, each once, in a fixed order."""
    found = [_copy(rule, situation) for rule in rules if "copy" in rule.asks]
    for kind, tell in _COMMON.items():
        asking = [r for r in rules if kind in r.asks]
        if asking:
            text, done = tell(asking, situation)
            found.append(Duty(kind, _ids(asking), text, done))
    for limit in sorted({limit for r in rules for limit in r.limits}):
        asking = [r for r in rules if limit in r.limits]
        found.append(Duty("limit", _ids(asking), f"pass on: {limit}", "the card says so"))
    for prefix in sorted({r.prefix for r in rules if r.prefix}):
        told = f"give the result a name that begins with “{prefix}”"
        done = f"{situation.name} does" if situation.name and begins_with(situation.name, prefix) else None
        found.append(Duty("name", _ids([r for r in rules if r.prefix == prefix]), told, done))
    for sentence in sorted({r.sentence for r in rules if r.sentence}):
        asking = [r for r in rules if r.sentence == sentence]
        found.append(Duty("display", _ids(asking), f"display “{sentence}”", "the card does"))
    asking = [r for r in rules if r.line]
    if asking:
        found.append(
            Duty("notice", _ids(asking), "give the licence's notice along", f"it stands in the file {NOTICE_NAME}")
        )
    return tuple(found)


def begins_with(name: str, prefix: str) -> bool:
    """Whether a repository's name begins with the words; it cannot have spaces, so what separates them is free."""
    plain = re.sub(r"[\W_]", "", name.rpartition("/")[2].lower())
    return plain.startswith(re.sub(r"[\W_]", "", prefix.lower()))


def _ids(rules: Sequence[Rule]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(r.id for r in sorted(rules, key=lambda r: RANK.get(r.id, len(RANK)))))


def _copy(rule: Rule, situation: Situation) -> Duty:
    """The text of a licence, which every copy of the model must come with."""
    if rule.id in situation.texts:
        return Duty("copy", (rule.id,), "give the licence's text along", "it is among the files")
    text = f"give the licence's text along, which no parent has as a file; it is at {rule.source}"
    return Duty("copy", (rule.id,), text, None)
