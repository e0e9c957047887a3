"""A recipe as canonical data, and as the readable file that is published."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from hubmerge.recipe.refs import default_name
from hubmerge.recipe.settings import Gradient, Rule, Setting, slots

if TYPE_CHECKING:
    from hubmerge.recipe.parameters import Given, Parameters
    from hubmerge.recipe.recipe import Recipe
    from hubmerge.recipe.schema import ModelEntry

# Any reader, of YAML 1.1 as well, takes these for the text they are; everything else is quoted.
_PLAIN = re.compile(r"(?:(?:[A-Za-z]|\.{1,2}/|/|~/)[\w./@~ -]*[\w./~-]|[A-Za-z]|\d+[KMGT]B)", re.ASCII)
_WORDS = ("yes", "no", "on", "off", "y", "n", "true", "false", "null")
_BLOCK = re.compile(r"(?=[!-~])(?:[!-~](?:[ -~]*[!-~])?\n|\n)*(?:[!-~](?:[ -~]*[!-~])?)?\n?")


def normalized(recipe: Recipe, parameters: Parameters) -> dict[str, Any]:
    """Canonical plain data: every default written out, numbers in the parameter's own type, keys in a fixed order."""
    known = slots(parameters.method.parameters)
    defaults = {"weight": 1.0} | {
        name: info.get_default(call_default_factory=True)
        for name, info in parameters.method.parameters.model_fields.items()
        if not info.is_required()
    }
    shared = _settings(parameters.shared, known)
    for name, value in defaults.items():
        shared.setdefault(name, _plain(value))
    # Where a template lies is about this machine; what came of it is the card.
    left_out: dict[str, Any] = {"models": True, "parameters": True, "base": True, "card": {"template"}}
    data = recipe.model_dump(mode="json", exclude=left_out)
    return {
        "method": recipe.method,
        "base": str(recipe.base) if recipe.base else None,
        "models": [
            {"repo": str(m.ref), "name": m.name, "parameters": _settings(given, known)}
            for m, given in zip(recipe.models, parameters.own, strict=True)
        ],
        "parameters": dict(sorted(shared.items())),
        **{key: value for key, value in data.items() if key != "method"},
    }


def _settings(given: Given, known: Any) -> dict[str, Any]:
    return {name: _canonical(given[name], known[name].is_float).plain() for name in sorted(given)}


def _canonical(setting: Setting, is_float: bool) -> Setting:
    """Whole numbers of a decimal parameter as floats, and a gradient of one point as the constant it is."""
    rules = []
    for rule in setting.rules:
        value = rule.value
        if isinstance(value, Gradient):
            value = value.points[0] if len(set(value.points)) == 1 else value
        elif is_float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        rules.append(Rule(rule.match, value))
    return Setting(tuple(rules))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def to_yaml(recipe: Recipe, parameters: Parameters) -> str:
    """The recipe as YAML: what was set, in the schema's order, without the defaults."""
    known = slots(parameters.method.parameters)
    data: dict[str, Any] = {"method": recipe.method}
    if recipe.base is not None:
        data["base"] = str(recipe.base)
    data["models"] = [_entry(m, _settings(g, known)) for m, g in zip(recipe.models, parameters.own, strict=True)]
    if parameters.shared:
        data["parameters"] = _settings(parameters.shared, known)
    rest = recipe.model_dump(mode="json", exclude={"method", "base", "models", "parameters"}, exclude_defaults=True)
    if "shard_size" in rest.get("output", {}):
        rest["output"]["shard_size"] = format_size(recipe.output.shard_size)
    return _dump(data | rest)


def _entry(model: ModelEntry, settings: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {"repo": str(model.ref)}
    if model.name != default_name(model.repo):
        entry["name"] = model.name
    return entry | settings


def format_size(size_bytes: int) -> int | str:
    """The shortest exact notation of a size: ``5GB``, else the plain number."""
    for i, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "KB")):
        if size_bytes % 1000**i == 0:
            return f"{size_bytes // 1000**i}{unit}"
    return size_bytes


def _dump(data: dict[str, Any]) -> str:
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedSeq
    from ruamel.yaml.representer import RoundTripRepresenter
    from ruamel.yaml.scalarstring import LiteralScalarString, SingleQuotedScalarString

    def styled(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: styled(v) for k, v in value.items()}
        if isinstance(value, list):
            items = CommentedSeq(styled(v) for v in value)
            # Gradients, globs and tags are short: on one line they read like what they are.
            if all(not isinstance(v, dict | list) for v in value):
                items.fa.set_flow_style()
            return items
        if not isinstance(value, str):
            return value
        if "\n" in value and _BLOCK.fullmatch(value):
            return LiteralScalarString(value)
        return value if _PLAIN.fullmatch(value) and value.lower() not in _WORDS else SingleQuotedScalarString(value)

    class Representer(RoundTripRepresenter):
        """Floats with a point, which YAML 1.1 asks for: 1.0e-06."""

    def number(representer: RoundTripRepresenter, value: float) -> Any:
        text = repr(value)
        return representer.represent_scalar(
            "tag:yaml.org,2002:float", text if "." in text else text.replace("e", ".0e")
        )

    Representer.add_representer(float, number)
    yaml = YAML(typ="rt", pure=True)
    yaml.Representer = Representer
    yaml.width = 120
    yaml.allow_unicode = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    out = io.StringIO()
    yaml.dump(styled(data), out)
    return out.getvalue()
