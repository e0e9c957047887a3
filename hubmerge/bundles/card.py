"""The bundle's own card."""

from __future__ import annotations

from hubmerge.bundles.manifest import Manifest
from hubmerge.spec import PinnedModel


def bundle_card(manifest: Manifest, base: PinnedModel, repo: str | None, plain_bytes: int | None) -> str:
    """The whole ``README.md``."""
    return f"---\nlibrary_name: hubmerge\n---\n\n# bundle of {len(manifest.tasks)}\n"
