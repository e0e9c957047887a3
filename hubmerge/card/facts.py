"""The facts of a merge, as its card tells them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hubmerge.analysis import Diagnostics
from hubmerge.architectures import Loading, loading, with_task
from hubmerge.card.citing import bibtex, paper_url
from hubmerge.card.quoting import Quotation, Speaker, quotations
from hubmerge.card.wording import Setting, compact, credits_of, settings_table, uses
from hubmerge.evaluation import Comparison, Table, table
from hubmerge.licenses import Decision, derive_license, license_of
from hubmerge.methods import get_method
from hubmerge.plots import Plot, plots
from hubmerge.spec import AdapterPart, Method, PinnedModel, Plan, Truncation

if TYPE_CHECKING:
    from hubmerge.recipe import Card, Recipe

HUB_URL = "https://huggingface.co"
_MAX_NAMED = 4
_TOKENIZER_FILES = frozenset({"tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json"})


@dataclass(frozen=True, slots=True)
class Parent:
    """A row of the table of inputs."""

    role: str
    name: str
    repo: str | None
    """None for a local folder."""
    commit: str | None
    settings: str
    """Its weight and further settings of its own."""
    license: str | None


@dataclass(frozen=True, slots=True)
class Head:
    """A task's own tensors, kept beside the merged model."""

    name: str
    path: str
    config_path: str | None
    loading: Loading | None


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """A merged adapter in a few numbers."""

    tensors: int
    """How many of the base's weights it changes."""
    ranks: tuple[int, int]
    """Its smallest and largest rank."""
    task_type: str | None
    """PEFT's name of the kind of model it goes onto."""
    lossless: bool
    """Whether its rank is the sum of its parents'."""


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of; everything it says follows from these.

    Args:
        plan: What was run.
        recipe: What was asked for, and what its author says about the result.
        repo_id: Where the model is published; None for a local folder.
        hub_url: The Hub that the links lead to.
        truncation: What a merged adapter lost to its rank.
        diagnostics: What was measured of the task vectors.
        results: What evaluations say of the result and of its parents.
    """

    plan: Plan
    recipe: Recipe
    repo_id: str | None = None
    hub_url: str = HUB_URL
    truncation: Truncation | None = None
    diagnostics: Diagnostics | None = None
    results: Comparison | None = None

    @cached_property
    def method(self) -> Method:
        """The merge method."""
        return get_method(self.plan.method)

    @cached_property
    def license(self) -> Decision:
        """The check of the parents' licences, and what the card says of it."""
        return derive_license(self.plan, self.recipe.card, self.repo_id)

    @property
    def words(self) -> Card:
        """What the recipe's author says."""
        return self.recipe.card

    @property
    def has_base(self) -> bool:
        """Whether the plan's base is one, and not a model that stands in because the method needs none."""
        return self.recipe.base is not None or not any(_same(self.plan.base, m) for m in self.plan.models)

    @property
    def parents(self) -> tuple[PinnedModel, ...]:
        """The models the result is made of."""
        return (self.plan.base, *self.plan.models) if self.has_base else self.plan.models

    @cached_property
    def loading(self) -> Loading | None:
        """How the result, or the model that a merged adapter is put on, is loaded."""
        found = loading(self.plan.base.config)
        return with_task(found, self.adapter.task_type) if self.adapter else found

    @cached_property
    def adapter(self) -> MergedAdapter | None:
        """What is to be said about a merged adapter; None for a full model."""
        pairs = [(j.factors, j.inputs) for j in self.plan.jobs if j.factors is not None]
        if not pairs:
            return None
        tasks = {str((m.adapter or {}).get("task_type")) for m in self.plan.models}
        ranks = sorted({pair.rank for pair, _ in pairs})
        lossless = all(
            pair.rank >= sum(p.rank or 0 for p in parts if isinstance(p, AdapterPart)) for pair, parts in pairs
        )
        return MergedAdapter(len(pairs), (ranks[0], ranks[-1]), tasks.pop() if len(tasks) == 1 else None, lossless)

    @property
    def title(self) -> str:
        """The heading."""
        if self.words.title:
            return self.words.title
        return self.repo_id.rpartition("/")[2] if self.repo_id else " + ".join(m.name for m in self.plan.models)

    @property
    def headline(self) -> str:
        """What was merged, in a few words."""
        names = [m.name for m in self.plan.models]
        if len(names) > _MAX_NAMED:
            return f"{len(names)} models"
        return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"

    @property
    def uses(self) -> tuple[tuple[str, str], ...]:
        """What the author says the result is for, and what not."""
        return uses(self.words)

    @property
    def limitations(self) -> tuple[Quotation, ...]:
        """What the parents' cards say about their limitations."""
        return quotations((Speaker.of(m), m.quotes.limitations) for m in self.parents)

    @property
    def credits(self) -> tuple[tuple[str, str], ...]:
        """What the author says about the people behind it."""
        return credits_of(self.words)

    @property
    def inputs(self) -> tuple[Parent, ...]:
        """The table of inputs."""
        data = self.recipe.normalized()
        shared = {"weight": data["parameters"].get("weight", 1.0)}
        rows = [_parent(m, shared | e["parameters"]) for m, e in zip(self.plan.models, data["models"], strict=True)]
        return (_parent(self.plan.base, {}), *rows) if self.has_base else tuple(rows)

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The table of parameters, defaults included."""
        return settings_table(self.method, self.recipe.normalized()["parameters"])

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads kept, in order."""
        found = [o.path for o in self.plan.outputs if o.path.startswith("heads/")]
        return tuple(self._head(path) for path in found)

    def _head(self, path: str) -> Head:
        name = path.removeprefix("heads/").removesuffix(".safetensors")
        config_path = f"heads/{name}.config.json"
        for file in self.plan.files:
            if file.path == config_path and file.content is not None:
                return Head(name, path, config_path, loading(json.loads(file.content)))
        return Head(name, path, None, None)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the plan, and the reading of a foreign recipe, found worth saying."""
        found = [p.message for p in self.plan.problems if p.severity != "error"]
        return tuple(_without_paths(text, self.plan) for text in (*self.recipe.notes, *found))

    @cached_property
    def plots(self) -> tuple[Plot, ...]:
        """What the measured figures look like."""
        return plots(self.diagnostics) if self.diagnostics is not None else ()

    @property
    def results_table(self) -> Table | None:
        """What evaluations say, as it is shown."""
        return table(self.results) if self.results is not None else None

    @property
    def has_tokenizer(self) -> bool:
        """Whether the result comes with a tokenizer."""
        return any(f.path in _TOKENIZER_FILES or f.path.endswith(".model") for f in self.plan.files)

    @property
    def local_names(self) -> tuple[str, ...]:
        """Inputs that only the author has."""
        return tuple(m.name for m in self.parents if m.is_local)

    @property
    def paper_url(self) -> str | None:
        """Where the method's paper is."""
        return paper_url(self.method.paper)

    @property
    def bibtex(self) -> str | None:
        """How the method's paper is cited."""
        return bibtex(self.method.paper)

    @property
    def base_citation(self) -> tuple[Speaker, str] | None:
        """How the base's card says that the base is cited."""
        base = self.plan.base
        return (Speaker.of(base), base.quotes.bibtex) if self.has_base and base.quotes.bibtex else None


def _same(a: PinnedModel, b: PinnedModel) -> bool:
    return (a.repo, a.commit, a.root) == (b.repo, b.commit, b.root)


def _parent(model: PinnedModel, own: Mapping[str, Any]) -> Parent:
    found = license_of(model)
    own = dict(own)
    weight = [compact(own.pop("weight"))] if "weight" in own else []
    return Parent(
        role="base" if model.role == "base" else "adapter" if model.adapter is not None else "model",
        name=model.name,
        repo=None if model.is_local else model.repo,
        commit=model.commit,
        settings=", ".join([*weight, *(f"{k}={compact(v)}" for k, v in own.items())]),
        license=found.label if found else None,
    )


def _without_paths(text: str, plan: Plan) -> str:
    """The message with local models' names in place of their folders, which are nobody's business."""
    folders = {f: m.name for m in (plan.base, *plan.models) if m.is_local for f in (m.repo, m.root) if f}
    for folder in sorted(folders, key=len, reverse=True):
        pattern = rf"(?<![\w./~-]){re.escape(folder)}(?![\w~-])(?!\.\w)"
        text = folders[folder].join(re.split(pattern, text))
    return text
