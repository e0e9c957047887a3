"""Pagination of listings by ``Link: rel="next"``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

from hubmerge.localhub.errors import bad_request
from hubmerge.localhub.http import Call

CURSOR = "cursor"


def start_of(call: Call) -> int:
    """Index of the first item of the page that the request asks for.

    Raises:
        HubError: 400 for a cursor this hub did not give out.
    """
    text = call.query.get(CURSOR, "0")
    if not text.isdigit():
        raise bad_request("Invalid cursor")
    return int(text)


def next_link(call: Call, start: int) -> dict[str, str]:
    """The header that points at the page starting with item ``start``."""
    url = f"{call.base_url}{call.path}?{call.request.url.include_query_params(**{CURSOR: start}).query}"
    return {"Link": f'<{url}>; rel="next"'}


def paged(call: Call, items: Sequence[Any], *, size: int | None = None) -> Response:
    """One page of ``items``."""
    start, size = start_of(call), size or call.core.config.page_size
    more = start + size < len(items)
    return JSONResponse(list(items[start : start + size]), headers=next_link(call, start + size) if more else None)
