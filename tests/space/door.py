"""What tests of signing in share: a Hub with people and an application, the running server, a browser's steps."""

from __future__ import annotations

import copy
import io
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import gradio as gr
import httpx2
import uvicorn

from hubmerge.localhub import LocalHub, OAuthApp
from hubmerge.space import serving
from hubmerge.space.app import Service, build_app
from hubmerge.space.jobs import JobTable
from hubmerge.space.runner import Runner
from hubmerge.space.sessions import Client, Cookies, Sessions, Site
from tests.space.scene import SMALL, USERS

APP = OAuthApp("form", "the-client's-secret", ("http://127.0.0.1/login/callback",), "The form")
SCOPES = "openid profile contribute-repos gated-repos jobs write-discussions"


def settings_of(hub: Any, app: OAuthApp = APP) -> dict[str, str]:
    """The variables that a Space would have."""
    return {
        "OAUTH_CLIENT_ID": app.client_id, "OAUTH_CLIENT_SECRET": app.client_secret, "OAUTH_SCOPES": SCOPES,
        "OPENID_PROVIDER_URL": hub.endpoint,
    }  # fmt: skip


def page_of(service: Service) -> gr.Blocks:
    """A page with one button, which tells who pressed it."""

    def who(request: gr.Request) -> str:
        visitor = service.sessions.visitor_of(request)
        return visitor.name if visitor else "nobody"

    with gr.Blocks() as page:
        told = gr.Textbox(label="You")
        gr.Button("Who am I?").click(who, None, told, api_name="who")
    return page


@dataclass
class Door:
    """A running server."""

    url: str
    hub: LocalHub
    log: io.StringIO = field(default_factory=io.StringIO)

    @contextmanager
    def browser(self) -> Iterator[Browser]:
        with httpx2.Client(base_url=self.url, timeout=60) as client:
            yield Browser(self, client)


@contextmanager
def opened(hub: LocalHub, tmp: Path, make: Callable[[Site], Sessions] | None = None) -> Iterator[Door]:
    """Serve the application from a thread, as ``serving.serve`` does from the main one."""
    with ExitStack() as stack:
        sock = serving._listen("127.0.0.1", 0)
        stack.callback(sock.close)
        site = Site.of({}, "127.0.0.1", sock.getsockname()[1])
        client = Client.of(settings_of(hub))
        assert client is not None
        sessions = make(site) if make else Cookies(client, site, hub.endpoint)
        table = JobTable(tmp / "jobs.db")
        stack.callback(table.close)
        runner = stack.enter_context(Runner(table, tmp, SMALL))
        door = Door(site.url, hub)
        app = build_app(Service(runner, SMALL, sessions, hub.endpoint, "this machine"), page_of)
        server = serving._Server(uvicorn.Config(app, log_config=_logged_to(door.log), ws="none"))
        ready = threading.Event()
        server.when_started = ready.set
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        assert ready.wait(60)
        yield door
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def _logged_to(stream: io.StringIO) -> dict[str, Any]:
    config = copy.deepcopy(serving.log_config())
    for handler in config["handlers"].values():
        handler["stream"] = stream
    return config


def quiet() -> None:
    """Let go of the log's handlers."""
    for name in ("uvicorn", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()


class Fields(HTMLParser):
    """The fields of a page's form."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "input":
            self.found[values["name"] or ""] = values["value"] or ""


@dataclass
class Browser:
    """One visitor's browser."""

    door: Door
    client: httpx2.Client

    def to_consent(self, path: str = "/login") -> dict[str, str]:
        """Press "Sign in": the fields of the Hub's page."""
        sent = self.client.get(path)
        assert sent.status_code == 302, sent.text
        address = sent.headers["location"]
        assert address.startswith(self.door.hub.endpoint + "/oauth/authorize?")
        return Fields(self.client.get(address).text).found

    def decide(self, user: str, decision: str = "approve", path: str = "/login") -> str:
        """… and agree there, or not: where the Hub sends the browser."""
        answer = {"user": user, "decision": decision}
        address = f"{self.door.hub.endpoint}/oauth/authorize"
        back = str(self.client.post(address, data=self.to_consent(path) | answer).headers["location"])
        assert back.startswith(self.door.url + "/login/callback?")
        return back

    def sign_in(self, user: str, path: str = "/login") -> httpx2.Response:
        """All of it."""
        return self.client.get(self.decide(user, path=path))

    def post(self, path: str, *, origin: str | None = None, **options: Any) -> httpx2.Response:
        """As a page of the server itself does, or of another one."""
        return self.client.post(path, headers={"origin": origin or self.door.url}, **options)

    def who(self) -> str:
        """What an event of the page knows of its visitor."""
        begun = self.post("/gradio_api/call/who", json={"data": []})
        assert begun.status_code == 200, begun.text
        told = self.client.get(f"/gradio_api/call/who/{begun.json()['event_id']}").text
        return told.partition('data: ["')[2].partition('"')[0]


@contextmanager
def hub_with_people(tmp: Path) -> Iterator[LocalHub]:
    """The Hub."""
    with LocalHub(tmp / "hub", users=USERS, apps=[APP]) as hub:
        yield hub
