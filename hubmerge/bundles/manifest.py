"""``hubmerge_bundle.json``: what a bundle holds, and all that is needed to decode it besides the base."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

import hubmerge
from hubmerge import align
from hubmerge.card import datasets_of, languages_of
from hubmerge.codec import Codec, CodecParams, Target, Task
from hubmerge.codecs import get_codec
from hubmerge.errors import HubMergeError, IntegrityError, UnknownMethodError, UsageError
from hubmerge.licenses import Declaration, declared, files_of, license_of, silence
from hubmerge.lock import OutputDigest, Sha256, SourceFile, explain, is_inside, parsed
from hubmerge.recipe.refs import name_problem
from hubmerge.recipe.schema import Card, Globs
from hubmerge.spec import Kind, PinnedModel

MANIFEST_NAME = "hubmerge_bundle.json"
FORMAT_VERSION: Literal[1] = 1
_STRICT = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
_Count = Annotated[int, Field(ge=0)]
_Shape = Annotated[tuple[_Count, ...], Field(strict=False)]
_Texts = Annotated[tuple[str, ...], Field(strict=False)]


class Origin(BaseModel):
    """Where a model was: a Hub repository at a commit, or a local folder, of which only the name is recorded."""

    model_config = _STRICT

    name: str = Field(min_length=1)
    repo: str | None = None
    commit: str | None = Field(None, pattern=r"^[0-9a-f]{7,64}$")
    header_sha256: Sha256
    """Digest over its safetensors headers: the same names, types, shapes and offsets."""
    files: Annotated[tuple[SourceFile, ...], Field(strict=False)] = ()
    """Its weight files; digests as far as they were known without reading the bytes, and of a local folder's all."""
    license: dict[str, str | list[str]] = {}
    """Its licence, by its card and its licence files: ``license``, ``license_name``, ``license_link``."""
    license_files: _Texts = ()
    """Its licence and notice files."""
    languages: _Texts = ()
    """What its card names …"""
    datasets: _Texts = ()
    """… likewise."""
    limitations: _Texts = ()
    """What its card says about its limitations: plain paragraphs."""
    bibtex: str = ""
    """How its card says that it is cited."""

    @classmethod
    def of(cls, model: PinnedModel) -> Self:
        """Of a pinned model."""
        place: dict[str, Any] = {} if model.is_local else {"repo": model.repo, "commit": model.commit}
        found = [model.files[path] for path in sorted({t.file for t in model.tensors.values()})]
        files = [SourceFile(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256, git_sha1=f.git_sha1) for f in found]
        terms = license_of(model)
        return cls(
            name=model.name,
            header_sha256=model.header_sha256,
            files=tuple(files),
            license=terms.front_matter() if terms is not None else {},
            license_files=tuple(sorted(model.notices)),
            languages=tuple(languages_of([model.card])),
            datasets=tuple(datasets_of([model.card])),
            limitations=model.quotes.limitations,
            bibtex=model.quotes.bibtex,
            **place,
        )

    @property
    def label(self) -> str:
        """How to call it in a message."""
        return f"{self.repo}@{(self.commit or '')[:12]}" if self.repo else f"the local folder {self.name!r}"

    @property
    def declaration(self) -> Declaration:
        """What it declares about its licence; in a sentence, a local folder has only its name."""
        local = "the local base" if self.name == "base" else f"the local model {self.name}"
        place = files_of(self.repo, self.commit)
        why = silence(self.license, self.license_files)
        return Declaration(self.repo or local, declared(self.license), place, why, self.license_files)

    @property
    def size_bytes(self) -> int:
        """Of its weight files."""
        return sum(f.size_bytes for f in self.files)


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
    name: str
    source: Origin
    """The model that was added."""
    adapter: bool = False
    """Whether that was an adapter."""
    settings: dict[str, Any] = {}
    """Parameters of the codec that held for this task alone."""
    prefix: str = ""
    """How its names become the base's: ``-bert.`` takes that away from their beginning, ``+model.`` adds it there."""
    names: dict[str, str] = {}
    """Its own names, by the base's, where the prefix does not tell them."""
    absent: _Texts = ()
    """Tensors of the base that it does not have."""
    config: bool = False
    """Whether its own ``config.json`` is kept."""
    files: dict[str, Sha256 | None] = {}
    """The other small files that belong to it, such as a tokenizer's: with the digest of what is kept for it, or None
    where the base's own is meant."""
    ranks: dict[str, _Count] = {}
    """Of deltas that were kept as factors, by tensor."""
    modules: dict[str, str] = {}
    """Of an adapter: its own name for the module, by tensor, where that is not the tensor's without ``.weight``."""
    facts: dict[str, float] = {}
    """Numbers that decoding needs."""
    norm: float = Field(ge=0)
    """Frobenius norm of its deltas."""
    error: float | None = Field(None, ge=0)
    """Frobenius norm of the error that theory expects at scale 1; None where there is no theory."""

    @field_validator("name")
    @classmethod
    def _is_a_file_name(cls, name: str) -> str:
        if problem := name_problem(name):
            raise ValueError(problem)
        return name

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, str | None]) -> dict[str, str | None]:
        for path in files:
            is_inside(path)
        return files

    def own_name(self, name: str) -> str:
        """What a tensor of the base is called in the task's own checkpoint."""
        return self.names.get(name) or own_name(self.prefix, name)

    @property
    def relative_error(self) -> float | None:
        """The expected error as a fraction of the deltas' norm; None where either is unknown or 0."""
        return self.error / self.norm if self.error is not None and self.norm > 0 else None

    @property
    def head_path(self) -> str:
        """The file with what only this task has, if it has something."""
        return f"heads/{self.name}.safetensors"

    @property
    def config_path(self) -> str:
        """Its own ``config.json``."""
        return f"heads/{self.name}.config.json"

    @property
    def adapter_config_path(self) -> str:
        """Its own ``adapter_config.json``, if it was an adapter."""
        return f"heads/{self.name}.adapter_config.json"

    def file_path(self, path: str) -> str:
        """Where one of ``files`` that is kept for it lies."""
        return f"heads/{self.name}/{path}"

    @property
    def parts_path(self) -> str:
        """The file with its private parts, if the codec keeps any."""
        return f"tasks/{self.id}.safetensors"

    @property
    def small_paths(self) -> tuple[str, ...]:
        """All small files that are kept for it."""
        own = [self.file_path(path) for path, sha256 in self.files.items() if sha256 is not None]
        return (
            *([self.config_path] if self.config else []),
            *([self.adapter_config_path] if self.adapter else []),
            *own,
        )


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
    include: Globs = ("*",)
    """As in the recipe, which also holds for tasks that are added: which tensors take part …"""
    exclude: Globs = ()
    """… and which of these do not."""
    heads: Literal["keep", "drop"] = "keep"
    """As in the recipe: whether tensors that only one task has are kept."""
    shard_size: int = Field(5_000_000_000, ge=1)
    """Largest size of a file of shared parts, in bytes."""
    card: Card = Card()
    """What the recipe's author says about the bundle."""
    files: Annotated[tuple[OutputDigest, ...], Field(strict=False)]
    """All weight files, by path."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for what, found in (
            ("task", [t.name.lower() for t in self.tasks]),
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

    @property
    def size_bytes(self) -> int:
        """Of all weight files."""
        return sum(f.size_bytes for f in self.files)

    @property
    def plain_bytes(self) -> int:
        """What the tasks' own weight files take."""
        return sum(t.source.size_bytes for t in self.tasks)

    def own_bytes(self, task: TaskEntry) -> int:
        """What the bundle's weight files hold for this task alone."""
        return sum(f.size_bytes for f in self.files if f.path in (task.parts_path, task.head_path))

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

    def codec_of(self, where: str = MANIFEST_NAME) -> tuple[Codec, CodecParams]:
        """The codec and its parameters; messages call the manifest ``where``.

        Raises:
            HubMergeError: This version does not know the codec.
            IntegrityError: The parameters are not the codec's.
        """
        try:
            codec = get_codec(self.codec)
        except UnknownMethodError as e:
            raise HubMergeError(
                f"{where}: the codec {self.codec!r} is not known to hubmerge {hubmerge.__version__}",
                hint=f"it was made by hubmerge {self.hubmerge_version}; install that version or a newer one",
            ) from e
        try:
            params = codec.parameters.model_validate_json(json.dumps(self.parameters), strict=True)
        except ValidationError as e:
            raise IntegrityError(
                f"{where}: parameters: {explain(e)}", hint="restore the file from the repository"
            ) from e
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
    return parsed(Manifest, text, where, "bundle", FORMAT_VERSION)


def own_name(prefix: str, name: str) -> str:
    """What a tensor of the base is called by a model whose names become the base's by this prefix."""
    if not prefix:
        return name
    return align.rename(name, ("+" if prefix.startswith("-") else "-") + prefix[1:])
