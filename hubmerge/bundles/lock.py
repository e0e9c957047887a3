"""The lock of a bundle: what went into it, and the digest of every file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import hubmerge
from hubmerge.bundles.manifest import Manifest, Origin
from hubmerge.lock import FORMAT_VERSION, Digested, LicenseCheck, Lock, OutputDigest, Source, environment


def bundle_lock(
    manifest: Manifest,
    recipe: Mapping[str, Any],
    files: Iterable[Digested],
    digest: str,
    license_check: Mapping[str, Any],
) -> Lock:
    """The lock of a bundle, over all of its files.

    Args:
        manifest: The bundle's.
        recipe: The normalised recipe that makes it.
        files: All of its files but the lock.
        digest: Of the plan that was run last.
        license_check: What the check of the parents' licences said.
    """
    ordered = sorted(files, key=lambda f: f.path)
    return Lock(
        format_version=FORMAT_VERSION,
        hubmerge_version=hubmerge.__version__,
        recipe=dict(recipe),
        sources=(_source("base", manifest.base), *(_source("model", t.source) for t in manifest.tasks)),
        plan_sha256=digest,
        outputs=tuple(OutputDigest(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256 or "") for f in ordered),
        numerics="exact" if _is_exact(manifest) else "tolerance",
        seed=manifest.seed,
        environment=environment(),
        license=LicenseCheck.model_validate(license_check),
    )


def _is_exact(manifest: Manifest) -> bool:
    """Whether any machine makes the same bits: products of factors and decompositions differ in the last ones."""
    codec, params = manifest.codec_of()
    return not codec.whole(params) and not any(t.adapter for t in manifest.tasks)


def _source(role: Any, origin: Origin) -> Source:
    return Source(
        role=role,
        name=origin.name,
        repo=origin.repo,
        commit=origin.commit,
        local=origin.repo is None,
        header_sha256=origin.header_sha256,
        files=origin.files,
    )
