"""What a workflow asks of one step: read from its environment, where text is only text, and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from hubmerge.errors import UsageError

Mode = Literal["plan", "merge", "push"]
PREFIX = "HUBMERGE_INPUT_"
"""Of the variables in which ``action.yml`` hands its inputs on."""
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REPO = re.compile(f"{_NAME}/{_NAME}")
_USER = re.compile(_NAME)
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of one step."""

    recipe: str
    """Path of a recipe, from the folder the step runs in."""
    mode: Mode
    repo: str | None = None
    """Repository to publish to: namespace/name."""
    create_pr: bool = False
    private: bool = False
    flags: tuple[str, ...] = ()
    """Further arguments of hubmerge, one to a line."""
    expected_plan: str | None = None
    """SHA-256 of the plan that somebody has approved; another one is not run."""
    read_as: str | None = None
    """User whose gated repositories may be read, by the job's identity."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Inputs:
        """The inputs that an environment holds; what is not there, or empty, has its default.

        Raises:
            UsageError: A value that cannot be meant.
        """

        def text(name: str) -> str:
            return environment.get(PREFIX + name, "").strip()

        mode = text("MODE") or "plan"
        if mode not in get_args(Mode):
            raise _refused("mode", mode, f"it is one of {', '.join(get_args(Mode))}")
        if not text("RECIPE"):
            raise UsageError("the input recipe is empty", hint="name a recipe file of the repository")
        inputs = cls(
            recipe=text("RECIPE"),
            mode=mode,  # type: ignore[arg-type]
            repo=_matching("repo_id", text("REPO_ID"), _REPO, "it is namespace/name"),
            create_pr=_flag("create_pr", text("CREATE_PR")),
            private=_flag("private", text("PRIVATE")),
            flags=tuple(line.strip() for line in text("FLAGS").splitlines() if line.strip()),
            expected_plan=_matching("plan", text("PLAN"), _DIGEST, "it is the output `plan` of a step in mode plan"),
            read_as=_matching("read_as", text("READ_AS"), _USER, "it is the name of a user of the Hub"),
        )
        if mode == "push" and inputs.repo is None:
            raise UsageError("the input repo_id is empty", hint="mode push publishes to it: give namespace/name")
        return inputs


def _flag(name: str, text: str) -> bool:
    if text.lower() not in ("", "true", "false"):
        raise _refused(name, text, "it is true or false")
    return text.lower() == "true"


def _matching(name: str, text: str, pattern: re.Pattern[str], hint: str) -> str | None:
    if text and not pattern.fullmatch(text):
        raise _refused(name, text, hint)
    return text or None


def _refused(name: str, text: str, hint: str) -> UsageError:
    shown = text if len(text) <= 100 else text[:99] + "…"
    return UsageError(f"the input {name} cannot be {shown!r}", hint=hint)
