"""One namespace for checkpoints that were saved differently: prefixes, ties, task heads, vocabulary.

Everything here works on names and shapes from headers and on ``config.json``; no weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hubmerge.spec import Kind, Problem, TensorSpec

# Tensors that a checkpoint may store once and use twice: suffix of the alias -> suffixes of the tensor it repeats.
_TIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("cls.predictions.decoder.weight", ("embeddings.word_embeddings.weight",)),
    ("cls.predictions.decoder.bias", ("cls.predictions.bias",)),
    ("lm_head.decoder.weight", ("embeddings.word_embeddings.weight",)),
    ("lm_head.decoder.bias", ("lm_head.bias",)),
    (
        "lm_head.weight",
        ("embed_tokens.weight", "wte.weight", "shared.weight", "word_embeddings.weight", "embed_in.weight"),
    ),
    ("encoder.embed_tokens.weight", ("shared.weight",)),
    ("decoder.embed_tokens.weight", ("shared.weight",)),
)
_EMBEDDING = re.compile(
    r"(^|[._])(embed(ding|dings|_tokens|_positions|_in|_out)?|wte|wpe|shared|lm_head|position_ids|relative_attention_bias|codebook)([._]|$)"
)
_STACK = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|stages?|encoders?|decoders?|resblocks|groups)\.(\d+)\.")
_LANGUAGE_MODEL = re.compile(
    r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|ForMaskedLM|ForPreTraining|WithLMHead)"
)
_HEAD = re.compile(
    r"(^|\.)(classifier|score|qa_outputs|classification_head|out_proj|logits_proj|heads?|fc|pre_classifier)(\.|$)"
)
_OLD_NORM = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
# Modules of transformers' Conv1D, which stores [in, out].
_CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "trajectory_transformer", "ctrl"})
_CONV1D = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")
_PREFIX_PARTS = 3


def kind_of(name: str, shape: tuple[int, ...]) -> Kind:
    """The tensor's class, from its name and shape (as methods distinguish them)."""
    if len(shape) > 2:
        return "conv"
    if len(shape) < 2:
        return "vector"
    return "embedding" if _EMBEDDING.search(name) else "linear"


def is_input_embedding(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a per-layer gradient treats the tensor as coming before the first layer."""
    return bool(_EMBEDDING.search(name)) and not re.search(r"(^|\.)(lm_head|embed_out)\.", name)


def is_transposed(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> bool:
    """Whether a linear weight is stored [in, out] (transformers' Conv1D)."""
    return len(shape) == 2 and config.get("model_type") in _CONV1D_TYPES and bool(_CONV1D.search(name))


def layer_of(name: str) -> int | None:
    """Number of the layer a tensor belongs to; None outside the stack."""
    found = _STACK.search(name)
    return int(found.group(1)) if found else None


def tied_to(name: str, tensors: Mapping[str, TensorSpec]) -> str | None:
    """The stored tensor that ``name`` would repeat if it is tied in this checkpoint."""
    for alias, sources in _TIES:
        if name == alias or name.endswith("." + alias):
            for source in sources:
                found = [n for n in tensors if (n == source or n.endswith("." + source)) and n != name]
                if len(found) == 1:
                    return found[0]
    return None


def is_language_model(config: Mapping[str, Any]) -> bool:
    """Whether the architecture has an output embedding over its vocabulary."""
    return any(_LANGUAGE_MODEL.search(str(a)) for a in config.get("architectures") or ())


@dataclass(frozen=True, slots=True)
class Alignment:
    """How a checkpoint's tensors map onto the base's names."""

    tensors: Mapping[str, TensorSpec]
    """Base name -> this model's tensor; names the model does not have are absent."""
    extra: Mapping[str, TensorSpec]
    """Tensors the base does not have, under the names they would have in the base's namespace."""
    prefix: str
    """``-transformer.`` when that was stripped, ``+transformer.`` when it was added, empty when names agree."""


def _candidates(names: Mapping[str, TensorSpec]) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")[:-1]
        for n in range(1, min(len(parts), _PREFIX_PARTS) + 1):
            if parts[n - 1].isdigit():
                break
            found[".".join(parts[:n]) + "."] = None
    return list(found)


def _modern(name: str) -> str:
    for old, new in _OLD_NORM:
        if name.endswith(old):
            return name[: -len(old)] + new
    return name


def rename(name: str, prefix: str) -> str:
    """Apply a prefix that ``choose_prefix`` found."""
    if prefix.startswith("-"):
        return name.removeprefix(prefix[1:])
    return prefix[1:] + name


def choose_prefix(base: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    """The prefix to strip (``-p.``) or add (``+p.``) so that most ``names`` are in ``base``; may be empty."""

    def hits(prefix: str) -> int:
        return sum(1 for n in names if (rename(n, prefix) if prefix else n) in base)

    best, best_hits = "", hits("")
    if best_hits == len(names):
        return best
    for prefix in [f"-{p}" for p in _candidates(names)] + [f"+{p}" for p in _candidates(base)]:
        count = hits(prefix)
        if count > best_hits:
            best, best_hits = prefix, count
    return best


def align(base: Mapping[str, TensorSpec], tensors: Mapping[str, TensorSpec]) -> Alignment:
    """Map a full checkpoint's names onto the base's."""
    modern = {(name if name in base else _modern(name)): spec for name, spec in tensors.items()}
    prefix = choose_prefix(base, modern)
    matched: dict[str, TensorSpec] = {}
    extra: dict[str, TensorSpec] = {}
    for name, spec in modern.items():
        renamed = rename(name, prefix) if prefix else name
        if renamed in base:
            matched[renamed] = spec
        elif name in base and name not in matched:
            matched[name] = spec
        else:
            extra[name] = spec
    return Alignment(matched, extra, prefix)


def is_head(name: str, shape: tuple[int, ...], config: Mapping[str, Any], base: Mapping[str, TensorSpec]) -> bool:
    """Whether a tensor is a task's own head.

    It lies outside the layer stack, and is either sized by the task's labels or called like a head.
    """
    if layer_of(name) is not None and _stack_known(name, base):
        return False
    labels = config.get("num_labels") or len(config.get("id2label") or ())
    return bool(_HEAD.search(name)) or (bool(labels) and len(shape) in (1, 2) and shape[0] == labels)


def _stack_known(name: str, base: Mapping[str, TensorSpec]) -> bool:
    shape_of = re.sub(r"\d+", "#", name)
    return any(re.sub(r"\d+", "#", n) == shape_of for n in base)


def is_vocabulary(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes of a tensor differ only in vocabulary rows."""
    if len(a) != len(b) or not a or a[1:] != b[1:] or layer_of(name) is not None:
        return False
    return bool(
        re.search(r"(embed_tokens|wte|shared|word_embeddings|embed_in|embed_out|lm_head|predictions)[._]", name)
    )


def untied_outputs(
    base: Mapping[str, TensorSpec],
    base_config: Mapping[str, Any],
    extra: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
) -> tuple[dict[str, str], list[str]]:
    """Sort a model's extra output embeddings into untied ones and mere repetitions of a tied tensor.

    A checkpoint writes ``tie_word_embeddings`` only when it differs from its architecture's default. A tied base
    that writes it
    therefore says that the default is untied, and one that does not write it that the default is tied.

    Returns:
        ``{name: base tensor it starts from}`` for outputs this model has untied, and the names of repetitions to drop.
    """
    untied: dict[str, str] = {}
    repeated: list[str] = []
    if not is_language_model(base_config):
        return untied, repeated
    for name in extra:
        source = tied_to(name, base)
        if source is None:
            continue
        default = not base_config.get("tie_word_embeddings", False)
        if config.get("tie_word_embeddings", default) or name.endswith(
            ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", ".bias")
        ):
            repeated.append(name)
        else:
            untied[name] = source
    return untied, repeated


def structure_problems(where: str, base: Mapping[str, TensorSpec], alignment: Alignment) -> list[Problem]:
    """What makes a checkpoint not a fine-tune of this base."""
    problems: list[Problem] = []
    if not alignment.tensors:
        return [
            Problem(
                "error",
                f"{where}: none of its {len(alignment.extra)} tensors has a counterpart in the base",
                "use a fine-tune of the base, or the right base",
            )
        ]
    missing = [n for n in base if n not in alignment.tensors and layer_of(n) is not None]
    if missing:
        problems.append(
            Problem(
                "error",
                f"{where}: {len(missing)} tensors of the base's layers are missing, the first is {missing[0]!r}",
                "use a fine-tune of the base with the same number of layers, or exclude these tensors",
            )
        )
    outside = [n for n in base if n not in alignment.tensors and layer_of(n) is None]
    if outside:
        names = ", ".join(repr(n) for n in outside[:3]) + (", …" if len(outside) > 3 else "")
        problems.append(Problem("note", f"{where}: has no {names}: counted as unchanged from the base"))
    return problems
