"""What the result's folder looks like: shards packed from sizes, the index, and the small files that travel along."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hubmerge.io.header import build_header
from hubmerge.spec import Dtype, OutputFile, PinnedModel, SmallFile, TensorJob

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "bpe.codes",
    "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
MODEL_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "feature_extractor_config.json", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "1_Pooling/config.json",
)  # fmt: skip
NOTICE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def pack(jobs: Sequence[TensorJob], max_shard_bytes: int) -> tuple[list[TensorJob], list[OutputFile]]:
    """Put the tensors of the model itself into shards, in canonical order, greedily (as save_pretrained does).

    Rows of one tensor that are merged in several jobs stay together. A tensor larger than a shard gets one of its own.

    Returns:
        The jobs with their place filled in, ordered by file and offset, and the files.
    """
    groups = _by_tensor(jobs)
    shards: list[list[list[TensorJob]]] = [[]]
    size = 0
    for group in groups:
        group_bytes = sum(j.numel * j.dtype.nbytes for j in group)
        if shards[-1] and size + group_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group_bytes
    count = len(shards)
    names = (
        [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
    )
    placed: list[TensorJob] = []
    outputs: list[OutputFile] = []
    for number, (name, shard) in enumerate(zip(names, shards, strict=True)):
        new, output = place(shard, name, number)
        placed += new
        outputs.append(output)
    return placed, outputs


def place(groups: Sequence[Sequence[TensorJob]], path: str, output: int) -> tuple[list[TensorJob], OutputFile]:
    """Lay tensors out in one file: widest dtype first, so that every tensor is aligned, then canonical order."""
    ordered = sorted(groups, key=lambda g: -g[0].dtype.nbytes)
    header, spans = build_header(entry for g in ordered for entry in _entries(g))
    placed = []
    position = spans[0][0] if spans else 0
    for group in ordered:
        for job in group:
            end = position + _stored_bytes(job)
            placed.append(replace(job, output=output, start_byte=position, end_byte=end))
            position = end
    return placed, OutputFile(path, header, spans[-1][1] if spans else len(header))


def _by_tensor(jobs: Sequence[TensorJob]) -> list[list[TensorJob]]:
    groups: dict[str, list[TensorJob]] = {}
    for job in jobs:
        groups.setdefault(job.name, []).append(job)
    return list(groups.values())


def _entries(group: Sequence[TensorJob]) -> Iterator[tuple[str, Dtype, tuple[int, ...]]]:
    """The stored tensors that the jobs of one tensor fill, one after the other."""
    first = group[0]
    if first.factors is not None:
        for name, shape in zip(first.factors.names, first.factors.shapes(first.shape), strict=True):
            yield name, first.dtype, shape
    elif len(group) == 1:
        yield first.name, first.dtype, first.shape
    else:
        yield first.name, first.dtype, (sum(j.shape[0] for j in group), *first.shape[1:])


def _stored_bytes(job: TensorJob) -> int:
    elements = job.numel if job.factors is None else job.factors.rank * sum(job.shape)
    return elements * job.dtype.nbytes


def index_file(jobs: Sequence[TensorJob], outputs: Sequence[OutputFile]) -> SmallFile | None:
    """``model.safetensors.index.json`` for a sharded model; None for a single file."""
    if len(outputs) < 2:
        return None
    weight_map = {j.name: outputs[j.output].path for j in jobs}
    data = {
        "metadata": {
            "total_parameters": sum(j.numel for j in jobs),
            "total_size": sum(j.end_byte - j.start_byte for j in jobs),
        },
        "weight_map": dict(sorted(weight_map.items())),
    }
    return SmallFile("model.safetensors.index.json", content=to_json(data))


def to_json(data: Mapping[str, Any]) -> bytes:
    """JSON as transformers writes it."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def companions(base: PinnedModel, tokenizer: PinnedModel, tokenizer_source: int) -> list[SmallFile]:
    """The small files copied byte for byte: the base's, and the tokenizer of the model the recipe names."""
    found = [SmallFile(p, source=-1) for p in _matching(base, MODEL_FILES + NOTICE_FILES)]
    found += tokenizer_files(tokenizer, tokenizer_source)
    if base.config.get("auto_map"):
        found += [SmallFile(p, source=-1) for p in base.files if p.endswith(".py") and "/" not in p]
    return sorted(found, key=lambda f: f.path)


def tokenizer_files(model: PinnedModel, source: int) -> list[SmallFile]:
    """The tokenizer of a model; ``source`` is its number in the plan."""
    return [SmallFile(p, source=source) for p in sorted(_matching(model, TOKENIZER_FILES))]


def notices(base: PinnedModel) -> list[SmallFile]:
    """The licence files that accompany whatever is made from the base."""
    return [SmallFile(p, source=-1) for p in sorted(_matching(base, NOTICE_FILES))]


def is_notice(path: str) -> bool:
    """Whether a file at the top of a repository says what its licence is, or what must be told of it."""
    return "/" not in path and any(fnmatch.fnmatchcase(path, pattern) for pattern in NOTICE_FILES)


def _matching(model: PinnedModel, patterns: Sequence[str]) -> list[str]:
    return [
        p for p in model.files if any(fnmatch.fnmatchcase(p, pattern) for pattern in patterns) and p.count("/") <= 1
    ]
