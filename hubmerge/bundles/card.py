"""The bundle's own card: made of its manifest, so that adding a task needs no other task's model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import hubmerge
from hubmerge.bundles.manifest import Manifest, Origin
from hubmerge.bundles.report import Sizes
from hubmerge.bundles.terms import bundle_license, origins_license
from hubmerge.card import (
    Quotation,
    Setting,
    Speaker,
    assembled,
    bibtex,
    credits_of,
    datasets_of,
    languages_of,
    paper_url,
    quotations,
    repos_of,
    settings_table,
    uses,
)
from hubmerge.codec import Codec
from hubmerge.hub import Hub
from hubmerge.licenses import Decision, License, declared
from hubmerge.markdown import one_line
from hubmerge.quantities import percent
from hubmerge.recipe.schema import Card
from hubmerge.templating import rendered

TEMPLATE = "bundle_card.md.jinja"
_MAX_NAMED = 4


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table of tasks."""

    name: str
    origin: Origin
    kind: str
    license: str | None
    error: str
    """As a fraction of the change's norm."""


@dataclass(frozen=True)
class BundleFacts:
    """What a bundle's card is made of.

    Args:
        manifest: The bundle's.
        repo_id: Where it is published; None for a local folder.
        hub_url: The Hub that the links lead to.
    """

    manifest: Manifest
    repo_id: str | None
    hub_url: str

    @cached_property
    def codec(self) -> Codec:
        """The codec."""
        return self.manifest.codec_of()[0]

    @property
    def words(self) -> Card:
        """What the recipe's author says."""
        return self.manifest.card

    @property
    def names(self) -> list[str]:
        """The tasks' names."""
        return [t.name for t in self.manifest.tasks]

    @property
    def title(self) -> str:
        """The heading."""
        if self.words.title or self.repo_id:
            return self.words.title or (self.repo_id or "").rpartition("/")[2]
        return " + ".join(self.names) if len(self.names) <= _MAX_NAMED else f"{len(self.names)} tasks in a bundle"

    @property
    def place(self) -> str:
        """What commands call the bundle."""
        return self.repo_id or "."

    @property
    def base(self) -> str:
        """How to call the base in a sentence."""
        return self.manifest.base.repo or "a local base"

    @property
    def noun(self) -> str:
        """What the tasks are."""
        adapters = sum(t.adapter for t in self.manifest.tasks)
        what = "adapter" if adapters == len(self.names) else "fine-tune" if not adapters else "fine-tune or adapter"
        return what if len(self.names) == 1 else "fine-tunes and adapters" if " " in what else f"{what}s"

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The table of tasks."""
        found = []
        for task in self.manifest.tasks:
            terms, error = declared(task.source.license), task.relative_error
            shown = "0" if task.error == 0 else percent(error) if error is not None else "–"
            kind = "adapter" if task.adapter else "full model"
            found.append(Row(task.name, task.source, kind, terms.label if terms else None, shown))
        return tuple(found)

    @property
    def has_theory(self) -> bool:
        """Whether some task's error is known."""
        return any(row.error != "–" for row in self.rows)

    @property
    def sizes(self) -> Sizes:
        """The bundle beside the models as they are."""
        return Sizes.of(self.manifest)

    @cached_property
    def license(self) -> Decision:
        """The check of the parents' licences, and what the card says of it."""
        return bundle_license(self.manifest, self.repo_id)

    @property
    def origins(self) -> list[Origin]:
        """The parents."""
        return [self.manifest.base, *(t.source for t in self.manifest.tasks)]

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The table of parameters."""
        return settings_table(self.codec, self.manifest.parameters)

    @property
    def paper_url(self) -> str | None:
        """Where the codec's paper is."""
        return paper_url(self.codec.paper)

    @property
    def bibtex(self) -> str | None:
        """How the codec's paper is cited."""
        return bibtex(self.codec.paper)

    @property
    def base_citation(self) -> tuple[Speaker, str] | None:
        """How the base's card says that the base is cited."""
        base = self.manifest.base
        return (_speaker(base), base.bibtex) if base.bibtex else None

    @property
    def uses(self) -> tuple[tuple[str, str], ...]:
        """What the author says the bundle is for, and what not."""
        return uses(self.words)

    @property
    def limitations(self) -> tuple[Quotation, ...]:
        """What the parents' cards say about their limitations."""
        return quotations((_speaker(o), o.limitations) for o in self.origins)

    @property
    def credits(self) -> tuple[tuple[str, str], ...]:
        """What the author says about the people behind it."""
        return credits_of(self.words)


def bundle_card(manifest: Manifest, repo: str | None, hub_url: str) -> str:
    """The whole ``README.md``.

    Args:
        manifest: The bundle's.
        repo: Where it is published; None for a local folder.
        hub_url: The Hub that the links lead to.

    Raises:
        HubMergeError: The front matter would not be read back as it was meant.
    """
    facts = BundleFacts(manifest, repo, hub_url)
    values = {"facts": facts, "hub_url": hub_url, "version": hubmerge.__version__}
    data = front_matter(manifest.codec, facts.origins, facts.words, facts.license.terms)
    return assembled(data, rendered(TEMPLATE, values))


def check_card(hub: Hub, codec: str, origins: Sequence[Origin], words: Card, repo: str | None) -> None:
    """Let the Hub check the metadata of a bundle that is to be published, before anything is encoded.

    Args:
        hub: The Hub.
        codec: The codec's name.
        origins: The base and the tasks' models.
        words: What the recipe's author says.
        repo: Where it is published; None for a local folder.

    Raises:
        PublishError: What the Hub does not accept.
    """
    if repo is not None:
        terms = origins_license(origins[0], origins[1:], words, repo).terms
        hub.validate_card(assembled(front_matter(codec, origins, words, terms), f"# {repo.rpartition('/')[2]}"))


def _speaker(origin: Origin) -> Speaker:
    return Speaker.at(origin.declaration.label, origin.repo, origin.commit)


def front_matter(codec: str, origins: Sequence[Origin], words: Card, license_: License | None) -> dict[str, Any]:
    """The card's metadata.

    Args:
        codec: The codec's name.
        origins: The base and the tasks' models.
        words: What the recipe's author says.
        license_: What is stated of the bundle.
    """
    repos = repos_of(o.repo for o in origins)
    cards = [{"language": list(o.languages), "datasets": list(o.datasets)} for o in origins]
    data: dict[str, Any] = {
        "library_name": "hubmerge",
        "base_model": repos,
        "base_model_relation": "merge" if repos else None,
        **(license_.front_matter() if license_ else {}),
        "language": languages_of([{"language": list(words.language)}] if words.language else cards),
        "datasets": datasets_of(cards),
        "tags": list(dict.fromkeys(["merge", "hubmerge", "bundle", codec, *(one_line(t) for t in words.tags)])),
    }
    return {k: v for k, v in data.items() if v not in (None, [])}
