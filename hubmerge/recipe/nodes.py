"""A recipe's raw data with its positions, and the faults that point at them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from hubmerge.errors import RecipeError

Mark = tuple[int, int]
"""Line and column, both counted from 1."""
Loc = tuple[str | int, ...]
"""Keys and list indices from the root to a value."""
Issue = tuple[Loc, str]
"""Where in the data, and what is wrong."""


@dataclass(frozen=True, slots=True)
class Node:
    """A value of a recipe: where it stands and what it is called in messages.

    ``value`` is a scalar, a dict of nodes (a mapping) or a tuple of nodes (a list).
    """

    value: Any
    path: str = ""
    at: Mark | None = None
    key_at: Mark | None = None
    """Where the key stands, if the node is a mapping's value."""

    @property
    def is_mapping(self) -> bool:
        """Whether the value is a mapping."""
        return isinstance(self.value, dict)

    @property
    def is_list(self) -> bool:
        """Whether the value is a list."""
        return isinstance(self.value, tuple)

    def get(self, key: str) -> Node | None:
        """The value of a mapping's key; None if it is absent or this is no mapping."""
        found = self.value.get(key) if isinstance(self.value, dict) else None
        assert found is None or isinstance(found, Node)
        return found

    def plain(self) -> Any:
        """The data without positions: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {k: v.plain() for k, v in self.value.items()}
        if isinstance(self.value, tuple):
            return [v.plain() for v in self.value]
        return self.value

    def with_value(self, value: Any) -> Node:
        """Another value at the same place."""
        return replace(self, value=value)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a recipe."""

    path: str
    message: str
    at: Mark | None = None
    hint: str | None = None
    error: type[RecipeError] = RecipeError

    def text(self, where: str) -> str:
        """The line that is shown: file:line:column: path: message."""
        place = where if self.at is None else f"{where}:{self.at[0]}:{self.at[1]}"
        return ": ".join(part for part in (place, self.path, self.message) if part)


def fault(node: Node, message: str, *, key: bool = False, hint: str | None = None) -> Fault:
    """A fault at a node's value, or at its key."""
    at = node.key_at if key and node.key_at is not None else node.at
    return Fault(node.path, message, at, hint)


def child_path(parent: str, step: str | int) -> str:
    """The path of a child as messages print it: ``models[1].weight``."""
    if isinstance(step, int):
        return f"{parent}[{step}]"
    return f"{parent}.{step}" if parent else step


def of_plain(data: Any, path: str = "") -> Node:
    """A node tree without positions, for data that comes from a program."""
    if isinstance(data, Mapping):
        return Node({str(k): of_plain(v, child_path(path, str(k))) for k, v in data.items()}, path)
    if isinstance(data, list | tuple):
        return Node(tuple(of_plain(v, child_path(path, i)) for i, v in enumerate(data)), path)
    return Node(data, path)


def find(root: Node, loc: Loc) -> tuple[Node, bool]:
    """The node at a location, and True; or the nearest enclosing node that exists, and False."""
    node = root
    for step in loc:
        child: Node | None = None
        if isinstance(step, int) and node.is_list and 0 <= step < len(node.value):
            child = node.value[step]
        elif isinstance(step, str):
            child = node.get(step)
        if child is None:
            return node, False
        node = child
    return node, True


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` when a known word is near, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def show(value: Any) -> str:
    """A value as YAML would spell it, short enough for a message."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


_EXPECTED = {
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
_BOUNDS = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
_BOUND_WORDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}


def explain(error: Mapping[str, Any]) -> str:
    """One pydantic error in the words of a recipe: what was expected and what was found."""
    kind, value, context = error["type"], error.get("input"), error.get("ctx") or {}
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, found {show(value)}"
    if kind in _BOUNDS:
        name = _BOUNDS[kind]
        return f"must be {_BOUND_WORDS[name]} {context[name]}, found {show(value)}"
    if kind == "literal_error":
        known = [w.strip("'") for w in re.findall(r"'[^']*'", context["expected"])]
        suggestion = did_you_mean(value, known) if isinstance(value, str) else ""
        return f"{show(value)} is not one of {', '.join(known)}{suggestion}"
    if kind in ("value_error", "assertion_error") and "error" in context:
        return str(context["error"])
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, found {show(value)}"


def raise_faults(where: str, faults: Sequence[Fault]) -> NoReturn:
    """Raise one error that lists every fault, in the order in which they stand in the file.

    Raises:
        RecipeError: Always; UnknownMethodError if one of the faults is an unknown method.
    """
    ordered = sorted(dict.fromkeys(faults), key=lambda f: f.at or (0, 0))
    error = next((f.error for f in ordered if f.error is not RecipeError), RecipeError)
    hint = next((f.hint for f in ordered if f.hint), None)
    raise error("\n".join(f.text(where) for f in ordered), hint=hint)
