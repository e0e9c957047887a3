"""Licences: what the parents' cards and files say, what the child's card may say, and what its publisher must do.

A check of what is stated, by a table with its sources; not legal advice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hubmerge.errors import UsageError
from hubmerge.licenses.duties import NOTICE_NAME, Duty
from hubmerge.licenses.stated import License, declared, silence, stated
from hubmerge.licenses.verdict import Decision, Declaration, decide, refuse
from hubmerge.spec import PinnedModel, Plan

if TYPE_CHECKING:
    from hubmerge.recipe import Card

FOLDER = "licenses"
"""Where the licence files of the models lie that are not the base."""


def label_of(model: PinnedModel) -> str:
    """How to call a parent in a sentence; a local folder has only its name, for its path is nobody's business."""
    if not model.is_local:
        return model.repo
    return "the local base" if model.role == "base" else f"the local model {model.name}"


def files_of(repo: str | None, commit: str | None) -> str | None:
    """The address of a repository's files at a commit."""
    return f"https://huggingface.co/{repo}/blob/{commit}" if repo and commit else None


def license_of(model: PinnedModel) -> License | None:
    """A model's licence, by its card and by its licence files; None if nothing is known."""
    return stated(model.card, model.notices)


def derive_license(plan: Plan, card: Card, name: str | None = None) -> Decision:
    """The check of a merge.

    Args:
        plan: What is merged.
        card: What the recipe's author says.
        name: The repository that the result is published in, if that is known.
    """
    return decide(declarations((plan.base, *plan.models)), card, "the merged model's card", name)


def declarations(models: Sequence[PinnedModel]) -> list[Declaration]:
    """What models declare; each once, for a model may be its own base."""
    unique = {(m.repo, m.commit, m.root): m for m in models}
    return [
        Declaration(
            label_of(m),
            license_of(m),
            None if m.is_local else files_of(m.repo, m.commit),
            silence(m.card, m.notices),
            tuple(sorted(m.notices)),
        )
        for m in unique.values()
    ]


def stating(card: Card, identifier: str) -> Card:
    """What the author says, with this licence.

    Raises:
        UsageError: It is not a licence's identifier.
    """
    if declared({"license": identifier}) is None:
        raise UsageError(
            f"--license {identifier[:80]!r}: not the identifier of a licence",
            hint="give one of the Hub's, such as apache-2.0 or llama3.1, or SPDX's",
        )
    return card.model_copy(update={"license": identifier, "license_name": None, "license_link": None})


def own_texts(found: Decision) -> dict[str, bytes]:
    """Texts that a licence wants along and no parent has, as files."""
    folder = Path(__file__).parent
    return {f"{FOLDER}/{name}.txt": (folder / f"{name}.txt").read_bytes() for name in found.own_texts}


def kept_files(base: PinnedModel, models: Sequence[PinnedModel]) -> dict[str, bytes]:
    """The licence and notice files of the models, under ``licenses/NAME/``; those that are the base's are there."""
    return {
        f"{FOLDER}/{m.name}/{path}": content
        for m in models
        for path, content in sorted(m.notices.items())
        if base.notices.get(path) != content
    }


def notice(found: Decision, before: bytes = b"") -> bytes | None:
    """The file NOTICE; None if the licences ask for none and there was none.

    Args:
        found: The check's outcome.
        before: What stands in it already, such as the base's own; it is kept.
    """
    text = before.decode("utf-8", "replace")
    missing = [line for line in found.lines if line not in text]
    if not missing:
        return before or None
    # The base's own bytes stay as they are, whatever their encoding.
    return (before.rstrip() + b"\n\n" if before.strip() else b"") + "\n\n".join(missing).encode() + b"\n"


__all__ = [
    "FOLDER",
    "NOTICE_NAME",
    "Decision",
    "Declaration",
    "Duty",
    "License",
    "decide",
    "declarations",
    "declared",
    "derive_license",
    "files_of",
    "kept_files",
    "label_of",
    "license_of",
    "notice",
    "own_texts",
    "refuse",
    "silence",
    "stated",
    "stating",
]
