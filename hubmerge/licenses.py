"""Licences: what the parents' cards say, and what the child's card may therefore say; never more than they agree on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hubmerge.spec import PinnedModel, Plan

if TYPE_CHECKING:
    from hubmerge.recipe import Card

_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_NAME = re.compile(r"[\w][\w .,+()/-]{0,127}")
_ADDRESS = re.compile(r"https?://[A-Za-z0-9.-]+(:\d+)?(/[\w./~%+@=&?#:,-]*)?", re.ASCII)
_RELATIVE = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)*", re.ASCII)
# "unknown" is on the Hub's list; it says that nothing is known.
_SAYS_NOTHING = frozenset({"", "unknown", "none", "n/a"})


@dataclass(frozen=True, slots=True)
class License:
    """A licence as a card's front matter states it."""

    identifiers: tuple[str, ...]
    """As the Hub lists them, lower case, sorted; more than one if the card lists several."""
    name: str | None = None
    """What ``other`` is called."""
    link: str | None = None
    """Where its text is; an address, or a file in the model's own repository."""

    @property
    def is_other(self) -> bool:
        """Whether the identifier alone says nothing."""
        return "other" in self.identifiers

    @property
    def label(self) -> str:
        """How to call it in a sentence or a table."""
        text = " and ".join(self.identifiers)
        return f"{text} ({self.name})" if self.name else text

    def front_matter(self) -> dict[str, Any]:
        """The keys of a card."""
        one = self.identifiers[0] if len(self.identifiers) == 1 else list(self.identifiers)
        keys = {"license": one, "license_name": self.name, "license_link": self.link}
        return {k: v for k, v in keys.items() if v is not None}


@dataclass(frozen=True, slots=True)
class Decision:
    """The child's licence, None if its card must state none, and what its author and readers should know about it."""

    terms: License | None
    notes: tuple[str, ...]

    @property
    def license(self) -> str | None:
        """The licence in a few words."""
        return self.terms.label if self.terms else None


def declared(card: Mapping[str, Any]) -> License | None:
    """The licence that a card's front matter declares; None if it declares none, or nothing that can be understood."""
    value = card.get("license")
    values = value if isinstance(value, list) else [value]
    found = {v.strip().lower() for v in values if isinstance(v, str)} - _SAYS_NOTHING
    if not found or len(found) > 8 or not all(_IDENTIFIER.fullmatch(v) for v in found):
        return None
    name, link = card.get("license_name"), card.get("license_link")
    return License(
        tuple(sorted(found)),
        name.strip() if isinstance(name, str) and _NAME.fullmatch(name.strip()) else None,
        link if isinstance(link, str) and (_ADDRESS.fullmatch(link) or _RELATIVE.fullmatch(link)) else None,
    )


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a parent's card has to say."""

    label: str
    """How to call the parent in a sentence."""
    card: Mapping[str, Any]
    """Its front matter."""
    place: str | None
    """Address of its files; None for a local folder."""


def label_of(model: PinnedModel) -> str:
    """How to call a parent in a sentence; a local folder has only its name, for its path is nobody's business."""
    if not model.is_local:
        return model.repo
    return "the local base" if model.role == "base" else f"the local model {model.name}"


def files_of(repo: str | None, commit: str | None) -> str | None:
    """The address of a repository's files at a commit."""
    return f"https://huggingface.co/{repo}/blob/{commit}" if repo and commit else None


def derive_license(plan: Plan, card: Card) -> Decision:
    """What the merged model's card says; ``card`` is what the recipe's author says."""
    unique = {(m.repo, m.commit, m.root): m for m in (plan.base, *plan.models)}
    parents = [
        Declaration(label_of(m), m.card, None if m.is_local else files_of(m.repo, m.commit)) for m in unique.values()
    ]
    return decide(parents, card, "the merged model's card")


def decide(parents: Sequence[Declaration], card: Card, ours: str) -> Decision:
    """What a card may say about the licence, given the parents' cards.

    All parents declare one and the same licence: that one. Otherwise: none, and a note says why. What the recipe's
    author states in ``card`` is taken over, with a note where the parents say something else.

    Args:
        parents: The base and the models, each once.
        card: What the recipe's author says.
        ours: What notes call the card that is made.
    """
    own = declared(card.model_dump())
    agreed, reasons = _agreement([(p, declared(p.card)) for p in parents])
    if own is None:
        return Decision(agreed, tuple(f"{r}: {ours} states none" for r in reasons))
    if agreed is not None and not _same(own, agreed):
        reasons = [f"the parents declare {agreed.label}"]
    suffix = f"; the card states {own.label}, as the recipe says"
    return Decision(own, tuple(r + suffix for r in reasons))


def _agreement(stated: Sequence[tuple[Declaration, License | None]]) -> tuple[License | None, list[str]]:
    """The one licence that all declare, or the reasons why there is none."""
    reasons = [f"{p.label} {_silence(p.card)}" for p, found in stated if found is None]
    known = [(p, found) for p, found in stated if found is not None]
    if known and any(not _same(known[0][1], found) for _, found in known):
        each = ", ".join(f"{p.label}: {found.label}" for p, found in known)
        reasons.append(f"the parents declare different licences ({each})")
    elif len(stated) > 1 and known and known[0][1].is_other and not _identified(known[0][1]):
        reasons.append("the parents declare licence 'other' without saying which")
    if reasons or not known:
        return None, reasons
    return _absolute(*known[0]), []


def _silence(card: Mapping[str, Any]) -> str:
    value = card.get("license")
    if value is None or value == [] or (isinstance(value, str) and value.strip().lower() in _SAYS_NOTHING):
        return "declares no licence"
    return "declares a licence that is not an identifier"


def _identified(found: License) -> bool:
    return found.name is not None or (found.link is not None and _ADDRESS.fullmatch(found.link) is not None)


def _same(a: License, b: License) -> bool:
    if a.identifiers != b.identifiers:
        return False
    if not a.is_other:
        return True
    if a.name and b.name:
        return a.name.lower() == b.name.lower()
    return a.name == b.name and a.link == b.link


def _absolute(parent: Declaration, found: License) -> License:
    """A link into the parent's own repository, made to work from the child's."""
    if found.link is None or _ADDRESS.fullmatch(found.link):
        return found
    return License(found.identifiers, found.name, f"{parent.place}/{found.link}" if parent.place else None)
