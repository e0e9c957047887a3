"""Small pages of text, for what happens outside of the form: signing in and out, and what goes wrong there."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse

from hubmerge.templating import template_folder


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(template_folder() / "space"), undefined=StrictUndefined, autoescape=True,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip


def notice(
    title: str, text: str, *, status: int = 200, link: str = "/", name: str = "", post: bool = False
) -> HTMLResponse:
    """A page.

    Args:
        title: Its heading.
        text: A sentence or two; any characters.
        status: Of HTTP.
        link: A path on this server, and …
        name: … what it is called.
        post: Whether that is done by a button instead of a link, since it changes something.
    """
    page = _environment().get_template("notice.html.jinja")
    values = {"title": title, "text": text, "link": link, "name": name or "Back to the form", "post": post}
    return HTMLResponse(page.render(values), status, {"cache-control": "no-store"})
