"""Cards as they are read: checked in, valid for the Hub, and changed only together with the changelog.

``UPDATE_GOLDEN=1`` writes them anew; then they are to be read, and the changelog to say what has changed.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import hubmerge
from hubmerge.localhub import LocalHub
from tests.cards import SITUATIONS
from tests.test_card import kinds, outline, split

FOLDER = Path(__file__).parent / "data" / "cards"
DIGESTS = FOLDER / "digests.txt"
CHANGELOG = Path(__file__).parent.parent / "CHANGELOG.md"
UPDATE = os.environ.get("UPDATE_GOLDEN") == "1"
ORDER = [
    "Results", "Evaluation", "How to use it", "How to restore a task", "What was merged", "What is inside", "Size",
    "How it was merged", "How it was made", "How the tasks get along", "Intended use", "Out-of-scope use",
    "Limitations", "Reproduce and verify", "Verify", "Provenance", "Licence", "Citation", "Authors", "Contact",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _any_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hubmerge, "__version__", "0.0.0")


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_card_is_the_one_that_is_checked_in(name: str) -> None:
    made = SITUATIONS[name]()
    path = FOLDER / f"{name}.md"
    if UPDATE:
        path.write_text(made)
    assert made == path.read_text()


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_card_is_read_as_it_was_meant(name: str) -> None:
    text = (FOLDER / f"{name}.md").read_text()
    data, body = split(text)
    card = ModelCard(text)
    assert {k: v for k, v in card.data.to_dict().items() if k != "model-index"} == {
        k: v for k, v in data.items() if k != "model-index"
    }
    assert {"base_model", "base_model_relation", "library_name", "tags"} <= data.keys()
    titles = outline(body)
    assert titles == sorted(titles, key=ORDER.index)
    assert not kinds(body) & {"html_block", "html_inline"}
    assert "\n\n\n" not in text
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_the_hub_takes_every_card(hub: LocalHub) -> None:
    for name in SITUATIONS:
        ModelCard((FOLDER / f"{name}.md").read_text()).validate()


def test_cards_change_only_with_the_changelog() -> None:
    lines = [f"{hashlib.sha256((FOLDER / f'{n}.md').read_bytes()).hexdigest()}  {n}.md" for n in sorted(SITUATIONS)]
    if UPDATE:
        DIGESTS.write_text("\n".join(lines) + "\n")
    assert DIGESTS.read_text().splitlines() == lines
    assert sorted(p.stem for p in FOLDER.glob("*.md")) == sorted(SITUATIONS)
    short = hashlib.sha256(DIGESTS.read_bytes()).hexdigest()[:12]
    entry = next(e for e in CHANGELOG.read_text().split("\n- ") if e.startswith("Cards:"))
    assert f"`{short}`" in entry, f"say in {CHANGELOG.name}, in the entry Cards:, what is new: `{short}`"
