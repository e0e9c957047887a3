"""The end of every change of a bundle: what describes it is written, and all of it becomes visible at once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hubmerge.aibom import AIBOM_NAME
from hubmerge.bundles.aibom import bundle_bill
from hubmerge.bundles.card import BundleFacts, bundle_card
from hubmerge.bundles.destination import Destination
from hubmerge.bundles.lock import bundle_lock
from hubmerge.bundles.manifest import MANIFEST_NAME, Manifest
from hubmerge.bundles.planning import BundlePlan
from hubmerge.bundles.recipes import recipe_of
from hubmerge.bundles.terms import Publication, bundle_license
from hubmerge.card import HUB_URL
from hubmerge.companions import CARD_NAME, RECIPE_NAME
from hubmerge.hub import Hub
from hubmerge.licenses import NOTICE_NAME, Decision, notice, own_texts
from hubmerge.lock import LOCK_NAME, Digested, OutputDigest, dumps
from hubmerge.output import Written
from hubmerge.signing import SIGNATURE_NAME
from hubmerge.spec import Problem

MADE_ANEW = frozenset({MANIFEST_NAME, LOCK_NAME, CARD_NAME, RECIPE_NAME, AIBOM_NAME})
"""What describes a bundle as a whole."""


@dataclass(frozen=True, slots=True)
class Made:
    """A bundle that was created or changed."""

    manifest: Manifest
    written: tuple[Written, ...]
    """The weight files that are new or have changed."""
    problems: tuple[Problem, ...] = ()
    """What is worth knowing about the models that were added."""
    license: Decision | None = None
    """What the check of the models' licences says."""
    path: Path | None = None
    url: str | None = None
    commit: str | None = None


def finish(
    place: Destination,
    hub: Hub,
    publication: Publication,
    manifest: Manifest,
    plan: BundlePlan | None,
    small: dict[str, bytes],
    kept: Sequence[OutputDigest] = (),
    before: bytes = b"",
) -> Made:
    """Write what describes the bundle, and make it visible.

    Args:
        place: Where it goes.
        hub: Whose links the card has.
        publication: Who publishes it, and how.
        manifest: Of the bundle as it is now.
        plan: What was encoded, if anything was.
        small: Small files of new tasks; of a new bundle, the base's too.
        kept: What stays of the bundle before.
        before: What stood in its file NOTICE.
    """
    terms = bundle_license(manifest, place.repo)
    small |= own_texts(terms)
    before = small.get(NOTICE_NAME, before)
    if (text := notice(terms, before)) is not None and text != before:
        small[NOTICE_NAME] = text
    recipe = recipe_of(manifest)
    small[RECIPE_NAME] = recipe.to_yaml().encode()
    small[MANIFEST_NAME] = manifest.dumps().encode()
    # A card that is published links to where it is published; one in a folder to the Hub that everyone knows.
    facts = BundleFacts(manifest, place.repo, hub.endpoint if place.repo else HUB_URL)
    small[CARD_NAME] = bundle_card(facts.manifest, facts.repo_id, facts.hub_url).encode()
    digest = plan.digest if plan is not None else hashlib.sha256(small[MANIFEST_NAME]).hexdigest()
    small[AIBOM_NAME] = bundle_bill(facts, digest)
    others = {f.path for f in manifest.files} | small.keys()
    files: list[Digested] = [*manifest.files, *(f for f in kept if f.path not in others)]
    files += [Written(path, len(c), hashlib.sha256(c).hexdigest()) for path, c in small.items()]
    check = terms.record(accepted_risk=publication.accept_license_risk)
    small[LOCK_NAME] = dumps(bundle_lock(manifest, recipe.normalized(), files, digest, check)).encode()
    if publication.signer is not None:
        lock = Written(LOCK_NAME, len(small[LOCK_NAME]), hashlib.sha256(small[LOCK_NAME]).hexdigest())
        small[SIGNATURE_NAME] = publication.signer.sign(place.repo or facts.title, [*files, lock])
    notes = plan.problems if plan is not None else ()
    return Made(manifest, place.written, notes, terms, **place.finish(small))
