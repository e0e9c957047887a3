"""Who a request comes from: an encrypted cookie says so, or, on one's own machine, who is logged in there."""

from __future__ import annotations

import base64
import ipaddress
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hubmerge.errors import AccessError, UsageError
from hubmerge.space.visitors import Visitor

if TYPE_CHECKING:
    from starlette.responses import Response

MAX_COOKIE_BYTES = 4000
"""Of name and value; browsers keep no more than 4096 of both with the attributes."""
_ENCRYPTED = re.compile(r"[\w-]+", re.ASCII)
"""Without this, a cookie would be taken in other spellings, too: decoders of base64 pass over what they do not know."""
_PURPOSE = b"hubmerge: sessions of the web form, 1"
_SETTINGS = ("OAUTH_CLIENT_ID", "OAUTH_CLIENT_SECRET", "OAUTH_SCOPES", "OPENID_PROVIDER_URL")
_HINT = "A Space with `hf_oauth: true` sets OAUTH_CLIENT_ID, OAUTH_CLIENT_SECRET, OAUTH_SCOPES, OPENID_PROVIDER_URL."


@dataclass(frozen=True, slots=True)
class Site:
    """Where the server is reached."""

    origins: tuple[str, ...]
    """Scheme, host and port, as browsers send them; the first is the one that is shown and redirected to."""

    @property
    def url(self) -> str:
        """The server's address, without a slash at the end."""
        return self.origins[0]

    @property
    def secure(self) -> bool:
        """Whether it is reached by https, inside a frame of the Hub's; if not, it is on this machine."""
        return self.url.startswith("https://")

    @property
    def hosts(self) -> tuple[str, ...]:
        """What browsers send as ``Host``."""
        return tuple(origin.partition("://")[2] for origin in self.origins)

    @classmethod
    def of(cls, environment: Mapping[str, str], host: str, port: int) -> Self:
        """From what a Space says of itself (``SPACE_HOST``), or from where the server listens.

        Raises:
            UsageError: It listens on the network, and what it is called there is not said.
        """
        if names := [name.strip() for name in environment.get("SPACE_HOST", "").split(",") if name.strip()]:
            return cls(tuple(f"https://{name.rstrip('/')}" for name in names))
        if not is_loopback(host):
            raise UsageError(
                f"the server would listen on {host}, and under what name it is reached is not said",
                hint="Set SPACE_HOST to the name behind https://, or listen on 127.0.0.1.",
            )
        shown, at = f"[{host}]" if ":" in host else host, "" if port == 80 else f":{port}"
        return cls(tuple(dict.fromkeys(f"http://{name}{at}" for name in (shown, "127.0.0.1", "localhost", "[::1]"))))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Client:
    """This server, as the Hub's OAuth knows it."""

    id: str
    secret: str = field(repr=False)
    scopes: str
    provider: str
    """Address of the Hub that signs people in."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self | None:
        """From the variables that a Space has; None without any of them.

        Raises:
            UsageError: Some are there, others are not.
        """
        given = [environment.get(name, "").strip() for name in _SETTINGS]
        if not any(given):
            return None
        if missing := [name for name, value in zip(_SETTINGS, given, strict=True) if not value]:
            raise UsageError(f"nobody could sign in: {', '.join(missing)} is not set", hint=_HINT)
        return cls(given[0], given[1], given[2], given[3].rstrip("/"))

    def key(self, purpose: bytes) -> bytes:
        """32 bytes that only the holder of the secret can compute; others for every purpose."""
        return HKDF(SHA256(), 32, salt=None, info=purpose).derive(self.secret.encode())


class WithCookies(Protocol):
    """A request of Starlette's or of gradio's."""

    @property
    def cookies(self) -> Any:
        """By name."""


@dataclass(frozen=True, slots=True)
class OwnMachine:
    """Everybody who reaches the server is the one whose machine it is."""

    site: Site
    visitor: Visitor

    def visitor_of(self, request: WithCookies) -> Visitor | None:
        """That one."""
        return self.visitor


class Cookies:
    """Name and token of a visitor in a cookie of theirs, which only this server can read: nothing is kept here.

    The key is derived from the client's secret, so that a restarted server still knows its visitors.

    Args:
        client: Whose secret it is.
        site: Where the server is reached.
        endpoint: The Hub that the tokens are for.
    """

    def __init__(self, client: Client, site: Site, endpoint: str | None) -> None:
        self.client, self.site = client, site
        self._fernet = Fernet(base64.urlsafe_b64encode(client.key(_PURPOSE)))
        self._endpoint = endpoint
        # Browsers take a cookie called so only from this very host, by https.
        self.name = "__Host-hubmerge" if site.secure else "hubmerge"
        self._kind: dict[str, Any] = {
            "path": "/", "httponly": True, "secure": site.secure, "samesite": "none" if site.secure else "lax",
        }  # fmt: skip

    def visitor_of(self, request: WithCookies) -> Visitor | None:
        """Who sent a request; None without a cookie, with one that is not this server's, and after its time."""
        value = request.cookies.get(self.name)
        if not isinstance(value, str) or not _ENCRYPTED.fullmatch(value):
            return None
        try:
            known = json.loads(self._fernet.decrypt(value + "=" * (-len(value) % 4)))
        except InvalidToken:
            return None
        if known["until"] <= time.time():
            return None
        return Visitor(known["name"], known["token"], self._endpoint)

    def begin(self, response: Response, visitor: Visitor, until: float) -> None:
        """Let the sender of the next requests be this visitor.

        Args:
            response: What is answered.
            visitor: As the Hub knows them.
            until: When the token ends, in seconds since 1970.

        Raises:
            AccessError: The token is too long for a cookie.
        """
        known = json.dumps({"name": visitor.name, "token": visitor.token, "until": until})
        value = self._fernet.encrypt(known.encode()).decode().rstrip("=")
        if len(self.name) + len(value) > MAX_COOKIE_BYTES:
            raise AccessError(
                f"the Hub's token has {len(visitor.token)} characters, more than fit into a cookie",
                hint="Run `hubmerge space serve` on your own machine, with HF_TOKEN.",
            )
        response.set_cookie(self.name, value, max_age=max(0, int(until - time.time())), **self._kind)

    def end(self, response: Response) -> None:
        """Let the sender of the next requests be nobody."""
        response.delete_cookie(self.name, **self._kind)


Sessions = Cookies | OwnMachine
"""Either knows a request's visitor: ``visitor_of(request)``."""
