"""Whether models may be merged and published together, under which licence, and with which duties.

A check of what cards and licence files say, by a table; not legal advice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hubmerge.errors import LicenseError
from hubmerge.licenses.duties import NOTICE_NAME, Duty, Situation, begins_with, duties_of
from hubmerge.licenses.stated import License, declared, is_absolute, is_same
from hubmerge.licenses.table import SHARE_ALIKE, Rule, rank_of, rule_of

if TYPE_CHECKING:
    from hubmerge.recipe import Card

Verdict = Literal["allowed", "unknown", "blocked"]
OWN_TEXTS = frozenset({"apache-2.0"})
"""The licences whose text comes with hubmerge: the Hub's most frequent one, and few repositories have it as a file."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """A parent, and what is known of its licence."""

    label: str
    """How to call the parent in a sentence."""
    terms: License | None
    place: str | None
    """Address of its files; None for a local folder."""
    silence: str = "declares no licence"
    """Why ``terms`` is None."""
    files: tuple[str, ...] = ()
    """Its licence and notice files."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What of its licence is in the table."""
        return tuple(r for i in self._identifiers if (r := rule_of(i)) is not None)

    @property
    def unread(self) -> str | None:
        """What is not known about its licence, as the end of a sentence; None if all is."""
        if self.terms is None:
            return self.silence
        unknown = [i for i in self._identifiers if (r := rule_of(i)) is None or r.kind == "unread"]
        if not unknown:
            return None
        if self.terms.is_other and not (self.terms.name or self.terms.link):
            return "declares licence 'other' without saying which"
        return f"is under {self.terms.label}, of which it is not known what it asks"

    @property
    def _identifiers(self) -> tuple[str, ...]:
        """Its licences; one that is called by a listed name is that one."""
        if self.terms is None:
            return ()
        name = (self.terms.name or "").lower()
        return tuple(name if i == "other" and rule_of(name) else i for i in self.terms.identifiers)


@dataclass(frozen=True, slots=True)
class Decision:
    """The check's outcome: may the result be published, what does its card state, what is asked of its publisher."""

    verdict: Verdict
    terms: License | None
    """The licence that the card states; None if it must state none."""
    reasons: tuple[str, ...] = ()
    """Why the verdict is not ``allowed``."""
    duties: tuple[Duty, ...] = ()
    notes: tuple[str, ...] = ()
    """What the card says beside the licence; the reasons are among them."""
    sentences: tuple[str, ...] = ()
    """What the card must display."""
    lines: tuple[str, ...] = ()
    """What the file NOTICE must hold."""
    own_texts: tuple[str, ...] = ()
    """The licences whose text hubmerge adds, as no parent has it."""
    agreed: bool = False
    """Whether every parent declares the licence that the card states."""
    by_author: bool = False
    """Whether the recipe's author states it."""

    @property
    def license(self) -> str | None:
        """The licence in a few words."""
        return self.terms.label if self.terms else None

    @property
    def source(self) -> str | None:
        """Where its text is, as the parents' cards or the table say."""
        if self.terms is None or self.terms.link is not None or len(self.terms.identifiers) > 1:
            return self.terms.link if self.terms else None
        rule = rule_of(self.terms.identifiers[0])
        return rule.source if rule else None

    @property
    def left(self) -> tuple[Duty, ...]:
        """What hubmerge does not see to."""
        return tuple(d for d in self.duties if d.done is None)

    @property
    def headline(self) -> str:
        """The outcome in a line."""
        told = self.license or "none can be stated"
        if self.verdict == "blocked":
            return f"{told}; the parents' licences do not allow the result to be published"
        if self.verdict == "unknown":
            return f"{told}; it is not known whether the result may be published"
        count = f"{len(self.duties)} dut{'y' if len(self.duties) == 1 else 'ies'}" if self.duties else "no duties"
        return f"{told}; may be published, with {count}"

    def record(self, *, accepted_risk: bool) -> dict[str, Any]:
        """What the lock keeps."""
        return {
            "verdict": self.verdict,
            "license": self.license,
            "reasons": list(self.reasons),
            "accepted_risk": accepted_risk and self.verdict == "blocked",
        }

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "verdict": self.verdict,
            "license": self.license,
            "reasons": list(self.reasons),
            "duties": [d.to_json() for d in self.duties],
            "notes": list(self.notes),
        }


def decide(parents: Sequence[Declaration], card: Card, ours: str, name: str | None = None) -> Decision:
    """Check a result against its parents' licences.

    Duties are the union over every parent. Whatever is not known makes the verdict ``unknown``, and nothing is stated
    for it unless all parents declare the very same. What the recipe's author states in ``card`` is taken over; it
    blocks if it drops what a parent asks.

    Args:
        parents: The base and the models; neither order nor repetition matters.
        card: What the recipe's author says.
        ours: What notes call the card that is made.
        name: The repository that the result is published in, if that is known.
    """
    own, parents = declared(card.model_dump()), list(dict.fromkeys(parents))
    rules = _rules(parents)
    doubts = _doubts(parents)
    blocks = _forbidden(parents)
    derived, problem = _derived(parents, rules)
    if problem is not None:
        (doubts if problem.startswith("it is not known") else blocks).append(problem)
    agreed = _agreed(parents)
    terms = None if blocks else agreed if doubts else derived
    if own is not None:
        blocks += _dropped(own, rules, terms)
        doubts += _unclear(own, rules)
    misnamed = _misnamed(rules, name)
    verdict: Verdict = "blocked" if blocks or misnamed else "unknown" if doubts else "allowed"
    reasons = (*blocks, *misnamed, *doubts)
    shown = own or terms
    is_shared = terms is not None and agreed is not None and is_same(terms, agreed)
    texts = _texts(parents)
    local = frozenset(r.id for p in parents if p.place is None for r in p.rules)
    situation = Situation(texts | OWN_TEXTS, None if blocks or shown is None else shown.label, name, local)
    return Decision(
        verdict=verdict,
        terms=shown,
        reasons=reasons,
        duties=duties_of(rules, situation),
        notes=_notes(parents, reasons, own, terms, ours, is_shared=is_shared),
        sentences=tuple(dict.fromkeys(r.sentence for r in rules if r.sentence)),
        lines=_lines(parents, rules, shown),
        own_texts=tuple(r.id for r in rules if "copy" in r.asks and r.id in OWN_TEXTS - texts),
        agreed=own is None and is_shared,
        by_author=own is not None,
    )


def refuse(found: Decision, *, accept_risk: bool, name: str) -> None:
    """End a publication that licences forbid, before anything is created.

    Args:
        found: The check's outcome.
        accept_risk: Whether the publisher takes it upon themselves; then the licence must be stated, too.
        name: The repository.

    Raises:
        LicenseError: It is forbidden.
    """
    if found.verdict != "blocked" or (accept_risk and found.by_author):
        return
    raise LicenseError(
        f"{name}: the parents' licences do not allow this to be published: {'; '.join(found.reasons)}",
        hint="change what it names (the repository's name, or the models); or, if you have the right to publish it "
        "nevertheless, state the licence with --license and give --accept-license-risk",
    )


# --- one licence for all ----------------------------------------------------------------------------------------


def _rules(parents: Sequence[Declaration]) -> list[Rule]:
    """The rules that hold, each once, in the table's order."""
    return sorted({r.id: r for p in parents for r in p.rules}.values(), key=lambda r: rank_of(r.id))


def _forbidden(parents: Sequence[Declaration]) -> list[str]:
    return [
        f"{p.label} is under {r.id}, which allows no derivatives, and a merge is one"
        for p in parents
        for r in p.rules
        if r.kind == "no-derivatives"
    ]


def _doubts(parents: Sequence[Declaration]) -> list[str]:
    """What is not known, once for all parents of which it is not."""
    who: dict[str, list[str]] = {}
    for p in parents:
        if p.unread:
            who.setdefault(p.unread, []).append(p.label)
    return [f"{_and(labels)}{': each' if len(labels) > 1 else ''} {what}" for what, labels in who.items()]


def _derived(parents: Sequence[Declaration], rules: Sequence[Rule]) -> tuple[License | None, str | None]:
    """The licence that satisfies all rules, or why there is none."""
    strict = [r for r in rules if r.kind == "restricted"]
    own_kind = [r for r in rules if r.kind == "share-alike"]
    if not own_kind:
        if len(strict) > 1:
            return License(("other",), "-and-".join(r.id for r in strict), NOTICE_NAME), None
        last = strict or [r for r in rules if r.kind == "permissive"]
        return (_as_declared(last[-1].id, parents) if last else None), None
    binding = [r for r in rules if r.kind != "no-derivatives"]
    present = [r.id for r in own_kind]
    candidates = [*present, *(c for c in SHARE_ALIKE if c not in present)]
    answers = {c: [r.allows(c) for r in binding] for c in candidates}
    for candidate, answer in answers.items():
        if all(answer):
            return _as_declared(candidate, parents), None
    each = _each(parents)
    if any(False not in answer for answer in answers.values()):
        return None, f"it is not known whether one licence satisfies all of the parents' ({each})"
    return None, f"no licence satisfies all of the parents' ({each})"


def _as_declared(identifier: str, parents: Sequence[Declaration]) -> License:
    """A licence with the link that a parent gives to its text."""
    for p in parents:
        if p.terms is not None and p.terms.identifiers == (identifier,):
            return _absolute(p, p.terms)
    return License((identifier,))


def _agreed(parents: Sequence[Declaration]) -> License | None:
    """The one licence that every parent declares, known or not."""
    stated = [p.terms for p in parents]
    first = stated[0] if stated else None
    if first is None or any(terms is None or not is_same(first, terms) for terms in stated):
        return None
    if len(stated) > 1 and first.is_other and first.name is None and not (first.link and is_absolute(first.link)):
        return None
    if any(i != "other" and rule_of(i) is None for i in first.identifiers):
        # The parents' own invention, which the Hub would not take from anybody else.
        first = License(("other",), first.name or "-and-".join(first.identifiers), first.link)
    return _absolute(parents[0], first)


def _absolute(parent: Declaration, found: License) -> License:
    """A link into the parent's own repository, made to work from the child's."""
    if found.link is None or is_absolute(found.link):
        return found
    return License(found.identifiers, found.name, f"{parent.place}/{found.link}" if parent.place else None)


def _each(parents: Sequence[Declaration]) -> str:
    return ", ".join(f"{p.label}: {p.terms.label}" for p in parents if p.terms is not None)


# --- what the author states -------------------------------------------------------------------------------------


def _dropped(own: License, rules: Sequence[Rule], terms: License | None) -> list[str]:
    """What the parents ask that the author's licence is known to drop."""
    if own.is_other or any((r := rule_of(i)) is None or r.kind == "unread" for i in own.identifiers):
        return []
    kept = set(own.identifiers)
    missing = [
        r.id
        for r in rules
        if (r.kind == "restricted" and r.id not in kept and not any(r.allows(i) for i in kept))
        or (r.kind == "share-alike" and not all(r.allows(i) is not False for i in kept))
    ]
    if not missing:
        return []
    return [f"{own.label} drops what {_and(missing)} ask{'s' * (len(missing) == 1)}"]


def _unclear(own: License, rules: Sequence[Rule]) -> list[str]:
    """Whether an author's licence that is not in the table keeps what the parents ask."""
    if all((r := rule_of(i)) is not None and r.kind != "unread" for i in own.identifiers):
        return []
    asked = [r.id for r in rules if r.kind in ("restricted", "share-alike")]
    return [f"it is not known whether {own.label} keeps what {_and(asked)} asks"] if asked else []


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _misnamed(rules: Sequence[Rule], name: str | None) -> list[str]:
    """Names that the parents' licences ask for, and that the result's is not."""
    if name is None:
        return []
    return [
        f"{r.id} asks for a name that begins with “{r.prefix}”, and {name.rpartition('/')[2]!r} does not"
        for r in rules
        if r.prefix is not None and not begins_with(name, r.prefix)
    ]


# --- what is told -----------------------------------------------------------------------------------------------


def _notes(
    parents: Sequence[Declaration],
    reasons: Sequence[str],
    own: License | None,
    terms: License | None,
    ours: str,
    *,
    is_shared: bool,
) -> tuple[str, ...]:
    """The reasons, and where the licence comes from if not all parents declare it."""
    found = list(reasons)
    if own is not None:
        if terms is not None and not is_same(own, terms):
            found.append(f"of the parents' licences follows {terms.label}")
        return tuple(f"{r}; the card states {own.label}, as the recipe says" for r in found)
    if terms is None:
        return tuple(f"{r}: {ours} states none" for r in found)
    if not is_shared:
        found.append(f"the parents declare different licences ({_each(parents)}), and {terms.label} satisfies them all")
    return tuple(found)


def _texts(parents: Sequence[Declaration]) -> frozenset[str]:
    """The licences that some parent has as a file."""
    return frozenset(r.id for p in parents if any(f.upper().startswith("LICEN") for f in p.files) for r in p.rules)


def _lines(parents: Sequence[Declaration], rules: Sequence[Rule], shown: License | None) -> tuple[str, ...]:
    """What NOTICE must hold: what licences ask for, and where the texts of several are that hold at once."""
    found = [r.line for r in rules if r.line]
    if shown is not None and shown.link == NOTICE_NAME:
        under: Mapping[str, list[str]] = {
            r.id: sorted(p.label for p in parents if any(q.id == r.id for q in p.rules)) for r in rules
        }
        found += [f"{_and(under[r.id])}: {r.id}, {r.source}" for r in rules if r.kind == "restricted"]
    return tuple(dict.fromkeys(found))
