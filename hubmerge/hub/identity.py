"""A CI job's own identity, exchanged for short-lived tokens of the Hub: its "Trusted Publishers" (RFC 8693).

huggingface_hub does the same for one resource of a process, which ``HF_OIDC_RESOURCE`` names. A job that publishes to
one repository and reads gated ones needs two.
"""

from __future__ import annotations

import os
import threading
from time import monotonic

from hubmerge.errors import AccessError

_GRANT_TYPE = "urn:ietf:params:oauth:grant-type:token-exchange"
_ID_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:id_token"  # noqa: S105 - a type of tokens, no token
_MARGIN_S = 300.0
"""A token is replaced so long before it expires."""


class JobToken:
    """Gives a valid token at every call, for one resource.

    Args:
        resource: A repository, to write to it, or a user's name, to read what that user may of gated repositories.
        endpoint: Address of the Hub.
    """

    def __init__(self, resource: str, endpoint: str) -> None:
        self._resource, self._endpoint = resource, endpoint
        self._lock = threading.Lock()
        self._token, self._valid_until = "", 0.0

    def __repr__(self) -> str:
        return f"JobToken({self._resource!r})"

    def __call__(self) -> str:
        """The token.

        Raises:
            AccessError: The job has no identity.
            HfHubHTTPError: GitHub or the Hub refused.
        """
        with self._lock:
            now = monotonic()
            if now >= self._valid_until:
                self._token, lifetime_s = self._exchanged()
                self._valid_until = now + max(lifetime_s - _MARGIN_S, 0.0)
            return self._token

    def _exchanged(self) -> tuple[str, float]:
        from huggingface_hub import get_session, hf_raise_for_status

        body = {
            "grant_type": _GRANT_TYPE,
            "subject_token_type": _ID_TOKEN_TYPE,
            "subject_token": self._identity(),
            "resource": self._resource,
        }
        response = get_session().post(f"{self._endpoint}/oauth/token", json=body)
        hf_raise_for_status(response)
        answer = response.json()
        return str(answer["access_token"]), float(answer.get("expires_in", 0))

    def _identity(self) -> str:
        """What the job is, as GitHub certifies it to this Hub."""
        from huggingface_hub import get_session, hf_raise_for_status

        url, token = (os.environ.get(f"ACTIONS_ID_TOKEN_REQUEST_{name}") for name in ("URL", "TOKEN"))
        if not url or not token:
            raise AccessError(
                f"cannot use the job's identity for {self._resource}: it has none",
                hint="Give the job `permissions: id-token: write`.",
            )
        headers = {"Authorization": f"Bearer {token}"}
        response = get_session().get(url, params={"audience": self._endpoint}, headers=headers)
        hf_raise_for_status(response)
        return str(response.json()["value"])
