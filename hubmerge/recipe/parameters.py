"""A method's parameters as a recipe sets them: all checked at load time, resolved tensor by tensor for the plan."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hubmerge.recipe.nodes import Issue, Loc, did_you_mean, explain
from hubmerge.recipe.settings import Setting, Slot, read, slots
from hubmerge.spec import Settings

if TYPE_CHECKING:
    from hubmerge.spec import Algorithm

MAX_COMBINATIONS = 256
"""Up to this many combinations of values are all tried; beyond, one parameter is varied at a time."""

Given = Mapping[str, Setting]


@dataclass(frozen=True, slots=True)
class Parameters:
    """The settings of a recipe: those for all models, and each model's own, which come first."""

    method: Algorithm
    shared: Given
    own: tuple[Given, ...]
    _settings: dict[str, Settings] = field(default_factory=dict, compare=False, repr=False)
    _params: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def settings_for(self, name: str, t: float) -> Settings:
        """What holds for the tensor ``name`` at depth t; equal settings are one and the same object."""
        shared = _resolve(self.shared, name, t)
        own = [_resolve(given, name, t) for given in self.own]
        key = repr((shared, own))
        if key not in self._settings:
            weight = shared.pop("weight", 1.0)
            weights = tuple(float(values.pop("weight", weight)) for values in own)
            per_model = tuple(self._build(shared | values) for values in own)
            self._settings[key] = Settings(self._build(shared), per_model, weights)
        return self._settings[key]

    def params(self) -> Any:
        """The method's parameters where no tensor is in view: a value that varies is left at its default."""
        values = {k: s.rules[0].value for k, s in self.shared.items() if s.is_constant and k != "weight"}
        for name, info in self.method.parameters.model_fields.items():
            if info.is_required() and name not in values:
                values[name] = next(self.shared[name].rules[0].candidates())[0]
        return self._build(values)

    def _build(self, values: Mapping[str, Any]) -> Any:
        key = repr(sorted(values.items()))
        if key not in self._params:
            self._params[key] = validate(self.method, values)
        return self._params[key]


def _resolve(given: Given, name: str, t: float) -> dict[str, Any]:
    return {key: value for key, setting in given.items() for value in setting.values(name, t)}


def validate(method: Algorithm, values: Mapping[str, Any]) -> Any:
    """The method's parameter object. JSON is the strict form in which lists may stand for tuples.

    Raises:
        pydantic.ValidationError: A value is of the wrong type or out of range.
    """
    return method.parameters.model_validate_json(json.dumps(values), strict=True)


# --- checking ---------------------------------------------------------------------------------------------------


def check_recipe(method: str, shared: Any, own: Sequence[Any]) -> tuple[Parameters | None, list[Issue]]:
    """As ``check``, by the method's name; an unknown method is an issue at ``method``."""
    from hubmerge.errors import UnknownMethodError
    from hubmerge.recipe.algorithms import get_algorithm

    try:
        found = get_algorithm(method)
    except UnknownMethodError as e:
        return None, [(("method",), e.message)]
    return check(found, shared, own)


def check(method: Algorithm, shared: Any, own: Sequence[Any]) -> tuple[Parameters | None, list[Issue]]:
    """Read all settings of a recipe and try every value they can take.

    Args:
        method: The merge method.
        shared: The recipe's ``parameters``, plain data.
        own: Each model's ``parameters``, plain data.

    Returns:
        The parameters, or None together with everything that is wrong.
    """
    known = slots(method.parameters)
    issues: list[Issue] = []
    for_all = _read_all(shared, known, ("parameters",), method, issues)
    for_each = tuple(
        _read_all(data, known, ("models", i, "parameters"), method, issues, own=True) for i, data in enumerate(own)
    )
    parameters = Parameters(method, for_all, for_each)
    given = set(shared) if isinstance(shared, Mapping) else set()
    issues.extend(dict.fromkeys(_try_values(parameters, given)))
    if not issues and (problem := _problem_of_all(parameters)):
        issues.append((("parameters",), problem))
    return (None if issues else parameters), issues


def _problem_of_all(parameters: Parameters) -> str | None:
    """What the method itself says of settings that are the same for every tensor."""
    levels = (parameters.shared, *parameters.own)
    if not parameters.own or not all(s.is_constant for given in levels for s in given.values()):
        return None
    settings = parameters.settings_for("", 0.0)
    return parameters.method.problem(settings.params, settings.weights)


def _read_all(
    data: Any, known: Mapping[str, Slot], loc: Loc, method: Algorithm, issues: list[Issue], *, own: bool = False
) -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    for key, value in data.items() if isinstance(data, Mapping) else ():
        slot = known.get(key)
        if slot is None:
            issues.append(((*loc, key), unknown_parameter(key, known, method, own=own)))
        elif own and not slot.per_model:
            issues.append(((*loc, key), f"{key} holds for all models at once; write it under the recipe's parameters:"))
        else:
            setting, problems = read(value, slot, (*loc, key))
            issues.extend(problems)
            if setting is not None:
                found[key] = setting
    return found


def unknown_parameter(key: str, known: Mapping[str, Slot], method: Algorithm, *, own: bool) -> str:
    """The message for a parameter that the method does not have."""
    names = sorted(name for name, slot in known.items() if slot.per_model or not own)
    if suggestion := did_you_mean(key, (*names, *(("repo", "revision", "name") if own else ()))):
        return f"unknown key{suggestion}"
    whose = "parameters per model" if own else "parameters"
    return f"{key} is not a parameter of {method.name}; its {whose} are {', '.join(names)}"


Choice = tuple[Any, Loc]
_ABSENT = object()


def _try_values(parameters: Parameters, given: AbstractSet[str]) -> Iterator[Issue]:
    """Problems of any combination of values; ``given`` are the shared parameters that were written, even if badly."""
    method, shared = parameters.method, parameters.shared
    names = [name for name in shared if name != "weight"]
    yield from _try_combinations(method, [_choices(n, shared) for n in names], shared, given)
    for own in parameters.own:
        names = [name for name in {**shared, **own} if name != "weight"]
        if any(name in own for name in names):
            yield from _try_combinations(method, [_choices(n, own, shared) for n in names], shared, given)


def _choices(name: str, *levels: Given) -> tuple[str, list[Choice]]:
    """Every value a parameter can have, from the first level that decides on; absent last if none has to."""
    found: list[Choice] = []
    for given in levels:
        if name in given:
            found.extend(c for rule in given[name].rules for c in rule.candidates())
            if given[name].is_total:
                return name, found
    return name, [*found, (_ABSENT, found[0][1])]


def _try_combinations(
    method: Algorithm, choices: list[tuple[str, list[Choice]]], shared: Given, given: AbstractSet[str]
) -> Iterator[Issue]:
    names = [name for name, _ in choices]
    for combination in _combinations([found for _, found in choices]):
        values = {n: v for n, (v, _) in zip(names, combination, strict=True) if v is not _ABSENT}
        locs = {n: loc for n, (_, loc) in zip(names, combination, strict=True)}
        try:
            validate(method, values)
        except ValidationError as e:
            for error in e.errors(include_url=False):
                name = str(error["loc"][0]) if error["loc"] else ""
                if error["type"] != "missing":
                    yield locs.get(name, ("parameters",)), explain(error)
                elif name in shared:
                    yield ("parameters", name), "tensors that match no entry have no value; add {match: '*', value: …}"
                elif name not in given:
                    yield ("parameters",), f"{method.name} needs {name}"


def _combinations(options: list[list[Choice]]) -> Iterator[tuple[Choice, ...]]:
    if math.prod(len(o) for o in options) <= MAX_COMBINATIONS:
        yield from itertools.product(*options)
        return
    first = tuple(o[0] for o in options)
    for i, option in enumerate(options):
        for choice in option if i == 0 else option[1:]:
            yield (*first[:i], choice, *first[i + 1 :])
