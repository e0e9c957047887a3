"""What a bundle on the Hub holds, as a page shows it."""

from __future__ import annotations

from typing import Any

from hubmerge.errors import HubMergeError
from hubmerge.quantities import size
from hubmerge.space.plan import failure
from hubmerge.space.safety import check_repo
from hubmerge.space.visitors import Visitor


def bundle_facts(visitor: Visitor, place: str) -> dict[str, Any]:
    """A bundle's codec, base, tasks and sizes.

    Args:
        visitor: Who asks.
        place: ``owner/name``, with ``@revision`` if need be.

    Returns:
        Plain data: ``ok``, and the facts; or ``error`` and ``hint``.
    """
    from hubmerge.bundles.api import opened
    from hubmerge.bundles.report import Sizes, describe
    from hubmerge.bundles.terms import bundle_license
    from hubmerge.codecs import get_codec

    try:
        check_repo("the bundle", place)
        with opened(place, visitor.hub()) as found:
            manifest, terms = found.manifest, bundle_license(found.manifest, found.repo)
            sizes = Sizes.of(manifest)
            licenses = {t.name: _license(t.source.license) for t in manifest.tasks}
            facts = describe(manifest)
            return {
                "ok": True,
                "place": place,
                "repo": found.repo,
                "commit": found.commit,
                **facts,
                "incremental": get_codec(manifest.codec).incremental,
                "tasks": [_task(t, licenses[t["name"]]) for t in facts["tasks"]],
                "size": size(sizes.bundle_bytes),
                "comparison": sizes.verdict,
                "headline": terms.headline,
            }
    except HubMergeError as error:
        return failure(error, visitor.token)


def _license(stated: dict[str, Any]) -> str:
    """A licence as a task's origin has it."""
    name = stated.get("license_name") or stated.get("license") or "none stated"
    return ", ".join(map(str, name)) if isinstance(name, list) else str(name)


def _task(row: dict[str, Any], license_: str) -> dict[str, Any]:
    error = row["expected_relative_error"]
    return {
        **row,
        "license": license_,
        "own": size(row["own_bytes"]),
        "plain": size(row["plain_bytes"]),
        "error": None if error is None else f"{100 * error:.3g} %",
    }
