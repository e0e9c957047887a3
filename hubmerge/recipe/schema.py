"""The parts of a recipe: models, output and card, each a strict schema."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hubmerge.recipe.nodes import Issue
from hubmerge.recipe.refs import ModelRef, default_name, name_problem, ref_problem, split_revision

SIZE_UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
STRICT = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)

Globs = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
"""Glob patterns on tensor names."""
Text = Annotated[str, Field(min_length=1, max_length=20_000)]


class ManyIssuesError(ValueError):
    """Several things that are wrong at once, each with its place; what the Recipe's own check raises."""

    def __init__(self, items: list[Issue]) -> None:
        super().__init__("; ".join(message for _, message in items))
        self.items = items


class ModelEntry(BaseModel):
    """A model that takes part in the merge, with its own settings."""

    model_config = STRICT

    repo: str = Field(min_length=1)
    """Repo id, with ``@revision`` if need be, or local folder: a full checkpoint or a PEFT adapter."""
    revision: str | None = None
    """Branch, tag or commit."""
    name: str = ""
    """Name of the task; the last part of the repo id by default."""
    parameters: dict[str, Any] = {}
    """Settings of this model: ``weight`` and the method's per-model parameters; they may also stand beside ``repo``."""

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        data = split_revision(data)
        if not isinstance(data, dict):
            return data
        entry = {k: v for k, v in data.items() if k in cls.model_fields}
        inline = {k: v for k, v in data.items() if k not in cls.model_fields}
        given = entry.get("parameters", {})
        if inline and isinstance(given, dict):
            if twice := sorted(inline.keys() & given.keys()):
                raise ManyIssuesError([((twice[0],), "given both here and under parameters")])
            entry["parameters"] = given | inline
        if isinstance(entry.get("repo"), str) and entry.get("name") is None:
            entry["name"] = default_name(entry["repo"])
        return entry

    @model_validator(mode="after")
    def _check(self) -> Self:
        issues: list[Issue] = []
        if problem := ref_problem(self.repo, self.revision):
            issues.append((("repo",), problem))
        elif problem := name_problem(self.name):
            issues.append((("name",), problem))
        if issues:
            raise ManyIssuesError(issues)
        return self

    @property
    def ref(self) -> ModelRef:
        """Where the model lies."""
        return ModelRef(repo=self.repo, revision=self.revision)


class Output(BaseModel):
    """What is written."""

    model_config = STRICT

    format: Literal["full", "adapter", "bundle"] = "full"
    """A whole checkpoint; or a PEFT adapter; or a bundle from which each model can be restored."""
    shard_size: int = 5_000_000_000
    """Largest size of a weight file in bytes; ``5GB``, ``500MB`` and ``4GiB`` are understood."""
    rank: int | None = Field(None, ge=1)
    """Of a merged adapter: its largest rank; by default the sum of the adapters' ranks, which loses nothing."""

    @field_validator("shard_size", mode="before")
    @classmethod
    def _parse_size(cls, value: Any) -> Any:
        return parse_size(value) if isinstance(value, str) else value

    @field_validator("shard_size")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError(f"a shard needs at least one byte, found {value}")
        return value

    @model_validator(mode="after")
    def _rank_of_an_adapter(self) -> Self:
        if self.rank is not None and self.format != "adapter":
            raise ManyIssuesError([(("rank",), f"only a merged adapter has a rank; the format is {self.format}")])
        return self


class Card(BaseModel):
    """What only a person can say about the result; everything else on the model card is filled in from facts."""

    model_config = STRICT

    title: Text | None = None
    summary: Text | None = None
    """One or two sentences at the top."""
    description: Text | None = None
    language: Annotated[tuple[Annotated[str, Field(min_length=2, max_length=20)], ...], Field(strict=False)] = ()
    """Language codes, ``en``; one, or a list."""
    license: Text | None = None
    """Identifier as the Hub lists them; by default what the parents' licences allow."""
    license_name: Text | None = None
    """Name of a licence that the Hub does not list (``license: other``)."""
    license_link: Text | None = None
    """Address of its text."""
    tags: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    intended_use: Text | None = None
    out_of_scope_use: Text | None = None
    limitations: Text | None = None
    evaluation: Text | None = None
    citation: Text | None = None
    authors: Text | None = None
    contact: Text | None = None
    acknowledgements: Text | None = None
    template: Text | None = None
    """A file beside the recipe: a Jinja2 template that extends the card's and replaces some of its blocks."""

    @field_validator("language", mode="before")
    @classmethod
    def _one_language(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


def parse_size(text: str) -> int:
    """Bytes from ``5GB`` (decimal), ``4GiB`` (binary) or ``123``.

    Raises:
        ValueError: It is none of these.
    """
    found = _SIZE.fullmatch(text.strip())
    units = {unit.lower(): factor for unit, factor in SIZE_UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise ValueError(f"expected a size such as 5GB, 500MB or 4GiB, found {text!r}")
    return int(Decimal(found[1]) * units[found[2].lower()])
