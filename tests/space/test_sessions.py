"""Cookies that hold a visitor's token: only this server reads them, and only as they were written."""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass, field, replace
from http.cookies import SimpleCookie
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.responses import Response

from hubmerge.errors import AccessError, UsageError
from hubmerge.space.sessions import Client, Cookies, OwnMachine, Site, is_loopback
from hubmerge.space.visitors import Visitor

ANN = Visitor("ann", "hf_oauth_" + "aNN0123456789" * 3, "http://hub")
CLIENT = Client("id", "secret", "openid profile", "http://hub")
HERE = Site.of({}, "127.0.0.1", 7860)
SPACE = Site.of({"SPACE_HOST": "ann-merge.hf.space"}, "0.0.0.0", 7860)
VARIABLES = {
    "OAUTH_CLIENT_ID": "id", "OAUTH_CLIENT_SECRET": "secret", "OAUTH_SCOPES": "openid profile",
    "OPENID_PROVIDER_URL": "http://hub/",
}  # fmt: skip
FEW = settings(deadline=None, derandomize=True, max_examples=25)


@dataclass
class Request:
    cookies: dict[str, Any] = field(default_factory=dict)


def cookies(site: Site = HERE, secret: str = "secret") -> Cookies:
    return Cookies(replace(CLIENT, secret=secret), site, "http://hub")


def begun(sessions: Cookies, visitor: Visitor = ANN, lasts_s: float = 3600.0) -> Any:
    """The cookie that a browser is given."""
    response = Response()
    sessions.begin(response, visitor, time.time() + lasts_s)
    return SimpleCookie(response.headers["set-cookie"])[sessions.name]


def test_a_visitor_is_known_again_also_after_a_restart():
    value = begun(cookies()).value
    for server in (cookies(), cookies()):
        assert server.visitor_of(Request({server.name: value})) == ANN
        assert server.visitor_of(Request()) is None


@FEW
@given(st.text(min_size=1, alphabet=st.characters(codec="ascii")), st.sampled_from(["ann", "x" * 95]))
@example("'\"\\<>&%\n", "ann")
def test_the_token_is_nowhere_in_the_cookie(token: str, name: str):
    long = token * (20 // len(token) + 1)
    value = begun(cookies(), Visitor(name, long)).value
    raw = base64.urlsafe_b64decode(value + "==")
    assert long.encode() not in raw
    assert name.encode() not in raw
    assert long not in value
    assert begun(cookies(), Visitor(name, long)).value != value  # nor can two of the same be told to be so


def test_another_server_s_cookie_is_nobody_s():
    value = begun(cookies()).value
    other = cookies(secret="another")
    assert other.visitor_of(Request({other.name: value})) is None


@FEW
@given(st.data())
def test_a_changed_cookie_is_nobody_s(data: st.DataObject):
    value = begun(cookies()).value
    at = data.draw(st.integers(0, len(value) - 2))  # the last character has bits that mean nothing
    instead = data.draw(st.characters(codec="ascii").filter(lambda c: c != value[at]))
    assert cookies().visitor_of(Request({"hubmerge": value[:at] + instead + value[at + 1 :]})) is None


@FEW
@given(st.one_of(st.none(), st.integers(), st.text(alphabet=st.characters(codec="latin-1"))))
@example("gAAAAA")
@example("")
@example("=" * 5000)
@example("é")
def test_anything_else_is_nobody_s(value: Any):
    assert cookies().visitor_of(Request({"hubmerge": value})) is None


def test_it_ends_with_the_token():
    sessions = cookies()
    assert begun(sessions, lasts_s=100)["max-age"] in ("100", "99")
    late = begun(sessions, lasts_s=-1)
    assert late["max-age"] == "0"
    assert sessions.visitor_of(Request({sessions.name: late.value})) is None


def test_on_a_space_browsers_send_it_from_a_frame_and_by_https_only():
    sessions = cookies(SPACE)
    cookie = begun(sessions)
    assert sessions.name == "__Host-hubmerge"
    assert (cookie["secure"], cookie["httponly"], cookie["samesite"], cookie["path"]) == (True, True, "none", "/")
    assert not cookie["domain"]
    here = begun(cookies())
    assert (here["secure"], here["httponly"], here["samesite"]) == ("", True, "lax")


def test_the_end_of_a_session_removes_the_same_cookie():
    for site in (HERE, SPACE):
        sessions, response = cookies(site), Response()
        sessions.end(response)
        cookie = SimpleCookie(response.headers["set-cookie"])[sessions.name]
        assert (cookie["max-age"], cookie["path"], bool(cookie["secure"])) == ("0", "/", site.secure)


def test_a_token_that_is_too_long_is_refused_with_words():
    assert begun(cookies(), replace(ANN, token="hf_" + "x" * 2700)).value
    with pytest.raises(AccessError, match="3003 characters"):
        begun(cookies(), replace(ANN, token="hf_" + "x" * 3000))


def test_one_s_own_machine_has_one_visitor():
    assert OwnMachine(HERE, ANN).visitor_of(Request({"hubmerge": "x"})) == ANN


def test_neither_secret_nor_token_is_shown():
    assert "secret" not in repr(replace(CLIENT, secret="s3cr3t")).replace("secret=", "")
    assert "s3cr3t" not in repr(replace(CLIENT, secret="s3cr3t"))
    assert ANN.token not in repr(OwnMachine(HERE, ANN))


def test_settings_of_a_space():
    found = Client.of(VARIABLES | {"OTHER": "x"})
    assert found == Client("id", "secret", "openid profile", "http://hub")
    assert Client.of({}) is None
    assert Client.of(dict.fromkeys(VARIABLES, " ")) is None


@pytest.mark.parametrize("missing", VARIABLES)
def test_half_of_the_settings_is_a_mistake(missing: str):
    with pytest.raises(UsageError, match=f"{missing} is not set"):
        Client.of({name: value for name, value in VARIABLES.items() if name != missing})


def test_keys_differ_by_purpose_and_secret():
    keys = {replace(CLIENT, secret=s).key(p) for s in ("a", "b") for p in (b"1", b"2")}
    assert len(keys) == 4


def test_where_a_server_is_reached():
    assert HERE.origins == ("http://127.0.0.1:7860", "http://localhost:7860", "http://[::1]:7860")
    assert HERE.hosts == ("127.0.0.1:7860", "localhost:7860", "[::1]:7860")
    assert Site.of({}, "::1", 80).url == "http://[::1]"
    assert Site.of({}, "localhost", 81).url == "http://localhost:81"
    assert not HERE.secure
    assert SPACE.origins == ("https://ann-merge.hf.space",)
    assert SPACE.secure
    two = Site.of({"SPACE_HOST": "a.hf.space, merge.example.org/"}, "0.0.0.0", 7860)
    assert two.hosts == ("a.hf.space", "merge.example.org")
    for host in ("0.0.0.0", "192.168.1.5", "::", "merge.example.org"):
        with pytest.raises(UsageError, match="under what name"):
            Site.of({}, host, 7860)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
     ("10.0.0.1", False), ("localhost.evil.example", False), ("", False)],
)  # fmt: skip
def test_loopback(host: str, expected: bool):
    assert is_loopback(host) == expected
