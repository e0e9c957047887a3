"""API handlers about jobs: hardware, start, state, logs, cancel."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from hubmerge.localhub.auth import require_user, require_writer
from hubmerge.localhub.errors import forbidden
from hubmerge.localhub.http import Call
from hubmerge.localhub.jobs import MACHINES, Job


def hardware(call: Call) -> Response:
    """``GET /api/jobs/hardware``."""
    return JSONResponse(
        [
            {
                "name": m.name, "prettyName": m.pretty_name, "cpu": m.cpu, "ram": m.ram,
                "ephemeralStorage": m.storage, "accelerator": m.accelerator,
                "unitCostMicroUSD": m.micro_usd_per_minute, "unitCostUSD": m.micro_usd_per_minute / 1e6,
                "unitLabel": "minute",
            }
            for m in MACHINES
        ]
    )  # fmt: skip


def start(call: Call) -> Response:
    """``POST /api/jobs/{namespace}``."""
    namespace = call.params["namespace"]
    user = require_writer(call.identity, namespace)
    return JSONResponse(_view(call.core.jobs.start(namespace, user.name, call.json(), call.base_url)))


def _find(call: Call) -> Job:
    namespace = call.params["namespace"]
    if not require_user(call.identity).owns(namespace):
        raise forbidden(f"Forbidden: you don't have the rights to see the jobs of {namespace}")
    return call.core.jobs.find(namespace, call.params["id"])


def state(call: Call) -> Response:
    """``GET /api/jobs/{namespace}/{id}``."""
    return JSONResponse(_view(_find(call)))


def cancel(call: Call) -> Response:
    """``POST /api/jobs/{namespace}/{id}/cancel``."""
    require_writer(call.identity, call.params["namespace"])
    job = _find(call)
    call.core.jobs.cancel(job)
    return JSONResponse(_view(job))


def logs(call: Call) -> Response:
    """``GET /api/jobs/{namespace}/{id}/logs``: server-sent events, until the job has ended."""
    job = _find(call)

    def events() -> Iterator[str]:
        yield _event(job.created_at, f"===== Job started at {job.created_at} =====")
        for time, text in call.core.jobs.events(job):
            yield _event(time, text)

    return StreamingResponse(events(), media_type="text/event-stream")


def _event(time: str, text: str) -> str:
    return f"data: {json.dumps({'timestamp': time, 'data': text})}\n\n"


def _view(job: Job) -> dict[str, Any]:
    with job.changed:
        return {
            "id": job.id, "createdAt": job.created_at, "startedAt": job.started_at, "finishedAt": job.finished_at,
            "dockerImage": job.spec.get("dockerImage"), "spaceId": job.spec.get("spaceId"),
            "command": job.spec.get("command"), "arguments": job.spec.get("arguments"),
            "environment": job.spec.get("environment"), "flavor": job.spec.get("flavor"),
            "labels": job.spec.get("labels"), "status": {"stage": job.stage, "message": job.message},
            "owner": {"id": job.namespace, "name": job.namespace, "type": "user"},
            "initiator": {"type": "user", "id": job.creator, "name": job.creator},
        }  # fmt: skip
