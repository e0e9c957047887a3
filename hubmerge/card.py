"""The model card: front matter and text made from the facts of a run, and from nothing else."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import hubmerge
from hubmerge.analysis import Diagnostics
from hubmerge.architectures import Loading, loading, with_task
from hubmerge.errors import HubMergeError
from hubmerge.licenses import Decision, derive_license, license_of
from hubmerge.markdown import environment, one_line
from hubmerge.methods import get_method
from hubmerge.plots import Plot, plots
from hubmerge.spec import AdapterPart, Algorithm, Method, PinnedModel, Plan, Truncation

if TYPE_CHECKING:
    from hubmerge.recipe import Card, Recipe

HUB_URL = "https://huggingface.co"
TEMPLATE = "model_card.md.jinja"
_MAX_ITEMS = 100
_MAX_NAMED = 4
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8}){0,4}", re.ASCII)
_REPO = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}(/[\w.-]{1,96})?", re.ASCII)
_TASK = re.compile(r"[a-z0-9]+(-[a-z0-9]+){0,7}", re.ASCII)
_ARXIV = re.compile(r"arXiv[ :](\d{4}\.\d{4,5})")
_PLAIN_YAML = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*", re.ASCII)
# Readers of YAML 1.1 take these for booleans and null; "no" is also Norwegian.
_YAML_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
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
class Setting:
    """A row of the table of parameters."""

    name: str
    value: str
    meaning: str


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
    """

    plan: Plan
    recipe: Recipe
    repo_id: str | None = None
    hub_url: str = HUB_URL
    truncation: Truncation | None = None
    diagnostics: Diagnostics | None = None

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
    def sections(self) -> tuple[tuple[str, str], ...]:
        """What the author says about the result's use."""
        return sections(self.words)

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
        return paper_url(self.method)


def render_card(facts: CardFacts) -> str:
    """The whole ``README.md``.

    Raises:
        HubMergeError: The front matter would not be read back as it was meant.
    """
    body = environment().get_template(TEMPLATE).render(facts=facts, hub_url=facts.hub_url, version=hubmerge.__version__)
    return assembled(front_matter(facts), body)


def assembled(data: dict[str, Any], body: str) -> str:
    """A card from its metadata and its text.

    Raises:
        HubMergeError: The front matter would not be read back as it was meant.
    """
    return f"---\n{_yaml(data)}---\n\n{body.strip()}\n"


# --- what the cards of merges and bundles share


def sections(words: Card) -> tuple[tuple[str, str], ...]:
    """What the recipe's author says about the result's use."""
    return _given(
        ("Evaluation", words.evaluation),
        ("Intended use", words.intended_use),
        ("Out-of-scope use", words.out_of_scope_use),
        ("Limitations", words.limitations),
    )


def credits_of(words: Card) -> tuple[tuple[str, str], ...]:
    """What the recipe's author says about the people behind it."""
    return _given(("Authors", words.authors), ("Contact", words.contact), ("Acknowledgements", words.acknowledgements))


def settings_table(algorithm: Algorithm, given: Mapping[str, Any]) -> tuple[Setting, ...]:
    """The parameters that have a value, with their meaning."""
    return tuple(
        Setting(name, _compact(given[name]), " ".join((info.description or "").split()))
        for name, info in algorithm.parameters.model_fields.items()
        if name in given
    )


def paper_url(algorithm: Algorithm) -> str | None:
    """Where a method's paper is."""
    found = _ARXIV.search(algorithm.paper)
    return f"https://arxiv.org/abs/{found[1]}" if found else None


# --- metadata


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """The card's metadata. Of what the parents' cards say, only values of the expected form are taken over."""
    cards = [m.card for m in facts.parents]
    words = facts.words
    data: dict[str, Any] = {
        **_relations(facts),
        "pipeline_tag": _pipeline_tag(facts, cards),
        **(facts.license.terms.front_matter() if facts.license.terms else {}),
        "language": _matching(_LANGUAGE, words.language or _union(cards, "language")),
        "datasets": _matching(_REPO, _union(cards, "datasets")),
        "tags": _once(
            [
                "merge",
                "hubmerge",
                facts.plan.method,
                *(["lora"] if facts.adapter else []),
                *(one_line(t) for t in words.tags),
            ]
        ),
    }
    return {k: v for k, v in data.items() if v not in (None, [])}


def _relations(facts: CardFacts) -> dict[str, Any]:
    """Where the result stands among the Hub's models: a merge of its parents, or an adapter of their base."""
    repos = _once(m.repo for m in facts.parents if not m.is_local and _REPO.fullmatch(m.repo))
    if facts.adapter:
        base = repos[0] if repos and repos[0] == facts.plan.base.repo else None
        return {"base_model": base, "base_model_relation": "adapter" if base else None, "library_name": "peft"}
    library = "transformers" if facts.plan.base.config.get("model_type") else None
    return {"base_model": repos, "base_model_relation": "merge" if repos else None, "library_name": library}


def _pipeline_tag(facts: CardFacts, cards: list[Mapping[str, Any]]) -> str | None:
    # The task of the base alone says little: a model without its head may have another one, or none.
    stated = [c.get("pipeline_tag") for c in cards]
    first = stated[0]
    if isinstance(first, str) and _TASK.fullmatch(first) and all(s == first for s in stated):
        return first
    return facts.loading.pipeline_tag if facts.loading else None


def _union(cards: Iterable[Mapping[str, Any]], key: str) -> list[str]:
    values: list[Any] = []
    for card in cards:
        value = card.get(key)
        values += value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, str)]


def _matching(pattern: re.Pattern[str], values: Iterable[str]) -> list[str]:
    return _once(v for v in values if isinstance(v, str) and pattern.fullmatch(v))[:_MAX_ITEMS]


def _once(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(v for v in values if v))


def _yaml(data: dict[str, Any]) -> str:
    from ruamel.yaml import YAML
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    def styled(value: Any) -> Any:
        if isinstance(value, list):
            return [styled(v) for v in value]
        plain = _PLAIN_YAML.fullmatch(value) and value.lower() not in _YAML_WORDS
        return value if plain else DoubleQuotedScalarString(value)

    yaml = YAML(typ="rt", pure=True)
    yaml.width = 2**16
    out = io.StringIO()
    yaml.dump({k: styled(v) for k, v in data.items()}, out)
    text = out.getvalue()
    if YAML(typ="safe", pure=True).load(text) != data or "\n---" in f"\n{text}":
        raise HubMergeError(f"the card's front matter is not read back as written: {data}", hint="report this as a bug")
    return text


def _given(*sections: tuple[str, str | None]) -> tuple[tuple[str, str], ...]:
    return tuple((title, text) for title, text in sections if text)


def _same(a: PinnedModel, b: PinnedModel) -> bool:
    return (a.repo, a.commit, a.root) == (b.repo, b.commit, b.root)


def _parent(model: PinnedModel, own: Mapping[str, Any]) -> Parent:
    found = license_of(model)
    own = dict(own)
    weight = [_compact(own.pop("weight"))] if "weight" in own else []
    return Parent(
        role="base" if model.role == "base" else "adapter" if model.adapter is not None else "model",
        name=model.name,
        repo=None if model.is_local else model.repo,
        commit=model.commit,
        settings=", ".join([*weight, *(f"{k}={_compact(v)}" for k, v in own.items())]),
        license=found.label if found else None,
    )


def _compact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _without_paths(text: str, plan: Plan) -> str:
    """The message with local models' names in place of their folders, which are nobody's business."""
    folders = {f: m.name for m in (plan.base, *plan.models) if m.is_local for f in (m.repo, m.root) if f}
    for folder in sorted(folders, key=len, reverse=True):
        pattern = rf"(?<![\w./~-]){re.escape(folder)}(?![\w~-])(?!\.\w)"
        text = folders[folder].join(re.split(pattern, text))
    return text
