"""How a recipe names a model: a repo id with an optional revision, or a local folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hubmerge.recipe.nodes import show

_REPO = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[^\s~^:?*\[\]\\\x00-\x1f\x7f]{1,250}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_WINDOWS_DEVICES = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10))}
RESERVED_NAMES = ("base", "union")


class ModelRef(BaseModel):
    """A model on the Hub at a revision, or a folder on this machine.

    Written as ``org/name``, ``org/name@revision`` or a path that starts with ``./``, ``../``, ``/`` or ``~``; any other
    text is a folder if a folder of that name exists.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    repo: str = Field(min_length=1)
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return split_revision(data)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if problem := ref_problem(self.repo, self.revision):
            raise ValueError(problem)
        return self

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``org/name@revision`` or a path.

        Raises:
            pydantic.ValidationError: It is neither.
        """
        return cls.model_validate(text)

    @property
    def is_local(self) -> bool:
        """Whether this is a folder on this machine."""
        return looks_local(self.repo)

    @property
    def path(self) -> Path:
        """The folder of a local model."""
        return Path(self.repo).expanduser()

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def looks_local(text: str) -> bool:
    """Whether a model's name can only be a path."""
    return text in (".", "..") or text.startswith(("./", "../", "/", "~"))


def split_revision(data: Any) -> Any:
    """``repo`` and ``revision`` from text, or from a mapping whose ``repo`` holds both.

    Raises:
        ValueError: The revision is given twice, or is empty.
    """
    if isinstance(data, str):
        data = {"repo": data}
    if not isinstance(data, dict) or not isinstance(data.get("repo"), str):
        return data
    repo: str = data["repo"]
    if looks_local(repo):
        return data
    if _is_folder(repo):
        return {**data, "repo": f"./{repo}"}
    if "@" not in repo:
        return data
    repo, _, revision = repo.partition("@")
    if data.get("revision") is not None:
        raise ValueError(f"the revision is given twice: {revision!r} in repo and {data['revision']!r} as revision")
    if not revision:
        raise ValueError(f"no revision after the @ in {data['repo']!r}")
    return {**data, "repo": repo, "revision": revision}


def _is_folder(text: str) -> bool:
    try:
        return bool(text) and Path(text).is_dir()
    except (OSError, ValueError):  # too long for a path, or with a null character
        return False


def ref_problem(repo: str, revision: str | None) -> str | None:
    """What is wrong with a reference; None if nothing is."""
    if looks_local(repo):
        if not _expands(repo):
            return f"{show(repo)} cannot be a path"
        return "a local folder has no revision" if revision is not None else None
    if not _REPO.fullmatch(repo) or len(repo) > 96 or "--" in repo or ".." in repo or repo.endswith((".git", ".", "-")):
        return f"{show(repo)} is neither a repo id (org/name) nor a folder that exists; write ./ before a folder"
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision or revision.startswith("-")):
        return f"{show(revision)} cannot be a revision"
    return None


def default_name(repo: str) -> str:
    """The name of a model that was given none: the last part of its repo id or path."""
    if not looks_local(repo):
        return repo.rpartition("/")[2]
    return Path(repo).expanduser().resolve().name if _expands(repo) else repo


def _expands(path: str) -> bool:
    try:
        Path(path).expanduser()
    except RuntimeError:
        return False
    return "\0" not in path


def name_problem(name: str) -> str | None:
    """Why a model cannot have this name, which becomes a file name; None if it can."""
    if name.lower() in RESERVED_NAMES:
        return f"{name!r} means something else in a recipe; give the model another name:"
    if not _NAME.fullmatch(name) or name.endswith(".") or name.split(".")[0].lower() in _WINDOWS_DEVICES:
        return f"{show(name)} cannot be a file name on every system; give a name: of letters, digits, '.', '_' and '-'"
    return None
