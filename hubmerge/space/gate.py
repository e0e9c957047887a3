"""What every request passes first: where it comes from, how large it is, and what browsers may do with the answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response

from hubmerge.space.sessions import Site

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BODY_BYTES = 1_000_000
"""Of a request; the longest recipe takes a tenth of it."""
BODY_TIMEOUT_S = 30.0
"""Between two pieces of a request's body."""
_SAFE = ("GET", "HEAD")
_UNUSED = tuple(
    f"/gradio_api/{name}" for name in ("upload", "proxy=", "stream", "deep_link", "run-history", "component_server")
)
"""What gradio offers and the page has no use for: files from visitors, and requests to other hosts."""
_CONTENT = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors {}"
)
"""Nothing is fetched from elsewhere, whatever a model's card names. gradio needs the two exceptions for scripts."""


class Gate:
    """An ASGI application around another one.

    The cookie of a page that is shown in a frame comes along with requests that other sites make. They are told by
    their ``Origin``, which browsers always send with what changes something. On one's own machine there is no cookie,
    and any name can be made to lead there: ``Host`` is checked, too.

    Args:
        app: What is guarded.
        site: Where the server is reached.
        embedder: Origin of pages that may show it in a frame.
    """

    def __init__(self, app: Any, site: Site, embedder: str | None = None) -> None:
        self._app, self._site = app, site
        ancestors = " ".join(["'self'", *([embedder] if embedder else [])])
        self._headers = {
            "content-security-policy": _CONTENT.format(ancestors),
            # Not "no-referrer", with which browsers hide the Origin of forms from the server itself.
            "referrer-policy": "same-origin",
            "x-content-type-options": "nosniff",
        }

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer, or let another answer."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        body, started = _Body(receive), False

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            await send(message)

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if body.refusal is None or started:  # else it is what the application makes of half a body
                started = True
                await send_with_headers(message)

        refusal = self._refusal(scope)
        if refusal is None:
            try:
                await self._app(scope, body.receive, guarded_send)
            except _HalfError:
                if started:
                    raise
            except asyncio.CancelledError:  # the server ends; pages that are open listen until it does
                body.refusal = PlainTextResponse("The server is being stopped.", 503)
                if started:
                    with contextlib.suppress(Exception):  # of which nobody is left to be told
                        await send({"type": "http.response.body", "body": b"", "more_body": False})
            refusal = None if started else body.refusal
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)

    def _refusal(self, scope: MutableMapping[str, Any]) -> Response | None:
        headers = Headers(scope=scope)
        if not self._site.secure and headers.get("host") not in self._site.hosts:
            return PlainTextResponse(f"This is {self._site.url}, and reached under no other name.", 421)
        if scope["path"].startswith(_UNUSED):
            return PlainTextResponse("Not here.", 404)
        if scope["method"] in _SAFE:
            return None
        if headers.get("origin") not in self._site.origins:
            return PlainTextResponse("Requests from other sites are not taken.", 403)
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return PlainTextResponse(f"At most {MAX_BODY_BYTES:,} bytes are taken.", 413)
        return None


class _HalfError(Exception):
    """The rest of a body is not taken."""


class _Body:
    """A request's body as it comes in, as long as that is neither too much nor too slow."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._size, self._more = receive, 0, True
        self.refusal: Response | None = None

    async def receive(self) -> Message:
        """The next message."""
        if not self._more:
            return await self._receive()  # which waits for the visitor to go away
        try:
            message = await asyncio.wait_for(self._receive(), BODY_TIMEOUT_S)
        except TimeoutError:
            raise self._refused(408, "The rest of the request did not come.") from None
        self._size += len(message.get("body", b""))
        self._more = bool(message.get("more_body", False))
        if self._size > MAX_BODY_BYTES:
            raise self._refused(413, f"At most {MAX_BODY_BYTES:,} bytes are taken.")
        return message

    def _refused(self, status: int, text: str) -> _HalfError:
        self.refusal = PlainTextResponse(text, status, {"connection": "close"})
        return _HalfError(text)
