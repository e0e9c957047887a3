"""The model card: front matter and text made from the facts of a run, and from nothing else."""

from hubmerge.card.citing import bibtex, paper_url
from hubmerge.card.facts import HUB_URL, CardFacts
from hubmerge.card.metadata import assembled, datasets_of, front_matter, languages_of, repos_of
from hubmerge.card.quoting import Quotation, Speaker, quotations
from hubmerge.card.rendering import render_card
from hubmerge.card.wording import Setting, credits_of, settings_table, uses

__all__ = [
    "HUB_URL",
    "CardFacts",
    "Quotation",
    "Setting",
    "Speaker",
    "assembled",
    "bibtex",
    "credits_of",
    "datasets_of",
    "front_matter",
    "languages_of",
    "paper_url",
    "quotations",
    "render_card",
    "repos_of",
    "settings_table",
    "uses",
]
