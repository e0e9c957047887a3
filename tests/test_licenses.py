"""Licences: what is stated, what follows for the result, and that nothing unknown or hostile makes it freer."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.errors import LicenseError, UsageError
from hubmerge.licenses import (
    Decision,
    Declaration,
    License,
    decide,
    declared,
    derive_license,
    kept_files,
    license_of,
    notice,
    own_texts,
    refuse,
    silence,
    stated,
    stating,
)
from hubmerge.licenses.table import RULES, as_markdown, rank_of, rule_of
from hubmerge.licenses.texts import MAX_TEXT_BYTES, identify
from hubmerge.localhub.cards import LICENSES
from hubmerge.recipe import Card
from tests import factories as make

OTHER: dict[str, Any] = {"license": "other", "license_name": "acme-1", "license_link": "LICENSE"}
FREEDOM = ["allowed", "unknown", "blocked"]
COMMON = settings(deadline=None, derandomize=True, max_examples=25)
MIT_TEXT = """MIT License

Copyright (c) 2024 Ann

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
LLAMA_NOTICE = (
    "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."
)
LLAMA_TEXT = b"LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n\nLlama 3.1 Version Release Date: July 23, 2024\n"


def check(*cards: dict[str, Any], own: dict[str, Any] | None = None, local: bool = False) -> Decision:
    """The check of a base and models with these cards."""
    base = make.pinned("org/base", role="base", card=cards[0])
    models = [make.pinned(f"org/ft{i}", card=c) for i, c in enumerate(cards[1:], 1)]
    if local:
        models[-1] = make.pinned("./mine", root="/home/me/mine", name="mine", card=cards[-1])
    return derive_license(make.plan(make.recipe(base, models), base, models), Card(**(own or {})))


def combined(*licenses: str | None, own: str | None = None, name: str | None = None, shift: int = 0) -> Decision:
    """The check of parents that declare these identifiers."""
    parents = [parent(f"org/{i}", found) for i, found in enumerate(licenses, shift)]
    return decide(parents, Card(license=own), "the card", name)


def parent(label: str, identifier: str | None, *files: str) -> Declaration:
    return Declaration(label, declared({"license": identifier}), f"https://hub.example/{label}", files=files)


def asked(found: Decision) -> set[tuple[str, str, str]]:
    """Every duty, once for each licence that asks for it."""
    return {(d.kind, d.text if d.kind in ("limit", "name", "display") else "", i) for d in found.duties for i in d.of}


# --- the table


def test_the_table_has_every_licence_of_the_hub() -> None:
    assert {*RULES, "other", "unknown"} == LICENSES


def test_rows_link_to_their_source_and_name_only_licences_of_the_table() -> None:
    for rule in RULES.values():
        assert rule.source.startswith("https://")
        assert (rule.into or frozenset()) | (rule.not_into or frozenset()) <= RULES.keys()
        assert all(RULES[target].kind == "share-alike" for target in rule.into or ())
        assert (rule.not_into is not None) == (rule.kind == "permissive")


@pytest.mark.parametrize(
    ("licenses", "verdict", "stated_as"),
    [
        # all permissive: the most demanding one
        (("mit", "mit"), "allowed", "mit"),
        (("mit", "apache-2.0"), "allowed", "apache-2.0"),
        (("cc0-1.0", "bsd-3-clause", "mit"), "allowed", "bsd-3-clause"),
        (("apache-2.0", "cc-by-4.0"), "allowed", "cc-by-4.0"),
        (("0bsd", "mit"), "allowed", "0bsd"),
        # what limits use goes with the result
        (("apache-2.0", "cc-by-nc-4.0"), "allowed", "cc-by-nc-4.0"),
        (("apache-2.0", "llama3.1", "mit"), "allowed", "llama3.1"),
        (("gemma", "mit"), "allowed", "gemma"),
        (("creativeml-openrail-m", "mit"), "allowed", "creativeml-openrail-m"),
        (("gemma", "cc-by-nc-4.0"), "allowed", "other (gemma-and-cc-by-nc-4.0)"),
        (("llama3", "llama3.1"), "allowed", "other (llama3-and-llama3.1)"),
        # share-alike: the one licence that satisfies all
        (("cc-by-sa-4.0", "mit"), "allowed", "cc-by-sa-4.0"),
        (("cc-by-sa-3.0", "cc-by-sa-4.0"), "allowed", "cc-by-sa-4.0"),
        (("cc-by-sa-4.0", "gpl-3.0"), "allowed", "gpl-3.0"),
        (("cc-by-sa-4.0", "lgpl-3.0"), "allowed", "gpl-3.0"),
        (("lgpl-2.1", "apache-2.0"), "allowed", "lgpl-2.1"),
        (("mpl-2.0", "gpl-3.0", "agpl-3.0"), "allowed", "agpl-3.0"),
        (("cc-by-nc-4.0", "cc-by-nc-sa-4.0"), "allowed", "cc-by-nc-sa-4.0"),
        (("apache-2.0", "gpl-3.0"), "allowed", "gpl-3.0"),
        (("cecill-2.1", "mit"), "allowed", "cecill-2.1"),
        # conflicts
        (("apache-2.0", "gpl-2.0"), "blocked", None),
        (("gpl-2.0", "gpl-3.0"), "blocked", None),
        (("cc-by-sa-4.0", "gpl-2.0"), "blocked", None),
        (("cc-by-sa-4.0", "cc-by-nc-4.0"), "blocked", None),
        (("cc-by-nc-sa-4.0", "cc-by-sa-4.0"), "blocked", None),
        (("gpl-3.0", "llama3.1"), "blocked", None),
        (("agpl-3.0", "bigscience-openrail-m"), "blocked", None),
        # no derivatives
        (("cc-by-nd-4.0", "cc-by-nd-4.0"), "blocked", None),
        (("mit", "cc-by-nc-nd-4.0", None), "blocked", None),
        # not known
        (("mit", None), "unknown", None),
        (("mit", "unknown"), "unknown", None),
        (("mit", "cc"), "unknown", None),
        (("mit", "grok2-community"), "unknown", None),
        (("mit", "busl-1.1"), "unknown", None),
        (("mit", "no-such-licence"), "unknown", None),
        (("gpl-3.0", "cecill-2.1"), "unknown", None),
        (("deepfloyd-if-license", "deepfloyd-if-license"), "unknown", "deepfloyd-if-license"),
    ],
)
def test_combinations(licenses: tuple[str | None, ...], verdict: str, stated_as: str | None) -> None:
    found = combined(*licenses)
    assert (found.verdict, found.license) == (verdict, stated_as)
    assert (found.reasons == ()) == (verdict == "allowed")


def test_every_pair_of_the_hubs_licences_has_a_verdict_that_is_no_freer_than_either() -> None:
    single = {name: combined(name) for name in LICENSES}
    for a, b in itertools.combinations(sorted(LICENSES), 2):
        found = combined(a, b)
        for one in (single[a], single[b]):
            assert FREEDOM.index(found.verdict) >= FREEDOM.index(one.verdict), (a, b)
            assert asked(found) >= asked(one), (a, b)
        if found.terms is not None and not found.terms.is_other:
            (stated_one,) = found.terms.identifiers
            assert all(rank_of(stated_one) >= rank_of(i) or RULES[i].kind != "permissive" for i in (a, b)), (a, b)
        if "unknown" in (found.verdict, a, b):
            assert found.terms is None or found.agreed, (a, b)


NAMES = st.sampled_from([*sorted(LICENSES), "0bsd", "cecill-2.1", "gpl-3.0-or-later", "busl-1.1", "nobody-knows"])
PARENTS = st.lists(st.none() | NAMES, min_size=1, max_size=5)
MAYBE = st.none() | NAMES


@COMMON
@given(PARENTS, MAYBE, st.randoms(use_true_random=False))
def test_the_order_of_parents_does_not_matter(licenses: list[str | None], own: str | None, random: Any) -> None:
    parents = [parent(f"org/{i}", found) for i, found in enumerate(licenses)]
    first = decide(parents, Card(license=own), "the card", "me/x")
    random.shuffle(parents)
    second = decide(parents, Card(license=own), "the card", "me/x")
    assert (first.verdict, first.license, first.duties) == (second.verdict, second.license, second.duties)
    assert (first.sentences, first.lines) == (second.sentences, second.lines)
    assert len(first.reasons) == len(second.reasons)


@COMMON
@given(PARENTS, MAYBE, MAYBE, st.none() | st.just("me/merged"))
def test_another_parent_never_makes_it_freer(
    licenses: list[str | None], more: str | None, own: str | None, name: str | None
) -> None:
    before, after = combined(*licenses, own=own, name=name), combined(*licenses, more, own=own, name=name)
    assert FREEDOM.index(after.verdict) >= FREEDOM.index(before.verdict)
    assert asked(after) >= asked(before)
    assert set(after.sentences) >= set(before.sentences)
    if before.terms is None:
        assert after.terms is None


@COMMON
@given(PARENTS, MAYBE)
def test_a_parent_that_is_there_twice_changes_nothing(licenses: list[str | None], own: str | None) -> None:
    parents = [parent(f"org/{i}", found) for i, found in enumerate(licenses)]
    assert decide(parents, Card(license=own), "the card") == decide(parents * 2, Card(license=own), "the card")
    again = [parent(f"org/{i}", found) for i, found in enumerate(licenses, len(licenses))]
    once, twice = decide(parents, Card(license=own), "the card"), decide(parents + again, Card(license=own), "the card")
    assert (once.verdict, once.license, once.duties) == (twice.verdict, twice.license, twice.duties)


@COMMON
@given(PARENTS)
def test_nothing_is_stated_for_an_unknown_parent(licenses: list[str | None]) -> None:
    found = combined(*licenses, None)
    assert found.verdict != "allowed"
    assert found.terms is None


UNKNOWN = (None, "unknown", "not an identifier", "nobody-knows", "other", "cc", "grok2-community", "apple-ascl")


@pytest.mark.parametrize("unknown", UNKNOWN)
def test_beside_an_unknown_parent_no_licence_of_the_hub_is_stated(unknown: str | None) -> None:
    """But the unknown one itself, where it is named and all parents are under it."""
    for name in sorted(LICENSES):
        found = combined(name, unknown)
        assert found.verdict != "allowed", name
        if found.terms is not None:
            assert found.terms.identifiers == (name,) == (unknown,)
            assert name not in RULES or RULES[name].kind == "unread"


def test_research_only_is_handed_on() -> None:
    found = combined("mit", "apple-amlr")
    assert (found.verdict, found.license) == ("allowed", "apple-amlr")
    assert ("limit", "pass on: non-commercial research only", "apple-amlr") in asked(found)


# --- what models state


def test_all_agree() -> None:
    made = check({"license": "mit"}, {"license": "MIT "}, {"license": ["mit"]})
    assert (made.verdict, made.terms, made.notes, made.agreed) == ("allowed", License(("mit",)), (), True)
    assert made.terms is not None
    assert made.terms.front_matter() == {"license": "mit"}


@pytest.mark.parametrize("silent", [{}, {"license": None}, {"license": "unknown"}, {"license": ""}, {"license": []}])
def test_one_that_declares_none_means_none(silent: dict[str, Any]) -> None:
    made = check({"license": "apache-2.0"}, silent)
    assert (made.verdict, made.terms, made.license) == ("unknown", None, None)
    assert made.notes == ("org/ft1 declares no licence: the merged model's card states none",)


def test_a_local_parent_is_named_without_its_path() -> None:
    made = check({"license": "mit"}, {}, local=True)
    assert made.notes == ("the local model mine declares no licence: the merged model's card states none",)


def test_different_licences_are_listed() -> None:
    made = check({"license": "apache-2.0"}, {"license": "mit"}, {"license": "llama3"})
    assert made.license == "llama3"
    assert not made.agreed
    assert made.notes == (
        "the parents declare different licences (org/base: apache-2.0, org/ft1: mit, org/ft2: llama3), "
        "and llama3 satisfies them all",
    )


def test_conflict_and_silence_are_both_told() -> None:
    made = check({"license": "gpl-2.0"}, {"license": "gpl-3.0"}, {})
    assert made.reasons == (
        "no licence satisfies all of the parents' (org/base: gpl-2.0, org/ft1: gpl-3.0)",
        "org/ft2 declares no licence",
    )


def test_what_several_lack_is_said_once() -> None:
    assert check({"license": "mit"}, {}, {}).reasons == ("org/ft1 and org/ft2: each declares no licence",)


def test_several_licences_in_one_card_all_hold() -> None:
    made = check({"license": ["mit", "cc-by-nc-4.0"]}, {"license": ["cc-by-nc-4.0", "mit"]})
    assert made.terms is not None
    assert made.terms.front_matter() == {"license": "cc-by-nc-4.0"}
    assert check({"license": ["mit", "cc-by-nd-4.0"]}, {"license": "mit"}).verdict == "blocked"


@pytest.mark.parametrize(
    ("text", "identifiers"),
    [
        ("Apache-2.0 OR GPL-2.0-only", ("apache-2.0",)),
        ("GPL-3.0-only OR (MIT AND CC-BY-NC-4.0)", ("cc-by-nc-4.0", "mit")),
        ("MIT AND Apache-2.0", ("apache-2.0", "mit")),
        ("GPL-2.0-only WITH Classpath-exception-2.0", ("gpl-2.0-only",)),
        ("llama3.1 AND mit", ("llama3.1", "mit")),
    ],
)
def test_spdx_expressions(text: str, identifiers: tuple[str, ...]) -> None:
    assert declared({"license": text}) == License(identifiers)


def test_what_the_hub_does_not_list_becomes_a_named_other() -> None:
    made = check({"license": "0BSD"}, {"license": "0bsd"})
    assert made.terms is not None
    assert made.terms.front_matter() == {"license": "other", "license_name": "0bsd"}
    # And is read back as what it is.
    assert check(made.terms.front_matter(), {"license": "mit"}).verdict == "allowed"


def test_what_nobody_lists_is_a_name_of_the_parents_and_a_mistake_of_the_author() -> None:
    made = check({"license": "acme-9"}, {"license": "acme-9"})
    assert made.verdict == "unknown"
    assert made.terms is not None
    assert made.terms.front_matter() == {"license": "other", "license_name": "acme-9"}
    mistaken = check({"license": "mit"}, {"license": "mit"}, own={"license": "apache2"})
    assert mistaken.terms is not None
    assert mistaken.terms.front_matter() == {"license": "apache2"}  # which the Hub refuses


def test_other_with_one_name_keeps_it_and_links_to_the_first_parents_text() -> None:
    made = check(OTHER, OTHER)
    assert made.verdict == "unknown"
    assert made.terms is not None
    assert made.terms.front_matter() == {
        "license": "other",
        "license_name": "acme-1",
        "license_link": f"https://huggingface.co/org/base/blob/{make.digest('org/base', 40)}/LICENSE",
    }


def test_other_with_an_address_keeps_the_address() -> None:
    card = {"license": "other", "license_name": "acme-1", "license_link": "https://acme.example/licence"}
    made = check(card, card)
    assert made.terms == License(("other",), "acme-1", "https://acme.example/licence")


def test_other_that_is_called_by_a_listed_name_is_that_one() -> None:
    assert check({"license": "other", "license_name": "Llama3.1"}, {"license": "mit"}).sentences == (
        "Built with Llama",
    )


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (OTHER, {**OTHER, "license_name": "acme-2"}),
        (OTHER, {"license": "other"}),
        ({"license": "other"}, {"license": "other"}),
        ({"license": "other", "license_link": "LICENSE"}, {"license": "other", "license_link": "LICENSE"}),
    ],
)
def test_two_others_that_may_differ_mean_none(a: dict[str, Any], b: dict[str, Any]) -> None:
    made = check(a, b)
    assert made.verdict == "unknown"
    assert made.terms is None


# --- licence files


def test_texts_are_known_by_every_word_or_by_their_title() -> None:
    apache = Path(__file__).parents[1] / "LICENSE"
    assert identify(apache.read_bytes()) == "apache-2.0"
    assert identify(MIT_TEXT.encode()) == "mit"
    assert identify(MIT_TEXT.replace("\n", "\r\n").encode()) == "mit"
    assert identify(LLAMA_TEXT) == "llama3.1"
    assert identify("META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n".encode("utf-8-sig")) == "llama3"
    assert identify(b"# Gemma Terms of Use\n") == "gemma"
    assert identify(b"Attribution-NonCommercial-ShareAlike 4.0 International\n") == "cc-by-nc-sa-4.0"
    assert identify(b"   GNU GENERAL PUBLIC LICENSE\n   Version 3, 29 June 2007\n") == "gpl-3.0"


@pytest.mark.parametrize(
    "text",
    [
        MIT_TEXT + "\nNo commercial use.\n",
        MIT_TEXT.replace("Copyright", "For research only. Copyright"),
        MIT_TEXT.replace("without restriction", "without much restriction"),
        "MIT License\n",
        "Apache License\nVersion 2.0, January 2004\n",
        "",
        "all rights reserved",
        "\x00\xff" * 100,
    ],
)
def test_a_text_that_permits_with_other_words_is_none(text: str) -> None:
    assert identify(text.encode()) is None


def test_an_apache_text_with_an_addition_is_none() -> None:
    text = (Path(__file__).parents[1] / "LICENSE").read_text()
    assert identify((text + "\nCommons Clause: you may not sell it. " * 40).encode()) is None
    assert identify(("Not for sale.\n" + text).encode()) is None
    assert identify(text.encode() + b" " * MAX_TEXT_BYTES) is None


def test_a_licence_file_speaks_where_the_card_is_silent_and_adds_to_what_it_says() -> None:
    assert stated({}, {"LICENSE": MIT_TEXT.encode()}) == License(("mit",))
    assert stated({"license": "mit"}, {"LICENSE": LLAMA_TEXT}) == License(("llama3.1", "mit"))
    assert stated({"license": "other", "license_link": "LICENSE"}, {"LICENSE": LLAMA_TEXT}) == License(("llama3.1",))
    assert stated(OTHER, {"LICENSE": LLAMA_TEXT}) == License(("llama3.1", "other"), "acme-1", "LICENSE")
    assert stated({}, {"NOTICE": MIT_TEXT.encode()}) is None
    assert silence({}, ["LICENSE", "NOTICE"]) == ("declares no licence, and its LICENSE is not one that is recognised")


def test_a_fine_tune_of_llama_that_calls_itself_mit_still_asks_what_llama_asks() -> None:
    model = make.pinned("org/ft", card={"license": "mit"}, notices={"LICENSE": LLAMA_TEXT})
    assert license_of(model) == License(("llama3.1", "mit"))
    base = make.pinned("org/base", role="base", card={"license": "mit"})
    found = derive_license(make.plan(make.recipe(base, [model]), base, [model]), Card(), "me/merged")
    assert found.verdict == "blocked"
    assert found.license == "llama3.1"
    assert ("copy", ("llama3.1",)) in [(d.kind, d.of) for d in found.duties if d.done]


# --- the author's word


def test_the_authors_word_stands_where_the_parents_say_nothing() -> None:
    made = check({"license": "mit"}, {}, own={"license": "mit"})
    assert (made.verdict, made.license, made.by_author) == ("unknown", "mit", True)
    assert made.notes == ("org/ft1 declares no licence; the card states mit, as the recipe says",)


@pytest.mark.parametrize(
    ("licenses", "own", "verdict"),
    [
        (("cc-by-nc-4.0", "mit"), "mit", "blocked"),
        (("cc-by-nc-4.0", "mit"), "cc-by-nc-4.0", "allowed"),
        (("cc-by-nc-4.0", "mit"), "cc-by-nc-sa-4.0", "allowed"),
        (("cc-by-nc-4.0", "mit"), "other", "unknown"),
        (("llama3.1",), "apache-2.0", "blocked"),
        (("gpl-3.0",), "mit", "blocked"),
        (("gpl-3.0",), "agpl-3.0", "allowed"),
        (("mit", "apache-2.0"), "mit", "allowed"),
        (("mit",), "cc-by-nc-4.0", "allowed"),
        (("gpl-2.0", "gpl-3.0"), "gpl-3.0", "blocked"),
    ],
)
def test_the_authors_word_may_not_drop_what_a_parent_asks(licenses: tuple[str, ...], own: str, verdict: str) -> None:
    found = combined(*licenses, own=own)
    assert (found.verdict, found.license) == (verdict, own)


def test_the_authors_word_that_repeats_the_parents_needs_no_note() -> None:
    assert check({"license": "mit"}, {"license": "mit"}, own={"license": "MIT"}).notes == ()


def test_the_authors_own_licence_can_be_named_and_linked() -> None:
    own = {"license": "other", "license_name": "acme-1", "license_link": "LICENSE.md"}
    made = check({}, {}, own=own)
    assert made.terms is not None
    assert made.terms.front_matter() == own
    assert made.license == "other (acme-1)"


def test_a_model_that_is_its_own_base_counts_once() -> None:
    base = make.pinned("org/a", role="base", card={"license": "mit"})
    model = make.pinned("org/a", card={"license": "mit"})
    plan = make.plan(make.recipe(base, [model]), base, [model])
    assert derive_license(plan, Card()).license == "mit"


# --- duties


@pytest.mark.parametrize(
    ("identifier", "name", "fits"),
    [
        ("llama3.1", "me/Llama-merged", True),
        ("llama3.1", "me/Llama-3.1-merged", True),
        ("llama3.1", "me/merged-Llama", False),
        ("llama3.1", "Llama/merged", False),
        ("llama3", "me/Llama-3-x", True),
        ("llama3", "me/Llama3-x", True),
        ("llama3", "me/Llama-x", False),
        ("llama3", "me/Meta-Llama-3-x", False),
        ("llama2", "me/x", True),
        ("gemma", "me/x", True),
    ],
)
def test_names(identifier: str, name: str, fits: bool) -> None:
    found = combined(identifier, "mit", name=name)
    assert found.verdict == ("allowed" if fits else "blocked")
    assert combined(identifier, "mit").verdict == "allowed"


def test_notice_keeps_what_was_there_and_adds_each_line_once() -> None:
    found = combined("llama3.1", "gemma")
    text = notice(found, b"Copyright Ann\xff\n")
    assert text is not None
    assert text.startswith(b"Copyright Ann\xff\n\n")
    for line in (
        LLAMA_NOTICE,
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        "org/0: llama3.1, https://www.llama.com/llama3_1/license/",
    ):
        assert line in text.decode("utf-8", "replace").splitlines()
    assert notice(found, text) == text
    assert notice(combined("mit"), b"") is None
    assert notice(combined("mit"), b"Copyright Ann\n") == b"Copyright Ann\n"


def test_a_text_that_goes_along_is_a_parents_or_comes_with_hubmerge() -> None:
    found = decide([parent("org/a", "llama3.1", "LICENSE"), parent("org/b", "apache-2.0")], Card(), "the card")
    assert {d.of[0]: d.done for d in found.duties if d.kind == "copy"} == dict.fromkeys(
        ("apache-2.0", "llama3.1"), "it is among the files"
    )
    assert {p: identify(c) for p, c in own_texts(found).items()} == {"licenses/apache-2.0.txt": "apache-2.0"}
    alone = combined("llama3.1")
    assert [d.kind for d in alone.left] == ["copy", "name"]
    assert "https://www.llama.com/llama3_1/license/" in alone.left[0].text
    assert own_texts(alone) == {}


def test_the_authors_of_a_local_folder_are_left_to_be_named() -> None:
    near, far = (Declaration(f"org/{i}", License(("cc-by-4.0",)), place) for i, place in enumerate((None, "https://x")))
    assert [d.kind for d in decide([near, far], Card(), "the card").left] == ["credit"]
    assert decide([far], Card(), "the card").left == ()


def test_licence_files_of_models_are_kept_where_they_differ_from_the_bases() -> None:
    base = make.pinned("org/base", role="base", notices={"LICENSE": b"1", "NOTICE": b"2"})
    a = make.pinned("org/a", notices={"LICENSE": b"1", "NOTICE": b"3"})
    b = make.pinned("org/b", notices={"LICENSE.md": b"1"})
    assert kept_files(base, [a, b]) == {"licenses/a/NOTICE": b"3", "licenses/b/LICENSE.md": b"1"}


# --- publishing


def test_only_what_is_blocked_is_refused_and_only_with_both_words_it_is_not() -> None:
    for allowed in (combined("mit"), combined("mit", None)):
        refuse(allowed, accept_risk=False, name="me/x")
    forbidden = combined("cc-by-nd-4.0")
    for found, accept in ((forbidden, False), (forbidden, True), (combined("cc-by-nd-4.0", own="cc-by-nd-4.0"), False)):
        with pytest.raises(LicenseError, match=r"me/x: .* cc-by-nd-4\.0, which allows no derivatives") as caught:
            refuse(found, accept_risk=accept, name="me/x")
        assert "--accept-license-risk" in caught.value.hint
        assert caught.value.exit_code == 5
    refuse(combined("cc-by-nd-4.0", own="cc-by-nd-4.0"), accept_risk=True, name="me/x")


def test_what_is_stated_on_the_command_line_must_be_a_licence() -> None:
    assert stating(Card(license="mit", license_name="x"), "apache-2.0") == Card(license="apache-2.0")
    with pytest.raises(UsageError, match="not the identifier of a licence"):
        stating(Card(), "MIT\nlicense: apache-2.0")


# --- hostile text


@pytest.mark.parametrize(
    "value",
    [
        "mit\nlicense: apache-2.0", "MIT License", {"a": 1}, [["mit"]], 7, True, ["mit"] * 3 + ["x y"], "../etc", "<b>",
        "m" * 65, ["a" + str(i) for i in range(9)], "‮tim", "mit or", "( or )", "(" * 256, "mit and " * 10**5,
        "mit or\nmit", "{{ 7 * 7 }}", "mit and <script>", "[mit](javascript:alert(1))", "mit or foo bar", "m" * 10**7,
    ],
)  # fmt: skip
def test_what_is_no_identifier_is_not_taken_over(value: Any) -> None:
    assert declared({"license": value}) is None
    made = check({"license": "mit"}, {"license": value})
    assert made.terms is None
    assert "org/ft1 declares" in made.notes[0]


@pytest.mark.parametrize(
    "link", ["javascript:alert(1)", "https://x/ y", "../../x", "/etc", "a\nb", "https://u:p@x/", 3]
)
def test_links_and_names_of_another_form_are_dropped(link: Any) -> None:
    found = declared({"license": "other", "license_name": f"{link}\n", "license_link": link})
    assert found is not None
    assert found.link is None


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_whatever_cards_say_only_identifiers_names_and_addresses_come_out(a: str, b: str, c: str) -> None:
    card = {"license": a, "license_name": b, "license_link": c}
    found = stated(card, {"LICENSE": c.encode("utf-8", "surrogatepass")})
    if found is not None:
        for text in found.identifiers:
            assert re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", text)
            assert rule_of(text) is None or rule_of(text).source.startswith("https://")  # type: ignore[union-attr]
        assert "\n" not in (found.name or "") + (found.link or "")
    assert check(card, {"license": "mit"}).verdict in FREEDOM


def test_the_page_shows_the_table() -> None:
    page = (Path(__file__).parents[1] / "docs" / "licenses.md").read_text()
    command = "python -c 'from hubmerge.licenses.table import as_markdown as m; print(m(), end=\"\")'"
    assert page.endswith(as_markdown()), f"replace the table by what this prints: {command}"
