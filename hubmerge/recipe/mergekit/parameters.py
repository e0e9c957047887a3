"""The parameters of a mergekit file as settings of a recipe: levels, defaults, and what has no counterpart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hubmerge.recipe.mergekit.inputs import File, Input
from hubmerge.recipe.mergekit.methods import Parameter, Port
from hubmerge.recipe.mergekit.values import Levels, chain, level
from hubmerge.recipe.nodes import Node, did_you_mean, show
from hubmerge.recipe.settings import slots

if TYPE_CHECKING:
    from hubmerge.spec import Method


def read_parameters(
    file: File, port: Port, method: Method, inputs: list[Input]
) -> tuple[list[dict[str, Node]], dict[str, Node]]:
    """Each model's own parameters, and those for all models."""
    known = slots(method.parameters)
    for node in file.shared:
        _check_parameters(file, port, node)
    for model in inputs:
        if model.parameters is not None:
            _check_parameters(file, port, model.parameters, own=True)
    shared: dict[str, Node] = {name: Node(value) for name, value in port.constants.items()}
    own: list[dict[str, Node]] = [{} for _ in inputs]
    place = file.root.get("parameters") or file.root
    for key, parameter in port.parameters.items():
        before = len(file.faults)
        levels = _levels(file, file.shared, key, parameter)
        own_levels = [_levels(file, _own_nodes(m, parameter), key, parameter) for m in inputs]
        if len(file.faults) == before:
            _check_required(file, parameter, key, inputs, own_levels, levels)
        target = parameter.to
        if target is None:
            _refuse_other_values(file, port, parameter, key, [levels, *own_levels])
            continue
        if not known[target].per_model and any(own_levels):
            levels, own_levels = _hoist(file, port, key, own_levels, levels), [[] for _ in inputs]
        if (setting := chain(levels, parameter.default, place)) is not None:
            shared[target] = setting
        for given, rules in zip(own, own_levels, strict=True):
            if (setting := chain(rules, None, place)) is not None:
                given[target] = setting
    return own, shared


def _own_nodes(model: Input, parameter: Parameter) -> list[Node]:
    return [model.parameters] if model.parameters is not None and parameter.per_model else []


def _levels(file: File, nodes: list[Node], key: str, parameter: Parameter) -> Levels:
    found: Levels = []
    for node in nodes:
        if (child := node.get(key)) is not None and child.value is not None:
            found.extend(level(child, parameter.convert, file.faults))
    return found


def _check_parameters(file: File, port: Port, node: Node, *, own: bool = False) -> None:
    if not node.is_mapping:
        file.bad(node, f"expected a mapping, found {show(node.plain())}")
        return
    known = (*port.parameters, *port.ignored)
    for key, child in node.value.items():
        parameter = port.parameters.get(key)
        if key == "int8_mask" or (parameter is not None and (parameter.per_model or not own)):
            continue
        if key in known:
            file.notes.append(f"{child.path} has no effect: mergekit's {port.method} does not look at it there")
        else:
            suggestion = did_you_mean(key, known)
            known_text = "" if suggestion else f"; {port.method} takes {', '.join(port.parameters) or 'none'}"
            file.bad(child, f"unknown parameter, which mergekit would ignore{suggestion}{known_text}", key=True)


def _check_required(
    file: File, parameter: Parameter, key: str, inputs: list[Input], own: list[Levels], shared: Levels
) -> None:
    if not parameter.required:
        return
    if not parameter.per_model:
        if not any(rule.match == "*" for rule in shared):
            place = file.shared[0] if file.shared else file.root
            file.bad(place, f"{key} is required" if not shared else f"{key} needs a value without a filter as well")
        return
    for model, levels in zip(inputs, own, strict=True):
        if not any(rule.match == "*" for rule in (*levels, *shared)):
            missing = "needs a value without a filter as well" if levels or shared else "is required"
            file.bad(model.node, f"{key} of {model.text} {missing}: mergekit has no default for it")


def _refuse_other_values(file: File, port: Port, parameter: Parameter, key: str, levels: list[Levels]) -> None:
    for rule in (rule for found in levels for rule in found):
        if rule.value.value != parameter.default:
            only = show(parameter.default)
            file.bad(
                rule.value, f"hubmerge's {port.method} has nothing like {key}: {show(rule.value.value)}; only {only}"
            )


def _hoist(file: File, port: Port, key: str, own: list[Levels], shared: Levels) -> Levels:
    """A parameter that may differ per model in mergekit and holds for all models here: fine if all say the same."""
    nodes = [chain([*levels, *shared], None, file.root) for levels in own]
    plain = [node.plain() if node is not None else None for node in nodes]
    if any(p != plain[0] for p in plain):
        first = next(rule.value for levels in own for rule in levels)
        file.bad(first, f"{key} differs between models; hubmerge's {port.method} has one for all")
    return [*own[0], *shared]
