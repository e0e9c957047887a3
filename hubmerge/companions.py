"""The small files of a merged model: copies, licences, recipe, diagnostics, card, bill of materials, and the lock.

The lock is over all of them, and a signature over the lock too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hubmerge.aibom import AIBOM_NAME, merge_bill
from hubmerge.card import HUB_URL, CardFacts, render_card
from hubmerge.evaluation import Comparison, result_files
from hubmerge.hub import Hub
from hubmerge.hub.benchmarks import benchmark
from hubmerge.inputs import read_small
from hubmerge.licenses import NOTICE_NAME, kept_files, notice, own_texts
from hubmerge.lock import LOCK_NAME, build_lock, dumps, portable_recipe
from hubmerge.output import Written
from hubmerge.plots import as_files
from hubmerge.recipe import Recipe
from hubmerge.signing import SIGNATURE_NAME, Signer
from hubmerge.spec import Plan, Truncation

if TYPE_CHECKING:
    from hubmerge.measuring import Meter

RECIPE_NAME = "hubmerge.yaml"
CARD_NAME = "README.md"


def companions(
    recipe: Recipe,
    planned: Plan,
    hub: Hub,
    written: list[Written],
    truncation: Truncation | None,
    license_check: Mapping[str, Any],
    repo: str | None = None,
    meter: Meter | None = None,
    signer: Signer | None = None,
    results: Comparison | None = None,
) -> dict[str, bytes]:
    """The small files of the result: copies, licences, recipe, card, bill of materials, the lock over all of them.

    With a signer, also a signature over all of these.
    """
    files: dict[str, bytes] = {}
    for f in planned.files:
        if f.content is not None:
            files[f.path] = f.content
        else:
            assert f.source is not None
            files[f.path] = read_small(planned.pinned(f.source), hub, f.path)
    files |= kept_files(planned.base, planned.models)
    portable = portable_recipe(planned, recipe.normalized())
    files[RECIPE_NAME] = Recipe.from_data(portable).to_yaml().encode()
    # A card that is published links to where it is published; one in a folder to the Hub that everyone knows.
    measured = meter.diagnostics() if meter is not None else None
    facts = CardFacts(planned, recipe, repo, hub.endpoint if repo else HUB_URL, truncation, measured, results)
    files |= as_files(measured) if measured is not None else {}
    files[CARD_NAME] = render_card(facts).encode()
    if results is not None and repo is not None:
        files |= result_files(results, lambda dataset: benchmark(hub, dataset))
    files[AIBOM_NAME] = merge_bill(facts, written)
    files |= own_texts(facts.license)
    if (text := notice(facts.license, files.get(NOTICE_NAME, b""))) is not None:
        files[NOTICE_NAME] = text
    lock = build_lock(planned, recipe.normalized(), all_written(written, files), license_check)
    files[LOCK_NAME] = dumps(lock).encode()
    if signer is not None:
        files[SIGNATURE_NAME] = signer.sign(repo or facts.title, all_written(written, files))
    return files


def card_before(
    recipe: Recipe, planned: Plan, hub: Hub, repo: str | None, results: Comparison | None = None
) -> str:  # fmt: skip
    """The card as far as it is known before anything is read.

    Raises:
        UsageError: What is wrong with the template of the recipe's author.
    """
    return render_card(CardFacts(planned, recipe, repo, hub.endpoint if repo else HUB_URL, results=results))


def check_card(recipe: Recipe, planned: Plan, hub: Hub, repo: str | None, results: Comparison | None) -> None:
    """Render the card before anything is read, as far as it is known then; if it is published, the Hub checks it.

    Raises:
        UsageError: What is wrong with the template of the recipe's author.
        PublishError: What the Hub does not accept.
    """
    text = card_before(recipe, planned, hub, repo, results)
    if repo is not None:
        hub.validate_card(text)


def all_written(written: list[Written], files: Mapping[str, bytes]) -> tuple[Written, ...]:
    """All files of the result, by path."""
    small = [Written(path, len(content), hashlib.sha256(content).hexdigest()) for path, content in files.items()]
    return tuple(sorted([*written, *small], key=lambda w: w.path))
