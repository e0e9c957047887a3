"""The lock of a bundle: what went into it, and the digest of every file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import hubmerge
from hubmerge.bundles.manifest import Manifest, Origin
from hubmerge.lock import FORMAT_VERSION, Digested, Lock, environment


def bundle_lock(manifest: Manifest, recipe: Mapping[str, Any], files: Iterable[Digested], digest: str) -> Lock:
    """The lock of a bundle, over all of its files."""
    codec, _ = manifest.codec_of()
    ordered = sorted(files, key=lambda f: f.path)
    return Lock.model_validate(
        {
            "format_version": FORMAT_VERSION,
            "hubmerge_version": hubmerge.__version__,
            "recipe": dict(recipe),
            "sources": [_source("base", manifest.base), *(_source("model", t.source) for t in manifest.tasks)],
            "plan_sha256": digest,
            "outputs": [{"path": f.path, "size_bytes": f.size_bytes, "sha256": f.sha256} for f in ordered],
            "numerics": "exact" if codec.unit == "element" else "tolerance",
            "seed": manifest.seed,
            "environment": environment(),
        }
    )


def _source(role: str, origin: Origin) -> dict[str, Any]:
    return {
        "role": role,
        "name": origin.name,
        "repo": origin.repo,
        "commit": origin.commit,
        "local": origin.repo is None,
        "header_sha256": origin.header_sha256,
        "files": [],
    }
