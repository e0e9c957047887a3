"""From ASGI to handlers: raw-path routes, the call a handler sees, file responses, error responses."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from hubmerge.localhub.auth import Identity
from hubmerge.localhub.core import Core
from hubmerge.localhub.errors import HubError, bad_request
from hubmerge.localhub.protocol import ZEROCOPY, Message, Receive, Scope, Send

CHUNK_BYTES = 1 << 20
SPOOL_BYTES = 1 << 20


@dataclass(slots=True)
class Call:
    """One request, as handlers see it.

    Attributes:
        params: Decoded captures of the route.
        path: Raw path, still percent-encoded.
        body: The request's body, spooled; empty for streaming routes, which read ``request`` themselves.
    """

    core: Core
    request: Request
    params: Mapping[str, str]
    path: str
    body: BinaryIO
    _identity: list[Identity | None] = field(default_factory=list)

    @property
    def identity(self) -> Identity | None:
        """Who is asking.

        Raises:
            HubError: 401 for an unknown token.
        """
        if not self._identity:
            self._identity.append(self.core.accounts.identify(self.request.headers.get("authorization")))
        return self._identity[0]

    @property
    def kind(self) -> str:
        """Repository type named by the route: ``models``, ``datasets/`` … or nothing for a model."""
        return (self.params.get("type") or "models").rstrip("/").removesuffix("s")

    @property
    def query(self) -> QueryParams:
        """Query parameters."""
        return self.request.query_params

    def flag(self, name: str) -> bool:
        """A boolean query parameter."""
        return self.query.get(name, "").lower() in ("1", "true")

    def json(self) -> dict[str, Any]:
        """The body as a JSON object.

        Raises:
            HubError: 400 if it is something else.
        """
        try:
            value = json.load(self.body)
        except ValueError as error:
            raise bad_request(f"The request body is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise bad_request("The request body is not a JSON object")
        return value

    @property
    def base_url(self) -> str:
        """This server as the client addresses it."""
        return f"{self.request.url.scheme}://{self.request.headers.get('host', 'localhost')}"

    @property
    def cdn_url(self) -> str:
        """Origin of signed addresses."""
        if self.core.config.cdn_port is None:
            return self.base_url
        host = urlsplit(self.base_url).hostname or "localhost"
        host = f"[{host}]" if ":" in host else host
        return f"{self.request.url.scheme}://{host}:{self.core.config.cdn_port}"


Handler = Callable[[Call], Response]
StreamHandler = Callable[[Call], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Route:
    """A method and a pattern of raw paths; ``stream`` handlers run on the event loop and read the body themselves."""

    method: str
    pattern: re.Pattern[str]
    handler: Handler | StreamHandler
    stream: bool = False


_CAPTURES = {
    "type": r"(?P<type>models|datasets|spaces)",
    "prefix": r"(?P<type>datasets/|spaces/)?",
    "repo": r"(?P<repo>[^/]+/[^/]+)",
    "shown": r"(?P<repo>(?!_|api/|oauth/)[^/]+/[^/]+)",
    "rev": r"(?P<rev>refs/(?:pr|convert)/[^/]+|[^/]+)",
    "path": r"(?P<path>.+)",
}


def route(method: str, template: str, handler: Handler | StreamHandler, *, stream: bool = False) -> Route:
    """A route from a template such as ``/api/{type}/{repo}/refs``; unknown ``{names}`` capture one segment."""
    regex = re.sub(
        r"\{(\w+)\}",
        lambda match: _CAPTURES.get(match[1], rf"(?P<{match[1]}>[^/]+)"),
        template.replace(".", r"\."),
    )
    return Route(method, re.compile(regex), handler, stream)


class FileResponse(Response):
    """Part of a file, sent by the kernel where the server can, in large chunks read by a thread where not."""

    def __init__(self, path: Path, start_byte: int, end_byte: int, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(status_code=status, headers=dict(headers))
        self._path = path
        self._start_byte = start_byte
        self._end_byte = end_byte
        self.headers["content-length"] = str(end_byte - start_byte)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as an ASGI application."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        count = self._end_byte - self._start_byte
        if scope["method"] == "HEAD" or count == 0:
            await send({"type": "http.response.body", "body": b""})
            return
        with self._path.open("rb", buffering=0) as file:
            if ZEROCOPY in scope.get("extensions", {}):
                await send({"type": ZEROCOPY, "file": file, "offset": self._start_byte, "count": count})
                return
            file.seek(self._start_byte)
            while count:
                chunk = await asyncio.to_thread(file.read, min(CHUNK_BYTES, count))
                if not chunk:
                    raise OSError(f"{self._path} is shorter than its size")
                count -= len(chunk)
                await send({"type": "http.response.body", "body": chunk, "more_body": count > 0})


def error_response(error: HubError) -> Response:
    """The Hub's form of an error: JSON body plus the headers that clients look at."""
    # Messages quote what clients sent, which need not fit into a header.
    visible = "".join(c if " " <= c <= "~" else "?" for c in error.message)
    headers = {"X-Error-Message": visible, **error.headers}
    if error.code:
        headers["X-Error-Code"] = error.code
    return JSONResponse({"error": error.message, **error.payload}, status_code=error.status, headers=headers)


class Application:
    """The hub as an ASGI application: finds the route, runs the handler off the event loop, answers."""

    def __init__(self, core: Core, routes: Sequence[Route]) -> None:
        self._core = core
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        request_id = uuid.uuid4().hex.encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        request = Request(scope, receive)
        try:
            response = await self._respond(request)
        except HubError as error:
            response = error_response(error)
        except ClientDisconnect:
            return
        await response(scope, receive, send_with_id)

    async def _respond(self, request: Request) -> Response:
        path = request.scope["raw_path"].decode("ascii")
        method = "GET" if request.method == "HEAD" else request.method
        methods: set[str] = set()
        for candidate in self._routes:
            match = candidate.pattern.fullmatch(path)
            if match is None:
                continue
            methods.add(candidate.method)
            if candidate.method == method:
                return await self._run(candidate, match, request, path)
        if methods:
            raise HubError(405, f"Method {method} not allowed", headers={"Allow": ", ".join(sorted(methods))})
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    async def _run(self, found: Route, match: re.Match[str], request: Request, path: str) -> Response:
        params = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
        with SpooledTemporaryFile(SPOOL_BYTES) as spool:
            call = Call(self._core, request, params, path, cast("BinaryIO", spool))
            if found.stream:
                return await cast("StreamHandler", found.handler)(call)
            async for chunk in request.stream():
                spool.write(chunk)
            spool.seek(0)
            return await asyncio.to_thread(cast("Handler", found.handler), call)
