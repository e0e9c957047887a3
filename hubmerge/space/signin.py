"""Signing in with Hugging Face and out: OAuth's authorization code with PKCE. The token ends up in a cookie alone."""

from __future__ import annotations

import logging
import re
import time
from typing import Any

import httpx2
from authlib.integrations.base_client import MismatchingStateError, OAuthError
from authlib.integrations.starlette_client import OAuth
from joserfc.errors import JoseError
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from hubmerge.errors import HubMergeError
from hubmerge.hub.translate import scrub
from hubmerge.space.notices import notice
from hubmerge.space.sessions import Cookies
from hubmerge.space.visitors import sign_in

log = logging.getLogger(__name__)

CALLBACK = "/login/callback"
"""Where the Hub sends people back to; what a Space registers by default."""
_PURPOSE = b"hubmerge: a sign-in under way, 1"
_UNDER_WAY_S = 600
_USELESS = (httpx2.HTTPError, LookupError, TypeError, ValueError)
"""What comes of no answer of the Hub's, or of one that makes no sense."""
_DEFAULT_S = 3600.0
"""How long a token lasts whose end the Hub does not state."""


class SignIn:
    """The routes ``/login``, ``/login/callback`` and ``/logout``.

    Args:
        cookies: What is written down about visitors.
        endpoint: The Hub that says whose token it is.
    """

    def __init__(self, cookies: Cookies, endpoint: str | None) -> None:
        client = cookies.client
        self._client, self._site, self._cookies, self._endpoint = client, cookies.site, cookies, endpoint
        self._hub: Any = OAuth().register(
            name="hub",
            client_id=client.id,
            client_secret=client.secret,
            client_kwargs={"scope": client.scopes, "code_challenge_method": "S256"},
            server_metadata_url=f"{client.provider}/.well-known/openid-configuration",
        )

    def routes(self) -> list[Route]:
        """For an application."""
        under_way = Middleware(
            SessionMiddleware, secret_key=self._client.key(_PURPOSE).hex(), session_cookie="hubmerge-sign-in",
            max_age=_UNDER_WAY_S, path="/login", same_site="lax", https_only=self._site.secure,
        )  # fmt: skip
        return [
            Route("/login", self._login, middleware=[under_way]),
            Route(CALLBACK, self._callback, middleware=[under_way]),
            Route("/logout", self._ask_logout, methods=["GET"]),
            Route("/logout", self._logout, methods=["POST"]),
        ]

    async def _login(self, request: Request) -> Response:
        request.session["next"] = own_path(request.query_params.get("next"))
        try:
            sent: Response = await self._hub.authorize_redirect(request, self._site.url + CALLBACK)
        except _USELESS as error:
            return self._failed(error)
        sent.headers["cache-control"] = "no-store"
        return sent

    async def _callback(self, request: Request) -> Response:
        goal = own_path(request.session.pop("next", None))
        try:
            token = await self._hub.authorize_access_token(request)
            secret = token.get("access_token")
            visitor = await run_in_threadpool(sign_in, secret, self._endpoint)
            answer = RedirectResponse(goal, 303, {"cache-control": "no-store"})
            self._cookies.begin(answer, visitor, _end_of(token))
        except MismatchingStateError:
            text = "This sign-in was begun in another browser, or too long ago. Begin it again."
            return _not_signed_in(text, 400)
        except (OAuthError, JoseError) as error:
            return self._refused(str(error.error))
        except _USELESS as error:
            return self._failed(error)
        except HubMergeError as error:
            text = scrub(f"{error.message}. {error.hint}", secret)
            return _not_signed_in(text, 502)
        return answer

    def _refused(self, error: str) -> Response:
        """What OAuth's errors mean, in words; the address's own are not shown, for anybody can write one."""
        if error == "access_denied":
            text = "You did not agree, and so nothing can be done in your name. You can still look around."
            return _not_signed_in(text, 403)
        log.warning("sign-in refused: %s", error[:40].encode("unicode_escape").decode())
        text = "The Hub refused the sign-in. Begin it again; if that does not help, tell whoever runs this page."
        return _not_signed_in(text, 400)

    def _failed(self, error: Exception) -> Response:
        log.warning("the Hub was of no use to sign somebody in: %s", type(error).__name__)
        text = f"{self._client.provider} could not be reached, or is out of order. Try again in a while."
        return _not_signed_in(text, 502)

    async def _ask_logout(self, request: Request) -> Response:
        """A page with a button: a link would let every other page sign people out."""
        visitor = self._cookies.visitor_of(request)
        if visitor is None:
            return notice("You are signed out", "Jobs that you have started go on.")
        text = f"You are signed in as {visitor.name}. Jobs that you have started go on when you sign out."
        return notice("Sign out?", text, link="/logout", name="Sign out", post=True)

    async def _logout(self, _: Request) -> Response:
        answer = RedirectResponse("/", 303, {"cache-control": "no-store"})
        self._cookies.end(answer)
        return answer


def _not_signed_in(text: str, status: int) -> Response:
    return notice("You are not signed in", text, status=status, link="/login", name="Sign in with Hugging Face")


def own_machine_routes(name: str) -> list[Route]:
    """The same routes, where everybody is the one whose machine it is."""

    async def login(_: Request) -> Response:
        return RedirectResponse("/", 303)

    async def logout(_: Request) -> Response:
        text = f"This server works with the token of {name}, who has started it. End the server to sign out."
        return notice("You are on your own machine", text)

    return [Route("/login", login), Route("/logout", logout, methods=["GET", "POST"])]


def own_path(text: str | None) -> str:
    """A path on this server, whatever is given: ``/`` instead of anything that could lead elsewhere."""
    if not text or not text.startswith("/") or not text.isascii() or not text.isprintable() or "\\" in text:
        return "/"
    # Browsers take "//host", however many slashes there are, for another host's address; also after "/..".
    return "/" if "//" in re.split("[?#]", text)[0] else text


def _end_of(token: dict[str, Any]) -> float:
    return float(token.get("expires_at") or time.time() + float(token.get("expires_in") or _DEFAULT_S))
