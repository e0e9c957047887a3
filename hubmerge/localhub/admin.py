"""The admin endpoint that tests use on a hub in another process: fault rules, request log, bandwidth."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hubmerge.localhub.faults import Fault, FaultBook, FaultRule
from hubmerge.localhub.protocol import Receive, Scope, Send
from hubmerge.localhub.wire import Limits, RequestLog


def _rule(rule: FaultRule) -> dict[str, Any]:
    return {"id": rule.number, "hits": rule.hits, "fault": asdict(rule.fault)}


class AdminMiddleware:
    """Answers ``/_admin/…`` and passes everything else on. Not protected: only for test servers on loopback."""

    def __init__(self, app: Any, book: FaultBook, log: RequestLog, limits: Limits) -> None:
        self._app = app
        self._book = book
        self._log = log
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or not scope["path"].startswith("/_admin/"):
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        body = await request.body()
        try:
            payload = json.loads(body) if body else {}
            response = self._answer(request.method, scope["path"].removeprefix("/_admin/"), payload)
        except (TypeError, ValueError, re.error) as error:
            response = JSONResponse({"error": str(error)}, status_code=400)
        await response(scope, receive, send)

    def _answer(self, method: str, what: str, payload: dict[str, Any]) -> Response:
        if what == "faults":
            if method == "POST":
                unknown = payload.keys() - {f.name for f in fields(Fault)}
                if unknown:
                    raise ValueError(f"unknown fault settings: {sorted(unknown)}")
                return JSONResponse(_rule(self._book.add(Fault(**payload))))
            if method == "DELETE":
                self._book.clear()
            return JSONResponse([_rule(rule) for rule in self._book.rules()])
        if what == "requests":
            if method == "DELETE":
                self._log.clear()
            return JSONResponse(self._log.as_dicts())
        if what == "limits":
            if method == "PUT":
                for name in ("read_bytes_s", "write_bytes_s"):
                    if name in payload:
                        setattr(self._limits, name, payload[name])
            return JSONResponse(asdict(self._limits))
        return JSONResponse({"error": f"no such thing: {what}"}, status_code=404)
