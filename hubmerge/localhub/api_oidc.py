"""API handlers about jobs without a secret: their identity, and what it is exchanged for."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from hubmerge.localhub.errors import HubError, invalid_token
from hubmerge.localhub.http import Call
from hubmerge.localhub.publishers import RefusedError

PROVIDER_PATH = "/_oidc/token"


def provide(call: Call) -> Response:
    """``GET /_oidc/token?audience=…``, which GitHub answers for a job that may have an identity."""
    scheme, _, token = call.request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise invalid_token()
    audience = call.query.get("audience") or call.base_url
    return JSONResponse({"value": call.core.publishers.identity_token(token, audience, f"{call.base_url}/_oidc")})


def exchange(call: Call) -> Response:
    """``POST /oauth/token``."""
    try:
        return JSONResponse(call.core.publishers.exchange(call.json(), call.base_url))
    except HubError:
        error = "invalid_request"
    except RefusedError as refused:
        error = refused.error
    return JSONResponse({"error": error, "error_description": "The exchange was refused"}, status_code=400)
