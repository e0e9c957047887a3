"""Signing in to applications with an account of the hub: OAuth's authorization code grant with PKCE (RFC 6749, 7636).

There are no passwords here: whoever opens the consent page chooses whom to sign in as.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from hubmerge.localhub.auth import Accounts, Identity, Role
from hubmerge.localhub.database import Database
from hubmerge.localhub.publishers import RefusedError

APP_TTL_S = 8 * 3600.0
CODE_TTL_S = 60.0
WRITING = frozenset(("contribute-repos", "write-repos", "manage-repos"))
"""Scopes that let a token change repositories."""
SCOPES = (
    "openid", "profile", "email", "read-billing", "read-memberships", "read-repos", "gated-repos", *sorted(WRITING),
    "inference-api", "jobs", "webhooks", "write-discussions",
)  # fmt: skip
_LOOPBACK = ("127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class OAuthApp:
    """An application that people may sign in to.

    Attributes:
        redirect_uris: Where people are sent back to. On http://127.0.0.1 any port will do (RFC 8252, 7.3).
        ttl_s: How long its tokens are valid.
    """

    client_id: str
    client_secret: str = field(repr=False)
    redirect_uris: tuple[str, ...]
    name: str = "An application"
    ttl_s: float = APP_TTL_S

    def may_redirect_to(self, uri: str) -> bool:
        """Whether somebody may be sent back there."""
        return any(_comparable(uri) == _comparable(own) for own in self.redirect_uris)


def _comparable(uri: str) -> str:
    try:
        parts = urlsplit(uri)
        if parts.scheme == "http" and parts.hostname in _LOOPBACK and parts.username is None:
            _ = parts.port  # which must be a number
            return parts._replace(netloc=parts.hostname).geturl()
    except ValueError:
        return ""
    return uri


@dataclass(frozen=True, slots=True)
class Grant:
    """What somebody agreed to, as it stands behind a code."""

    client_id: str
    redirect_uri: str
    user: str
    scope: str
    challenge: str
    nonce: str


class OAuth:
    """Applications, codes and tokens.

    Args:
        database: Where they are kept.
        accounts: Where tokens are issued.
        apps: Those that are known from now on, besides those of earlier.
    """

    def __init__(self, database: Database, accounts: Accounts, apps: Sequence[OAuthApp] = ()) -> None:
        self._database, self._accounts = database, accounts
        for app in apps:
            self.register(app)

    def register(self, app: OAuthApp) -> None:
        """Add an application, or change one."""
        row = (app.client_id, app.client_secret, json.dumps(app.redirect_uris), app.name, app.ttl_s)
        with self._database.write() as db:
            db.execute("INSERT OR REPLACE INTO apps VALUES (?, ?, ?, ?, ?)", row)

    def app(self, client_id: str) -> OAuthApp | None:
        """An application by its public name."""
        rows = self._database.connection().execute("SELECT * FROM apps WHERE client_id = ?", (client_id,))
        row = rows.fetchone()
        if row is None:
            return None
        uris = tuple(json.loads(row["redirect_uris"]))
        return OAuthApp(row["client_id"], row["client_secret"], uris, row["name"], row["ttl_s"])

    def agree(self, grant: Grant) -> str:
        """A code for what somebody agreed to, to be redeemed once and soon."""
        code, now = secrets.token_urlsafe(32), time.time()
        row = (_digest(code), json.dumps([getattr(grant, name) for name in Grant.__slots__]), now + CODE_TTL_S)
        with self._database.write() as db:
            db.execute("DELETE FROM codes WHERE expires_at < ?", (now,))
            db.execute("INSERT INTO codes VALUES (?, ?, ?)", row)
        return code

    def redeem(self, body: Mapping[str, str], client_id: str, secret: str, issuer: str) -> dict[str, Any]:
        """A token for a code.

        Args:
            body: The request's: ``code``, ``redirect_uri`` and, if the code is bound to one, ``code_verifier``.
            client_id: Who asks.
            secret: The application's.
            issuer: This hub.

        Raises:
            RefusedError: Of whatever is wrong, it says only OAuth's word.
        """
        app = self.app(client_id)
        if app is None or not hmac.compare_digest(app.client_secret.encode(), secret.encode()):
            raise RefusedError("invalid_client")
        grant = self._take(body.get("code", ""))
        expected = (app.client_id, body.get("redirect_uri"))
        if grant is None or (grant.client_id, grant.redirect_uri) != expected or not _proves(grant, body):
            raise RefusedError("invalid_grant")
        scopes = grant.scope.split()
        role: Role = "write" if WRITING.intersection(scopes) else "read"
        token = self._accounts.issue(Identity(grant.user, role, ()), "hf_oauth_", app.ttl_s)
        found = {"access_token": token, "token_type": "bearer", "expires_in": int(app.ttl_s), "scope": grant.scope}
        if "openid" in scopes:
            found["id_token"] = self._signed(self._claims(grant, issuer))
        return found

    def _take(self, code: str) -> Grant | None:
        """What a code is for, which then is for nothing any more, whatever comes of it."""
        with self._database.write() as db:
            row = db.execute("SELECT * FROM codes WHERE digest = ?", (_digest(code),)).fetchone()
            db.execute("DELETE FROM codes WHERE digest = ?", (_digest(code),))
        return Grant(*json.loads(row["granted"])) if row is not None and row["expires_at"] > time.time() else None

    def _claims(self, grant: Grant, issuer: str) -> dict[str, Any]:
        now = int(time.time())
        times = {"iat": now, "exp": now + 3600, "auth_time": now}
        nonce = {"nonce": grant.nonce} if grant.nonce else {}
        return {**profile(grant.user, issuer), **times, **nonce, "iss": issuer, "aud": grant.client_id}

    # --- identity tokens, which anybody can check

    @cached_property
    def _key(self) -> Any:
        from cryptography.hazmat.primitives.asymmetric import rsa

        return rsa.generate_private_key(65537, 2048)

    def keys(self) -> dict[str, Any]:
        """What identity tokens are checked with: a JSON Web Key Set; another one in every process."""
        numbers = self._key.public_key().public_numbers()
        n, e = (_encoded(value.to_bytes((value.bit_length() + 7) // 8)) for value in (numbers.n, numbers.e))
        return {"keys": [{"kty": "RSA", "use": "sig", "alg": "RS256", "kid": self._kid, "n": n, "e": e}]}

    @cached_property
    def _kid(self) -> str:
        return _digest(str(self._key.public_key().public_numbers().n))[:16]

    def _signed(self, claims: Mapping[str, Any]) -> str:
        from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
        from cryptography.hazmat.primitives.hashes import SHA256

        header = {"alg": "RS256", "typ": "JWT", "kid": self._kid}
        text = ".".join(_encoded(json.dumps(part).encode()) for part in (header, claims))
        return f"{text}.{_encoded(self._key.sign(text.encode(), PKCS1v15(), SHA256()))}"


def profile(user: str, issuer: str) -> dict[str, str]:
    """Who a user is, in OpenID's words."""
    return {"sub": user, "name": user, "preferred_username": user, "profile": f"{issuer}/{user}", "picture": ""}


def _proves(grant: Grant, body: Mapping[str, str]) -> bool:
    """Whether who redeems a code is who began (RFC 7636); a code that is bound to nobody takes no proof either."""
    verifier = body.get("code_verifier", "")
    given = _encoded(hashlib.sha256(verifier.encode()).digest()) if verifier else ""
    return hmac.compare_digest(given, grant.challenge)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")
