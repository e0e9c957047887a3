"""The plan of a merge as a page shows it, before anything costs: what it takes, whether it fits here."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hubmerge.errors import BudgetError, HubMergeError, UsageError
from hubmerge.hub.jobs import Jobs
from hubmerge.hub.translate import scrub
from hubmerge.quantities import size
from hubmerge.remote import FLAVOR, TIMEOUT_S, duration, prepare
from hubmerge.space.safety import Limits, check_recipe, check_report
from hubmerge.space.visitors import Visitor

if TYPE_CHECKING:
    from hubmerge.hub import Hub
    from hubmerge.recipe import Recipe
    from hubmerge.results import PlanReport
    from hubmerge.spec import Plan

BYTES_PER_S = 40e6
"""What a small machine reads, merges and writes in a second: for an estimate, not a promise."""
_START_S = 15.0


def live_plan(visitor: Visitor, recipe_text: str, target: str, limits: Limits) -> dict[str, Any]:
    """Everything that is to be known before a merge is begun, from headers alone; errors are a part of it.

    Args:
        visitor: Who asks, and whose token is used.
        recipe_text: YAML.
        target: Where the result would go; it may be empty.
        limits: Of this page.

    Returns:
        Plain data: ``ok`` (it can run somewhere), ``error`` and ``hint`` where it cannot; else the plan's facts,
        ``fits_here`` with ``why_not``, ``license``, ``problems``, ``staged`` (shards that are finished already) and
        ``seconds`` (an estimate).
    """
    from hubmerge import api

    try:
        recipe = check_recipe(recipe_text, limits)
        options = api.RunOptions(fetch="stream", device="cpu", max_memory_bytes=limits.memory_per_job_bytes)
        hub = visitor.hub()
        report = api.report(recipe, options=options, hub=hub)
        done = staged(report.plan, recipe, target, hub) if target else 0
    except HubMergeError as error:
        return failure(error, visitor.token)
    return _facts(report, recipe, done, limits)


def _facts(report: PlanReport, recipe: Recipe, done: int, limits: Limits) -> dict[str, Any]:
    problems = [asdict(p) for p in report.plan.problems]
    why_not = ""
    try:
        check_report(report, limits)
    except BudgetError as error:
        why_not = error.message
    taken, shards = report.footprint, len(report.plan.outputs)
    seconds = _START_S + (taken.read_bytes + taken.write_bytes) / BYTES_PER_S
    return {
        **report.to_json(),
        "ok": not any(p["severity"] == "error" for p in problems),
        "recipe": recipe.to_yaml(),
        "parameters": report.parameters,
        "read": size(taken.read_bytes),
        "write": size(taken.write_bytes),
        "memory": size(taken.memory_bytes),
        "shards": shards,
        "staged": done,
        "seconds": seconds * (1 - done / max(shards, 1)),
        "time": _about(seconds * (1 - done / max(shards, 1))),
        "verdict": report.license.verdict,
        "headline": report.license.headline,
        "reasons": list(report.license.reasons),
        "left_to_you": [d.text for d in report.license.left],
        "fits_here": not why_not,
        "why_not": why_not,
    }


def _about(seconds: float) -> str:
    return "less than a minute" if seconds < 60 else f"about {duration(60 * round(seconds / 60))}"


def staged(plan: Plan, recipe: Recipe, target: str, hub: Hub) -> int:
    """How many shards of this plan an earlier run has finished; 0 where nothing can be seen."""
    from hubmerge.journal import resumable
    from hubmerge.lock import portable_recipe
    from hubmerge.staging import Stage

    work = resumable(plan, portable_recipe(plan, recipe.normalized()), resume=True)
    stage = Stage(hub, target, work, "main", "")
    try:
        stage.find(hub.head(target, stage.branch))
    except HubMergeError:
        return 0
    return len(stage.files)


def machines(visitor: Visitor, timeout_s: int = TIMEOUT_S) -> list[dict[str, Any]]:
    """What Hugging Face Jobs offers, the cheapest first, with the most that a job would cost.

    Raises:
        HubMergeError: The Hub does not say.
    """
    return [
        {
            "name": f.name,
            "hardware": f.hardware,
            "usd_per_hour": round(f.usd_per_minute * 60, 4),
            "at_most_usd": round(f.usd_per_minute * timeout_s / 60, 2),
            "default": f.name == FLAVOR,
        }
        for f in Jobs(visitor.hub()).flavors().values()
    ]


def job_offer(
    visitor: Visitor, recipe_text: str, target: str, limits: Limits, *, flavor: str = FLAVOR, timeout_s: int = TIMEOUT_S
) -> dict[str, Any]:
    """What running a recipe on Hugging Face Jobs would be and cost; nothing is started, ``remote.submit`` does that.

    Raises:
        UsageError, AccessError: It cannot be.
    """
    recipe = check_recipe(recipe_text, limits)
    if not target:
        raise UsageError("where the result goes is not said", hint="Write your-name/name-of-the-model.")
    found = prepare(recipe, ("--to", target), visitor.hub(), flavor=flavor, timeout_s=timeout_s)
    return {**found.facts(), "at_most_usd": found.highest_cost_usd, "submission": found}


def failure(error: HubMergeError, token: str) -> dict[str, Any]:
    """An error as a page shows it."""
    return {"ok": False, "error": scrub(error.message, token), "hint": scrub(error.hint, token)}
