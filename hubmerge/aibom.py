"""``aibom.cdx.json``: the bill of materials of a result in CycloneDX 1.6, with its parents as ancestors.

It says what the lock and the card say, in the words that scanners of supply chains read. There is no clock in it: the
same inputs give the same text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import hubmerge
from hubmerge.card import HUB_URL, CardFacts
from hubmerge.licenses import License, license_of
from hubmerge.licenses.stated import is_absolute
from hubmerge.licenses.table import rule_of, spdx_spelling
from hubmerge.lock import LOCK_NAME, Digested, numerics_of

AIBOM_NAME = "aibom.cdx.json"
_SPEC = "1.6"
_KIND = "machine-learning-model"


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A model that the result is made of."""

    role: str
    """``base`` or ``model``."""
    name: str
    """What the recipe calls it."""
    repo: str | None
    """None for a local folder, of which only the name is told."""
    commit: str | None
    license: License | None
    header_sha256: str = ""
    """Digest over its safetensors headers."""


@dataclass(frozen=True, slots=True)
class Material:
    """What a bill is made of.

    Args:
        name: What the result is called.
        repo: Where it is published; None for a local folder.
        hub_url: The Hub that its repositories are on.
        license: What its card states; None if it states none.
        facts: The method and what else describes how it was made, by name.
        digest: Of the plan.
        ancestors: The base, then the models.
        files: The weight files.
        architecture: ``model_type`` and the class, as far as the base's config names them.
    """

    name: str
    repo: str | None
    hub_url: str
    license: License | None
    facts: Mapping[str, str]
    digest: str
    ancestors: Sequence[Ancestor]
    files: Sequence[Digested]
    architecture: Mapping[str, str] = field(default_factory=dict)


def merge_bill(facts: CardFacts, written: Iterable[Digested]) -> bytes:
    """The bill of a merge.

    Args:
        facts: What its card is made of.
        written: Its weight files.
    """
    plan = facts.plan
    ancestors = [
        Ancestor(
            role=m.role,
            name=m.name,
            repo=None if m.is_local else m.repo,
            commit=m.commit,
            license=license_of(m),
            header_sha256=m.header_sha256,
        )
        for m in (plan.base, *plan.models)
    ]
    described = {
        "method": plan.method,
        "parameters": json.dumps(plan.params.model_dump(mode="json"), sort_keys=True),
        "numerics": numerics_of(plan),
        "seed": str(plan.seed),
    }
    return bill(
        Material(
            name=facts.repo_id or facts.title,
            repo=facts.repo_id,
            hub_url=facts.hub_url,
            license=facts.license.terms,
            facts=described,
            digest=plan.digest,
            ancestors=ancestors,
            files=sorted(written, key=lambda f: f.path),
            architecture=_architecture(plan.base.config),
        )
    )


def bill(made: Material) -> bytes:
    """The text of a bill: JSON with sorted keys, two spaces of indentation and a newline at the end."""
    data = {
        "$schema": f"http://cyclonedx.org/schema/bom-{_SPEC}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": _SPEC,
        "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, f"{made.hub_url}/{made.name}#{made.digest}").urn,
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "hubmerge", "version": hubmerge.__version__}]},
            "component": _result(made),
        },
    }
    return (json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _result(made: Material) -> dict[str, Any]:
    files = [{"type": "file", "name": f.path, "hashes": [{"alg": "SHA-256", "content": f.sha256}]} for f in made.files]
    place = {"purl": _purl(made.repo, None, made.hub_url)} if made.repo else {}
    card = {"modelCard": {"modelParameters": dict(made.architecture)}} if made.architecture else {}
    return {
        "type": _KIND,
        "bom-ref": "result",
        "name": made.name,
        **place,
        **_licenses(made.license),
        **card,
        "components": files,
        "pedigree": {"ancestors": [_ancestor(a, i, made.hub_url) for i, a in enumerate(made.ancestors)]},
        "externalReferences": [
            {"type": "build-meta", "url": LOCK_NAME},
            {"type": "model-card", "url": "README.md"},
        ],
        "properties": _properties({**made.facts, "plan_sha256": made.digest}),
    }


def _ancestor(found: Ancestor, index: int, hub_url: str) -> dict[str, Any]:
    place: dict[str, Any] = {}
    if found.repo is not None and found.commit is not None:
        place = {
            "version": found.commit,
            "purl": _purl(found.repo, found.commit, hub_url),
            "externalReferences": [
                {"type": "distribution", "url": f"{hub_url}/{quote(found.repo)}/tree/{found.commit}"}
            ],
        }
    said = {"role": found.role, "name": found.name, "header_sha256": found.header_sha256}
    return {
        "type": _KIND,
        "bom-ref": f"ancestor-{index}",
        "name": found.repo or found.name,
        **place,
        **_licenses(found.license),
        "properties": _properties(said),
    }


def _purl(repo: str, commit: str | None, hub_url: str) -> str:
    """A package URL, of the type that the purl specification has for the Hub."""
    version = f"@{commit}" if commit else ""
    elsewhere = f"?repository_url={quote(hub_url, safe=':/')}" if hub_url != HUB_URL else ""
    return f"pkg:huggingface/{quote(repo)}{version}{elsewhere}"


def _licenses(found: License | None) -> dict[str, Any]:
    """The key ``licenses``, by SPDX's identifiers or else by the Hub's names; nothing if none is known."""
    if found is None:
        return {}
    return {"licenses": [{"license": _license(identifier, found)} for identifier in found.identifiers]}


def _license(identifier: str, found: License) -> dict[str, str]:
    if (spelling := spdx_spelling(identifier)) is not None:
        return {"id": spelling}
    name = found.name if identifier == "other" and found.name else identifier
    rule = rule_of(name)
    link = found.link if found.link and is_absolute(found.link) else rule.source if rule is not None else None
    return {"name": name} | ({"url": link} if link else {})


def _properties(values: Mapping[str, str]) -> list[dict[str, str]]:
    """What CycloneDX has no word for; an empty value is left out."""
    return [{"name": f"hubmerge:{name}", "value": value} for name, value in sorted(values.items()) if value]


def _architecture(config: Mapping[str, Any]) -> dict[str, str]:
    """What a config says of the kind of model it is; it comes from strangers, and may hold anything."""
    classes = config.get("architectures")
    stated = {
        "architectureFamily": config.get("model_type"),
        "modelArchitecture": classes[0] if isinstance(classes, list) and classes else None,
    }
    return {name: value for name, value in stated.items() if isinstance(value, str) and value}
