"""What a task's own checkpoint looks like beside the base: other names, tensors more or less, a config of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hubmerge import align
from hubmerge.bundles.manifest import own_name
from hubmerge.matching import Aligned
from hubmerge.spec import PinnedModel, TensorSpec

_BASE_HEADS = re.compile(r"(lm_head|cls|embed_out)\.")
_OUTPUT_WEIGHT = re.compile(r"(^|\.)(score|classifier|qa_outputs|out_proj)\.weight$")
_STEM = re.compile(r"(.+?)(LMHeadModel|Model|For[A-Z]\w*)")
_BY_TASK = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


@dataclass(frozen=True, slots=True)
class Naming:
    """How a task's names and tensors differ from the base's; as in a manifest."""

    prefix: str
    names: Mapping[str, str]
    absent: tuple[str, ...]


def as_stored(base: PinnedModel, model: PinnedModel, aligned: Aligned) -> None:
    """Change what takes part to what the model stores itself, for a bundle gives models back as they were.

    An output embedding that the model ties to its input is not stored, and one that only the model has untied is its
    own.
    """
    if model.adapter is not None:
        return
    stored = align.align(base.tensors, model.tensors).tensors
    for name in [n for n in aligned.inputs if n not in stored]:
        given = aligned.inputs.pop(name)
        if name in aligned.untied and isinstance(given, TensorSpec):
            aligned.heads[given.name] = given


def naming(base: PinnedModel, model: PinnedModel, aligned: Aligned) -> Naming:
    """How a model's names differ from the base's.

    An adapter takes the base's names, unless it brings a head: then those of the model that it was trained on.
    """
    prefix = aligned.prefix
    if model.adapter is None:
        stored = align.align(base.tensors, model.tensors).tensors
        own = {name: spec.name for name, spec in stored.items()}
        absent = {n for n in base.tensors if n not in own}
    else:
        prefix = prefix if aligned.heads else ""
        own = {}
        absent = {n for n in base.tensors if aligned.heads and n not in aligned.inputs and _is_base_head(n, base)}
    names = {n: name for n, name in own.items() if name != own_name(prefix, n)}
    absent |= {n for n in base.tensors if (names.get(n) or own_name(prefix, n)) in aligned.heads}
    return Naming(prefix, names, tuple(n for n in base.tensors if n in absent))


def _is_base_head(name: str, base: PinnedModel) -> bool:
    shape = base.tensors[name].shape
    return bool(_BASE_HEADS.match(name)) or align.is_head(name, shape, base.config, base.tensors)


def config_of(base: PinnedModel, model: PinnedModel, aligned: Aligned) -> dict[str, Any] | None:
    """The task's own ``config.json``; None if the base's is as good.

    That of an adapter with a head is the base's with the class that PEFT's task type stands for and as many labels as
    the head has rows.
    """
    if model.config:
        # Where the author's machine kept the model is nobody's business.
        return {k: v for k, v in model.config.items() if k != "_name_or_path"}
    if model.adapter is None or not aligned.heads:
        return None
    config = {k: v for k, v in base.config.items() if k not in ("architectures", "num_labels")}
    architecture = _architecture(base.config, model.adapter)
    if architecture is not None:
        config["architectures"] = [architecture]
    labels = next((s.shape[0] for n, s in aligned.heads.items() if _OUTPUT_WEIGHT.search(n) and len(s.shape) == 2), 0)
    if labels:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    return config


def _architecture(config: Mapping[str, Any], adapter: Mapping[str, Any]) -> str | None:
    """The class an adapter with a head belongs to: as PEFT noted it, or the base's relative for the task."""
    noted = (adapter.get("auto_mapping") or {}).get("base_model_class")
    if isinstance(noted, str):
        return noted
    suffix = _BY_TASK.get(str(adapter.get("task_type")))
    given = config.get("architectures")
    stem = _STEM.fullmatch(str(given[0])) if isinstance(given, list) and given else None
    return f"{stem[1]}{suffix}" if stem and suffix else None
