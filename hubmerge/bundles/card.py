"""The bundle's own card: made of its manifest, so that adding a task needs no other task's model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import hubmerge
from hubmerge.bundles.manifest import Manifest, Origin
from hubmerge.bundles.report import Sizes
from hubmerge.bundles.terms import bundle_license
from hubmerge.card import Setting, assembled, credits_of, paper_url, sections, settings_table
from hubmerge.codec import Codec
from hubmerge.licenses import Decision, declared
from hubmerge.markdown import environment, one_line
from hubmerge.quantities import percent, size
from hubmerge.recipe.refs import ref_problem
from hubmerge.recipe.schema import Card

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
    def _origins(self) -> list[Origin]:
        return [self.manifest.base, *(t.source for t in self.manifest.tasks)]

    @property
    def repos(self) -> list[str]:
        """The parents that are on the Hub, each once."""
        return list(dict.fromkeys(o.repo for o in self._origins if o.repo and ref_problem(o.repo, None) is None))

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The table of parameters."""
        return settings_table(self.codec, self.manifest.parameters)

    @property
    def paper_url(self) -> str | None:
        """Where the codec's paper is."""
        return paper_url(self.codec)

    @property
    def sections(self) -> tuple[tuple[str, str], ...]:
        """What the author says about the bundle's use."""
        return sections(self.words)

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
    environment_ = environment()
    environment_.filters |= {"size": size}
    body = environment_.get_template(TEMPLATE).render(facts=facts, hub_url=hub_url, version=hubmerge.__version__)
    return assembled(front_matter(facts), body)


def front_matter(facts: BundleFacts) -> dict[str, Any]:
    """The card's metadata."""
    words, repos = facts.words, facts.repos
    data: dict[str, Any] = {
        "library_name": "hubmerge",
        "base_model": repos,
        "base_model_relation": "merge" if repos else None,
        **(facts.license.terms.front_matter() if facts.license.terms else {}),
        "language": list(words.language),
        "tags": list(
            dict.fromkeys(["merge", "hubmerge", "bundle", facts.manifest.codec, *(one_line(t) for t in words.tags)])
        ),
    }
    return {k: v for k, v in data.items() if v not in (None, [])}
