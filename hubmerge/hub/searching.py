"""Models found by a few letters of their names, each with what is to be known before it is chosen."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hubmerge.hub.reading import Reader
from hubmerge.spec import DTYPES

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

What = Literal["full", "adapter", "bundle", "other"]
_EXPAND: list[Any] = [
    "cardData", "downloads", "gated", "lastModified", "library_name", "pipeline_tag", "private", "safetensors",
    "siblings", "tags", "usedStorage",
]  # fmt: skip
_MOST = 50


@dataclass(frozen=True, slots=True)
class Found:
    """A model of the Hub, as its page describes it."""

    repo: str
    what: What
    """A whole checkpoint, a PEFT adapter, a bundle of hubmerge's, or nothing that can be merged."""
    size_bytes: int | None
    """Of its weights, if the Hub says; else of all files it has ever had."""
    license: str | None
    gated: bool
    """Its files are given only to those who were let in."""
    private: bool
    base: tuple[str, ...]
    """What it was made from, as its card says."""
    task: str | None
    """The Hub's word for what it does."""
    downloads: int


class Searching:
    """Searches what the token of a ``Hub`` may see."""

    def __init__(self, hub: Reader) -> None:
        self._hub = hub

    def models(self, text: str, limit: int = 20) -> tuple[Found, ...]:
        """Models whose id has this text in it, those first that are used most.

        Raises:
            AccessError: The token is wrong.
            SourceError, TransportError: The Hub does not say.
        """

        def found() -> list[ModelInfo]:
            most = min(limit, _MOST)
            listed = self._hub.api.list_models(search=text, sort="downloads", expand=_EXPAND, limit=most)
            return list(itertools.islice(listed, most))

        return tuple(_found(info) for info in self._hub.call(f"search for {text!r}", "models", found))


def _found(info: ModelInfo) -> Found:
    card: dict[str, Any] = info.card_data.to_dict() if info.card_data is not None else {}  # type: ignore[no-untyped-call]
    bases = card.get("base_model") or ()
    return Found(
        repo=info.id,
        what=_what(info),
        size_bytes=_size_bytes(info),
        license=_text(card.get("license_name") if card.get("license") == "other" else card.get("license")),
        gated=bool(info.gated),
        private=bool(info.private),
        base=(bases,) if isinstance(bases, str) else tuple(b for b in bases if isinstance(b, str)),
        task=info.pipeline_tag,
        downloads=info.downloads or 0,
    )


def _what(info: ModelInfo) -> What:
    files = {s.rfilename for s in info.siblings or ()}
    if "hubmerge_bundle.json" in files:
        return "bundle"
    if "adapter_config.json" in files:
        return "adapter"
    return "full" if any(f.endswith(".safetensors") and "/" not in f for f in files) else "other"


def _size_bytes(info: ModelInfo) -> int | None:
    counted: Mapping[str, int] = getattr(info.safetensors, "parameters", None) or {}
    if counted and all(name in DTYPES for name in counted):
        return sum(n * DTYPES[name].nbytes for name, n in counted.items())
    return getattr(info, "used_storage", None)


def _text(value: object) -> str | None:
    """A card may hold anything."""
    if isinstance(value, list | tuple):
        return ", ".join(str(v) for v in value) or None
    return str(value) if value else None
