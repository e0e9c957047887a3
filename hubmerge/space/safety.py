"""What a visitor of a shared page may ask for: repositories of the Hub only, and of no more than there is room for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hubmerge.errors import BudgetError, UsageError
from hubmerge.quantities import size
from hubmerge.recipe import Recipe
from hubmerge.recipe.algorithms import get_algorithm
from hubmerge.recipe.refs import looks_local, name_problem, ref_problem
from hubmerge.results import PlanReport
from hubmerge.space.jobs import without_tokens
from hubmerge.space.orders import KINDS, Order

GB = 1_000_000_000
_BUILT_IN = ("hubmerge.methods.", "hubmerge.codecs.")
_TARGET = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]")
_SHORT = 200


@dataclass(frozen=True, slots=True)
class Limits:
    """What one page gives to its visitors, each and all together."""

    recipe_chars: int = 50_000
    models: int = 16
    patterns: int = 100
    """Globs and rules by tensor name in a recipe; each is tried on every tensor."""
    min_shard_bytes: int = 100_000_000
    """Every shard is a commit."""
    read_bytes: int = 200 * GB
    write_bytes: int = 100 * GB
    parallel: int = 1
    """Jobs of one visitor that run at a time …"""
    waiting: int = 5
    """… that are not finished …"""
    per_hour: int = 20
    """… and that are begun in an hour."""
    workers: int = 1
    """Jobs that run at a time, whoever's."""
    queue: int = 100
    """Jobs that are not finished, whoever's."""
    memory_bytes: int = 12 * GB
    """For all jobs together, as is the disk."""
    disk_bytes: int = 40 * GB
    run_s: float = 6 * 3600.0
    """A job that takes longer is ended; what it has staged stays."""

    @property
    def memory_per_job_bytes(self) -> int:
        """Of each job that runs beside the others."""
        return self.memory_bytes // self.workers

    @property
    def disk_per_job_bytes(self) -> int:
        """Likewise."""
        return self.disk_bytes // self.workers


def check_recipe(text: str, limits: Limits) -> Recipe:
    """Read a visitor's recipe.

    Raises:
        RecipeError: It is wrong as such.
        UsageError: It asks for something that a shared page does not give.
    """
    if len(text) > limits.recipe_chars:
        raise UsageError(
            f"the recipe has {len(text):,} characters; at most {limits.recipe_chars:,} are taken here",
            hint="Shorten it, or run it with `hubmerge push`.",
        )
    _check_text("the recipe", text)
    recipe = Recipe.loads(text)
    for value in _texts(recipe.model_dump(mode="json")):
        _check_text("the recipe", value)  # as it is after YAML's escapes
    for what, ref in _references(recipe):
        check_repo(what, ref)
    if recipe.card.template is not None:
        raise UsageError("card.template is a file, and this page has none of yours", hint="Leave out card.template.")
    if not type(get_algorithm(recipe.method)).__module__.startswith(_BUILT_IN):
        raise UsageError(f"the method {recipe.method} is a plug-in", hint="Choose one of hubmerge's own methods.")
    _check_amounts(recipe, limits)
    return recipe


def _references(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.base is not None:
        yield "base", str(recipe.base)
    yield from ((f"models[{i}]", str(m.ref)) for i, m in enumerate(recipe.models))


def _texts(value: Any) -> Iterator[str]:
    """All text in plain data, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for k, v in value.items():
            yield from _texts(k)
            yield from _texts(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _texts(v)


def _check_amounts(recipe: Recipe, limits: Limits) -> None:
    found = {
        "models": (len(recipe.models), limits.models),
        "patterns": (_patterns(recipe), limits.patterns),
    }
    for what, (n, most) in found.items():
        if n > most:
            raise UsageError(f"the recipe has {n} {what}; at most {most} are taken here", hint="Leave some out.")
    if recipe.output.shard_size < limits.min_shard_bytes:
        raise UsageError(
            f"output.shard_size is {size(recipe.output.shard_size)}; "
            f"here a shard has at least {size(limits.min_shard_bytes)}",
            hint="Leave out output.shard_size.",
        )


def _patterns(recipe: Recipe) -> int:
    settings = [recipe.parameters, *(m.parameters for m in recipe.models)]
    return len(recipe.include) + len(recipe.exclude) + sum(_rules(value) for value in settings)


def _rules(value: Any) -> int:
    if isinstance(value, Mapping):
        return ("match" in value) + sum(_rules(v) for v in value.values())
    return sum(_rules(v) for v in value) if isinstance(value, list | tuple) else 0


def check_order(order: Order, limits: Limits) -> Order:
    """A visitor's order, its recipe in the form in which it is written down.

    Raises:
        RecipeError: Its recipe is wrong.
        UsageError: It asks for something that a shared page does not give.
    """
    if order.kind not in KINDS:
        raise UsageError(f"{order.kind!r} is nothing that can be done here", hint=f"There are {', '.join(KINDS)}.")
    check_target(order.target)
    _check_text("the licence", order.license)
    if order.kind == "merge" or order.kind == "bundle create":
        recipe = check_recipe(order.recipe, limits)
        if (recipe.output.format == "bundle") != (order.kind == "bundle create"):
            raise UsageError(
                f"{order.kind}: the recipe's method {recipe.method} and its output format {recipe.output.format} "
                "are for something else",
                hint="Choose a method for a merge, a codec for a bundle.",
            )
        return replace(order, recipe=recipe.to_yaml(), bundle="", model="", task="")
    _check_change(order)
    return replace(order, recipe="")


def check_target(target: str) -> None:
    """Refuse what cannot be published to.

    Raises:
        UsageError: It is no repository.
    """
    if not _TARGET.fullmatch(target) or ref_problem(target, None) is not None:
        raise UsageError(f"{_shown(target)} is no repository to publish to", hint="Write your-name/name-of-the-model.")


def _check_change(order: Order) -> None:
    """What is done with a bundle that is there."""
    if order.kind == "bundle add":
        check_repo("the model", order.model)
        if not order.task:
            return
    elif order.kind == "bundle retrieve":
        check_repo("the bundle", order.bundle)
    if problem := name_problem(order.task):
        raise UsageError(f"the task: {problem}", hint="Choose one of the bundle's tasks, or another name.")


def check_repo(what: str, ref: str) -> None:
    """Refuse what is no repository of the Hub.

    Raises:
        UsageError: It is a local path, another host's address, or nothing at all.
    """
    repo, _, revision = ref.partition("@")
    if looks_local(repo) or ref_problem(repo, revision or None) is not None:
        raise UsageError(
            f"{what}: {_shown(ref)} is no repository of the Hub, and nothing else can be read here",
            hint="Write owner/name, with @revision if need be; upload a local model first: hf upload.",
        )


def _check_text(what: str, text: str) -> None:
    if _CONTROL.search(text.replace("\n", "").replace("\r", "")):
        raise UsageError(f"{what} holds control characters", hint="Write plain text.")
    if without_tokens(text) != text:
        raise UsageError(
            f"{what} holds what looks like a token",
            hint="Take it out, and revoke it if it is one: what is written here is published.",
        )


def _shown(text: str) -> str:
    return repr(without_tokens(text)[:_SHORT])


def check_report(report: PlanReport, limits: Limits) -> None:
    """Refuse a merge that is too large for this page, before anything of it is read.

    Raises:
        BudgetError: It is; the message says in what.
    """
    taken = report.footprint
    check_sizes(taken.read_bytes, taken.write_bytes, taken.memory_bytes, limits)


def check_sizes(read_bytes: int, write_bytes: int, memory_bytes: int, limits: Limits) -> None:
    """The same, of sizes that are known otherwise.

    Raises:
        BudgetError: They are too large.
    """
    for what, needed, most in (
        ("reads", read_bytes, limits.read_bytes),
        ("writes", write_bytes, limits.write_bytes),
        ("holds in memory", memory_bytes, limits.memory_per_job_bytes),
    ):
        if needed > most:
            raise BudgetError(
                f"this {what} {size(needed)}; at most {size(most)} are given here",
                hint="Run it on Hugging Face Jobs or on a machine of your own, or merge less at once.",
            )
