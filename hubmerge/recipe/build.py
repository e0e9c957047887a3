"""A tree of positioned values into a Recipe, or into one error that lists everything wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from hubmerge.errors import UnknownMethodError
from hubmerge.recipe.nodes import Fault, Issue, Loc, Node, did_you_mean, explain, fault, find, raise_faults
from hubmerge.recipe.recipe import Recipe
from hubmerge.recipe.refs import ModelRef
from hubmerge.recipe.schema import Card, ManyIssuesError, ModelEntry, Output

if TYPE_CHECKING:
    from hubmerge.recipe.mergekit import Translation
    from hubmerge.spec import Algorithm

R = TypeVar("R", bound=Recipe)

_SCHEMAS: Mapping[Loc, type[BaseModel]] = {(): Recipe, ("base",): ModelRef, ("output",): Output, ("card",): Card}


def build(cls: type[R], root: Node, where: str) -> R:
    """Validate a recipe.

    Args:
        cls: Recipe, or a subclass.
        root: The recipe's data; a mergekit file is recognised by ``merge_method``.
        where: What messages call the recipe.

    Raises:
        RecipeError: One line for each fault, in the order of the file.
    """
    translation: Translation | None = None
    if root.get("merge_method") is not None:
        from hubmerge.recipe.mergekit import translate

        translation = translate(root, where)
        root = translation.root
    data = root.plain()
    try:
        recipe = cls.model_validate(data)
    except ValidationError as e:
        raise_faults(where, [_place(issue, root) for issue in _issues(e, data)])
    if translation is not None:
        recipe._notes, recipe._n_layers = translation.notes, translation.n_layers
    return recipe


def _issues(error: ValidationError, data: dict[str, Any]) -> Iterator[Issue]:
    method = _method(data)
    found_parameters = False
    for item in error.errors(include_url=False):
        loc: Loc = tuple(item["loc"])
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, ManyIssuesError):
            found_parameters = found_parameters or loc == ()
            yield from (((*loc, *place), message) for place, message in inner.items)
        elif item["type"] == "extra_forbidden":
            yield loc, _unknown_key(loc, method)
        elif item["type"] == "missing":
            yield loc, "required"
        else:
            yield loc, explain(item)
    if not found_parameters:
        # Pydantic stops at the first level that fails; what is wrong with the parameters shall be seen all the same.
        yield from _parameter_issues(data)


def _method(data: Mapping[str, Any]) -> Algorithm | None:
    from hubmerge.recipe.algorithms import get_algorithm

    try:
        return get_algorithm(data["method"]) if isinstance(data.get("method"), str) else None
    except UnknownMethodError:
        return None


def _parameter_issues(data: Mapping[str, Any]) -> Iterator[Issue]:
    from hubmerge.recipe.parameters import check_recipe

    models, method = data.get("models"), data.get("method")
    if isinstance(method, str) and method:
        own = [_own_parameters(m) for m in models] if isinstance(models, list) else []
        yield from check_recipe(method, data.get("parameters"), own)[1]


def _own_parameters(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return {}
    inline = {k: v for k, v in entry.items() if k not in ModelEntry.model_fields}
    given = entry.get("parameters")
    return inline | given if isinstance(given, dict) else inline


def _unknown_key(loc: Loc, method: Algorithm | None) -> str:
    from hubmerge.recipe.settings import slots

    key = str(loc[-1])
    if len(loc) == 1 and method is not None and key in slots(method.parameters):
        return f"{key} is a parameter of {method.name}; write it under parameters:"
    known = [name for name in _SCHEMAS[loc[:-1]].model_fields if name != "compat"]
    suggestion = did_you_mean(key, known)
    return f"unknown key{suggestion}" if suggestion else f"unknown key; known: {', '.join(known)}"


def _place(issue: Issue, root: Node) -> Fault:
    """The fault for an issue, at the position of the value; at that of the key if the key is what is wrong."""
    loc, message = issue
    node, exact = find(root, loc)
    if not exact:
        # A model's parameters may stand beside its repo, and its name may come from its repo.
        for other in _elsewhere(loc):
            alternative, exact = find(root, other)
            if exact:
                node = alternative
                break
    if message == "required":
        return fault(node, f"{loc[-1]} is required")
    on_key = message.startswith("unknown key") or _is_about_key(message, loc)
    if loc == ("method",) and message.startswith("unknown method"):
        from hubmerge.methods import all_methods

        hint = f"known methods: {', '.join(m.name for m in all_methods())}"
        return Fault(node.path, message, node.at, hint, UnknownMethodError)
    return fault(node, message, key=on_key)


def _is_about_key(message: str, loc: Loc) -> bool:
    return bool(loc) and any(
        message.startswith(f"{loc[-1]} {words}") for words in ("is a parameter", "is not a parameter", "holds for all")
    )


def _elsewhere(loc: Loc) -> Iterator[Loc]:
    if len(loc) >= 3 and loc[0] == "models":
        if loc[2] == "parameters":
            yield (*loc[:2], *loc[3:])
        elif loc[2] == "name":
            yield (*loc[:2], "repo")
