"""Signing in to applications with an account of the local Hub: the whole flow over HTTP, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from cryptography.hazmat.primitives.hashes import SHA256
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from hubmerge.localhub import HubProcess, LocalHub, OAuthApp, User, oauth

USERS = (User("ann", "hf_ann"), User("bob", "hf_bob"))
BACK = "http://127.0.0.1:7860/login/callback"
APP = OAuthApp("app-1", "s3cret %:", ("http://127.0.0.1/login/callback", "https://a.example/cb"), "A <form>")
VERIFIER = "v" * 50
CHALLENGE = base64.urlsafe_b64encode(hashlib.sha256(VERIFIER.encode()).digest()).decode().rstrip("=")
ASKED = {
    "client_id": APP.client_id, "redirect_uri": BACK, "response_type": "code", "state": "st&te", "nonce": "n0",
    "scope": "openid profile contribute-repos", "code_challenge": CHALLENGE, "code_challenge_method": "S256",
}  # fmt: skip


class Form(HTMLParser):
    """The fields and choices of a page's form."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fields: dict[str, str] = {}
        self.options: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        if tag == "input":
            self.fields[found["name"] or ""] = found["value"] or ""

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "option" and data.strip():
            self.options.append(data)


@pytest.fixture
def town(start_hub: Callable[..., LocalHub]) -> LocalHub:
    return start_hub(users=USERS, apps=[APP], separate_cdn=False)


def ask(hub: Any, **changed: str) -> httpx2.Response:
    return httpx2.get(f"{hub.endpoint}/oauth/authorize", params=ASKED | changed)


def decide(hub: Any, user: str = "ann", decision: str = "approve", **changed: str) -> httpx2.Response:
    page = Form(ask(hub, **changed).text)
    return httpx2.post(f"{hub.endpoint}/oauth/authorize", data=page.fields | {"user": user, "decision": decision})


def sent_back(response: httpx2.Response) -> dict[str, str]:
    """What a redirection to the application says."""
    assert response.status_code == 303, response.text
    assert response.headers["location"].startswith(BACK + "?")
    return {name: values[0] for name, values in parse_qs(urlsplit(response.headers["location"]).query).items()}


def redeem(hub: Any, code: str, *, auth: Any = (APP.client_id, "s3cret%20%25%3A"), **changed: str) -> httpx2.Response:
    """By HTTP Basic, whose two parts are percent-encoded before (RFC 6749, 2.3.1)."""
    body = {"grant_type": "authorization_code", "code": code, "redirect_uri": BACK, "code_verifier": VERIFIER}
    return httpx2.post(f"{hub.endpoint}/oauth/token", data=body | changed, auth=auth)


def error_of(response: httpx2.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]


def test_the_whole_flow(town: LocalHub):
    page = Form(ask(town).text)
    assert page.options == ["ann", "bob"]
    assert "A &lt;form&gt;" in ask(town).text
    back = sent_back(decide(town, "bob"))
    assert back["state"] == ASKED["state"]
    answer = redeem(town, back["code"])
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    found = answer.json()
    assert found["access_token"].startswith("hf_oauth_")
    assert (found["token_type"], found["expires_in"], found["scope"]) == ("bearer", 8 * 3600, ASKED["scope"])
    api = HfApi(endpoint=town.endpoint, token=found["access_token"])
    assert api.whoami()["name"] == "bob"
    api.create_repo("bob/made-by-the-app")
    with pytest.raises(HfHubHTTPError):
        api.create_repo("ann/not-hers")
    info = httpx2.get(
        f"{town.endpoint}/oauth/userinfo", headers={"authorization": f"Bearer {found['access_token']}"}
    ).json()
    assert (info["sub"], info["preferred_username"]) == ("bob", "bob")


def test_identity_tokens_can_be_checked_with_the_public_keys(town: LocalHub):
    token = redeem(town, sent_back(decide(town))["code"]).json()["id_token"]
    metadata = httpx2.get(f"{town.endpoint}/.well-known/openid-configuration").json()
    header, claims, signature = (base64.urlsafe_b64decode(part + "==") for part in token.split("."))
    (key,) = httpx2.get(metadata["jwks_uri"]).json()["keys"]
    assert json.loads(header) == {"alg": "RS256", "typ": "JWT", "kid": key["kid"]}
    n, e = (int.from_bytes(base64.urlsafe_b64decode(key[name] + "==")) for name in ("n", "e"))
    RSAPublicNumbers(e, n).public_key().verify(signature, token.rpartition(".")[0].encode(), PKCS1v15(), SHA256())
    found = json.loads(claims)
    assert (found["iss"], found["aud"], found["nonce"]) == (metadata["issuer"], APP.client_id, ASKED["nonce"])
    assert "id_token" not in redeem(town, sent_back(decide(town, scope="profile"))["code"]).json()


def test_scopes_that_do_not_write_give_tokens_that_only_read(town: LocalHub):
    found = redeem(town, sent_back(decide(town, scope="openid profile jobs"))["code"]).json()
    api = HfApi(endpoint=town.endpoint, token=found["access_token"])
    assert api.whoami()["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError):
        api.create_repo("ann/no")


def test_secrets_in_the_form_are_as_good(town: LocalHub):
    code = sent_back(decide(town))["code"]
    body = {"client_id": APP.client_id, "client_secret": APP.client_secret}
    assert error_of(redeem(town, code, **body)) == (401, "invalid_client")  # not in both
    assert redeem(town, code, auth=None, **body).status_code == 200


def test_codes_are_for_once(town: LocalHub):
    code = sent_back(decide(town))["code"]
    assert redeem(town, code).status_code == 200
    assert error_of(redeem(town, code)) == (400, "invalid_grant")
    code = sent_back(decide(town))["code"]
    assert error_of(redeem(town, code, code_verifier="x" * 50)) == (400, "invalid_grant")
    assert error_of(redeem(town, code)) == (400, "invalid_grant")  # nobody guesses twice


@pytest.mark.parametrize(
    ("changed", "asked"),
    [
        ({"redirect_uri": "https://a.example/cb"}, {}),
        ({"code_verifier": ""}, {}),
        ({"code_verifier": VERIFIER}, {"code_challenge": "", "code_challenge_method": ""}),
        ({"code": "nonsense"}, {}),
    ],
)
def test_codes_are_bound_to_what_they_were_asked_with(town: LocalHub, changed: dict[str, str], asked: dict[str, str]):
    code = changed.pop("code", None) or sent_back(decide(town, **asked))["code"]
    assert error_of(redeem(town, code, **changed)) == (400, "invalid_grant")


def test_codes_are_the_applications_own_and_end(town: LocalHub, monkeypatch: pytest.MonkeyPatch):
    town.register_app(OAuthApp("app-2", "other", (BACK,)))
    code = sent_back(decide(town))["code"]
    assert error_of(redeem(town, code, auth=("app-2", "other"))) == (400, "invalid_grant")
    code = sent_back(decide(town))["code"]
    assert error_of(redeem(town, code, auth=(APP.client_id, "wrong"))) == (401, "invalid_client")
    assert error_of(redeem(town, code, auth=("app-3", "x"))) == (401, "invalid_client")
    assert redeem(town, code).status_code == 200  # a stranger does not use up a code
    monkeypatch.setattr(oauth, "CODE_TTL_S", -1.0)
    assert error_of(redeem(town, sent_back(decide(town))["code"])) == (400, "invalid_grant")
    assert error_of(redeem(town, "x", grant_type="password")) == (400, "unsupported_grant_type")


def test_tokens_end(town: LocalHub):
    town.register_app(OAuthApp("short", "s", (BACK,), ttl_s=-1.0))
    code = sent_back(decide(town, client_id="short"))["code"]
    token = redeem(town, code, auth=("short", "s")).json()["access_token"]
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi(endpoint=town.endpoint, token=token).whoami()
    assert caught.value.response.status_code == 401


@pytest.mark.parametrize(
    "changed",
    [
        {"client_id": "unknown"},
        {"redirect_uri": "https://evil.example/login/callback"},
        {"redirect_uri": "http://127.0.0.1.evil.example/login/callback"},
        {"redirect_uri": "http://evil@127.0.0.1:7860/login/callback"},
        {"redirect_uri": "http://127.0.0.1:7860/elsewhere"},
        {"redirect_uri": "http://127.0.0.1:port/login/callback"},
        {"redirect_uri": "https://127.0.0.1/login/callback"},
        {"redirect_uri": ""},
    ],
)
def test_nobody_is_sent_anywhere_unless_it_is_sure(town: LocalHub, changed: dict[str, str]):
    for response in (ask(town, **changed), httpx2.post(f"{town.endpoint}/oauth/authorize", data=ASKED | changed)):
        assert response.status_code == 400
        assert "location" not in response.headers


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"response_type": "token"}, "unsupported_response_type"),
        ({"scope": "openid root"}, "invalid_scope"),
        ({"code_challenge_method": "plain"}, "invalid_request"),
        ({"code_challenge": "short"}, "invalid_request"),
    ],
)
def test_other_errors_are_the_applications_to_show(town: LocalHub, changed: dict[str, str], error: str):
    back = sent_back(ask(town, **changed))
    assert (back["error"], back["state"]) == (error, ASKED["state"])
    assert "code" not in back


@pytest.mark.parametrize(("user", "decision"), [("ann", "deny"), ("nobody", "approve"), ("ann", "")])
def test_whoever_does_not_agree_is_sent_back_without_a_code(town: LocalHub, user: str, decision: str):
    back = sent_back(decide(town, user, decision))
    assert back["error"] == "access_denied"
    assert "code" not in back


def test_a_hub_in_another_process_keeps_applications_and_tokens(tmp_path):
    with HubProcess(tmp_path / "hub", users=USERS, apps=[APP]) as hub:
        token = redeem(hub, sent_back(decide(hub))["code"]).json()["access_token"]
    with HubProcess(tmp_path / "hub", users=USERS) as hub:
        assert HfApi(endpoint=hub.endpoint, token=token).whoami()["name"] == "ann"
        assert ask(hub).status_code == 200
