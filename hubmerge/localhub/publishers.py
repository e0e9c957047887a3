"""CI jobs without a secret: an identity provider like GitHub's, and the exchange of its tokens for tokens of the hub.

The exchange is the Hub's own (RFC 8693, as "Trusted Publishers" documents it). The provider stands here because tests
have no other; it signs with a secret of this hub, where GitHub signs with a key that everybody can check.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from typing import Any

from hubmerge.localhub.auth import GATED_REPOS, Accounts, Identity, Role
from hubmerge.localhub.database import Database
from hubmerge.localhub.errors import invalid_token

ACCESS_TTL_S = 3600
GRANT_TYPE = "urn:ietf:params:oauth:grant-type:token-exchange"
ID_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:id_token"  # noqa: S105 - a type of tokens, no token
ACCESS_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105
ROBOT = "[OIDC]"
"""Whom the Hub names as author of what a job without a user of its own commits."""
_REQUESTS = "requests"
_ID_TTL_S = 300


class RefusedError(Exception):
    """An exchange that is not granted; ``error`` is OAuth's word for it, and never says which check failed."""

    def __init__(self, error: str) -> None:
        super().__init__(error)
        self.error = error


class Publishers:
    """Which jobs are trusted, with what, and the tokens that prove who a job is.

    Args:
        database: Where trust is kept.
        accounts: Where tokens are issued.
        secret: Key of the provider's signatures.
    """

    def __init__(self, database: Database, accounts: Accounts, secret: bytes) -> None:
        self._database = database
        self._accounts = accounts
        self._secret = secret

    def trust(self, resource: str, claims: Mapping[str, str]) -> None:
        """Let jobs with these claims write to a repository, or read what a user may read of gated ones.

        Args:
            resource: ``namespace/name``, with ``datasets/`` or ``spaces/`` before it, or a user's name.
            claims: What a job's token must say, word for word; ``branch`` and ``workflow`` (a file's name) stand for
                the ends of GitHub's ``ref`` and ``workflow_ref``.
        """
        with self._database.write() as db:
            db.execute("INSERT INTO publishers VALUES (?, ?)", (resource, json.dumps(dict(claims))))

    def request_token(self, claims: Mapping[str, str]) -> str:
        """What lets a job ask the provider for its identity: GitHub's ``ACTIONS_ID_TOKEN_REQUEST_TOKEN``."""
        return self._signed({**claims, "aud": _REQUESTS})

    def identity_token(self, request_token: str, audience: str, issuer: str) -> str:
        """The identity of a job, for one audience.

        Raises:
            HubError: 401 for a token that is none of a job's.
        """
        claims = self._checked(request_token, _REQUESTS)
        if claims is None:
            raise invalid_token()
        now = int(time.time())
        return self._signed({**claims, "iss": issuer, "aud": audience, "iat": now, "exp": now + _ID_TTL_S})

    def exchange(self, body: Mapping[str, Any], audience: str) -> dict[str, Any]:
        """A token of the hub for a job's identity.

        Raises:
            RefusedError: The request is malformed, or nobody trusts such a job with that.
        """
        resource, subject = body.get("resource"), body.get("subject_token")
        expected = (body.get("grant_type"), body.get("subject_token_type")) == (GRANT_TYPE, ID_TOKEN_TYPE)
        if not expected or not isinstance(resource, str) or not isinstance(subject, str) or not resource:
            raise RefusedError("invalid_request")
        claims = self._checked(subject, audience)
        if claims is None or claims["exp"] < time.time() or not self._is_trusted(resource, claims):
            raise RefusedError("invalid_grant")
        of_repo = "/" in resource
        role: Role = "write" if of_repo else "read"
        identity = Identity(ROBOT if of_repo else resource, role, (), scope=resource if of_repo else GATED_REPOS)
        prefix = "hf_jwt_" if of_repo else "hf_oauth_"
        return {
            "access_token": self._accounts.issue(identity, prefix, ACCESS_TTL_S),
            "token_type": "bearer",
            "expires_in": ACCESS_TTL_S,
            "issued_token_type": ACCESS_TOKEN_TYPE,
        }

    def _is_trusted(self, resource: str, claims: Mapping[str, Any]) -> bool:
        rows = self._database.connection().execute("SELECT claims FROM publishers WHERE resource = ?", (resource,))
        known = {**claims, "branch": _branch(claims), "workflow": _workflow(claims)}
        return any(all(known.get(name) == value for name, value in json.loads(row["claims"]).items()) for row in rows)

    def _signed(self, claims: Mapping[str, Any]) -> str:
        text = ".".join(_encoded(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
        return f"{text}.{self._signature(text)}"

    def _checked(self, token: str, audience: str) -> dict[str, Any] | None:
        """A token's claims; None if it is not ours, or for somebody else."""
        text, _, signature = token.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._signature(text).encode()):
            return None
        claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text.partition(".")[2] + "=="))
        return claims if claims["aud"] == audience else None

    def _signature(self, text: str) -> str:
        return _encoded(hmac.new(self._secret, text.encode(), hashlib.sha256).digest())


def _encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def _branch(claims: Mapping[str, Any]) -> str:
    return str(claims.get("ref", "")).removeprefix("refs/heads/")


def _workflow(claims: Mapping[str, Any]) -> str:
    return str(claims.get("workflow_ref", "")).partition("@")[0].rpartition("/")[2]
