"""mergekit files, read with mergekit's meaning and turned into recipes of our own."""

from __future__ import annotations

from hubmerge.recipe.mergekit.translate import Translation, translate

__all__ = ["Translation", "translate"]
