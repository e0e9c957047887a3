"""mergekit's settings (filters, gradients, levels of precedence) as rules of our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hubmerge.recipe.load import plain_scalar
from hubmerge.recipe.nodes import Fault, Node, did_you_mean, fault, show


@dataclass(frozen=True, slots=True)
class FilterRule:
    """A value for the tensors that a glob matches; the value's node is a scalar or a gradient."""

    match: str
    value: Node


Levels = list[FilterRule]
"""Rules in order of precedence: a level that does not match falls through to the next."""
Convert = Callable[[Any], Any]
"""Turns a scalar into the recipe's; raises ValueError with the reason if it cannot."""


def level(node: Node, convert: Convert, faults: list[Fault]) -> Levels:
    """The rules of one mergekit setting: a scalar, a gradient, {filter, value}, or a list of those mappings."""
    if node.is_mapping:
        return _entries((node,), convert, faults)
    if node.is_list and any(child.is_mapping for child in node.value):
        return _entries(node.value, convert, faults)
    return _with_value("*", node, convert, faults)


def _entries(entries: tuple[Node, ...], convert: Convert, faults: list[Fault]) -> Levels:
    found: Levels = []
    for entry in entries:
        value = entry.get("value")
        if not entry.is_mapping or value is None:
            faults.append(fault(entry, f"expected {{filter, value}}, found {show(entry.plain())}"))
            continue
        for key, child in entry.value.items():
            if key not in ("filter", "value"):
                faults.append(fault(child, f"unknown key{did_you_mean(key, ('filter', 'value'))}", key=True))
        name = entry.get("filter")
        text = "*" if name is None or name.value is None else name.value
        if not isinstance(text, str):
            faults.append(fault(name or entry, f"expected a part of a tensor's name, found {show(text)}"))
            continue
        found.extend(_with_value(glob(text), value, convert, faults))
    return found


def glob(text: str) -> str:
    """The glob for mergekit's filter, which is a plain part of a tensor's name."""
    if text in ("*", ""):
        return "*"
    return "*" + "".join(f"[{c}]" if c in "*?[" else c for c in text) + "*"


def _with_value(match: str, node: Node, convert: Convert, faults: list[Fault]) -> Levels:
    children = node.value if node.is_list else (node,)
    converted = []
    for child in children:
        if child.is_list or child.is_mapping:
            faults.append(fault(child, f"expected a value, found {show(child.plain())}"))
            continue
        try:
            converted.append(child.with_value(convert(child.value)))
        except ValueError as e:
            faults.append(fault(child, str(e)))
    if len(converted) < len(children):
        return []
    if not node.is_list:
        return [FilterRule(match, converted[0])]
    if any(isinstance(c.value, bool | str) for c in converted):
        faults.append(fault(node, "hubmerge has gradients of numbers only"))
        return []
    return [FilterRule(match, node.with_value(tuple(converted)))]


def chain(rules: Levels, default: Any, place: Node) -> Node | None:
    """The rules, cut after the first that matches everything, with the default behind them, as a recipe's setting."""
    kept: Levels = []
    for rule in rules:
        kept.append(rule)
        if rule.match == "*":
            break
    else:
        if default is not None:
            kept.append(FilterRule("*", place.with_value(default)))
    if not kept:
        return None
    if kept[0].match == "*":
        return kept[0].value
    entries = tuple(place.with_value({"match": place.with_value(r.match), "value": r.value}) for r in kept)
    return kept[0].value.with_value(entries)


# --- conversions ------------------------------------------------------------------------------------------------


def number(value: Any) -> Any:
    """A number; mergekit also reads ``"1e-5"``, which YAML 1.1 takes for text."""
    if isinstance(value, str):
        value = plain_scalar(value.strip())
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, found {show(value)}")
    return value


def truth(value: Any) -> bool:
    """A boolean; older mergekit files write 0.0 and 1.0."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise ValueError(f"expected true or false, found {show(value)}")


def aggregate(value: Any) -> str:
    """``normalize`` of a method that elects signs: divide by the weights that agree, or just sum."""
    return "weighted" if truth(value) else "sum"


def rescale(value: Any) -> str:
    """``rescale`` of a method that drops entries: keep the L1 norm, or nothing."""
    return "l1" if truth(value) else "none"
