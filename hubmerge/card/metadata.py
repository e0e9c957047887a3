"""A card's front matter: what the Hub is told, of which only values of the expected form come from the parents."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hubmerge.errors import HubMergeError
from hubmerge.evaluation import model_index
from hubmerge.markdown import one_line

if TYPE_CHECKING:
    from hubmerge.card.facts import CardFacts

_MAX_ITEMS = 100
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8}){0,4}", re.ASCII)
_REPO = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}(/[\w.-]{1,96})?", re.ASCII)
_TASK = re.compile(r"[a-z0-9]+(-[a-z0-9]+){0,7}", re.ASCII)
_PLAIN_YAML = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*", re.ASCII)
# Readers of YAML 1.1 take these for booleans and null; "no" is also Norwegian.
_YAML_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})


def assembled(data: dict[str, Any], body: str) -> str:
    """A card from its metadata and its text.

    Raises:
        HubMergeError: The front matter would not be read back as it was meant.
    """
    return f"---\n{_yaml(data)}---\n\n{body.strip()}\n"


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """The card's metadata. Of what the parents' cards say, only values of the expected form are taken over."""
    cards = [m.card for m in facts.parents]
    words = facts.words
    data: dict[str, Any] = {
        **_relations(facts),
        "pipeline_tag": _pipeline_tag(facts, cards),
        **(facts.license.terms.front_matter() if facts.license.terms else {}),
        "language": languages_of([{"language": list(words.language)}] if words.language else cards),
        "datasets": datasets_of(cards),
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
    if facts.results is not None:
        data["model-index"] = model_index(facts.results, one_line(facts.title), data["pipeline_tag"])
    return {k: v for k, v in data.items() if v not in (None, [])}


def languages_of(cards: Iterable[Mapping[str, Any]]) -> list[str]:
    """The languages that cards name, each once."""
    return _matching(_LANGUAGE, _union(cards, "language"))


def datasets_of(cards: Iterable[Mapping[str, Any]]) -> list[str]:
    """The data sets that cards name, each once."""
    return _matching(_REPO, _union(cards, "datasets"))


def repos_of(names: Iterable[str | None]) -> list[str]:
    """Those names that can be repositories, each once."""
    return _once(name for name in names if name is not None and _REPO.fullmatch(name))


def _relations(facts: CardFacts) -> dict[str, Any]:
    """Where the result stands among the Hub's models: a merge of its parents, or an adapter of their base."""
    repos = repos_of(m.repo for m in facts.parents if not m.is_local)
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
        if isinstance(value, dict):
            return {k: styled(v) for k, v in value.items()}
        if not isinstance(value, str):
            return value
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
