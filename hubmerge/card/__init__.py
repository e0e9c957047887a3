"""The model card: front matter and text made from the facts of a run, and from nothing else."""

from hubmerge.card.facts import HUB_URL, CardFacts
from hubmerge.card.metadata import assembled, front_matter
from hubmerge.card.rendering import render_card
from hubmerge.card.wording import Setting, credits_of, paper_url, sections, settings_table

__all__ = [
    "HUB_URL",
    "CardFacts",
    "Setting",
    "assembled",
    "credits_of",
    "front_matter",
    "paper_url",
    "render_card",
    "sections",
    "settings_table",
]
