"""What a card quotes of its parents' cards, each quotation with whom it is from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from hubmerge.licenses import label_of
from hubmerge.spec import PinnedModel


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model whose card is quoted."""

    name: str
    """How to call it in a sentence."""
    repo: str | None = None
    """None for a local folder."""
    commit: str = ""

    @classmethod
    def at(cls, label: str, repo: str | None, commit: str | None) -> Self:
        """A model at a commit; one from a local folder has neither."""
        return cls(f"{label} at {commit[:7]}", repo, commit) if repo and commit else cls(label)

    @classmethod
    def of(cls, model: PinnedModel) -> Self:
        """A pinned model."""
        return cls.at(label_of(model), None if model.is_local else model.repo, model.commit)


@dataclass(frozen=True, slots=True)
class Quotation:
    """Paragraphs that stand in the cards of all these models."""

    speakers: tuple[Speaker, ...]
    paragraphs: tuple[str, ...]


def quotations(said: Iterable[tuple[Speaker, tuple[str, ...]]]) -> tuple[Quotation, ...]:
    """What the models' cards say, in order; the same words only once, for many fine-tunes copy their base's card."""
    found: dict[tuple[str, ...], dict[Speaker, None]] = {}
    for speaker, paragraphs in said:
        if paragraphs:
            found.setdefault(paragraphs, {})[speaker] = None
    return tuple(Quotation(tuple(speakers), paragraphs) for paragraphs, speakers in found.items())
