"""A method's schema as plain descriptions of controls, and what they were set to as a recipe. Nothing is fetched."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic.fields import FieldInfo

from hubmerge.codec import Codec
from hubmerge.codecs import all_codecs
from hubmerge.errors import UsageError
from hubmerge.methods import all_methods
from hubmerge.recipe.algorithms import get_algorithm
from hubmerge.recipe.nodes import did_you_mean, show
from hubmerge.spec import Algorithm, Method

Widget = Literal["slider", "number", "choice", "switch", "text"]
_STEP = 0.001
_AWAY = {"ge": 0.0, "gt": _STEP, "le": 0.0, "lt": -_STEP}
DEFAULT = "default"
"""The choice that leaves a value to the method."""


@dataclass(frozen=True, slots=True)
class Control:
    """One parameter, as a page shows it."""

    name: str
    label: str
    widget: Widget
    default: Any
    """None where the method decides by itself."""
    help: str
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False
    """May be left empty."""
    whole: bool = False
    """Takes whole numbers only."""
    per_model: bool = False
    """May be set for each model."""


WEIGHT = Control("weight", "Weight", "number", 1.0, "How much of this model goes into the result.", per_model=True)


@dataclass(frozen=True, slots=True)
class MethodForm:
    """A method or codec, as a page shows it."""

    name: str
    kind: Literal["method", "codec"]
    summary: str
    paper: str
    uses_base: bool
    """Whether a base must be chosen."""
    min_models: int
    max_models: int | None
    incremental: bool
    """Of a codec: whether tasks can be added and removed later without the others' models."""
    takes_weights: bool
    draws: bool
    """Whether it draws at random, so that a seed decides what comes out."""
    controls: tuple[Control, ...]

    @property
    def shared(self) -> tuple[Control, ...]:
        """What holds for all models."""
        return self.controls

    @property
    def per_model(self) -> tuple[Control, ...]:
        """What may be set for each model; its weight first, if there are weights."""
        own = tuple(c for c in self.controls if c.per_model)
        return (WEIGHT, *own) if self.takes_weights else own


def forms() -> tuple[MethodForm, ...]:
    """All methods, then all codecs; plug-ins are left out."""
    return tuple(form_of(a) for a in (*all_methods(), *all_codecs()) if type(a).__module__.startswith("hubmerge."))


def form_of(algorithm: Algorithm | str) -> MethodForm:
    """One of them, by its name.

    Raises:
        UnknownMethodError: There is none.
    """
    found = get_algorithm(algorithm) if isinstance(algorithm, str) else algorithm
    is_method = isinstance(found, Method)
    return MethodForm(
        name=found.name,
        kind="method" if is_method else "codec",
        summary=found.summary,
        paper=found.paper,
        uses_base=found.uses_base if isinstance(found, Method) else True,
        min_models=found.min_models if isinstance(found, Method) else 1,
        max_models=found.max_models if isinstance(found, Method) else None,
        incremental=found.incremental if isinstance(found, Codec) else False,
        takes_weights=is_method and found.problem(found.parameters(), (1.0, 0.5)) is None,
        draws="random" in found.summary,  # every algorithm that draws says so there
        controls=tuple(_control(name, info) for name, info in found.parameters.model_fields.items()),
    )


def _control(name: str, info: FieldInfo) -> Control:
    leaves, optional = _leaves(info.annotation)
    extra = info.json_schema_extra
    choices = tuple(str(c) for c in leaves if isinstance(c, str))
    if choices:
        widget: Widget = "choice"
    elif bool in leaves:
        widget = "switch"
    elif int not in leaves and float not in leaves:
        widget = "text"
    else:
        widget = "slider" if None not in _bounds(info) and not optional else "number"
    whole = int in leaves and float not in leaves
    step = 1.0 if whole else _STEP if widget == "slider" else None
    minimum, maximum = _bounds(info)
    return Control(
        name=name,
        label=name.replace("_", " ").capitalize(),
        widget=widget,
        default=None if info.is_required() else info.default,
        help=" ".join((info.description or "").split()),
        minimum=minimum,
        maximum=maximum,
        step=step if widget in ("slider", "number") else None,
        choices=(DEFAULT, *choices) if choices and optional else choices,
        optional=optional,
        whole=whole,
        per_model=isinstance(extra, dict) and bool(extra.get("per_model")),
    )


def _leaves(annotation: Any) -> tuple[tuple[Any, ...], bool]:
    """The types, or literal words, that an annotation admits, and whether it also admits None."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _leaves(typing.get_args(annotation)[0])
    if origin is Literal:
        words = typing.get_args(annotation)
    elif origin in (typing.Union, types.UnionType):
        found = [_leaves(a) for a in typing.get_args(annotation)]
        words = tuple(w for leaves, _ in found for w in leaves)
        if any(optional for _, optional in found):
            words = (*words, None)
    else:
        words = (annotation,)
    kept = tuple(w for w in words if w is not None and w is not type(None))
    return kept, len(kept) < len(words)


def _bounds(info: FieldInfo) -> tuple[float | None, float | None]:
    """The least and the greatest value; beside an end that does not belong to the range, one step away from it."""
    ends = {key: getattr(m, key) for m in info.metadata for key in _AWAY if getattr(m, key, None) is not None}
    low, high = ([v + _AWAY[key] for key, v in ends.items() if key[0] == side] for side in "gl")
    return (low[0] if low else None), (high[0] if high else None)


# --- and back ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A model that was chosen, and its own values; what is missing or None is as for all models."""

    repo: str
    name: str = ""
    values: Mapping[str, Any] | None = None


def to_recipe(
    form: MethodForm, base: str | None, models: Sequence[ModelChoice], values: Mapping[str, Any], **keys: Any
) -> dict[str, Any]:
    """A recipe as plain data, of what the controls were set to; what stands at its default is not mentioned.

    Args:
        form: Of the method.
        base: The base's repository.
        models: Those that were chosen, in order.
        values: By the names of the controls, as a page gives them: numbers may be whole ones, an empty text is nothing.
        keys: Further keys of the recipe (``dtype``, ``seed``, ``card`` …); None and empty ones are left out.

    Raises:
        UsageError: A value that the control cannot have.
    """
    shared = {c.name: c for c in form.shared}
    own = {c.name: c for c in form.per_model}
    recipe: dict[str, Any] = {"method": form.name}
    if base:
        recipe["base"] = base
    recipe["models"] = [
        {"repo": m.repo, **({"name": m.name} if m.name else {}), **_set(m.values or {}, own, keep_defaults=True)}
        for m in models
    ]
    if given := _set(values, shared, keep_defaults=False):
        recipe["parameters"] = given
    rest = {k: v for k, v in keys.items() if v is not None and v != {} and v != ""}
    if form.kind == "codec":
        rest["output"] = {**rest.get("output", {}), "format": "bundle"}
    return recipe | rest


def _set(values: Mapping[str, Any], controls: Mapping[str, Control], *, keep_defaults: bool) -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        if name not in controls:
            raise UsageError(f"{name} is not a setting here{did_you_mean(name, controls)}")
        read = value_of(controls[name], value)
        if read is not None and (keep_defaults or read != controls[name].default):
            found[name] = read
    return found


def value_of(control: Control, value: Any) -> Any:
    """What a control was set to, in the parameter's own type; None if it was left empty.

    Raises:
        UsageError: It cannot have that value. Ranges are the recipe's to check.
    """
    if value is None or value == "" or (control.optional and value == DEFAULT and control.widget == "choice"):
        return None
    if control.widget == "switch" and isinstance(value, bool):
        return value
    if control.widget == "choice" and value in control.choices:
        return value
    if control.widget == "text":
        return str(value)
    if control.widget in ("slider", "number") and not isinstance(value, bool):
        try:
            number = float(value)
            return int(number) if control.whole and number.is_integer() else number
        except (TypeError, ValueError, OverflowError):
            pass
    raise UsageError(f"{control.label}: {show(value)} cannot be set", hint=control.help or "Choose another value.")
