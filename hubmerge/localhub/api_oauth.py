"""Handlers of OAuth: what there is, the consent page, tokens, and whose they are."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from html import escape
from urllib.parse import parse_qsl, unquote, urlencode

from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from hubmerge.localhub import api_oidc
from hubmerge.localhub.auth import require_user
from hubmerge.localhub.http import Call
from hubmerge.localhub.oauth import SCOPES, Grant, OAuthApp, profile
from hubmerge.localhub.publishers import RefusedError

_ASKED = ("client_id", "redirect_uri", "response_type", "scope", "state", "nonce", "code_challenge",
          "code_challenge_method")  # fmt: skip
_CHALLENGE = re.compile(r"[\w-]{43}", re.A)
_PAGE = """\
<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title></head>
<body style="font: 1rem/1.5 system-ui, sans-serif; max-width: 36rem; margin: 10vh auto; padding: 0 1rem">
<main><h1>{title}</h1>{content}</main>
</body>
</html>
"""
_CONSENT = """
<p>{app} asks for: {scopes}.</p>
<form method="post" action="/oauth/authorize">{hidden}
<p><label for="user">Sign in as</label> <select id="user" name="user">{users}</select></p>
<p><button name="decision" value="approve">Authorize</button> <button name="decision" value="deny">Deny</button></p>
</form>
"""


def configuration(call: Call) -> Response:
    """``GET /.well-known/openid-configuration``."""
    at = f"{call.base_url}/oauth"
    return JSONResponse({
        "issuer": call.base_url, "authorization_endpoint": f"{at}/authorize", "token_endpoint": f"{at}/token",
        "userinfo_endpoint": f"{at}/userinfo", "jwks_uri": f"{at}/jwks", "scopes_supported": SCOPES,
        "response_types_supported": ["code"], "grant_types_supported": ["authorization_code"],
        "subject_types_supported": ["public"], "id_token_signing_alg_values_supported": ["RS256"],
        "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post"],
        "code_challenge_methods_supported": ["S256"],
    })  # fmt: skip


def keys(call: Call) -> Response:
    """``GET /oauth/jwks``."""
    return JSONResponse(call.core.oauth.keys())


def ask(call: Call) -> Response:
    """``GET /oauth/authorize``: a page on which somebody agrees, or does not."""
    asked = {name: call.query.get(name, "") for name in _ASKED}
    found = _checked(call, asked)
    if isinstance(found, Response):
        return found
    hidden = "".join(f'<input type="hidden" name="{name}" value="{escape(value)}">' for name, value in asked.items())
    users = "".join(f"<option>{escape(name)}</option>" for name in call.core.accounts.names())
    scopes = escape(", ".join(asked["scope"].split()) or "nothing")
    content = _CONSENT.format(app=escape(found.name), scopes=scopes, hidden=hidden, users=users)
    return _page(f"Sign in to {found.name}", content)


def decide(call: Call) -> Response:
    """``POST /oauth/authorize``: what the page sends."""
    form = _form(call)
    asked = {name: form.get(name, "") for name in _ASKED}
    found = _checked(call, asked)
    if isinstance(found, Response):
        return found
    user = form.get("user", "")
    if form.get("decision") != "approve" or not call.core.accounts.exists(user):
        return _back(asked, error="access_denied", error_description="The user denied the request")
    grant = Grant(
        found.client_id, asked["redirect_uri"], user, asked["scope"], asked["code_challenge"], asked["nonce"]
    )  # fmt: skip
    return _back(asked, code=call.core.oauth.agree(grant))


def _checked(call: Call, asked: Mapping[str, str]) -> OAuthApp | Response:
    """The application; or an answer, which goes nowhere else as long as it is not sure that it may."""
    app = call.core.oauth.app(asked["client_id"])
    if app is None or not app.may_redirect_to(asked["redirect_uri"]):
        what = "there is no such application" if app is None else "the application may not send people there"
        return _page("This sign-in cannot be", f"<p>{escape(what)}</p>", 400)
    if asked["response_type"] != "code":
        return _back(asked, error="unsupported_response_type")
    if unknown := set(asked["scope"].split()) - set(SCOPES):
        return _back(asked, error="invalid_scope", error_description=f"unknown: {sorted(unknown)}")
    challenge = (asked["code_challenge"], asked["code_challenge_method"])
    if challenge != ("", "") and (challenge[1] != "S256" or not _CHALLENGE.fullmatch(challenge[0])):
        return _back(asked, error="invalid_request", error_description="only S256 challenges are taken")
    return app


def token(call: Call) -> Response:
    """``POST /oauth/token``: for a code, as a form; or for the identity of a job, as JSON."""
    if not call.request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        return api_oidc.exchange(call)
    form = _form(call)
    try:
        if form.get("grant_type") != "authorization_code":
            raise RefusedError("unsupported_grant_type")
        found = call.core.oauth.redeem(form, *_credentials(call, form), call.base_url)
    except RefusedError as refused:
        status = 401 if refused.error == "invalid_client" else 400
        return JSONResponse({"error": refused.error}, status_code=status, headers=_UNKEPT)
    return JSONResponse(found, headers=_UNKEPT)


_UNKEPT = {"cache-control": "no-store"}


def _credentials(call: Call, form: Mapping[str, str]) -> tuple[str, str]:
    """Name and secret of the application, from the header or from the form, not from both (RFC 6749, 2.3.1)."""
    scheme, _, encoded = call.request.headers.get("authorization", "").partition(" ")
    if not scheme:
        return form.get("client_id", ""), form.get("client_secret", "")
    try:
        name, _, secret = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        scheme = ""
    if scheme.lower() != "basic" or "client_secret" in form:
        raise RefusedError("invalid_client")
    return unquote(name), unquote(secret)


def userinfo(call: Call) -> Response:
    """``GET /oauth/userinfo``."""
    return JSONResponse(profile(require_user(call.identity).name, call.base_url))


def _form(call: Call) -> dict[str, str]:
    return dict(parse_qsl(call.body.read().decode("utf-8", errors="replace"), keep_blank_values=True))


def _back(asked: Mapping[str, str], **values: str) -> Response:
    state = {"state": asked["state"]} if asked["state"] else {}
    joint = "&" if "?" in asked["redirect_uri"] else "?"
    return RedirectResponse(f"{asked['redirect_uri']}{joint}{urlencode({**values, **state})}", 303, _UNKEPT)


def _page(title: str, content: str, status: int = 200) -> Response:
    return HTMLResponse(_PAGE.format(title=escape(title), content=content), status, _UNKEPT)
