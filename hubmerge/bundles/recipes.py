"""The recipe that a bundle's manifest amounts to: of the whole, and of one more model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hubmerge.bundles.manifest import Manifest, Origin
from hubmerge.spec import PinnedModel

if TYPE_CHECKING:
    from hubmerge.recipe import Recipe


def recipe_of(manifest: Manifest) -> Recipe:
    """The recipe that makes such a bundle; a local folder stands in it as ``./NAME``."""
    from hubmerge.recipe import Recipe as RecipeClass

    models = [{"repo": _place(t.source), "name": t.name, "parameters": t.settings} for t in manifest.tasks]
    return RecipeClass.from_data(_data(manifest, _place(manifest.base), models))


def recipe_for(manifest: Manifest, base: PinnedModel, model: PinnedModel) -> Recipe:
    """How the bundle treats one model."""
    from hubmerge.recipe import Recipe as RecipeClass

    return RecipeClass.from_data(_data(manifest, base.repo, [{"repo": model.repo, "name": model.name}]))


def _place(origin: Origin) -> str:
    return f"{origin.repo}@{origin.commit}" if origin.repo else f"./{origin.name}"


def _data(manifest: Manifest, base: str, models: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "method": manifest.codec,
        "base": base,
        "models": models,
        "parameters": dict(manifest.parameters),
        "seed": manifest.seed,
        "include": list(manifest.include),
        "exclude": list(manifest.exclude),
        "heads": manifest.heads,
        "output": {"format": "bundle", "shard_size": manifest.shard_size},
        "card": manifest.card.model_dump(mode="json", exclude_defaults=True),
    }
