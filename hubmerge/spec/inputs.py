"""What models are made of: dtypes, tensors, files, and a model pinned to a commit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

Kind = Literal["linear", "embedding", "conv", "vector"]


@dataclass(frozen=True, slots=True)
class Dtype:
    """A safetensors dtype: its torch name, its size, and whether a merge may compute with it."""

    name: str
    torch_name: str
    nbytes: int
    mergeable: bool = False

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype of the same name."""
        import torch

        dtype = getattr(torch, self.torch_name)
        assert isinstance(dtype, torch.dtype)
        return dtype


# Sub-byte formats (F4, F6) are left out on purpose: a checkpoint that uses them is quantised and refused by name.
DTYPES: Mapping[str, Dtype] = {
    d.name: d
    for d in (
        Dtype("F64", "float64", 8, True),
        Dtype("F32", "float32", 4, True),
        Dtype("F16", "float16", 2, True),
        Dtype("BF16", "bfloat16", 2, True),
        Dtype("F8_E4M3", "float8_e4m3fn", 1),
        Dtype("F8_E5M2", "float8_e5m2", 1),
        Dtype("F8_E8M0", "float8_e8m0fnu", 1),
        Dtype("I64", "int64", 8),
        Dtype("I32", "int32", 4),
        Dtype("I16", "int16", 2),
        Dtype("I8", "int8", 1),
        Dtype("U64", "uint64", 8),
        Dtype("U32", "uint32", 4),
        Dtype("U16", "uint16", 2),
        Dtype("U8", "uint8", 1),
        Dtype("BOOL", "bool", 1),
        Dtype("C64", "complex64", 8),
    )
}
DTYPE_BY_TORCH_NAME: Mapping[str, Dtype] = {d.torch_name: d for d in DTYPES.values()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One stored tensor: its type and the half-open byte range it occupies in a file of its model."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    file: str
    start_byte: int
    end_byte: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Length of the byte range."""
        return self.end_byte - self.start_byte


@dataclass(frozen=True, slots=True)
class FileSpec:
    """A file of a pinned model: digests where the source knows them without reading the bytes."""

    path: str
    size_bytes: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """What an adapter does to one parameter of its base."""

    module: str
    """Path of the module in the adapter's own namespace, without ``base_model.model.``."""
    parameter: str
    """``weight`` or ``bias``."""
    kind: Literal["low_rank", "generic", "replace"]
    """Factors; anything else PEFT merges; or a full tensor that takes the base's place."""
    tensors: tuple[TensorSpec, ...]
    """The adapter's stored tensors it needs."""
    rank: int | None = None
    shape: tuple[int, ...] | None = None
    """Shape of the parameter it is made for, linear weights as (out, in); None where the stored tensors do not tell."""
    optional: bool = False
    """The base may lack the parameter, and then there is nothing to do."""
    target: str | None = None
    """The base's name for the parameter, where it is known to be another one."""

    def fits(self, shape: tuple[int, ...], *, transposed: bool) -> bool:
        """Whether a stored tensor of this shape can be the parameter."""
        if self.shape is None:
            return True
        return shape == (self.shape[::-1] if transposed and len(shape) == 2 else self.shape)

    @property
    def name(self) -> str:
        """The parameter's full name."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


@dataclass(frozen=True, slots=True)
class Quotes:
    """What may be quoted of a model's card; plain text, of bounded length."""

    limitations: tuple[str, ...] = ()
    """Its paragraphs about limitations; one that begins with ``- `` is an item of a list."""
    bibtex: str = ""
    """How it asks to be cited."""


@dataclass(frozen=True, slots=True)
class PinnedModel:
    """A model whose commit, files and tensor inventory are known; nothing but headers has been read."""

    role: Literal["base", "model"]
    name: str
    repo: str
    commit: str | None
    """The Hub commit; None for a local folder."""
    root: str | None
    """Folder of a local model; None for a Hub repo."""
    files: Mapping[str, FileSpec]
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    adapter: Mapping[str, Any] | None = None
    """``adapter_config.json`` of a PEFT adapter; None for a full checkpoint."""
    parts: tuple[AdapterPart, ...] = ()
    """What the adapter changes; empty for a full checkpoint."""
    card: Mapping[str, Any] = field(default_factory=dict)
    """Front matter of the model card."""
    quotes: Quotes = Quotes()
    """What its text says."""
    notices: Mapping[str, bytes] = field(default_factory=dict)
    """Contents of the licence and notice files at the top, by their path."""
    notes: tuple[str, ...] = ()
    """What a person should know about how the model was found."""
    header_sha256: str = ""
    """Digest over the safetensors headers: identifies a local folder's layout without reading its weights."""

    @property
    def is_local(self) -> bool:
        """Whether the model is a folder on this machine."""
        return self.root is not None


class ByteSource(Protocol):
    """Random access to the bytes of one file; safe to call from several threads."""

    size_bytes: int

    def read_into(self, start_byte: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``start_byte`` on, or raise SourceError; never a short read."""

    def close(self) -> None:
        """Release the file or connection."""


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts ``layers.2`` before ``layers.10``: the canonical order of tensors."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)
