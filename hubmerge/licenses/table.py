"""The table of licences: what each asks of whoever publishes a model that was made from others.

A reading of the licences' texts, to which every row links, by people who are no lawyers. The Hub's identifiers are all
here; other SPDX identifiers are sorted by their category in the ScanCode LicenseDB, which license-expression carries.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

Kind = Literal["permissive", "share-alike", "restricted", "no-derivatives", "unread"]
Ask = Literal["notices", "copy", "credit", "changes", "source", "rename", "terms"]

USE_POLICY = "its use policy holds for everybody who uses the result"
NON_COMMERCIAL = "non-commercial use only"
RESEARCH = "non-commercial research only"
NO_OTHER_MODELS = "it may not be used to improve other large language models"

_SPDX = "https://spdx.org/licenses/"
_CC = "https://creativecommons.org/licenses/"


@dataclass(frozen=True, slots=True)
class Rule:
    """What one licence asks.

    ``permissive`` lets the result be under any licence; ``share-alike`` must be the result's own; ``restricted`` limits
    use, and its limits go with the result; ``unread`` is known by name only.
    """

    id: str
    """As the Hub spells it, or SPDX in lower case."""
    kind: Kind
    source: str
    """Address of its text."""
    asks: tuple[Ask, ...] = ()
    limits: tuple[str, ...] = ()
    """What its users may not do."""
    into: frozenset[str] | None = frozenset()
    """The share-alike licences, besides itself, that what is made from it may be under; None if that is not known."""
    not_into: frozenset[str] | None = None
    """Of a permissive licence, the share-alike licences that it does not go together with; None of all others."""
    prefix: str | None = None
    """What the name of the result must begin with."""
    sentence: str | None = None
    """What the result's page must display."""
    line: str | None = None
    """What a file called NOTICE must hold."""

    def allows(self, target: str) -> bool | None:
        """Whether what is made from it may be under a share-alike licence; None if that is not known."""
        if self.not_into is not None:
            return target not in self.not_into
        return target == self.id or (None if self.into is None else target in self.into)


def _spdx(names: str, kind: Kind, asks: tuple[Ask, ...], **rest: object) -> Iterable[Rule]:
    return [Rule(n.lower(), kind, f"{_SPDX}{n}.html", asks, **rest) for n in names.split()]  # type: ignore[arg-type]


def _cc(terms: str, versions: str, kind: Kind, **rest: object) -> Iterable[Rule]:
    asks: tuple[Ask, ...] = ("credit", "notices", "changes")
    made = [(f"cc-{terms}-{v}", f"{_CC}{terms}/{v}/") for v in versions.split()]
    return [Rule(name, kind, source, asks, **rest) for name, source in made]  # type: ignore[arg-type]


_GPL = frozenset({"gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0"})
_GPL_FAMILY = _GPL | {"lgpl", "lgpl-2.1", "lgpl-3.0"}
_NOTHING: frozenset[str] = frozenset()


def _permissive() -> Iterable[Rule]:
    """From the least to the most demanding: the result of several is under the last of them."""
    yield from _spdx("CC0-1.0 Unlicense WTFPL", "permissive", (), not_into=_NOTHING)
    yield Rule("pddl", "permissive", "https://opendatacommons.org/licenses/pddl/1-0/", not_into=_NOTHING)
    yield from _spdx("Zlib BSL-1.0 ISC PostgreSQL NCSA MIT", "permissive", ("notices",), not_into=_NOTHING)
    yield from _spdx("BSD-2-Clause BSD-3-Clause BSD-3-Clause-Clear", "permissive", ("notices",), not_into=_NOTHING)
    yield Rule("bsd", "permissive", "https://opensource.org/license/bsd-3-clause", ("notices",), not_into=_NOTHING)
    yield Rule("openmdw-1.0", "permissive", "https://openmdw.ai/license/1-0/", ("copy", "notices"), not_into=_NOTHING)
    yield from _spdx("MS-PL", "permissive", ("notices",), not_into=_GPL_FAMILY)
    yield from _spdx("CDLA-Permissive-2.0", "permissive", ("copy",), not_into=_NOTHING)
    yield from _spdx("CDLA-Permissive-1.0", "permissive", ("copy", "credit", "changes"), not_into=_NOTHING)
    yield from _spdx("AFL-3.0", "permissive", ("copy", "notices", "changes"), not_into=_GPL_FAMILY)
    # gnu.org/licenses/license-list.html: compatible with version 3 of the GPL, not with version 2.
    yield from _spdx(
        "ECL-2.0 Apache-2.0", "permissive", ("copy", "notices", "changes"), not_into=frozenset({"gpl-2.0"})
    )
    yield Rule("odc-by", "permissive", "https://opendatacommons.org/licenses/by/1-0/", ("credit", "notices"),
               not_into=_NOTHING)  # fmt: skip
    yield from _spdx("etalab-2.0", "permissive", ("credit",), not_into=_NOTHING)
    yield from _cc("by", "2.0 2.5 3.0 4.0", "permissive", not_into=_NOTHING)


def _share_alike() -> Iterable[Rule]:
    """From weak to strong: where several would do for the result, it is the first of them."""
    asks: tuple[Ask, ...] = ("terms", "copy", "notices", "changes")
    source: tuple[Ask, ...] = (*asks, "source")
    gnu = "https://www.gnu.org/licenses/"
    yield from _spdx("CDLA-Sharing-1.0", "share-alike", asks)
    yield Rule("odbl", "share-alike", "https://opendatacommons.org/licenses/odbl/1-0/", asks)
    yield Rule("gfdl", "share-alike", f"{gnu}fdl-1.3.html", asks)
    yield Rule("lgpl-lr", "share-alike", f"{_SPDX}LGPLLR.html", source)
    yield from _spdx("OFL-1.1 LPPL-1.3c", "share-alike", (*asks, "rename"))
    # Creative Commons: later versions of the same licence, and creativecommons.org/compatiblelicenses.
    yield from _cc("by-sa", "3.0", "share-alike", into=frozenset({"cc-by-sa-4.0"}))
    yield from _cc("by-sa", "4.0", "share-alike", into=frozenset({"gpl-3.0"}))
    # Artistic 2.0, section 4(c)(ii); MPL 2.0, section 1.12; EPL 1.0, section 7; the appendices of both EUPL.
    yield from _spdx("Artistic-2.0", "share-alike", source, into=_GPL)
    yield from _spdx("MPL-2.0", "share-alike", source, into=_GPL_FAMILY)
    yield from _spdx("EPL-1.0", "share-alike", source, into=frozenset({"epl-2.0"}))
    yield from _spdx("EPL-2.0 OSL-3.0", "share-alike", source)
    eupl = {"osl-3.0", "epl-1.0", "gpl-2.0"}
    yield from _spdx("EUPL-1.1", "share-alike", source, into=frozenset(eupl))
    eupl |= {"gpl-3.0", "agpl-3.0", "lgpl-2.1", "lgpl-3.0", "mpl-2.0", "eupl-1.1"}
    yield from _spdx("EUPL-1.2", "share-alike", source, into=frozenset(eupl))
    # LGPL 2.1, section 3; a licence "family" names no version, and then any may be chosen (GPL 3.0, section 14).
    yield Rule("lgpl", "share-alike", f"{gnu}lgpl-3.0.html", source, into=_GPL_FAMILY)
    yield Rule("lgpl-2.1", "share-alike", f"{gnu}old-licenses/lgpl-2.1.html", source, into=_GPL - {"gpl"})
    yield Rule("lgpl-3.0", "share-alike", f"{gnu}lgpl-3.0.html", source, into=frozenset({"gpl-3.0", "agpl-3.0"}))
    yield Rule("gpl", "share-alike", f"{gnu}gpl-3.0.html", source, into=_GPL)
    yield Rule("gpl-2.0", "share-alike", f"{gnu}old-licenses/gpl-2.0.html", source)
    yield Rule("gpl-3.0", "share-alike", f"{gnu}gpl-3.0.html", source, into=frozenset({"agpl-3.0"}))
    yield Rule("agpl-3.0", "share-alike", f"{gnu}agpl-3.0.html", source)


def _non_commercial() -> Iterable[Rule]:
    """Creative Commons' adapter's licences: by-nc may become by-nc-sa; and later versions of the same."""
    sa = ["cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"]
    limits = (NON_COMMERCIAL,)
    for i, version in enumerate(("2.0", "3.0", "4.0")):
        yield from _cc("by-nc", version, "restricted", limits=limits, into=frozenset(sa[i:]))
        yield from _cc("by-nc-sa", version, "share-alike", limits=limits, into=frozenset(sa[i + 1 :]))
    yield Rule("fair-noncommercial-research-license", "share-alike",
               "https://huggingface.co/facebook/fair-noncommercial-research-license/blob/main/LICENSE",
               ("terms", "copy"), (RESEARCH, USE_POLICY))  # fmt: skip
    yield Rule("apple-amlr", "restricted", "https://github.com/apple/ml-fastvlm/blob/main/LICENSE_MODEL",
               ("copy", "notices", "changes"), (RESEARCH,))  # fmt: skip
    yield from _cc("by-nd", "4.0", "no-derivatives")
    yield from _cc("by-nc-nd", "3.0 4.0", "no-derivatives", limits=limits)


def _llama(version: str, folder: str, *, line: str, **rest: object) -> Rule:
    """One of Meta's agreements; sections 1.b.i (copy, name, display), 1.b.iii (notice) and 1.b.iv (use policy)."""
    source = "https://ai.meta.com/llama/license/" if version == "2" else f"https://www.llama.com/{folder}/license/"
    rights = f"Copyright {'(c)' if version == '2' else '©'} Meta Platforms, Inc. All Rights Reserved."
    limits = (USE_POLICY, *((NO_OTHER_MODELS,) if version in ("2", "3") else ()))
    notice = f"{line}, {rights}"
    return Rule(f"llama{version}", "restricted", source, ("copy",), limits, line=notice, **rest)  # type: ignore[arg-type]


def _model_licences() -> Iterable[Rule]:
    meta = "Meta Llama 3 is licensed under the Meta Llama 3 Community License"
    yield _llama("2", "llama2", line="Llama 2 is licensed under the LLAMA 2 Community License")
    yield _llama("3", "llama3", line=meta, prefix="Llama 3", sentence="Built with Meta Llama 3")
    for version in ("3.1", "3.2", "3.3", "4"):
        line = f"Llama {version} is licensed under the Llama {version} Community License"
        folder = f"llama{version.replace('.', '_')}"
        yield _llama(version, folder, line=line, prefix="Llama", sentence="Built with Llama")
    # Section 3.1; Gemma 4 and later are under the Apache licence, and their cards say so.
    yield Rule("gemma", "restricted", "https://ai.google.dev/gemma/terms", ("copy", "changes"), (USE_POLICY,),
               line="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
               )  # fmt: skip
    rail = {
        "openrail": "https://www.licenses.ai/",
        "openrail++": "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md",
        "creativeml-openrail-m": "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
        "bigscience-openrail-m": "https://www.licenses.ai/blog/2022/8/26/bigscience-open-rail-m-license",
        "bigscience-bloom-rail-1.0": "https://huggingface.co/spaces/bigscience/license",
        "bigcode-openrail-m": "https://huggingface.co/spaces/bigcode/bigcode-model-license-agreement",
    }
    for name, source in rail.items():
        yield Rule(name, "restricted", source, ("copy", "notices", "changes"), (USE_POLICY,))


def _unread() -> Iterable[Rule]:
    """On the Hub's list, but what they ask of a merge nobody has put into this table."""
    hub = "https://huggingface.co/docs/hub/repositories-licenses"
    yield Rule("cc", "unread", "https://creativecommons.org/licenses/", into=None)
    yield Rule("c-uda", "unread", f"{_SPDX}C-UDA-1.0.html", into=None)
    yield Rule("apple-ascl", "unread", hub, into=None)
    for name in ("intel-research", "h-research", "deepfloyd-if-license"):
        yield Rule(name, "unread", hub, (), (RESEARCH,), into=None)
    yield Rule("grok2-community", "unread", "https://huggingface.co/xai-org/grok-2/blob/main/LICENSE", into=None)


_ROWS = (*_permissive(), *_model_licences(), *_non_commercial(), *_share_alike(), *_unread())
RULES: dict[str, Rule] = {rule.id: rule for rule in _ROWS}
"""Every licence that the Hub lists, but for ``other`` and ``unknown``; in the order of what they ask."""
RANK: dict[str, int] = {name: i for i, name in enumerate(RULES)}
SHARE_ALIKE: tuple[str, ...] = tuple(r.id for r in _ROWS if r.kind == "share-alike")
_CATEGORIES: dict[str, Kind] = {
    "Permissive": "permissive", "Public Domain": "permissive", "Copyleft": "share-alike",
    "Copyleft Limited": "share-alike",
}  # fmt: skip
# Such as GPL-3.0, which SPDX now has as GPL-3.0-only and GPL-3.0-or-later.
_FORMER = re.compile(r"[A-Z]+-\d\.\d")
_VERSION_SUFFIX = re.compile(r"(-only|-or-later|\+)$")


def rule_of(identifier: str) -> Rule | None:
    """The row of a licence by the Hub's or SPDX's identifier, in any case; None if nobody knows it."""
    name = identifier.lower()
    # "or later" gives a choice; reading it as "only" asks no less.
    found = RULES.get(name) or RULES.get(_VERSION_SUFFIX.sub("", name))
    if found is not None:
        return found
    if (entry := _scancode().get(name)) is None:
        return None
    spdx, category, _ = entry
    kind = _CATEGORIES.get(category, "unread")
    asks: tuple[Ask, ...] = ("notices",) if kind == "permissive" else ("terms", "copy", "notices")
    return Rule(name, kind, f"{_SPDX}{spdx}.html", asks if kind != "unread" else (), into=None)


def rank_of(identifier: str) -> tuple[int, str]:
    """Where a licence stands in the order of what they ask; those outside the table stand at the end of their kind."""
    rule = rule_of(identifier)
    if rule is None:
        return len(RANK), identifier
    last = max(RANK[r.id] for r in _ROWS if r.kind == rule.kind)
    return RANK.get(rule.id, last), identifier


def spdx_spelling(identifier: str) -> str | None:
    """How SPDX spells one of its identifiers; None if it has none such."""
    spelling, _, listed = _scancode().get(identifier.lower(), ("", "", False))
    return spelling if listed else None


@cache
def _scancode() -> dict[str, tuple[str, str, bool]]:
    """SPDX identifiers, in lower case, with their spelling, their category, and whether SPDX has them on its list.

    Among those of former times are some that it has never had; a third of a megabyte.
    """
    from license_expression import get_license_index

    found = {}
    for e in get_license_index():
        names = () if e["is_exception"] else (e.get("spdx_license_key"), *e.get("other_spdx_license_keys", ()))
        for i, name in enumerate(names):
            if name and not name.startswith("LicenseRef-"):
                found[name.lower()] = (name, e["category"], i == 0 or _FORMER.fullmatch(name) is not None)
    return found


def as_markdown() -> str:
    """The table, as ``docs/licenses.md`` shows it."""
    head = "| Licence | Kind | It asks | It limits | May also become |\n| --- | --- | --- | --- | --- |\n"
    return head + "".join(f"| {' | '.join(_cells(rule))} |\n" for rule in _ROWS)


def _cells(rule: Rule) -> tuple[str, ...]:
    asks: list[str] = [*rule.asks]
    asks += [f"name “{rule.prefix}…”"] if rule.prefix else []
    asks += [f"display “{rule.sentence}”"] if rule.sentence else []
    asks += ["NOTICE"] if rule.line else []
    if rule.not_into is not None:
        into = f"anything but {', '.join(sorted(rule.not_into))}" if rule.not_into else "anything"
    else:
        into = "not known" if rule.into is None else ", ".join(sorted(rule.into)) or "–"
    return f"[{rule.id}]({rule.source})", rule.kind, ", ".join(asks) or "–", "; ".join(rule.limits) or "–", into
