"""What a parameter is for a given tensor: scalars, rules by name, and gradients over the layers."""

from __future__ import annotations

import fnmatch
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Union

from hubmerge.recipe.nodes import Issue, Loc, did_you_mean, show

if typing.TYPE_CHECKING:
    from hubmerge.spec import Params


@dataclass(frozen=True, slots=True)
class Gradient:
    """Values at equal distances over the depth of the model, joined by straight lines."""

    points: tuple[float, ...]

    def at(self, t: float) -> float:
        """The value at depth t: 0 is the first layer, 1 the last."""
        last = len(self.points) - 1
        if last == 0:
            return self.points[0]
        position = min(max(t, 0.0), 1.0) * last
        i = min(int(position), last - 1)
        part, a, b = position - i, self.points[i], self.points[i + 1]
        # Without rounding where nothing changes: a flat gradient is the constant it looks like.
        return a if a == b else (1 - part) * a + part * b


@dataclass(frozen=True, slots=True)
class Rule:
    """A value for the tensors whose name matches a glob."""

    match: str
    value: Any
    """A plain value, or a Gradient."""
    loc: Loc = field(default=(), compare=False)
    """Where the value stands."""

    def candidates(self) -> Iterator[tuple[Any, Loc]]:
        """The values that bound what tensors may get (for a gradient, its points), and where each stands."""
        if isinstance(self.value, Gradient):
            yield from ((v, (*self.loc, i)) for i, v in enumerate(self.value.points))
        else:
            yield self.value, self.loc

    def applies(self, name: str) -> bool:
        """Whether the rule holds for a tensor."""
        return self.match == "*" or _glob(self.match).match(name) is not None


@dataclass(frozen=True, slots=True)
class Setting:
    """An ordered list of rules: the first that matches a tensor decides; none may match."""

    rules: tuple[Rule, ...]

    @property
    def is_total(self) -> bool:
        """Whether every tensor gets a value."""
        return any(r.match == "*" for r in self.rules)

    @property
    def is_constant(self) -> bool:
        """Whether every tensor gets the same value."""
        return self.rules[0].match == "*" and not isinstance(self.rules[0].value, Gradient)

    def values(self, name: str, t: float) -> Iterator[Any]:
        """The value of a tensor at depth t; nothing if no rule matches."""
        for rule in self.rules:
            if rule.applies(name):
                yield rule.value.at(t) if isinstance(rule.value, Gradient) else rule.value
                return

    def plain(self) -> Any:
        """The shortest notation that means the same."""
        values = [list(r.value.points) if isinstance(r.value, Gradient) else r.value for r in self.rules]
        if self.rules[0].match == "*":
            return values[0]
        return [{"match": r.match, "value": v} for r, v in zip(self.rules, values, strict=True)]


@lru_cache(maxsize=4096)
def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(pattern))


def matches(patterns: Sequence[str], name: str) -> bool:
    """Whether any of the globs matches the name; case counts."""
    return any(p == "*" or _glob(p).match(name) is not None for p in patterns)


def depth(layer: int | None, n_layers: int, *, is_embedding: bool, outside_at_start: bool = False) -> float:
    """Where a tensor lies in the model, from 0 to 1.

    A layer lies at ``layer / (n_layers - 1)``, the only layer of a model at 1. Input embeddings lie at 0 and what comes
    after the layers at 1; mergekit puts everything outside the layers at 0 (``outside_at_start``).
    """
    if layer is None:
        return 0.0 if is_embedding or outside_at_start else 1.0
    return 1.0 if n_layers <= 1 else min(layer / (n_layers - 1), 1.0)


# --- reading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter as settings need to know it: may it be a gradient, may its own value be a list."""

    name: str
    is_float: bool
    is_list: bool = False
    per_model: bool = False


WEIGHT = Slot("weight", is_float=True, per_model=True)


def slots(params: type[Params]) -> dict[str, Slot]:
    """The parameters of a method, and ``weight``, which every method has."""
    found = {"weight": WEIGHT}
    for name, info in params.model_fields.items():
        extra = info.json_schema_extra
        per_model = isinstance(extra, dict) and bool(extra.get("per_model"))
        leaves = set(_leaves(info.annotation))
        is_list = any(t in leaves for t in (list, tuple, set, frozenset))
        found[name] = Slot(name, float in leaves, is_list, per_model)
    return found


def _leaves(annotation: Any) -> Iterator[Any]:
    """The plain types that an annotation admits: those of its union, without Annotated."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _leaves(typing.get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for arg in typing.get_args(annotation):
            yield from _leaves(arg)
    else:
        yield origin or annotation


def read(data: Any, slot: Slot, loc: Loc) -> tuple[Setting | None, list[Issue]]:
    """Parse a setting from plain data; None together with what is wrong."""
    issues: list[Issue] = []
    if isinstance(data, Mapping):
        return None, [(loc, "expected a value, a gradient [a, b] or a list of {match, value}, found a mapping")]
    if not _is_rules(data):
        rules = [Rule("*", _value(data, slot, loc, issues), loc)]
    else:
        rules = []
        for i, entry in enumerate(data):
            if rules and rules[-1].match == "*":
                issues.append(((*loc, i), "never used: the entry before it matches every tensor"))
            rules.extend(_rule(entry, slot, (*loc, i), issues))
    return (None if issues else Setting(tuple(rules))), issues


def _is_rules(data: Any) -> bool:
    return isinstance(data, list | tuple) and any(isinstance(entry, Mapping) for entry in data)


def _rule(entry: Any, slot: Slot, loc: Loc, issues: list[Issue]) -> Iterator[Rule]:
    if not isinstance(entry, Mapping):
        issues.append((loc, f"expected {{match, value}} as in the other entries, found {show(entry)}"))
        return
    unknown = [key for key in entry if key not in ("match", "value")]
    issues.extend(((*loc, k), f"unknown key{did_you_mean(k, ('match', 'value'))}") for k in unknown)
    match = entry.get("match", "*")
    if not isinstance(match, str) or not match:
        issues.append(((*loc, "match"), f"expected a glob such as '*.mlp.*', found {show(match)}"))
    elif "value" in entry:
        yield Rule(match, _value(entry["value"], slot, (*loc, "value"), issues), (*loc, "value"))
    elif not unknown:
        issues.append((loc, "value is missing"))


def _value(data: Any, slot: Slot, loc: Loc, issues: list[Issue]) -> Any:
    if isinstance(data, Mapping):
        issues.append((loc, "expected a value, found a mapping"))
        return None
    if not isinstance(data, list | tuple):
        if slot is WEIGHT or isinstance(data, float) or (slot.is_float and type(data) is int):
            _number(data, loc, issues)
        return data
    if slot.is_list:
        return tuple(data)
    if not slot.is_float:
        issues.append((loc, f"{slot.name} is not a number with decimals, so it cannot be a gradient"))
        return None
    if not data:
        issues.append((loc, "a gradient needs at least one value"))
        return None
    return Gradient(tuple(_number(v, (*loc, i), issues) for i, v in enumerate(data)))


def _number(data: Any, loc: Loc, issues: list[Issue]) -> float:
    if isinstance(data, bool) or not isinstance(data, int | float):
        issues.append((loc, f"expected a number, found {show(data)}"))
        return math.nan
    try:
        value = float(data)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        issues.append((loc, f"expected a finite number, found {show(data)}"))
    return value
