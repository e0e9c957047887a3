"""Search for models, as a page shows it: plain data, and errors as text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hubmerge.errors import HubMergeError
from hubmerge.hub.searching import Found, Searching
from hubmerge.quantities import size
from hubmerge.recipe.refs import looks_local
from hubmerge.space.plan import failure
from hubmerge.space.visitors import Visitor

MIN_CHARS = 2
MAX_CHARS = 100
_WORDS = {"full": "full model", "adapter": "adapter", "bundle": "bundle", "other": "no safetensors"}


def search(visitor: Visitor, text: str, limit: int = 20) -> dict[str, Any]:
    """Models by a few letters of their ids, as this visitor may see them.

    Returns:
        ``ok`` and ``models``, each with a ``label`` that says what it is in words; or ``error`` and ``hint``.
    """
    text = text.strip()[:MAX_CHARS]
    if len(text) < MIN_CHARS or looks_local(text):
        return {"ok": True, "models": []}
    try:
        found = Searching(visitor.hub()).models(text, limit)
    except HubMergeError as error:
        return failure(error, visitor.token)
    return {"ok": True, "models": [{**asdict(one), "label": label(one)} for one in found]}


def label(found: Found) -> str:
    """What a model is, in a line."""
    facts = [
        _WORDS[found.what],
        size(found.size_bytes) if found.size_bytes is not None else "size unknown",
        found.license or "no licence stated",
        *(["gated"] if found.gated else []),
        *(["private"] if found.private else []),
    ]
    return f"{found.repo} ({', '.join(facts)})"
