"""``hubmerge_bundle.json``: what a bundle holds, and all that is needed to decode it besides the base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

import hubmerge
from hubmerge.codec import Codec, CodecParams, Target, Task
from hubmerge.codecs import get_codec
from hubmerge.errors import HubMergeError, IntegrityError, UnknownMethodError, UsageError
from hubmerge.lock import Sha256, explain, is_inside
from hubmerge.spec import Kind, PinnedModel

MANIFEST_NAME = "hubmerge_bundle.json"
FORMAT_VERSION: Literal[1] = 1
_STRICT = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)
_Shape = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]


class Origin(BaseModel):
    """Where a model was: a Hub repository at a commit, or a local folder, of which only the name is recorded."""

    model_config = _STRICT

    name: str = Field(min_length=1)
    repo: str | None = None
    commit: str | None = Field(None, pattern=r"^[0-9a-f]{7,64}$")
    header_sha256: Sha256
    """Digest over its safetensors headers: the same names, types, shapes and offsets."""

    @classmethod
    def of(cls, model: PinnedModel) -> Self:
        """Of a pinned model."""
        place: dict[str, Any] = {} if model.is_local else {"repo": model.repo, "commit": model.commit}
        return cls(name=model.name, header_sha256=model.header_sha256, **place)

    @property
    def label(self) -> str:
        """How to call it in a message."""
        return f"{self.repo}@{(self.commit or '')[:12]}" if self.repo else f"the local folder {self.name!r}"


class TargetEntry(BaseModel):
    """A tensor of the base that the bundle covers."""

    model_config = _STRICT

    name: str
    shape: _Shape
    kind: Kind
    transposed: bool = False
    plain: bool = False

    def target(self) -> Target:
        """As codecs know it."""
        return Target(self.name, self.shape, self.kind, self.transposed, self.plain)

    @classmethod
    def of(cls, target: Target) -> Self:
        """From what codecs know."""
        return cls(
            name=target.name,
            shape=target.shape,
            kind=target.kind,
            transposed=target.transposed,
            plain=target.plain,
        )


class TaskEntry(BaseModel):
    """A task of the bundle."""

    model_config = _STRICT

    id: int = Field(ge=0)
    """Never given again, even when the task is removed."""
    name: str = Field(min_length=1)
    source: Origin
    """The model that was added."""
    adapter: bool = False
    """Whether that was an adapter."""
    prefix: str = ""
    """What stands before the base's names in the model's own: ``+bert.``; or what is missing there: ``-model.``."""
    config: bool = False
    """Whether its own ``config.json`` is kept."""
    absent: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Tensors of the base that the model does not have."""
    ranks: dict[str, int] = {}
    """Of deltas that were kept as factors, by tensor."""
    modules: dict[str, str] = {}
    """Of an adapter: its own name for the module, by tensor, where that is not the tensor's without ``.weight``."""
    facts: dict[str, float] = {}
    """Numbers that decoding needs."""
    norm: float = Field(ge=0)
    """Frobenius norm of its deltas."""
    error: float | None = Field(None, ge=0)
    """Frobenius norm of the error that theory expects at scale 1; None where there is no theory."""

    @property
    def head_path(self) -> str:
        """The file with what only this task has, if it has something."""
        return f"heads/{self.name}.safetensors"

    @property
    def config_path(self) -> str:
        """Its own ``config.json``."""
        return f"heads/{self.name}.config.json"

    @property
    def parts_path(self) -> str:
        """The file with its private parts, if the codec keeps any."""
        return f"tasks/{self.id}.safetensors"


class FileEntry(BaseModel):
    """A weight file of the bundle."""

    model_config = _STRICT

    path: str
    size_bytes: int = Field(ge=0)
    sha256: Sha256

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        return is_inside(path)


class Manifest(BaseModel):
    """The contents of ``hubmerge_bundle.json``."""

    model_config = _STRICT

    format_version: Literal[1]
    hubmerge_version: str
    codec: str
    parameters: dict[str, Any]
    """The codec's, with all defaults and what was fixed when the bundle was created."""
    seed: int = Field(ge=0, lt=2**64)
    base: Origin
    targets: Annotated[tuple[TargetEntry, ...], Field(strict=False)]
    """In canonical order."""
    tasks: Annotated[tuple[TaskEntry, ...], Field(strict=False)]
    """In the order they were added."""
    next_id: int = Field(ge=0)
    factors: bool = False
    """Whether targets are the balanced factors of adapters' deltas (``.up`` and ``.down``), and not tensors of the
    base; each task is then an adapter."""
    files: Annotated[tuple[FileEntry, ...], Field(strict=False)]
    """All weight files, by path."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for what, found in (
            ("task", [t.name for t in self.tasks]),
            ("task id", [t.id for t in self.tasks]),
            ("target", [t.name for t in self.targets]),
            ("file", [f.path for f in self.files]),
        ):
            if len(set(found)) < len(found):
                twice = next(x for i, x in enumerate(found) if x in found[:i])
                raise ValueError(f"{what} {twice!r} is there twice")
        if any(t.id >= self.next_id for t in self.tasks):
            raise ValueError(f"next_id {self.next_id} is not above every task's id")
        return self

    def task(self, name: str) -> TaskEntry:
        """The task of that name.

        Raises:
            UsageError: There is none.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        known = ", ".join(t.name for t in self.tasks) or "none"
        raise UsageError(f"the bundle has no task {name!r}", hint=f"its tasks: {known}")

    def codec_of(self) -> tuple[Codec, CodecParams]:
        """The codec and its parameters.

        Raises:
            HubMergeError: This version does not know the codec.
            IntegrityError: The parameters are not the codec's.
        """
        try:
            codec = get_codec(self.codec)
        except UnknownMethodError as e:
            raise HubMergeError(
                f"{MANIFEST_NAME}: the codec {self.codec!r} is not known to hubmerge {hubmerge.__version__}",
                hint=f"it was made by hubmerge {self.hubmerge_version}; install that version or a newer one",
            ) from e
        try:
            params = codec.parameters.model_validate_json(json.dumps(self.parameters), strict=True)
        except ValidationError as e:
            raise IntegrityError(f"{MANIFEST_NAME}: parameters: {explain(e)}", hint="restore the file") from e
        assert isinstance(params, CodecParams)
        return codec, params

    def identity(self, task: TaskEntry) -> Task:
        """The task as random bits know it."""
        return Task(task.id, self.seed)

    def dumps(self) -> str:
        """As text: JSON, with a newline at the end."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        return json.dumps({"format_version": FORMAT_VERSION, **data}, indent=1, allow_nan=False) + "\n"


def loads(text: str | bytes, where: str = MANIFEST_NAME) -> Manifest:
    """Read a manifest.

    Args:
        text: Its contents.
        where: What messages call it.

    Raises:
        IntegrityError: It is none; the message names the key.
        HubMergeError: It has a newer format than this version of hubmerge reads.
    """
    hint = "restore the file from the repository"
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise IntegrityError(f"{where}: not valid JSON: {str(e)[:200]}", hint=hint) from e
    version = data.get("format_version") if isinstance(data, Mapping) else None
    if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT_VERSION:
        raise HubMergeError(
            f"{where}: bundle format {version}; hubmerge {hubmerge.__version__} reads format {FORMAT_VERSION}",
            hint="install a newer hubmerge",
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as e:
        raise IntegrityError(f"{where}: {explain(e)}", hint=hint) from e
