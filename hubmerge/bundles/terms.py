"""Whether a bundle's parents' licences allow it to be published, and the files that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubmerge.bundles.manifest import Manifest, Origin
from hubmerge.licenses import Decision, decide, refuse, stating

if TYPE_CHECKING:
    from hubmerge.recipe.schema import Card
    from hubmerge.signing import Signer


@dataclass(frozen=True, slots=True)
class Publication:
    """Where a bundle is published, and what its publisher takes upon themselves."""

    repo: str | None = None
    """None for a local folder, which is not published."""
    accept_license_risk: bool = False
    license: str | None = None
    """What its card shall state, if not what the recipe says."""
    signer: Signer | None = None
    """Who signs it, if anybody does."""

    def words(self, card: Card) -> Card:
        """What the author says, with this licence.

        Raises:
            UsageError: It is not a licence's identifier.
        """
        return card if self.license is None else stating(card, self.license)

    def check(self, base: Origin, models: Sequence[Origin], card: Card) -> None:
        """End here, before anything is created, if licences forbid it.

        Raises:
            LicenseError: They do.
        """
        if self.repo is not None:
            found = origins_license(base, models, card, self.repo)
            refuse(found, accept_risk=self.accept_license_risk, name=self.repo)


LOCAL = Publication()
"""A folder."""


def origins_license(base: Origin, models: Sequence[Origin], card: Card, repo: str | None) -> Decision:
    """The check of a bundle of these models."""
    unique = {(o.repo, o.commit, None if o.repo else o.name): o for o in (base, *models)}
    return decide([o.declaration for o in unique.values()], card, "the bundle's card", repo)


def bundle_license(manifest: Manifest, repo: str | None) -> Decision:
    """The check of a bundle; ``repo`` is where it is published."""
    return origins_license(manifest.base, [t.source for t in manifest.tasks], manifest.card, repo)
