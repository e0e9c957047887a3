"""The bill of materials of a bundle, made of its manifest."""

from __future__ import annotations

import json

from hubmerge.aibom import Ancestor, Material, bill
from hubmerge.bundles.card import BundleFacts
from hubmerge.bundles.manifest import Origin
from hubmerge.licenses import declared


def bundle_bill(facts: BundleFacts, digest: str) -> bytes:
    """The bill of a bundle.

    Args:
        facts: What its card is made of.
        digest: Of the plan that was run last.
    """
    manifest = facts.manifest
    return bill(
        Material(
            name=facts.repo_id or facts.title,
            repo=facts.repo_id,
            hub_url=facts.hub_url,
            license=facts.license.terms,
            facts={
                "codec": manifest.codec,
                "parameters": json.dumps(dict(manifest.parameters), sort_keys=True),
                "seed": str(manifest.seed),
            },
            digest=digest,
            ancestors=[
                _ancestor("base", "base", manifest.base),
                *(_ancestor("model", t.name, t.source) for t in manifest.tasks),
            ],
            files=manifest.files,
        )
    )


def _ancestor(role: str, name: str, origin: Origin) -> Ancestor:
    return Ancestor(role, name, origin.repo, origin.commit, declared(origin.license), origin.header_sha256)
