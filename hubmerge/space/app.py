"""The web form as an application: sign-in, page, and what is refused before either sees it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubmerge.space.runner import Runner
from hubmerge.space.safety import Limits
from hubmerge.space.sessions import Client, Sessions, Site

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

MAX_BODY_BYTES = 1_000_000
"""Of a request; the longest recipe takes a tenth of it."""


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


def build_app(service: Service, site: Site, client: Client | None = None, page: gr.Blocks | None = None) -> FastAPI:
    """The application, to be served by uvicorn.

    Args:
        service: What the page works with.
        site: Where it is reached.
        client: For signing in; None where ``service.sessions`` knows everybody already.
        page: Instead of the usual page.
    """
    raise NotImplementedError
