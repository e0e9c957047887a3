"""The text of a merge's card."""

from __future__ import annotations

import hubmerge
from hubmerge.card.facts import CardFacts
from hubmerge.card.metadata import assembled, front_matter
from hubmerge.templating import rendered

TEMPLATE = "model_card.md.jinja"


def render_card(facts: CardFacts) -> str:
    """The whole ``README.md``.

    Raises:
        UsageError: What is wrong with the template of the recipe's author.
        HubMergeError: The front matter would not be read back as it was meant.
    """
    values = {"facts": facts, "hub_url": facts.hub_url, "version": hubmerge.__version__}
    return assembled(front_matter(facts), rendered(TEMPLATE, values, facts.words.template))
