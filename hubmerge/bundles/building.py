"""A task's transformers model: its class and config, the model made from its tensors, and what a task may change."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hubmerge.adapters.quiet import quiet
from hubmerge.architectures import loading
from hubmerge.bundles.manifest import TaskEntry
from hubmerge.bundles.store import Bundle
from hubmerge.errors import SourceError, UsageError
from hubmerge.inputs import read_small
from hubmerge.spec import PinnedModel

_LABELS = ("id2label", "label2id", "problem_type")
# Labels are changed with the task; the others say nothing about what the model computes when it is used.
_MAY_DIFFER = re.compile(
    r"_.*|.*drop.*|id2label|label2id|num_labels|problem_type|architectures|auto_map|dtype|torch_dtype|"
    r"transformers_version|finetuning_task|task_specific_params|initializer_.*|use_cache|name_or_path"
)
_GENERATION = "generation_config.json"
_SIZES = (("out_features", 0), ("in_features", 1), ("out_channels", 0), ("nf", 1))


@dataclass(frozen=True, slots=True)
class Design:
    """What transformers needs to know besides the weights."""

    task: str
    cls: Any
    config: Any
    settings: Mapping[str, Any]
    """What of the config decides what the model computes."""
    generation: Mapping[str, Any] | None
    """Its ``generation_config.json``, if it has one."""

    @property
    def name(self) -> str:
        """Of the class."""
        return str(self.cls.__name__)


def design_of(bundle: Bundle, base: PinnedModel, task: TaskEntry) -> Design:
    """The class and config of a task's model.

    Raises:
        SourceError: The installed transformers has no such class, or the config says nothing about it.
    """
    import transformers

    config = json.loads(bundle.read(task.config_path)) if task.config else dict(base.config)
    where, hint = f"{bundle.label}: task {task.name!r}", "retrieve the task as a folder, and load that yourself"
    found = loading(config)
    if found is None:
        raise SourceError(f"{where}: its config.json names no architecture", hint=hint)
    if found.remote_code:
        raise SourceError(f"{where}: its architecture's code lies in a repository, and is not run", hint=hint)
    name = config["architectures"][0]
    cls: Any = getattr(transformers, name, None)
    if not hasattr(cls, "from_pretrained") or getattr(cls, "config_class", None) is None:
        raise SourceError(f"{where}: transformers {transformers.__version__} has no {name}", hint=hint)
    made = cls.config_class.from_dict(config)
    settings = {k: v for k, v in made.to_dict().items() if not _MAY_DIFFER.fullmatch(k)}
    return Design(task.name, cls, made, settings, _generation(bundle, base, task))


def _generation(bundle: Bundle, base: PinnedModel, task: TaskEntry) -> dict[str, Any] | None:
    if _GENERATION not in task.files:
        return None
    own = task.files[_GENERATION] is not None
    content = bundle.read(task.file_path(_GENERATION)) if own else read_small(base, bundle.hub, _GENERATION)
    found: dict[str, Any] = json.loads(content)
    return found


def build(design: Design, given: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[Any, set[str]]:
    """Make the model of these tensors, which become its parameters where nothing has to be converted.

    Args:
        design: Its class and config.
        given: The tensors of its checkpoint.
        dtype: Of its parameters.

    Returns:
        The model, in evaluation mode, and the names of what was not given.

    Raises:
        SourceError: Tensors and config do not fit together.
    """
    with quiet():
        try:
            model, report = design.cls.from_pretrained(
                None, config=design.config, state_dict=given, dtype=dtype, output_loading_info=True
            )
        except (RuntimeError, ValueError, KeyError, TypeError) as e:
            raise SourceError(
                f"task {design.task!r}: transformers cannot make a {design.name} of its tensors: "
                f"{str(e).strip().partition(chr(10))[0]}",
                hint="its config.json does not fit its weights; add the task again from a revision where they do",
            ) from e
        _adopt_generation(model, design)
    return model, set(report["missing_keys"])


def check_same_design(was: Design, wanted: Design) -> None:
    """A model can become another task's if they differ in weights and labels only.

    Raises:
        UsageError: They differ in more.
    """
    hint = f"make another model: bundle.model({wanted.task!r})"
    if was.cls is not wanted.cls:
        raise UsageError(f"the model is a {was.name}, task {wanted.task!r} a {wanted.name}", hint=hint)
    old, new = was.settings, wanted.settings
    if differ := [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]:
        values = ", ".join(f"{k} is {old.get(k)!r} and {new.get(k)!r}" for k in differ[:3])
        raise UsageError(
            f"tasks {was.task!r} and {wanted.task!r} are models of different designs: {values[:300]}", hint=hint
        )


def adopt(model: Any, design: Design) -> None:
    """Give the model what another task has besides weights: labels, and how it generates."""
    for key in _LABELS:
        setattr(model.config, key, getattr(design.config, key))
    for module in model.modules():
        if isinstance(vars(module).get("num_labels"), int):
            module.num_labels = design.config.num_labels
    _adopt_generation(model, design)


def _adopt_generation(model: Any, design: Design) -> None:
    from transformers import GenerationConfig

    if design.generation is not None and model.can_generate():
        model.generation_config = GenerationConfig.from_dict(dict(design.generation))


def resize(model: Any, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Put an uninitialised parameter of another shape in the place of one, wherever the model uses it; its data."""
    path, _, attribute = name.rpartition(".")
    old: torch.Tensor = getattr(model.get_submodule(path), attribute)
    new = nn.Parameter(torch.empty(shape, dtype=old.dtype, device=old.device), requires_grad=old.requires_grad)
    for module in model.modules():
        for own, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter is old:
                setattr(module, own, new)
                _resize_module(module, own, old.shape, new.shape)
    return new.data


def _resize_module(module: nn.Module, parameter: str, old: torch.Size, new: torch.Size) -> None:
    """What a module notes about the size of its weight."""
    for attribute, dim in _SIZES:
        if parameter == "weight" and len(new) > dim and getattr(module, attribute, None) == old[dim]:
            setattr(module, attribute, new[dim])
