"""Command-line flags as a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hubmerge.recipe.load import parse_value
from hubmerge.recipe.nodes import Fault, Node, fault, of_plain, raise_faults
from hubmerge.recipe.refs import looks_local

WHERE = "command line"


def flags_to_node(
    method: str, base: str | None, models: Sequence[str], params: Sequence[str], options: Mapping[str, Any]
) -> Node:
    """The recipe that the flags describe; each value is called by its flag in messages.

    Raises:
        RecipeError: A flag is not of the form it should have, or a parameter is given twice.
    """
    faults: list[Fault] = []
    root: dict[str, Node] = {"method": Node(method, "--method")}
    if base is not None:
        root["base"] = Node(base, "--base")
    root["models"] = Node(tuple(_model(text, faults) for text in models), "--model")
    parameters: dict[str, Node] = {}
    for text in params:
        name, equals, value = text.partition("=")
        path = f"--param {name}"
        if not equals or not name:
            faults.append(Fault(f"--param {text}", "expected KEY=VALUE"))
        elif name in parameters:
            faults.append(Fault(path, "given twice"))
        else:
            parameters[name] = parse_value(value, path, WHERE)
    if parameters:
        root["parameters"] = Node(parameters, "--param")
    for key, value in options.items():
        if value is not None:
            root[key] = _option(key, value)
    if faults:
        raise_faults(WHERE, faults)
    return Node(root)


def _option(key: str, value: Any) -> Node:
    """A key of the recipe; the keys of a section have flags of their own."""
    flag = f"--{key.replace('_', '-')}"
    if isinstance(value, Mapping):
        return Node({k: _option(k, v) for k, v in value.items()}, flag)
    return of_plain(value, flag)


def _model(text: str, faults: list[Fault]) -> Node:
    """``repo[@revision][:weight]``. A path may contain colons, so after a path only a number is a weight."""
    node = Node(text, f"--model {text}")
    repo, colon, tail = text.rpartition(":")
    if not colon:
        return Node({"repo": node}, node.path)
    try:
        weight = float(tail)
    except ValueError:
        if not looks_local(text):
            faults.append(fault(node, f"the weight after the colon is not a number: {tail!r}"))
        return Node({"repo": node}, node.path)
    if not math.isfinite(weight):
        faults.append(fault(node, f"the weight is not a finite number: {tail}"))
    return Node({"repo": node.with_value(repo), "weight": node.with_value(weight)}, node.path)
