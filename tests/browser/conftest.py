"""One Hub, one server and one Chromium for all tests; everybody has a browser's context of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants
from playwright.sync_api import Browser, expect, sync_playwright

from hubmerge.localhub import User
from tests.browser.scene import PATIENCE_MS, PEOPLE, Visit
from tests.space.running import Server, Town

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), "chromium")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


@pytest.fixture(scope="session")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        made = Town(tmp_path_factory.mktemp("town"), PEOPLE)
        made.furnish()
        yield made
        made.hub.stop()


@pytest.fixture(scope="session")
def server(town: Town, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = ("--workers", "2", "--min-shard", "1", "--per-hour", "1000")
    made = Server(town, tmp_path_factory.mktemp("server"), limits)
    made.start()
    yield made
    made.end()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Browser, server: Server) -> Iterator[Callable[..., Visit]]:
    """Somebody's visit, signed in by default; whatever their pages ask of another host, or fail at, fails the test."""
    strange: list[str] = []
    contexts = []
    server.town.behave()

    def begin(user: User, *, signed_in: bool = True, **options: object) -> Visit:
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        page = context.new_page()
        context.on("request", lambda r: strange.append(r.url) if _is_elsewhere(r.url) else None)
        page.on("pageerror", lambda e: strange.append(str(e)))
        made = Visit(page, server, user.name)
        made.sign_in() if signed_in else made.home()
        return made

    yield begin
    for context in contexts:
        context.close()
    server.town.behave()
    assert strange == []


def _is_elsewhere(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1"
