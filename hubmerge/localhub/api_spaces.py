"""API handlers about what Spaces run on. Nothing is run here: it is noted down what was asked for."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from hubmerge.localhub.errors import bad_request
from hubmerge.localhub.http import Call
from hubmerge.localhub.repos import Repo

HARDWARE = "cpu-basic"


def runtime(call: Call) -> Response:
    """``GET /api/spaces/{repo}/runtime``."""
    return _runtime(call, call.core.repos.visible("space", call.params["repo"], call.identity))


def request_hardware(call: Call) -> Response:
    """``POST /api/spaces/{repo}/hardware``."""
    flavor = call.json().get("flavor")
    if not isinstance(flavor, str) or not flavor:
        raise bad_request("Invalid hardware flavor")
    repo, _ = call.core.repos.writable("space", call.params["repo"], call.identity)
    call.core.repos.set_hardware(repo, flavor)
    return _runtime(call, repo)


def _runtime(call: Call, repo: Repo) -> Response:
    hardware = {"current": None, "requested": call.core.repos.hardware(repo) or HARDWARE}
    return JSONResponse({"stage": "STOPPED", "hardware": hardware, "gcTimeout": None, "storage": None})
