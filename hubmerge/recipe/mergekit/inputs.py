"""The models of a mergekit file: references, slices, the base, and the role each plays in its method."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hubmerge.recipe.mergekit.methods import Port
from hubmerge.recipe.nodes import Fault, Node, did_you_mean, fault, show
from hubmerge.recipe.refs import default_name, name_problem, split_revision


@dataclass(frozen=True, slots=True)
class Input:
    """A model of the mergekit file."""

    node: Node
    repo: str
    revision: str | None
    parameters: Node | None = None

    @property
    def key(self) -> tuple[str, str | None]:
        """What makes two inputs the same."""
        return self.repo, self.revision

    @property
    def text(self) -> str:
        """The model as messages name it."""
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


@dataclass(slots=True)
class File:
    """A mergekit file while it is being read."""

    root: Node
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    base: Input | None = None
    inputs: list[Input] = field(default_factory=list)
    shared: list[Node] = field(default_factory=list)
    """Parameters for all models, the most specific first."""
    n_layers: int | None = None

    def bad(self, node: Node, message: str, *, key: bool = False, hint: str | None = None) -> None:
        """Take down a fault at a node, or at its key."""
        self.faults.append(fault(node, message, key=key, hint=hint))


def read_inputs(file: File) -> None:
    """Fill in the models, the base and the parameters for all models."""
    root = file.root
    models, slices = root.get("models"), root.get("slices")
    if models is not None and slices is not None:
        file.bad(slices, "models and slices exclude each other", key=True)
    elif slices is not None:
        _read_slices(file, slices)
    elif models is None:
        if root.get("modules") is None:
            file.bad(root, "models is required")
    elif not models.is_list or not models.value:
        file.bad(models, f"expected a list of models, found {show(models.plain())}")
    else:
        _read_sources(file, models.value, ("model", "parameters"))
    if file.base is None and (node := root.get("base_model")) is not None and node.value is not None:
        file.base = reference(file, node)
    if (node := root.get("parameters")) is not None and node.value is not None:
        file.shared.append(node)


def _read_sources(file: File, entries: tuple[Node, ...], known: tuple[str, ...]) -> None:
    for entry in entries:
        if not entry.is_mapping or entry.get("model") is None:
            file.bad(entry, f"expected {{model: …}}, found {show(entry.plain())}")
            continue
        for key, node in entry.value.items():
            if key not in known:
                file.bad(
                    node, f"unknown key{did_you_mean(key, known)}; a parameter belongs under parameters:", key=True
                )
        found = reference(file, entry.value["model"], entry.get("parameters"))
        if found is None:
            continue
        if any(found.key == other.key for other in file.inputs):
            file.bad(found.node, f"{found.text} is listed twice")
        file.inputs.append(found)


def _read_slices(file: File, node: Node) -> None:
    """One slice that takes the same layers, from the first on, of every model is a merge of whole models."""
    refusal = (
        "hubmerge keeps the base's layers: slices are read only if there is one, with the same range [0, n] everywhere"
    )
    if (
        not node.is_list
        or len(node.value) != 1
        or (sources := node.value[0].get("sources")) is None
        or not sources.value
    ):
        file.bad(node, refusal, key=True)
        return
    part = node.value[0]
    for key, child in part.value.items():
        if key not in ("sources", "base_model", "parameters"):
            file.bad(child, f"hubmerge does not read {key} of a slice", key=True)
    ends = []
    for source in sources.value if sources.is_list else (sources,):
        layers = source.get("layer_range")
        span = layers.plain() if layers is not None else None
        if isinstance(span, list) and len(span) == 2 and span[0] == 0 and type(span[1]) is int and span[1] > 0:
            ends.append(span[1])
        else:
            file.bad(layers or source, refusal)
    if len(set(ends)) > 1:
        file.bad(sources, refusal, key=True)
    if file.faults or not sources.is_list:
        return
    file.n_layers = ends[0]
    _read_sources(file, sources.value, ("model", "layer_range", "parameters"))
    if (child := part.get("base_model")) is not None:
        file.base = reference(file, child)
    if (child := part.get("parameters")) is not None and child.value is not None:
        file.shared.append(child)


def reference(file: File, node: Node, parameters: Node | None = None) -> Input | None:
    """A model reference, as text or as a mapping; None (and a fault) if hubmerge cannot follow it."""
    adapter = "list the adapter itself as the model (hubmerge reads adapters) and its full model as base_model"
    if node.is_mapping:
        for key, child in node.value.items():
            if key == "lora" and child.value is not None:
                file.bad(child, "a model with an adapter on top is not an input hubmerge has", key=True, hint=adapter)
            elif key not in ("model", "lora"):
                file.bad(child, f"hubmerge does not read {key} of a model reference", key=True)
        inner = node.get("model")
        path = inner.get("path") if inner is not None and inner.is_mapping else inner
        revision = inner.get("revision") if inner is not None else None
        if path is None or not isinstance(path.value, str):
            file.bad(node, "expected {model: {path: …, revision: …}}")
            return None
        return Input(node, path.value, revision.value if revision is not None else None, parameters)
    if not isinstance(node.value, str) or not node.value:
        file.bad(node, f"expected a model, found {show(node.plain())}")
        return None
    if "+" in node.value:
        file.bad(node, f"{node.value!r}: a model with an adapter on top is not an input hubmerge has", hint=adapter)
        return None
    try:
        parts = split_revision(node.value)
    except ValueError as e:
        file.bad(node, str(e))
        return None
    return Input(node, parts["repo"], parts.get("revision"), parameters)


def names_of(inputs: list[Input]) -> list[str]:
    """A name for each model; mergekit has none. The last part of the repo id where that is unique and safe."""
    names: list[str] = []
    for model in inputs:
        name = default_name(model.repo)
        if sum(default_name(m.repo).lower() == name.lower() for m in inputs) > 1:
            name = f"{model.repo.strip('./')}@{model.revision}" if model.revision else model.repo.strip("./")
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:90]
        name = name if name and name_problem(name) is None else f"model-{name}".rstrip("-")
        taken = [n.lower() for n in names]
        names.append(name if name.lower() not in taken else f"{name}-{len(names) + 1}")
    return names


def arrange(file: File, port: Port) -> list[Input]:
    """The models in the roles that mergekit's method gives them."""
    inputs, base, root = file.inputs, file.base, file.root
    if port.base == "required" and base is None:
        file.bad(root, f"base_model is required: {port.method} needs it")
        return inputs
    others = [m for m in inputs if base is None or m.key != base.key]
    if port.base == "required":
        if port.n_others is not None and len(others) != port.n_others:
            wanted = "exactly one model" if port.n_others == 1 else f"{port.n_others} models"
            file.bad(
                root.get("models") or root, f"{port.method} takes {wanted} besides base_model, found {len(others)}"
            )
        if len(others) < port.min_others:
            count = f"at least {port.min_others} models besides base_model, found {len(others)}"
            file.bad(root.get("models") or root, f"{port.method} takes {count}")
        return others
    if base is not None and len(others) == len(inputs):
        # mergekit appends the base to the inputs, where it needs a weight like any other.
        if not any(node.get("weight") is not None for node in file.shared):
            file.bad(
                base.node, "mergekit merges base_model as one more input, and it has no weight; list it under models"
            )
            return inputs
        return [*inputs, base]
    return inputs
