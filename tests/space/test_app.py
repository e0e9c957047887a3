"""The application over real HTTP: signing in and out, and what is refused before the page sees it."""

from __future__ import annotations

import base64
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from huggingface_hub import HfApi
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hubmerge.cli import cli
from hubmerge.errors import AccessError, UsageError
from hubmerge.localhub import Fault, LocalHub, OAuthApp
from hubmerge.space import gate
from hubmerge.space.gate import MAX_BODY_BYTES
from hubmerge.space.serving import _listen, _locked, sessions_of
from hubmerge.space.sessions import Client, Cookies, OwnMachine, Site
from hubmerge.space.signin import own_path
from hubmerge.space.visitors import Visitor
from tests.space.door import Browser, Door, Fields, hub_with_people, opened, quiet, settings_of
from tests.space.scene import ANN, PUBLISHER

EVIL = "https://evil.example"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with hub_with_people(tmp_path_factory.mktemp("hub")) as found:
        yield found
    quiet()


@pytest.fixture(scope="module")
def door(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with opened(hub, tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def browser(door: Door) -> Iterator[Browser]:
    with door.browser() as found:
        yield found


# --- signing in and out


def test_signing_in_and_out(door: Door, browser: Browser):
    assert browser.who() == "nobody"
    sent = browser.sign_in("ann")
    assert (sent.status_code, sent.headers["location"]) == (303, "/")
    assert browser.who() == "ann"
    with door.browser() as other:
        other.sign_in("bob")
        assert (other.who(), browser.who()) == ("bob", "ann")
    asked = browser.client.get("/logout")
    assert "You are signed in as ann" in asked.text
    assert browser.who() == "ann"  # a link signs nobody out
    assert browser.post("/logout", origin=EVIL).status_code == 403
    assert browser.who() == "ann"
    assert browser.post("/logout").status_code == 303
    assert browser.who() == "nobody"
    assert "signed out" in browser.client.get("/logout").text


def known_of(hub: LocalHub, value: str) -> Visitor:
    """What a cookie holds for whoever has the client's secret."""
    client = Client.of(settings_of(hub))
    assert client is not None
    sessions = Cookies(client, Site.of({}, "127.0.0.1", 1), hub.endpoint)
    visitor = sessions.visitor_of(type("Request", (), {"cookies": {"hubmerge": value}})())
    assert visitor is not None
    return visitor


def test_the_token_is_the_hub_s_and_in_the_cookie_alone(browser: Browser, hub: LocalHub):
    sent = browser.sign_in("ann")
    value = browser.client.cookies["hubmerge"]
    token = known_of(hub, value).token
    assert token.startswith("hf_oauth_")
    assert HfApi(endpoint=hub.endpoint, token=token).whoami()["name"] == "ann"
    hidden = base64.urlsafe_b64decode(value + "==")
    pages = "".join(browser.client.get(path).text for path in ("/", "/config", "/logout", "/health"))
    for text in (value, str(sent.headers), hidden.decode("latin-1"), pages):
        assert token not in text


def test_a_restarted_server_knows_its_visitors(hub: LocalHub, tmp_path: Path):
    with opened(hub, tmp_path) as first, first.browser() as browser:
        browser.sign_in("ann")
        cookie = browser.client.cookies["hubmerge"]
    with opened(hub, tmp_path) as second, second.browser() as browser:
        browser.client.cookies.set("hubmerge", cookie)
        assert browser.who() == "ann"


def test_who_does_not_agree_is_told_so(browser: Browser):
    answer = browser.client.get(browser.decide("ann", "deny"))
    assert answer.status_code == 403
    assert "You did not agree" in answer.text
    assert 'href="/login"' in answer.text
    assert browser.who() == "nobody"


def test_a_sign_in_is_finished_where_it_was_begun_and_once(door: Door, browser: Browser):
    back = browser.decide("ann")
    with door.browser() as other:
        for address in (back, "/login/callback", "/login/callback?code=x&state=y"):
            answer = other.client.get(address)
            assert answer.status_code == 400
            assert "begun in another browser" in answer.text
        assert other.who() == "nobody"
    forged = f"/login/callback?code=stolen&state={parse_qs(urlsplit(back).query)['state'][0]}"
    answer = browser.client.get(forged)
    assert answer.status_code == 400
    assert "refused" in answer.text
    assert browser.client.get(back).status_code == 400  # its state is used up
    assert browser.who() == "nobody"


def test_what_a_stranger_writes_into_the_address_is_not_shown(browser: Browser):
    words = "<script>alert(1)</script>"
    answer = browser.client.get("/login/callback", params={"error": words, "error_description": "call 555"})
    assert answer.status_code == 400
    assert "script>alert" not in answer.text
    assert "555" not in answer.text


def test_a_hub_that_cannot_be_reached_is_told_of(hub: LocalHub, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{free.getsockname()[1]}"

        def sessions(site: Site) -> Cookies:
            return Cookies(Client("form", "secret", "openid", gone), site, gone)

        with opened(hub, tmp_path, sessions) as door, door.browser() as browser:
            answer = browser.client.get("/login")
            assert answer.status_code == 502
            assert f"{gone} could not be reached" in answer.text


def test_a_hub_that_answers_nonsense_is_told_of(hub: LocalHub, tmp_path: Path):
    html, lost = {"status": 200, "body": "<html>"}, {"reset": True}
    faults = (  # in the order of a sign-in: what was once read is kept
        ("/.well-known/", html), ("/.well-known/", lost), ("/oauth/token", html), ("/oauth/token", {"status": 500}),
        ("/oauth/token", lost), ("/oauth/jwks", html), ("/oauth/jwks", lost), ("/api/whoami-v2", {"status": 403}),
        ("/api/whoami-v2", html), ("/api/whoami-v2", {"status": 200, "body": "{}"}),
    )  # fmt: skip
    with opened(hub, tmp_path) as door, door.browser() as browser:
        for path, answer in faults:
            hub.faults.add(Fault(path=f"^{path}", **answer))
            begun = browser.client.get("/login")
            if begun.status_code == 302:
                begun = browser.sign_in("ann")
            assert begun.status_code in (400, 502), (path, answer)
            assert "You are not signed in" in begun.text
            assert [rule.hits for rule in hub.faults.rules()] == [1], (path, answer)
            hub.faults.clear()
        assert browser.who() == "nobody"
        assert browser.sign_in("ann").status_code == 303
    assert "Traceback" not in door.log.getvalue()


def test_scopes_and_proof_are_asked_for(browser: Browser):
    fields = browser.to_consent()
    assert fields["code_challenge_method"] == "S256"
    assert len(fields["code_challenge"]) == 43
    assert fields["redirect_uri"] == f"{browser.door.url}/login/callback"
    assert "contribute-repos" in fields["scope"]


def test_on_a_space_it_is_all_by_https(hub: LocalHub, tmp_path: Path):
    name = "ann-form.hf.space"
    url = f"https://{name}"
    hub.register_app(OAuthApp("space", "secret", (f"{url}/login/callback",)))

    def sessions(_: Site) -> Cookies:
        client = Client("space", "secret", "openid contribute-repos", hub.endpoint)
        return Cookies(client, Site.of({"SPACE_HOST": name}, "0.0.0.0", 7860), hub.endpoint)

    with opened(hub, tmp_path, sessions) as door, httpx2.Client(base_url=door.url, headers={"host": name}) as browser:
        sent = browser.get("/login")
        state = sent.headers["set-cookie"]
        assert "secure" in state
        assert "samesite=lax" in state
        form = Fields(httpx2.get(sent.headers["location"]).text).found
        assert form["redirect_uri"] == f"{url}/login/callback"
        answer = {"user": "ann", "decision": "approve"}
        back = httpx2.post(f"{hub.endpoint}/oauth/authorize", data=form | answer).headers["location"]
        assert back.startswith(f"{url}/login/callback?")
        signed_in = browser.get(back.removeprefix(url), headers={"cookie": state.partition(";")[0]})
        assert signed_in.headers["location"] == "/"
        (given,) = (c for c in signed_in.headers.get_list("set-cookie") if c.startswith("__Host-hubmerge="))
        assert {"HttpOnly", "Path=/", "SameSite=none", "Secure"} <= set(given.split("; "))
        cookie = {"cookie": given.partition(";")[0]}
        assert "signed in as ann" in browser.get("/logout", headers=cookie).text
        assert browser.post("/logout", headers=cookie | {"origin": url}).status_code == 303
        for origin in (f"http://{name}", "https://bob-form.hf.space", door.url):
            assert browser.post("/logout", headers=cookie | {"origin": origin}).status_code == 403


# --- where people are sent


def test_back_to_where_one_was(browser: Browser):
    assert browser.sign_in("ann", "/login?next=/%3Fjob%3D1").headers["location"] == "/?job=1"


ELSEWHERE = (
    EVIL, "//evil.example", "///evil.example", "/\\evil.example", "\\/evil.example", "/\t/evil.example",
    "https:evil.example", "javascript:alert(1)", "/..//evil.example", "/\r\nLocation: https://evil.example", "login",
    "", "http://127.0.0.1@evil.example", "/\u2044evil.example",
)  # fmt: skip


@pytest.mark.parametrize("address", ELSEWHERE)
def test_and_never_anywhere_else(address: str):
    assert own_path(address) == "/"


@pytest.mark.parametrize("address", [EVIL, "///evil.example"])
def test_not_even_from_the_hub(browser: Browser, address: str):
    back = browser.decide("ann", path=str(httpx2.URL("/login", params={"next": address})))
    assert browser.client.get(back).headers["location"] == "/"
    forged = browser.decide("ann")
    assert browser.client.get(f"{forged}&next={address}").headers["location"] == "/"


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.text(alphabet="/\\.:@?#%ae \t\n\x00é", max_size=12))
@example("/a//b")
@example("/?next=//evil.example")
def test_own_paths_are_on_this_server(text: str):
    found = httpx2.URL(f"http://here{own_path(text)}")
    assert (found.host, found.port) == ("here", None)
    assert httpx2.URL("http://here/login").join(own_path(text)).host == "here"


# --- what is refused


@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/call/who", "/logout", "/nothing"])
def test_requests_of_other_sites_are_refused(browser: Browser, path: str):
    browser.sign_in("ann")
    for origin in (
        EVIL,
        "null",
        "http://127.0.0.1",
        "http://127.0.0.1:1",
        f"{browser.door.url}.evil.example",
        "",
        None,
    ):
        headers = {} if origin is None else {"origin": origin}
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            answer = browser.client.request(method, path, headers=headers, json={"data": []})
            assert answer.status_code == 403, (method, origin)
            assert "access-control-allow-origin" not in answer.headers


def test_other_sites_read_nothing(browser: Browser):
    for path in ("/", "/config", "/gradio_api/info", "/health"):
        answer = browser.client.get(path, headers={"origin": EVIL})
        assert answer.status_code == 200
        assert not any(name.startswith("access-control-allow") for name in answer.headers)
    preflight = {"origin": EVIL, "access-control-request-method": "POST"}
    assert browser.client.options("/gradio_api/queue/join", headers=preflight).status_code == 403


def test_names_that_are_not_the_server_s_own_lead_nowhere(door: Door, browser: Browser):
    port = door.url.rpartition(":")[2]
    for host in (f"evil.example:{port}", "127.0.0.1", f"127.0.0.1.evil.example:{port}"):
        assert browser.client.get("/", headers={"host": host}).status_code == 421
    for host in (f"localhost:{port}", f"[::1]:{port}"):
        assert browser.client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/upload", "/gradio_api/proxy=https://evil.example/", "/gradio_api/run-history/connect",
     "/gradio_api/deep_link", "/gradio_api/stream/x", "/gradio_api/component_server"],
)  # fmt: skip
def test_what_the_page_has_no_use_for_is_not_there(browser: Browser, path: str):
    assert browser.client.get(path).status_code == 404
    assert browser.post(path).status_code == 404


def test_bodies_have_an_end(browser: Browser):
    path = "/gradio_api/call/who"
    too_much = b" " * (MAX_BODY_BYTES + 1)
    assert browser.post(path, content=too_much).status_code == 413
    pieces = (too_much[i : i + 100_000] for i in range(0, len(too_much), 100_000))
    assert browser.post(path, content=pieces).status_code == 413
    assert browser.post(path, content=b" " * 1000).status_code == 422  # taken, and then not understood


def test_and_come_within_a_while(door: Door, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gate, "BODY_TIMEOUT_S", 0.2)
    host = door.url.removeprefix("http://")
    with socket.create_connection(("127.0.0.1", int(host.rpartition(":")[2])), timeout=30) as half:
        lines = (
            "POST /gradio_api/call/who HTTP/1.1",
            f"Host: {host}",
            f"Origin: {door.url}",
            "Content-Length: 9",
            "",
            "{",
        )
        half.sendall("\r\n".join(lines).encode())
        assert half.recv(4096).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("path", ["/", "/logout", "/health", "/nothing", "/gradio_api/upload"])
def test_browsers_are_told_what_may_be_done_with_answers(browser: Browser, hub: LocalHub, path: str):
    headers = browser.client.get(path).headers
    content = headers["content-security-policy"]
    assert "frame-ancestors 'self'" in content
    assert "*" not in content
    assert headers["referrer-policy"] == "same-origin"
    assert headers["x-content-type-options"] == "nosniff"
    if path == "/":
        assert f"frame-ancestors 'self' {hub.endpoint}" in content
        assert "default-src 'self'" in content


def test_nobody_else_is_told_of_visitors(browser: Browser):
    config = browser.client.get("/config").json()
    assert config["analytics_enabled"] is False
    assert browser.client.get("/monitoring/summary").status_code >= 400
    assert browser.client.get("/gradio_api/runs").status_code == 404


def test_the_log_holds_paths_and_no_secrets(hub: LocalHub, tmp_path: Path):
    with opened(hub, tmp_path) as door, door.browser() as browser:  # the last one opened has the log
        back = browser.decide("ann")
        browser.client.get(back)
        assert browser.who() == "ann"
        with browser.client.stream("GET", "/gradio_api/heartbeat/name-of-a-page") as heard:
            assert heard.status_code == 200
        query, value = parse_qs(urlsplit(back).query), browser.client.cookies["hubmerge"]
        token = known_of(hub, value).token
    log = door.log.getvalue()
    assert '"GET /login/callback HTTP/1.1" 303' in log
    assert '"GET /gradio_api/heartbeat HTTP/1.1" 200' in log
    for secret in (query["code"][0], query["state"][0], "code=", "state=", "name-of-a-page", value, token):
        assert secret not in log


def test_health(browser: Browser):
    assert browser.client.get("/health").json() == {"status": "ok"}


# --- one's own machine


def test_on_one_s_own_machine_everybody_is_who_is_logged_in(start_hub: Callable[..., LocalHub], tmp_path: Path):
    hub = start_hub(users=[PUBLISHER, ANN])

    def sessions(site: Site) -> OwnMachine:
        found = sessions_of({}, site, "127.0.0.1", hub.endpoint)
        assert isinstance(found, OwnMachine)
        return found

    with opened(hub, tmp_path, sessions) as door, door.browser() as browser:
        assert browser.who() == "local"
        assert browser.client.get("/login").headers["location"] == "/"
        for answer in (browser.client.get("/logout"), browser.post("/logout")):
            assert "the token of local" in answer.text
        assert browser.client.post("/gradio_api/call/who", json={"data": []}).status_code == 403
        assert browser.post("/gradio_api/call/who", origin=EVIL, json={"data": []}).status_code == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5"])
def test_strangers_never_get_the_token_of_the_machine(host: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", ANN.token)
    with pytest.raises(UsageError, match="under what name"):
        Site.of({}, host, 7860)
    space = Site.of({"SPACE_HOST": "ann-form.hf.space"}, host, 7860)
    for listens in (host, "127.0.0.1"):
        with pytest.raises(UsageError, match="everybody would use the token"):
            sessions_of({}, space, listens, "http://hub")
    here = Site.of({}, "127.0.0.1", 7860)
    with pytest.raises(UsageError, match="everybody would use the token"):
        sessions_of({}, here, host, "http://hub")


def test_without_a_token_nothing_is_served(hf_home: Path):
    with pytest.raises(AccessError, match="there is no token"):
        sessions_of({}, Site.of({}, "127.0.0.1", 7860), "127.0.0.1", "http://hub")


def test_one_server_has_a_folder(tmp_path: Path):
    with _locked(tmp_path), pytest.raises(UsageError, match="another server"), _locked(tmp_path):
        pass
    with _locked(tmp_path):
        pass


def test_a_port_that_is_taken_is_a_mistake():
    with _listen("127.0.0.1", 0) as taken, pytest.raises(UsageError, match="cannot listen on"):
        _listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "0.0.0.0"), "the server would listen on 0.0.0.0"),
        (("--max-memory", "lots"), "--max-memory: "),
        (("--max-disk", "-1GB"), "--max-disk: "),
        (("--min-shard", ""), "--min-shard: "),
    ],
)
def test_what_the_command_cannot_do(tmp_path: Path, arguments: tuple[str, ...], words: str):
    with pytest.raises(UsageError, match=words):
        cli.main(["space", "serve", "--port", "0", "--data", str(tmp_path), *arguments], standalone_mode=False)


def test_options_are_variables_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HUBMERGE_SPACE_MAX_MEMORY", "lots")
    with pytest.raises(UsageError, match="--max-memory: "):
        cli.main(["space", "serve", "--port", "0", "--data", str(tmp_path)], standalone_mode=False)
    monkeypatch.setenv("HUBMERGE_SPACE_MAX_MEMORY", "2GB")
    monkeypatch.setenv("OAUTH_CLIENT_ID", "id")
    with pytest.raises(UsageError, match="OAUTH_CLIENT_SECRET, OAUTH_SCOPES, OPENID_PROVIDER_URL is not set"):
        cli.main(["space", "serve", "--port", "0", "--data", str(tmp_path)], standalone_mode=False)
