"""The form as a Space: the files of its repository, from templates and a user's values, and their deployment."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hubmerge import __version__
from hubmerge.errors import UsageError
from hubmerge.hub import Hub
from hubmerge.hub.spaces import Deployed, Spaces
from hubmerge.templating import template_folder

SDK_VERSION = "6.31.0"
"""The gradio that the form is tested with; the Hub installs it by itself."""
PYTHON_VERSION = "3.11"
HARDWARE = "cpu-basic"
SCOPES = ("contribute-repos", "gated-repos", "jobs", "write-discussions")
"""What visitors are asked for: docs/space.md says why."""
MORE_SCOPES = ("read-repos", "write-repos")
EXPIRATION_MINUTES = 1440
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_WHEEL = re.compile(r"hubmerge-[\w.+!]+-py3-none-any\.whl", re.ASCII)
_EXTRA = re.compile(r"""\s*;\s*extra\s*==\s*['"]space['"]\s*""")
_FILES = ("README.md", "app.py", "requirements.txt")
_MAX_TITLE = 60


@dataclass(frozen=True, slots=True)
class Choices:
    """What a Space is made with.

    Raises:
        UsageError: A value that cannot be.
    """

    repo: str
    """``owner/name``."""
    title: str = "hubmerge"
    private: bool | None = None
    """None: as it is; a new one is private."""
    hardware: str | None = None
    wheel: Path | None = None
    """hubmerge itself; by default it comes from the package index, in this version."""
    scopes: tuple[str, ...] = ()
    """Further ones, of ``MORE_SCOPES``."""

    def __post_init__(self) -> None:
        if not _REPO.fullmatch(self.repo):
            raise UsageError(f"--to cannot be {self.repo[:100]!r}", hint="It is OWNER/NAME.")
        if not (0 < len(self.title) <= _MAX_TITLE and self.title.isprintable()):
            raise UsageError(f"--title cannot be {self.title[:100]!r}", hint=f"At most {_MAX_TITLE} characters.")
        if self.wheel is not None and not _WHEEL.fullmatch(self.wheel.name):
            raise UsageError(
                f"{self.wheel} is no wheel of hubmerge", hint="Build one in a checkout: pip wheel --no-deps ."
            )


def render(choices: Choices) -> dict[str, bytes]:
    """The Space's files, by path.

    Raises:
        UsageError: The wheel cannot be read.
    """
    environment = Environment(
        loader=FileSystemLoader(template_folder() / "space"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,  # noqa: S701 - no HTML
    )  # fmt: skip
    # A string of JSON is one of YAML and of Python, on one line, whatever is in it.
    environment.filters["quoted"] = json.dumps
    wheel = choices.wheel
    values = {
        "title": choices.title,
        "sdk_version": SDK_VERSION,
        "python_version": PYTHON_VERSION,
        "hardware": choices.hardware or HARDWARE,
        "scopes": (*SCOPES, *choices.scopes),
        "minutes": EXPIRATION_MINUTES,
        "version": __version__,
        "wheel": wheel.name if wheel else None,
        "requirements": requirements(wheel) if wheel else (f"hubmerge[space]=={__version__}",),
    }
    files = {name: environment.get_template(f"{name}.jinja").render(values).encode() for name in _FILES}
    return files | ({wheel.name: wheel.read_bytes()} if wheel else {})


def requirements(wheel: Path) -> Sequence[str]:
    """What a wheel of hubmerge needs to serve the form, in its own words.

    Raises:
        UsageError: It is none.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            found = message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    except (OSError, ValueError, zipfile.BadZipFile) as e:
        raise UsageError(f"{wheel} cannot be read: {e}", hint="Build one in a checkout: pip wheel --no-deps .") from e
    always = [line for line in found if "extra ==" not in line]
    form = [_EXTRA.sub("", line) for line in found if _EXTRA.search(line)]
    return sorted({*always, *form}, key=str.lower)


def deploy(choices: Choices, hub: Hub) -> Deployed:
    """Make the Space, or bring the one that is there up to date, with one commit.

    Raises:
        UsageError: The wheel cannot be read.
        AccessError, PublishError, TransportError: As ``Spaces.publish``.
    """
    return Spaces(hub).publish(
        choices.repo, render(choices), message=f"Deploy the web form of hubmerge {__version__}",
        private=choices.private, hardware=choices.hardware, stale=(".whl",),
    )  # fmt: skip


def next_steps(choices: Choices, deployed: Deployed) -> str:
    """What is left to do, in lines for a terminal."""
    plan = (
        "since July 2026 a Space with gradio needs a paid plan (PRO, Team or Enterprise), also on cpu-basic: "
        f"{deployed.url}/settings says whether it runs"
    )
    seen = ("only you see it: --public opens it to everybody",) if deployed.created and not choices.private else ()
    steps = (
        plan,
        "signing in needs nothing more: the Hub makes the OAuth application from the front matter of README.md",
        "limits are variables of the Space, such as HUBMERGE_SPACE_MAX_MEMORY=24GB: `hubmerge space serve --help`",
        *seen,
    )
    return "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))
