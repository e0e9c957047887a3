"""The web form as an application: sign-in, page, and what is refused before either sees it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hubmerge.space.gate import Gate
from hubmerge.space.runner import Runner
from hubmerge.space.safety import Limits
from hubmerge.space.sessions import Cookies, Sessions
from hubmerge.space.signin import SignIn, own_machine_routes

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

_MAX_FILE = "100kb"
_QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1",
    # gradio would compute statistics of the last ten thousand events after each one, for a page that is switched off.
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9), "GRADIO_ANALYTICS_MAX_EVENTS": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Service:
    """What the page works with."""

    runner: Runner
    limits: Limits
    sessions: Sessions
    """``visitor_of(request)``, with a request of Starlette's or gradio's."""
    endpoint: str | None
    """Address of the Hub; None for the environment's."""
    machine: str
    """What merges run on, in words."""


def build_app(service: Service, make_page: Callable[[Service], gr.Blocks] | None = None) -> FastAPI:
    """The application, to be served by uvicorn.

    Args:
        service: What the page works with; its sessions say how people sign in, and where the server is reached.
        make_page: Makes another page than the form.
    """

    async def building() -> FastAPI:
        return _build(service, make_page)

    # gradio makes an event loop for each of its locks, and closes none, unless one is running.
    return asyncio.run(building())


def _build(service: Service, make_page: Callable[[Service], gr.Blocks] | None) -> FastAPI:
    os.environ.update(_QUIET)  # gradio reads them when it is imported, and when a page is made
    import gradio as gr
    from fastapi import FastAPI

    sessions = service.sessions
    if isinstance(sessions, Cookies):
        routes, embedder = SignIn(sessions, service.endpoint).routes(), sessions.client.provider
    else:
        routes, embedder = own_machine_routes(sessions.visitor.name), None
    app = FastAPI(
        routes=[*routes, Route("/health", _health)],
        # gradio answers with whatever origin asks, unless the application around it has a policy of its own: none.
        middleware=[Middleware(Gate, site=sessions.site, embedder=embedder), Middleware(CORSMiddleware)],
        openapi_url=None,
    )
    look: dict[str, Any] = {}
    if make_page is None:
        from hubmerge.space.page import LOOK, build

        make_page, look = build, LOOK
    gr.mount_gradio_app(
        app, make_page(service), path="/", show_error=False, footer_links=[], run_history=False, ssr_mode=False,
        enable_monitoring=False, pwa=False, mcp_server=False, max_file_size=_MAX_FILE, **look,
    )  # fmt: skip
    return app


async def _health(_: Request) -> Response:
    return JSONResponse({"status": "ok"})
