"""What the form is set to, as plain data, and the recipe that it writes. Nothing of a page is in here.

A draft goes to and fro between the browser's events; every change makes a new one.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ruamel.yaml import YAML

from hubmerge.errors import HubMergeError, UsageError
from hubmerge.recipe import Recipe
from hubmerge.recipe.refs import looks_local, ref_problem
from hubmerge.space.form import WEIGHT, Control, MethodForm, ModelChoice, form_of, to_recipe

METHOD = "task_arithmetic"
"""What the form begins with."""
DTYPES = ("bfloat16", "float16", "float32", "float64")
RESULT = ("title", "dtype", "seed", "license")
"""What is said of the result, beside where it goes."""
MAX_CHARS = 300
"""Of a name that is typed."""
Draft = dict[str, Any]


def new_draft(method: str = METHOD) -> Draft:
    """A form that nothing was filled into."""
    return {"method": method, "base": "", "models": [], "values": {}, "result": {}, "next": 1}


def form_for(draft: Draft) -> MethodForm:
    """The chosen method's form."""
    return form_of(draft["method"])


def with_method(draft: Draft, name: str) -> Draft:
    """Another method; what models and both methods have in common stays as it was set.

    Raises:
        UnknownMethodError: There is none.
    """
    form = form_of(name)
    shared = {c.name for c in form.shared}
    kept = {c.name for c in form_for(draft).shared if c in form.shared}
    values = {k: v for k, v in draft["values"].items() if k in shared & kept}
    own = {c.name for c in form.per_model}
    models = [{**m, "values": {k: v for k, v in m["values"].items() if k in own}} for m in draft["models"]]
    return {**draft, "method": name, "values": values, "models": models}


def with_base(draft: Draft, repo: str | None) -> Draft:
    """Another base."""
    return {**draft, "base": _short(repo)}


def with_model(draft: Draft, repo: str, most: int) -> Draft:
    """One more model at the end.

    Args:
        draft: What there is.
        repo: The model's repository.
        most: How many there may be.

    Raises:
        UsageError: There are as many already.
    """
    if len(draft["models"]) >= most:
        raise UsageError(f"{most} models are chosen, and no more can be merged here", hint="Remove one first.")
    model = {"key": draft["next"], "repo": _short(repo), "name": "", "values": {}}
    return {**draft, "models": [*draft["models"], model], "next": draft["next"] + 1}


def without_model(draft: Draft, key: int) -> Draft:
    """All models but one."""
    return {**draft, "models": [m for m in draft["models"] if m["key"] != key]}


def with_models(draft: Draft, fields: Sequence[tuple[int, str]], values: Sequence[Any]) -> Draft:
    """What the list of models is set to.

    Args:
        draft: What there is.
        fields: Of each control, its model's key and what it sets: ``repo``, ``name``, or a setting.
        values: What each control is set to.
    """
    given: dict[int, dict[str, Any]] = {}
    for (key, field), value in zip(fields, values, strict=True):
        given.setdefault(key, {})[field] = value
    return {**draft, "models": [_model(m, given.get(m["key"], {})) for m in draft["models"]]}


def _model(model: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    rest = {k: _plain(v) for k, v in given.items() if k not in ("repo", "name")}
    repo, name = (_short(given.get(k, model[k])) for k in ("repo", "name"))
    return {**model, "repo": repo, "name": name, "values": {**model["values"], **rest}}


def with_values(draft: Draft, names: Sequence[str], values: Sequence[Any]) -> Draft:
    """What the method's controls are set to."""
    return {**draft, "values": {**draft["values"], **dict(zip(names, map(_plain, values), strict=True))}}


def with_result(draft: Draft, values: Sequence[Any]) -> Draft:
    """What is said of the result, in the order of ``RESULT``."""
    return {**draft, "result": dict(zip(RESULT, map(_plain, values), strict=True))}


def _short(value: Any) -> str:
    return str(value or "").strip()[:MAX_CHARS]


def _plain(value: Any) -> Any:
    return value[: 10 * MAX_CHARS] if isinstance(value, str) else value


# --- and the recipe ---------------------------------------------------------------------------------------------


def is_empty(draft: Draft) -> bool:
    """Whether there is nothing that a recipe could be about."""
    return not draft["models"] and not draft["base"]


def recipe_text(draft: Draft) -> str:
    """The recipe as YAML; one that is not complete yet is written as far as it goes, an empty form writes nothing.

    Raises:
        UsageError: A control is set to what it cannot be.
    """
    if is_empty(draft):
        return ""
    plain = recipe_data(draft)
    try:
        return Recipe.from_data(plain).to_yaml()
    except HubMergeError:  # the plan says what is missing
        out = io.StringIO()
        YAML().dump(plain, out)
        return out.getvalue()


def recipe_data(draft: Draft) -> dict[str, Any]:
    """The recipe as plain data.

    Raises:
        UsageError: A control is set to what it cannot be.
    """
    form, result = form_for(draft), draft["result"]
    models = [ModelChoice(m["repo"], m["name"], own_values(m, form)) for m in draft["models"]]
    card = {k: result[k].strip() for k in ("title", "license") if isinstance(result.get(k), str) and result[k].strip()}
    keys: dict[str, Any] = {"card": card}
    if form.draws:
        keys["seed"] = _seed(result.get("seed"))
    if form.kind == "method" and result.get("dtype") in DTYPES:
        keys["dtype"] = result["dtype"]
    return to_recipe(form, draft["base"], models, draft["values"], **keys)


def own_values(model: Mapping[str, Any], form: MethodForm) -> dict[str, Any]:
    """A model's own settings; a weight of 1 need not be mentioned."""
    known = {c.name for c in form.per_model}
    found = {k: v for k, v in model["values"].items() if k in known}
    if found.get(WEIGHT.name) == WEIGHT.default:
        del found[WEIGHT.name]
    return found


def _seed(value: Any) -> int | None:
    if value in (None, "", 0):
        return None
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"Seed: {value!r} is no whole number", hint="Leave it empty, or write one.") from None


def repo_named(chosen: Any, typed: Any) -> str:
    """The repository that is meant: the result that was chosen, else what was typed.

    Raises:
        UsageError: Neither is one.
    """
    ref = _short(chosen) or _short(typed)
    repo, _, revision = ref.partition("@")
    if not ref:
        raise UsageError("no model is chosen", hint="Search, and choose one of what is found; or type owner/name.")
    if looks_local(repo) or repo.count("/") != 1 or ref_problem(repo, revision or None) is not None:
        raise UsageError(f"{ref!r} is no repository of the Hub", hint="Write owner/name, with @revision if need be.")
    return ref


def label_of(control: Control, number: int | None = None) -> str:
    """What a control is called, of one model or of all."""
    return control.label if number is None else f"{control.label} of model {number}"
