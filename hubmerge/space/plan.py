"""The plan of a merge or of a bundle as a page shows it, before anything costs: what it takes, whether it fits here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hubmerge.errors import BudgetError, HubMergeError, UsageError
from hubmerge.hub.jobs import Jobs
from hubmerge.hub.translate import scrub
from hubmerge.licenses import Decision, license_of
from hubmerge.quantities import size
from hubmerge.remote import FLAVOR, TIMEOUT_S, duration, prepare
from hubmerge.space.safety import Limits, check_recipe, check_report, check_sizes
from hubmerge.space.visitors import Visitor

if TYPE_CHECKING:
    from hubmerge.hub import Hub
    from hubmerge.recipe import Recipe
    from hubmerge.results import PlanReport
    from hubmerge.spec import PinnedModel, Plan, Problem

BYTES_PER_S = 40e6
"""What a small machine reads, merges and writes in a second: for an estimate, not a promise."""
_START_S = 15.0


def live_plan(visitor: Visitor, recipe_text: str, target: str, limits: Limits) -> dict[str, Any]:
    """Everything that is to be known before a job is begun, from headers alone; errors are a part of it.

    Args:
        visitor: Who asks, and whose token is used.
        recipe_text: YAML, of a merge or of a bundle.
        target: Where the result would go; it may be empty.
        limits: Of this page.

    Returns:
        Plain data: ``ok`` (it can run somewhere), ``error`` and ``hint`` where it cannot; else the plan's facts,
        ``fits_here`` with ``why_not``, the licence's ``verdict`` with ``reasons``, ``problems``, ``staged`` (shards
        that are finished already), ``seconds`` (an estimate) and ``card`` (its text before anything is read).
    """
    try:
        recipe = check_recipe(recipe_text, limits)
        hub = visitor.hub()
        if recipe.output.format == "bundle":
            return _of_bundle(recipe, target, hub, limits)
        return _of_merge(recipe, target, hub, limits)
    except HubMergeError as error:
        return failure(error, visitor.token)


def _of_merge(recipe: Recipe, target: str, hub: Hub, limits: Limits) -> dict[str, Any]:
    from hubmerge import api
    from hubmerge.companions import card_before

    options = api.RunOptions(fetch="stream", device="cpu", max_memory_bytes=limits.memory_per_job_bytes)
    report = api.report(recipe, options=options, hub=hub)
    done = staged(report.plan, recipe, target, hub) if target else 0
    taken, shards = report.footprint, len(report.plan.outputs)
    return {
        **report.to_json(),
        "kind": "merge",
        "recipe": recipe.to_yaml(),
        "parameters": report.parameters,
        "shards": shards,
        "staged": done,
        "memory": size(taken.memory_bytes),
        "card": card_before(recipe, report.plan, hub, target or None),
        **_common(report.plan.base, report.plan.models, report.plan.problems, report.license),
        **_amounts(taken.read_bytes, taken.write_bytes, done / max(shards, 1)),
        **_fit(report, limits),
    }


def _of_bundle(recipe: Recipe, target: str, hub: Hub, limits: Limits) -> dict[str, Any]:
    """Of a bundle, the sizes are known from headers; what it holds in memory is not estimated."""
    from hubmerge.bundles.manifest import Origin
    from hubmerge.bundles.planning import plan_bundle
    from hubmerge.bundles.terms import origins_license
    from hubmerge.resolve import pin_recipe

    base, models = pin_recipe(recipe, hub)
    plan = plan_bundle(recipe, base, models)
    origins = [Origin.of(m) for m in (base, *models)]
    terms = origins_license(origins[0], origins[1:], recipe.card, target or None)
    read = sum(f.size_bytes for m in (base, *models) for f in m.files.values() if f.path.endswith(".safetensors"))
    write = sum(o.size_bytes for o in plan.outputs)
    why_not = ""
    try:
        check_sizes(read, write, 0, limits)
    except BudgetError as error:
        why_not = error.message
    return {
        "kind": "bundle",
        "method": recipe.method,
        "recipe": recipe.to_yaml(),
        "parameters": ", ".join(f"{k}={v}" for k, v in plan.params.model_dump().items()),
        "shards": len(plan.outputs),
        "staged": 0,
        "memory": "",
        "card": "",
        **_common(base, models, plan.problems, terms),
        **_amounts(read, write, 0.0),
        "fits_here": not why_not,
        "why_not": why_not,
    }


def _common(
    base: PinnedModel, models: Sequence[PinnedModel], problems: Sequence[Problem], terms: Decision
) -> dict[str, Any]:
    """The models, what is wrong with them, and what their licences say."""
    return {
        "ok": not any(p.severity == "error" for p in problems),
        "sources": [_source(m) for m in (base, *models)],
        "problems": [asdict(p) for p in problems],
        "license": terms.license,
        "verdict": terms.verdict,
        "headline": terms.headline,
        "reasons": list(terms.reasons),
        "duties": [str(d) for d in terms.duties if d.done is not None],
        "left_to_you": [d.text for d in terms.left],
    }


def _source(model: PinnedModel) -> dict[str, Any]:
    terms = license_of(model)
    return {
        "role": model.role,
        "name": model.name,
        "repo": model.repo,
        "commit": model.commit,
        "adapter": model.adapter is not None,
        "license": terms.label if terms is not None else None,
    }


def _amounts(read_bytes: int, write_bytes: int, done: float) -> dict[str, Any]:
    seconds = (_START_S + (read_bytes + write_bytes) / BYTES_PER_S) * (1 - done)
    return {"read": size(read_bytes), "write": size(write_bytes), "seconds": seconds, "time": _about(seconds)}


def _fit(report: PlanReport, limits: Limits) -> dict[str, Any]:
    why_not = ""
    try:
        check_report(report, limits)
    except BudgetError as error:
        why_not = error.message
    return {"fits_here": not why_not, "why_not": why_not}


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
    visitor: Visitor, recipe_text: str, target: str, limits: Limits, *, flavor: str = FLAVOR,
    timeout_s: int = TIMEOUT_S, flags: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """What running a recipe on Hugging Face Jobs would be and cost; nothing is started, ``remote.submit`` does that.

    Args:
        visitor: Who would pay.
        recipe_text: YAML, of a merge.
        target: Where the result goes.
        limits: Of this page.
        flavor: Name of the machine.
        timeout_s: After so many seconds it is ended.
        flags: Further options of ``hubmerge push``.

    Raises:
        UsageError, AccessError: It cannot be.
    """
    recipe = check_recipe(recipe_text, limits)
    if not target:
        raise UsageError("where the result goes is not said", hint="Write your-name/name-of-the-model.")
    found = prepare(recipe, ("--to", target, *flags), visitor.hub(), flavor=flavor, timeout_s=timeout_s)
    return {**found.facts(), "at_most_usd": found.highest_cost_usd, "submission": found}


def failure(error: HubMergeError, token: str) -> dict[str, Any]:
    """An error as a page shows it."""
    return {"ok": False, "error": scrub(error.message, token), "hint": scrub(error.hint, token)}
