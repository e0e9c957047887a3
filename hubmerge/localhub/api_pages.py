"""Pages for people: what a repository's address shows in a browser."""

from __future__ import annotations

from html import escape
from urllib.parse import quote

from markdown_it import MarkdownIt
from starlette.responses import HTMLResponse, Response

from hubmerge.localhub import cards
from hubmerge.localhub.history import DEFAULT_BRANCH
from hubmerge.localhub.http import Call

_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")
"""Cards come from anybody: their HTML is shown as text, and the library lets no script into an address."""
_POLICY = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; base-uri 'self'"
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{name}</title>
<base href="{files}/">
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }}
main {{ overflow-wrap: anywhere; }}
pre, table {{ display: block; overflow-x: auto; }}
th, td {{ padding: 0 1rem 0 0; text-align: left; overflow-wrap: normal; }}
img {{ max-width: 100%; background: white; }}
</style>
</head>
<body>
<header><strong>{name}</strong>, commit <code>{commit}</code></header>
<main>{card}</main>
<footer><h2>Files</h2><ul>{listing}</ul></footer>
</body>
</html>
"""


def repository(call: Call) -> Response:
    """``GET /{repo}``: the card of the main branch, and links to its files; of what strangers may see."""
    core = call.core
    repo = core.repos.readable(call.kind, call.params["repo"], call.identity)
    commit = core.history.resolve(repo, DEFAULT_BRANCH)
    card = _MARKDOWN.render(cards.body(core.text(repo, commit, "README.md") or ""))
    entries = core.history.snapshot(repo, commit).values()
    listing = "".join(
        f'<li><a href="{quote(e.path)}">{escape(e.path)}</a>, {e.size_bytes:,} bytes</li>'
        for e in sorted(entries, key=lambda e: e.path)
    )
    page = _PAGE.format(
        name=escape(call.params["repo"]), commit=commit[:12], card=card, listing=listing,
        files=escape(f"{call.path}/resolve/{DEFAULT_BRANCH}"),
    )  # fmt: skip
    return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})
