"""HTML of the page's parts, by templates that escape whatever comes from repositories, visitors and errors."""

from __future__ import annotations

import datetime as dt
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hubmerge.errors import HubMergeError
from hubmerge.hub.translate import scrub
from hubmerge.markdown import clean
from hubmerge.quantities import size

_FOLDER = Path(__file__).parent / "templates"


@cache
def _environment() -> Environment:
    env = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    env.filters |= {"size": size, "moment": moment, "web": web_address}
    return env


def _finalize(value: Any) -> Any:
    """Text without what turns its direction or cannot be seen; None as nothing."""
    return clean(value, keep="\n\t") if type(value) is str else "" if value is None else value


def html(template: str, **values: Any) -> str:
    """A part of the page."""
    return _environment().get_template(f"{template}.html.jinja").render(values)


def plain(text: str) -> str:
    """Text for what gradio shows as text: on one line, without what cannot be seen."""
    return " ".join(clean(text).split())


def moment(seconds: float | None) -> str:
    """A time as people write it, in UTC."""
    if seconds is None:
        return ""
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%d %H:%M UTC")


def web_address(url: str) -> str:
    """An address that a link may lead to; empty if it is none."""
    return url if url.startswith(("https://", "http://")) else ""


def note(text: str, hint: str = "", *, kind: str = "note") -> str:
    """A message beside what it is about; ``kind`` is ``note``, ``done`` or ``problem``, and said in words too."""
    return html("note", text=text, hint=hint, kind=kind) if text else ""


def problem(error: HubMergeError, token: str = "") -> str:
    """An error as text: what is wrong, and what to do."""
    return note(scrub(error.message, token), scrub(error.hint, token), kind="problem")
