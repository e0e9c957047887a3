"""Workflows as files: one template, filled with a user's values such that no value can be more than text."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import FileSystemLoader, StrictUndefined
from jinja2.sandbox import SandboxedEnvironment

from hubmerge import __version__
from hubmerge.errors import UsageError

ACTION = "hubmerge/hubmerge"
"""Where this project's action lives on GitHub."""
_TEMPLATES = Path(__file__).parent / "templates"
_TEMPLATE = "merge.yml.jinja"
_FOLDER = Path(".github/workflows")
_OWN = "./"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_ACTION = re.compile(rf"{_NAME}/{_NAME}(?:/[A-Za-z0-9._/-]+)?@[A-Za-z0-9][A-Za-z0-9._/-]*")
_COMMIT = re.compile(r".*@[0-9a-f]{40}")
_VALUES = {
    "repo": (re.compile(f"{_NAME}/{_NAME}"), "it is namespace/name"),
    "read_as": (re.compile(_NAME), "it is the name of a user of the Hub"),
    "environment": (re.compile(r"[\w .-]{1,255}"), "letters, digits, spaces, dots, dashes and underscores"),
    "recipe": (re.compile(r".{1,1000}"), "it is the path of a file of the repository"),
}


@dataclass(frozen=True, slots=True)
class Choices:
    """What a workflow is made for.

    Raises:
        UsageError: A value that cannot be meant, or that GitHub would evaluate.
    """

    action: str
    """``OWNER/REPO@REF``; or ``./``, the action of the repository that has the workflow."""
    recipe: str = "merge.yaml"
    repo: str | None = None
    environment: str = "hubmerge"
    read_as: str | None = None
    reusable: bool = False

    def __post_init__(self) -> None:
        for name, (pattern, hint) in _VALUES.items():
            value = getattr(self, name)
            if value is not None and not (pattern.fullmatch(value) and value.isprintable() and "${{" not in value):
                raise UsageError(f"--{name.replace('_', '-')} cannot be {value[:100]!r}", hint=hint)
        if self.action != _OWN and not _ACTION.fullmatch(self.action):
            raise UsageError(f"--action cannot be {self.action[:100]!r}", hint="it is OWNER/REPO@REF")

    def next_steps(self) -> str:
        """What is left to do, in lines for a terminal."""
        pin = () if self.action == _OWN or _COMMIT.fullmatch(self.action) else (
            f"pin the action: write the commit of {self.action.partition('@')[2]} in its place, the name as a comment",
        )  # fmt: skip
        target = self.repo or "the repository to publish to"
        steps = (
            f"on GitHub: make the environment {self.environment!r} and give it required reviewers",
            f"on the Hub: create {target}, and add this repository, branch and workflow to its Trusted Publishers",
            *pin,
            "commit the file; the form is under Actions",
        )
        return "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))


def used_action(given: str | None) -> str:
    """The action that a workflow uses: the one given, or this project's, of this version."""
    return given or f"{ACTION}@v{__version__}"


def default_path(*, reusable: bool) -> Path:
    """Where the workflow belongs in a repository."""
    return _FOLDER / ("merge-call.yml" if reusable else "merge.yml")


def render(choices: Choices) -> str:
    """The workflow."""
    environment = SandboxedEnvironment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        # GitHub's own braces stay as they are.
        variable_start_string="[[", variable_end_string="]]", block_start_string="[%", block_end_string="%]",
        comment_start_string="[#", comment_end_string="#]",
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    # A string of JSON is one of YAML, on one line, whatever is in it.
    environment.filters["yaml"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.get_template(_TEMPLATE).render(**asdict(choices), own=choices.action == _OWN)


def check_writable(path: Path, *, overwrite: bool) -> None:
    """Refuse to replace a file that somebody may have changed.

    Raises:
        UsageError: There is one, and it may not be replaced.
    """
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists", hint="give --overwrite to replace it, or another --out")
