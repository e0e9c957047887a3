"""Addresses that grant access by themselves: HMAC-signed and expiring, like a CDN's."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlencode

from hubmerge.localhub.errors import HubError


class Signer:
    """Signs and checks paths with query parameters.

    Args:
        secret: Key; addresses stay valid across restarts as long as it is the same.
        ttl_s: Lifetime of new addresses.
    """

    def __init__(self, secret: bytes, ttl_s: float) -> None:
        self._secret = secret
        self.ttl_s = ttl_s

    def sign(self, path: str, parameters: Mapping[str, str | int]) -> str:
        """``path?parameters&expires=…&signature=…``."""
        query = {key: str(value) for key, value in parameters.items()}
        query["expires"] = f"{time.time() + self.ttl_s:.3f}"
        query["signature"] = self._signature(path, query)
        return f"{path}?{urlencode(query)}"

    def check(self, path: str, query_string: str) -> dict[str, str]:
        """The parameters of an address that this hub signed and that has not expired.

        Raises:
            HubError: 403.
        """
        query = dict(parse_qsl(query_string, keep_blank_values=True))
        given = query.pop("signature", "")
        if not hmac.compare_digest(given, self._signature(path, query)):
            raise HubError(403, "Access denied: the address carries no valid signature")
        if float(query.pop("expires")) < time.time():
            raise HubError(403, "Access denied: the address has expired")
        return query

    def _signature(self, path: str, query: Mapping[str, str]) -> str:
        text = path + "?" + urlencode(sorted(query.items()))
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()
