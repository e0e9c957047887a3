"""Licences: stated only if every parent states the same; what the author says is taken over, and conflicts are told."""

from __future__ import annotations

from typing import Any

import pytest

from hubmerge.licenses import Decision, License, declared, derive_license
from hubmerge.recipe import Card
from tests import factories as make

OTHER: dict[str, Any] = {"license": "other", "license_name": "acme-1", "license_link": "LICENSE"}


def decide(*cards: dict[str, Any], own: dict[str, Any] | None = None, local: bool = False) -> Decision:
    """The decision for a base and models with these cards."""
    base = make.pinned("org/base", role="base", card=cards[0])
    models = [make.pinned(f"org/ft{i}", card=c) for i, c in enumerate(cards[1:], 1)]
    if local:
        models[-1] = make.pinned("./mine", root="/home/me/mine", name="mine", card=cards[-1])
    return derive_license(make.plan(make.recipe(base, models), base, models), Card(**(own or {})))


def test_all_agree() -> None:
    made = decide({"license": "mit"}, {"license": "MIT "}, {"license": ["mit"]})
    assert made == Decision(License(("mit",)), ())
    assert made.license == "mit"
    assert made.terms is not None
    assert made.terms.front_matter() == {"license": "mit"}


@pytest.mark.parametrize("silent", [{}, {"license": None}, {"license": "unknown"}, {"license": ""}, {"license": []}])
def test_one_that_declares_none_means_none(silent: dict[str, Any]) -> None:
    made = decide({"license": "apache-2.0"}, silent)
    assert made.terms is None
    assert made.license is None
    assert made.notes == ("org/ft1 declares no licence: the merged model's card states none",)


def test_a_local_parent_is_named_without_its_path() -> None:
    made = decide({"license": "mit"}, {}, local=True)
    assert made.notes == ("the local model mine declares no licence: the merged model's card states none",)


def test_different_licences_mean_none_and_are_listed() -> None:
    made = decide({"license": "apache-2.0"}, {"license": "mit"}, {"license": "llama3"})
    assert made.terms is None
    assert made.notes == (
        "the parents declare different licences (org/base: apache-2.0, org/ft1: mit, org/ft2: llama3): "
        "the merged model's card states none",
    )


def test_missing_and_different_are_both_told() -> None:
    assert len(decide({"license": "mit"}, {"license": "gpl-3.0"}, {}).notes) == 2


def test_several_licences_in_one_card_are_a_set() -> None:
    made = decide({"license": ["mit", "apache-2.0"]}, {"license": ["apache-2.0", "mit"]})
    assert made.terms is not None
    assert made.terms.front_matter() == {"license": ["apache-2.0", "mit"]}
    assert decide({"license": ["mit", "apache-2.0"]}, {"license": "mit"}).terms is None


def test_other_with_one_name_keeps_it_and_links_to_the_first_parents_text() -> None:
    made = decide(OTHER, OTHER)
    assert made.terms is not None
    assert made.terms.front_matter() == {
        "license": "other",
        "license_name": "acme-1",
        "license_link": f"https://huggingface.co/org/base/blob/{make.digest('org/base', 40)}/LICENSE",
    }


def test_other_with_an_address_keeps_the_address() -> None:
    card = {"license": "other", "license_name": "acme-1", "license_link": "https://acme.example/licence"}
    made = decide(card, card)
    assert made.terms == License(("other",), "acme-1", "https://acme.example/licence")


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
    made = decide(a, b)
    assert made.terms is None
    assert len(made.notes) == 1


def test_the_authors_word_stands_where_the_parents_say_nothing() -> None:
    made = decide({"license": "mit"}, {}, own={"license": "mit"})
    assert made.license == "mit"
    assert made.notes == ("org/ft1 declares no licence; the card states mit, as the recipe says",)


def test_the_authors_word_stands_against_the_parents_with_a_note() -> None:
    made = decide({"license": "cc-by-nc-4.0"}, {"license": "cc-by-nc-4.0"}, own={"license": "mit"})
    assert made.license == "mit"
    assert made.notes == ("the parents declare cc-by-nc-4.0; the card states mit, as the recipe says",)


def test_the_authors_word_that_repeats_the_parents_needs_no_note() -> None:
    assert decide({"license": "mit"}, {"license": "mit"}, own={"license": "MIT"}).notes == ()


def test_the_authors_own_licence_can_be_named_and_linked() -> None:
    own = {"license": "other", "license_name": "acme-1", "license_link": "LICENSE.md"}
    made = decide({}, {}, own=own)
    assert made.terms is not None
    assert made.terms.front_matter() == own
    assert made.license == "other (acme-1)"


def test_a_model_that_is_its_own_base_counts_once() -> None:
    base = make.pinned("org/a", role="base", card={"license": "mit"})
    model = make.pinned("org/a", card={"license": "mit"})
    plan = make.plan(make.recipe(base, [model]), base, [model])
    assert derive_license(plan, Card()).license == "mit"


@pytest.mark.parametrize(
    "value",
    [
        "mit\nlicense: apache-2.0", "MIT License", {"a": 1}, [["mit"]], 7, True, ["mit"] * 3 + ["x y"], "../etc", "<b>",
        "m" * 65, ["a" + str(i) for i in range(9)], "‮tim",
    ],
)  # fmt: skip
def test_what_is_no_identifier_is_not_taken_over(value: Any) -> None:
    assert declared({"license": value}) is None
    made = decide({"license": "mit"}, {"license": value})
    assert made.terms is None
    assert "org/ft1 declares" in made.notes[0]


@pytest.mark.parametrize(
    "link", ["javascript:alert(1)", "https://x/ y", "../../x", "/etc", "a\nb", "https://u:p@x/", 3]
)
def test_links_and_names_of_another_form_are_dropped(link: Any) -> None:
    found = declared({"license": "other", "license_name": f"{link}\n", "license_link": link})
    assert found is not None
    assert found.link is None
