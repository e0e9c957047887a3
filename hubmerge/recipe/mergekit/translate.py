"""A mergekit file as a recipe of our own, with mergekit's meaning; or the reason why not, with line and column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hubmerge.recipe.mergekit.inputs import File, Input, arrange, names_of, read_inputs, reference
from hubmerge.recipe.mergekit.methods import METHODS, REFUSED_METHODS, Port
from hubmerge.recipe.mergekit.parameters import read_parameters
from hubmerge.recipe.nodes import Node, did_you_mean, raise_faults, show
from hubmerge.recipe.refs import looks_local

_KEYS = (
    "merge_method",
    "models",
    "slices",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "name",
)
_REFUSED_KEYS = {
    "modules": "merging only some modules of a model is not something hubmerge does; exclude: in a recipe of its own "
    "keeps tensors of the base",
    "tokenizer": "hubmerge does not build new tokenizers; use tokenizer_source: base, or a model's name",
    "chat_template": "hubmerge copies the tokenizer's files, its chat template included, byte for byte",
}
_DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True, slots=True)
class Translation:
    """A mergekit file in the terms of a recipe."""

    root: Node
    notes: tuple[str, ...]
    n_layers: int | None
    """Number of layers that the file says its models have; the plan holds it to that."""


def translate(root: Node, where: str) -> Translation:
    """Read a mergekit file.

    Raises:
        RecipeError: It asks for something that hubmerge does not do, or mergekit itself would refuse it.
    """
    file = File(root)
    _check_keys(file)
    port = _port(file)
    read_inputs(file)
    result: dict[str, Node] = {}
    if port is not None and not file.faults:
        result = _recipe(file, port)
    if file.faults:
        raise_faults(where, file.faults)
    return Translation(root.with_value(result), tuple(file.notes), file.n_layers)


def _check_keys(file: File) -> None:
    for key, node in file.root.value.items():
        if key in _REFUSED_KEYS:
            file.bad(node, _REFUSED_KEYS[key], key=True)
        elif key not in _KEYS:
            suggestion = did_you_mean(key, _KEYS)
            why = suggestion or "; mergekit ignores it, so remove it (a method's parameter belongs under parameters:)"
            file.bad(node, f"unknown key{why}", key=True)


def _port(file: File) -> Port | None:
    node = file.root.value["merge_method"]
    name = node.value
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    shared = f"methods it shares: {', '.join(METHODS)}"
    if isinstance(name, str) and name in REFUSED_METHODS:
        file.bad(node, f"mergekit's {name} is not one of the methods hubmerge has; {shared}")
    elif isinstance(name, str):
        file.bad(node, f"unknown method {name!r}{did_you_mean(name, (*METHODS, *REFUSED_METHODS))}; {shared}")
    else:
        file.bad(node, f"expected the name of a method, found {show(node.plain())}")
    return None


def _recipe(file: File, port: Port) -> dict[str, Node]:
    from hubmerge.methods import get_method

    root = file.root
    method = get_method(port.method)
    inputs = arrange(file, port)
    names = names_of(inputs)
    result = {"compat": Node("mergekit"), "method": root.value["merge_method"].with_value(port.method)}
    if file.base is not None:
        result["base"] = _repo(file.base)
    own, shared = read_parameters(file, port, method, inputs)
    result["models"] = Node(
        tuple(
            model.node.with_value(
                {
                    "repo": _repo(model),
                    "name": model.node.with_value(name),
                    "parameters": (model.parameters or model.node).with_value(settings),
                }
            )
            for model, name, settings in zip(inputs, names, own, strict=True)
        ),
        "models",
        (root.get("models") or root).at,
    )
    result["parameters"] = (root.get("parameters") or root).with_value(shared)
    _dtype(file, result)
    _tokenizer(file, result, dict(zip((m.key for m in inputs), names, strict=True)))
    if (title := root.get("name")) is not None and title.value is not None:
        result["card"] = title.with_value({"title": title})
    return result


def _repo(model: Input) -> Node:
    text = model.repo if looks_local(model.repo) else model.text
    return model.node.with_value(text)


def _dtype(file: File, result: dict[str, Node]) -> None:
    for key in ("dtype", "out_dtype"):
        node = file.root.get(key)
        if node is None or node.value is None:
            continue
        name = node.value.removeprefix("torch.") if isinstance(node.value, str) else node.value
        if name not in _DTYPES:
            suggestion = did_you_mean(name, _DTYPES) if isinstance(name, str) else ""
            file.bad(node, f"{show(node.plain())} is not one of {', '.join(_DTYPES)}{suggestion}")
            continue
        if key == "dtype" and name in ("bfloat16", "float16"):
            file.notes.append(f"mergekit computes in {name} here; hubmerge computes in float32 and rounds once")
        result["dtype"] = node.with_value(name)


def _tokenizer(file: File, result: dict[str, Node], names: Mapping[tuple[str, str | None], str]) -> None:
    node = file.root.get("tokenizer_source")
    if node is None or node.value is None:
        return
    if node.value in ("base", "union"):
        result["tokenizer"] = node
        return
    found = reference(file, node)
    if found is None:
        return
    if file.base is not None and found.key == file.base.key:
        result["tokenizer"] = node.with_value("base")
    elif found.key in names:
        result["tokenizer"] = node.with_value(names[found.key])
    else:
        file.bad(
            node, f"{found.text} is not a model of this file; hubmerge takes the tokenizer from one that is merged"
        )
