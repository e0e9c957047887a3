"""What a model's licence is: what its card declares, and what the licence files beside it turn out to be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hubmerge.licenses.table import RULES, rank_of, rule_of
from hubmerge.licenses.texts import identify

_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_EXPRESSION = re.compile(r"[A-Za-z0-9.+\-() ]{1,256}", re.ASCII)
_OPERATOR = re.compile(r"[ )](and|or|with)[ (]", re.IGNORECASE)
_NAME = re.compile(r"[\w][\w .,+()/-]{0,127}")
_ADDRESS = re.compile(r"https?://[A-Za-z0-9.-]+(:\d+)?(/[\w./~%+@=&?#:,-]*)?", re.ASCII)
_RELATIVE = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)*", re.ASCII)
# "unknown" is on the Hub's list; it says that nothing is known.
_SAYS_NOTHING = frozenset({"", "unknown", "none", "n/a"})
_MAX_DECLARED = 8
_TEXT_NAME = re.compile(r"LICEN[SC]E[^/]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class License:
    """A licence as a card's front matter states it."""

    identifiers: tuple[str, ...]
    """The Hub's, or SPDX's where the Hub lists none; lower case, sorted; of more than one, all hold."""
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
        """The keys of a card; the Hub takes only what it lists, so SPDX's others become a named ``other``."""
        # What nobody lists is a mistake, which the Hub is left to name.
        listed = [i for i in self.identifiers if i in RULES or i == "other" or rule_of(i) is None]
        if len(listed) < len(self.identifiers):
            return {"license": "other", "license_name": self.name or "-and-".join(self.identifiers)} | self._link()
        one = listed[0] if len(listed) == 1 else listed
        return {"license": one} | ({"license_name": self.name} if self.name else {}) | self._link()

    def _link(self) -> dict[str, str]:
        return {"license_link": self.link} if self.link else {}


def declared(card: Mapping[str, Any]) -> License | None:
    """The licence that a card's front matter declares; None if it declares none, or nothing that can be understood."""
    value = card.get("license")
    values = value if isinstance(value, list) else [value]
    if len(values) > _MAX_DECLARED:
        return None
    found: set[str] = set()
    for stated in values:
        read = _identifiers(stated) if isinstance(stated, str) and stated.strip().lower() not in _SAYS_NOTHING else ()
        if read is None:
            return None
        found |= set(read)
    if not found:
        return None
    name, link = card.get("license_name"), card.get("license_link")
    return License(
        tuple(sorted(found)),
        name.strip() if isinstance(name, str) and _NAME.fullmatch(name.strip()) else None,
        link if isinstance(link, str) and (_ADDRESS.fullmatch(link) or _RELATIVE.fullmatch(link)) else None,
    )


def _identifiers(text: str) -> tuple[str, ...] | None:
    """One identifier, or those of an SPDX expression; None if it is neither."""
    text = text.strip()
    if _IDENTIFIER.fullmatch(text.lower()):
        return (text.lower(),)
    if not (_EXPRESSION.fullmatch(text) and _OPERATOR.search(text)):
        return None
    from license_expression import get_spdx_licensing

    try:
        parsed = get_spdx_licensing().parse(text)
        return tuple(sorted(_chosen(parsed)))
    except Exception:  # what the parser raises is not documented; whatever it does not understand is no licence
        return None


def _chosen(parsed: Any) -> frozenset[str]:
    """All licences of AND; of OR, the option that asks least; an exception only permits more, and is left out."""
    from license_expression import AND, OR, LicenseWithExceptionSymbol

    if isinstance(parsed, AND):
        return frozenset().union(*(_chosen(part) for part in parsed.args))
    if isinstance(parsed, OR):
        return min((_chosen(part) for part in parsed.args), key=lambda ids: sorted(map(rank_of, ids), reverse=True))
    if isinstance(parsed, LicenseWithExceptionSymbol):
        return _chosen(parsed.license_symbol)
    name = str(parsed.key).lower()
    if not _IDENTIFIER.fullmatch(name):
        raise ValueError(f"{name!r} is not an identifier")
    return frozenset({name})


def stated(card: Mapping[str, Any], texts: Mapping[str, bytes]) -> License | None:
    """A model's licence; where its card and its licence files say different things, both hold.

    Args:
        card: The front matter of its card.
        texts: Its licence and notice files, by their path.
    """
    found = declared(card)
    read = {i for path, text in texts.items() if _TEXT_NAME.fullmatch(path) and (i := identify(text)) is not None}
    if not read:
        return found
    if found is None:
        return License(tuple(sorted(read)))
    # A licence that the Hub does not list has its text in that file, and here the text is a listed one's.
    before = set(found.identifiers)
    if before == {"other"} and found.name is None and (found.link is None or found.link in texts):
        return License(tuple(sorted(read)))
    return License(tuple(sorted(before | read)), found.name, found.link)


def silence(card: Mapping[str, Any], files: Iterable[str]) -> str:
    """Why a model's licence is not known, as the end of a sentence about it; ``files`` are its licence files."""
    value = card.get("license")
    said = "declares a licence that is not an identifier"
    if value is None or value == [] or (isinstance(value, str) and value.strip().lower() in _SAYS_NOTHING):
        said = "declares no licence"
    unread = next((path for path in sorted(files) if _TEXT_NAME.fullmatch(path)), None)
    return f"{said}, and its {unread} is not one that is recognised" if unread else said


def is_absolute(link: str) -> bool:
    """Whether a link is an address, and not a file of the model's repository."""
    return _ADDRESS.fullmatch(link) is not None


def is_same(a: License, b: License) -> bool:
    """Whether two models have the same licence."""
    if a.identifiers != b.identifiers:
        return False
    if not a.is_other:
        return True
    if a.name and b.name:
        return a.name.lower() == b.name.lower()
    return a.name == b.name and a.link == b.link
