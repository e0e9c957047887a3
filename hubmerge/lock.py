"""``hubmerge.lock.json``: what went into a published model and what came out, with digests."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NoReturn, Protocol, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

import hubmerge
from hubmerge.errors import HubMergeError, IntegrityError
from hubmerge.methods import get_method
from hubmerge.spec import AdapterPart, PinnedModel, Plan, TensorSpec

LOCK_NAME = "hubmerge.lock.json"
FORMAT_VERSION: Literal[1] = 1
_PACKAGES = ("numpy", "peft", "safetensors", "torch", "transformers")
_STRICT = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)
_UNSAFE = re.compile(r"[\\:\x00-\x1f\x7f]")

M = TypeVar("M", bound=BaseModel)
Numerics = Literal["exact", "tolerance"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Sha1 = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class Digested(Protocol):
    """A finished file: where it lies in the result, how long it is and the digest of its bytes."""

    @property
    def path(self) -> str:
        """Path in the result, with forward slashes."""

    @property
    def size_bytes(self) -> int:
        """Its length."""

    @property
    def sha256(self) -> str | None:
        """Its digest; it must be known."""


def is_inside(path: str) -> str:
    """The path of a file in a repository, if it is one: a stranger's must never point out of the folder.

    Raises:
        ValueError: It does.
    """
    if path.startswith("/") or _UNSAFE.search(path) or {"", ".", ".."} & set(path.split("/")):
        raise ValueError(f"{path!r} does not stay inside the model's folder")
    return path


class _File(BaseModel):
    model_config = _STRICT

    path: str = Field(min_length=1, max_length=1024)
    """Path inside the model, with forward slashes."""
    size_bytes: int = Field(ge=0)

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        return is_inside(path)


class SourceFile(_File):
    """A file of an input; digests as far as its source knows them without reading the bytes."""

    sha256: Sha256 | None = None
    git_sha1: Sha1 | None = None
    """Git blob id of a file that is not in large-file storage."""


class OutputDigest(_File):
    """A file of the result."""

    sha256: Sha256


class Source(BaseModel):
    """An input model: a Hub repository at a commit, or a local folder, of which only the name is recorded."""

    model_config = _STRICT

    role: Literal["base", "model"]
    name: str = Field(min_length=1)
    repo: str | None = None
    commit: str | None = Field(None, pattern=r"^[0-9a-f]{7,64}$")
    local: bool = False
    header_sha256: Sha256 | None = None
    """Digest over the safetensors headers: names, types, shapes and offsets of its tensors."""
    files: Annotated[tuple[SourceFile, ...], Field(strict=False)]
    """The files the merge uses."""

    @model_validator(mode="after")
    def _hub_or_local(self) -> Self:
        if self.local == (self.repo is not None) or self.local == (self.commit is not None):
            raise ValueError("a source has either a repo and its commit, or local: true")
        return self


class LicenseCheck(BaseModel):
    """What the check of the parents' licences said when the result was made; no legal advice."""

    model_config = _STRICT

    verdict: Literal["allowed", "unknown", "blocked"]
    license: str | None = None
    """What the card states."""
    reasons: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Why the verdict is not ``allowed``."""
    accepted_risk: bool = False
    """Whether it was published although the verdict was ``blocked``."""


class Lock(BaseModel):
    """The contents of ``hubmerge.lock.json``.

    The same inputs give the same lock: it holds no clock, host name, path or token.
    """

    model_config = _STRICT

    format_version: Literal[1]
    hubmerge_version: str
    recipe: dict[str, Any]
    """The normalised recipe; a local folder stands in it as ``./NAME``."""
    sources: Annotated[tuple[Source, ...], Field(strict=False, min_length=1)]
    """The base, then the models in the recipe's order."""
    plan_sha256: Sha256
    outputs: Annotated[tuple[OutputDigest, ...], Field(strict=False, min_length=1)]
    """Every published file, the card too, but for the lock itself; sorted by path."""
    numerics: Numerics
    """exact: the same bits on any machine; tolerance: matrix decompositions, which differ in the last bits."""
    seed: int = Field(ge=0, lt=2**64)
    environment: dict[str, str]
    """Versions that may matter for the result."""
    license: LicenseCheck | None = None

    @field_validator("outputs")
    @classmethod
    def _each_once(cls, outputs: tuple[OutputDigest, ...]) -> tuple[OutputDigest, ...]:
        seen: set[str] = set()
        for file in outputs:
            if file.path in seen:
                raise ValueError(f"{file.path!r} is listed twice")
            if file.path == LOCK_NAME:
                raise ValueError("a lock cannot list itself")
            seen.add(file.path)
        return outputs


# --- building ---------------------------------------------------------------------------------------------------


def build_lock(
    plan: Plan,
    recipe_data: Mapping[str, Any],
    outputs: Iterable[Digested],
    license_check: Mapping[str, Any] | None = None,
) -> Lock:
    """The lock of a finished run.

    Args:
        plan: What was run.
        recipe_data: The normalised recipe.
        outputs: Every published file with its digest; the lock itself may be among them and is left out.
        license_check: What the check of the parents' licences said, by the names of ``LicenseCheck``.

    Raises:
        HubMergeError: A file has no digest, an unsafe path, or is there twice.
    """
    files = sorted((f for f in outputs if f.path != LOCK_NAME), key=lambda f: f.path)
    try:
        return Lock.model_validate(
            {
                "format_version": FORMAT_VERSION,
                "hubmerge_version": hubmerge.__version__,
                "recipe": portable_recipe(plan, recipe_data),
                "sources": [_source(plan, i) for i in range(-1, len(plan.models))],
                "plan_sha256": plan.digest,
                "outputs": [{"path": f.path, "size_bytes": f.size_bytes, "sha256": f.sha256} for f in files],
                "numerics": numerics_of(plan),
                "seed": plan.seed,
                "environment": environment(),
                "license": None if license_check is None else dict(license_check),
            }
        )
    except ValidationError as e:
        raise HubMergeError(f"the lock cannot be written: {explain(e)}") from e


def portable_recipe(plan: Plan, recipe_data: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without paths of this machine: a local folder becomes ``./NAME`` (``./base`` for the base).

    It stays a valid recipe, for whoever puts those folders beside it.
    """
    data: dict[str, Any] = json.loads(json.dumps(recipe_data, allow_nan=False))
    if plan.base.is_local and data.get("base") is not None:
        data["base"] = f"./{plan.base.name}"
    for entry, model in zip(data["models"], plan.models, strict=True):
        if model.is_local:
            entry["repo"] = f"./{model.name}"
    return data


def numerics_of(plan: Plan) -> Numerics:
    """Whether every method the plan uses gives the same bits on any machine."""
    rows = [(j.method, j.settings.params) for j in plan.jobs if j.method and j.settings is not None]
    return "exact" if all(get_method(name).exact(p) for name, p in [(plan.method, plan.params), *rows]) else "tolerance"


def environment() -> dict[str, str]:
    """Versions of Python and of the packages that take part in a merge."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _source(plan: Plan, index: int) -> Source:
    model = plan.pinned(index)
    used = {"config.json", "adapter_config.json", "README.md"} | _weight_files(model)
    used |= {f.path for f in plan.files if f.source == index}
    files = [model.files[p] for p in sorted(used) if p in model.files]
    return Source(
        role=model.role,
        name=model.name,
        repo=None if model.is_local else model.repo,
        commit=model.commit,
        local=model.is_local,
        header_sha256=model.header_sha256 or None,
        files=tuple(
            SourceFile(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256, git_sha1=f.git_sha1) for f in files
        ),
    )


def _weight_files(model: PinnedModel) -> set[str]:
    specs: list[TensorSpec] = [*model.tensors.values()]
    part: AdapterPart
    for part in model.parts:
        specs += part.tensors
    return {s.file for s in specs}


# --- text -------------------------------------------------------------------------------------------------------


def dumps(lock: Lock) -> str:
    """The lock as text: JSON with sorted keys, two spaces of indentation and a newline at the end."""
    data = lock.model_dump(mode="json")
    _drop_unknown(data)
    _drop_unknown(data.get("license", {}))
    for source in data["sources"]:
        _drop_unknown(source)
        for file in source["files"]:
            _drop_unknown(file)
    return json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _drop_unknown(data: dict[str, Any]) -> None:
    for key in [k for k, v in data.items() if v is None]:
        del data[key]


def loads(text: str | bytes, where: str = LOCK_NAME) -> Lock:
    """Read a lock.

    Args:
        text: Its contents.
        where: What messages call it.

    Raises:
        IntegrityError: It is not a lock; the message names the key.
        HubMergeError: It has a newer format than this version of hubmerge reads.
    """
    return parsed(Lock, text, where, "lock", FORMAT_VERSION)


def parsed(kind: type[M], text: str | bytes, where: str, what: str, newest: int) -> M:
    """One of the JSON files that hubmerge writes: an object without repeated keys, of a format this version reads.

    Args:
        kind: What it is read as.
        text: Its contents.
        where: What messages call the file.
        what: What messages call its kind.
        newest: The newest format that is known.

    Raises:
        IntegrityError: It is damaged; the message names the key.
        HubMergeError: It has a newer format.
    """
    hint = "restore the file from the repository"
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise IntegrityError(f"{where}: not valid JSON: {str(e)[:200]}", hint=hint) from e
    if not isinstance(data, dict):
        raise IntegrityError(f"{where}: not a JSON object", hint=hint)
    version = data.get("format_version")
    if isinstance(version, int) and not isinstance(version, bool) and version > newest:
        raise HubMergeError(
            f"{where}: {what} format {version}; hubmerge {hubmerge.__version__} reads format {newest}",
            hint="install a newer hubmerge",
        )
    try:
        return kind.model_validate(data)
    except ValidationError as e:
        raise IntegrityError(f"{where}: {explain(e)}", hint=hint) from e


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(k for i, (k, _) in enumerate(pairs) if k in (p for p, _ in pairs[:i]))
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def explain(error: ValidationError) -> str:
    """The first thing that is wrong, with its place, such as ``outputs[2].sha256``."""
    issues = error.errors(include_url=False, include_input=False)
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in issues[0]["loc"]).lstrip(".")
    message = {
        "missing": "is missing",
        "extra_forbidden": "unknown key",
    }.get(issues[0]["type"], issues[0]["msg"].removeprefix("Value error, "))
    more = f" (and {len(issues) - 1} more)" if len(issues) > 1 else ""
    return f"{place[:200]}: {message}{more}" if place else f"{message}{more}"


def schema_text() -> str:
    """The JSON schema of the format, as ``docs/lock.schema.json`` holds it."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Lock.model_json_schema(),
        "title": LOCK_NAME,
    }
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"
