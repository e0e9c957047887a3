"""Recipes: what a person decides about a merge, read strictly from YAML, from mergekit files and from flags."""

from __future__ import annotations

from hubmerge.recipe.recipe import Recipe
from hubmerge.recipe.refs import ModelRef
from hubmerge.recipe.schema import Card, ModelEntry, Output

__all__ = ["Card", "ModelEntry", "ModelRef", "Output", "Recipe"]
