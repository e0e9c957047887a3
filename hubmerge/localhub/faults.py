"""Faults on purpose: rules that make chosen requests fail the way networks and servers really fail."""

from __future__ import annotations

import asyncio
import re
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from hubmerge.localhub.protocol import CONNECTION, ZEROCOPY, HubProtocol, Message, Receive, Scope, Send

DRIP_INTERVAL_S = 0.02
DELIVERY_GRACE_S = 0.05

EXPIRED_BODY = "<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"


@dataclass(frozen=True, slots=True)
class Fault:
    """What to do to which requests. Effects may be combined.

    Attributes:
        method: HTTP method; any if ``None``.
        path: Regular expression, searched in the decoded path. Large files come from ``^/_cdn/`` and go to ``^/_lfs/``.
        times: How many matching requests are hit; all of them if ``None``.
        skip: How many matching requests are let through first.
        status: Answer with this status instead of asking the hub.
        headers: Headers of that answer; or, without ``status``, headers replaced on the real one.
        body: Body of that answer.
        delay_s: Wait before doing anything.
        reset: Reset the connection (TCP RST) without an answer.
        reset_after_bytes: Reset it after that many body bytes.
        reset_upload_after_bytes: Reset it after that many bytes of the request's body were received.
        stall_upload_after_bytes: Receive no more of the request's body after that many bytes.
        upload_rate_bytes_s: Receive the request's body no faster than this.
        corrupt_upload_at: Invert the byte at this offset of the request's body.
        truncate_after_bytes: Close it cleanly after that many body bytes, although more were promised.
        stall_after_bytes: Stop sending after that many body bytes, for ``stall_s``.
        stall_s: Length of that pause; until the client gives up if ``None``.
        rate_bytes_s: Send the body no faster than this.
        ignore_range: Answer a range request with 200 and the whole file.
        corrupt_at: Invert the byte at this offset of the body.
        etag: Send this ETag (and X-Linked-Etag).
        gzip: Compress the body and ignore the range, as some CDNs do.
    """

    method: str | None = None
    path: str = ""
    times: int | None = 1
    skip: int = 0
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = ""
    delay_s: float = 0.0
    reset: bool = False
    reset_after_bytes: int | None = None
    reset_upload_after_bytes: int | None = None
    stall_upload_after_bytes: int | None = None
    upload_rate_bytes_s: float | None = None
    corrupt_upload_at: int | None = None
    truncate_after_bytes: int | None = None
    stall_after_bytes: int | None = None
    stall_s: float | None = None
    rate_bytes_s: float | None = None
    ignore_range: bool = False
    corrupt_at: int | None = None
    etag: str | None = None
    gzip: bool = False

    @staticmethod
    def expired_url(*, times: int | None = 1, skip: int = 0) -> Fault:
        """A download address that has expired: 403 with the storage provider's XML."""
        headers = {"Content-Type": "application/xml"}
        return Fault(path="^/_cdn/", times=times, skip=skip, status=403, headers=headers, body=EXPIRED_BODY)

    @staticmethod
    def rate_limited(path: str = "", *, times: int | None = 1, reset_s: int = 1, method: str | None = None) -> Fault:
        """429 with the Hub's ``RateLimit`` header."""
        headers = {"RateLimit": f'"api";r=0;t={reset_s}', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
        return Fault(method=method, path=path, times=times, status=429, headers=headers, body="Too Many Requests")


@dataclass(slots=True)
class FaultRule:
    """A fault that was registered, and how often it struck."""

    number: int
    fault: Fault
    pattern: re.Pattern[str]
    seen: int = 0
    hits: int = 0

    def strikes(self, method: str, path: str) -> bool:
        """Count the request if it matches, and say whether it is to be hit."""
        if self.fault.method not in (None, method) or not self.pattern.search(path):
            return False
        self.seen += 1
        if self.seen <= self.fault.skip or (self.fault.times is not None and self.hits >= self.fault.times):
            return False
        self.hits += 1
        return True


class FaultBook:
    """The registered rules, in order; the first that strikes decides. Usable from any thread."""

    def __init__(self) -> None:
        self._rules: list[FaultRule] = []
        self._lock = threading.Lock()
        self._next = 1

    def add(self, fault: Fault) -> FaultRule:
        """Register a fault; the returned rule shows its hits."""
        with self._lock:
            rule = FaultRule(self._next, fault, re.compile(fault.path))
            self._next += 1
            self._rules.append(rule)
        return rule

    def remove(self, number: int) -> None:
        """Forget one rule."""
        with self._lock:
            self._rules = [rule for rule in self._rules if rule.number != number]

    def clear(self) -> None:
        """Forget all rules."""
        with self._lock:
            self._rules = []

    def rules(self) -> list[FaultRule]:
        """All rules."""
        with self._lock:
            return list(self._rules)

    def match(self, method: str, path: str) -> Fault | None:
        """The fault that strikes this request."""
        with self._lock:
            return next((rule.fault for rule in self._rules if rule.strikes(method, path)), None)


class _CutError(Exception):
    """The fault has ended the response; the hub's own answer is of no more interest."""


class _FaultyResponse:
    """Passes an application's response on, damaged."""

    def __init__(self, fault: Fault, connection: HubProtocol, send: Send) -> None:
        self._fault = fault
        self._connection = connection
        self._send = send
        self._sent = 0
        self._stalled = False
        self._compressor = zlib.compressobj(wbits=31) if fault.gzip else None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._send({**message, "headers": self._headers(message["headers"])})
            return
        body, more = bytes(message.get("body", b"")), bool(message.get("more_body", False))
        body = _with_wrong_byte(body, self._sent, self._fault.corrupt_at)
        if self._compressor is not None:
            body = self._compressor.compress(body) + (b"" if more else self._compressor.flush())
        await self._deliver(body)
        if not more:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _headers(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        replaced = {key.lower(): value for key, value in self._fault.headers.items()}
        present = {key.lower() for key, _ in headers}
        if self._fault.etag is not None:
            quoted = f'"{self._fault.etag}"'
            replaced |= {key: quoted for key in ("etag", "x-linked-etag") if key.encode() in present}
        dropped = set(replaced)
        if self._compressor is not None:
            replaced["content-encoding"] = "gzip"
            dropped |= {"content-length", "content-encoding"}
        kept = [(key, value) for key, value in headers if key.lower().decode() not in dropped]
        return kept + [(key.encode(), value.encode()) for key, value in replaced.items()]

    async def _deliver(self, body: bytes) -> None:
        while body:
            step, pause = len(body), 0.0
            if self._fault.rate_bytes_s:
                step = min(step, max(1, int(self._fault.rate_bytes_s * DRIP_INTERVAL_S)))
                pause = step / self._fault.rate_bytes_s
            limit = self._next_limit()
            if limit is not None:
                step = min(step, limit - self._sent)
            if step > 0:
                await self._send({"type": "http.response.body", "body": body[:step], "more_body": True})
                self._sent += step
                body = body[step:]
            if limit is not None and self._sent >= limit:
                await self._strike()
            elif pause:
                await asyncio.sleep(pause)

    def _next_limit(self) -> int | None:
        limits = [self._fault.reset_after_bytes, self._fault.truncate_after_bytes]
        if not self._stalled:
            limits.append(self._fault.stall_after_bytes)
        return min((limit for limit in limits if limit is not None), default=None)

    async def _strike(self) -> None:
        if self._sent == self._fault.stall_after_bytes and not self._stalled:
            self._stalled = True
            await self._connection.gone(self._fault.stall_s)
        elif self._sent == self._fault.reset_after_bytes:
            await asyncio.sleep(DELIVERY_GRACE_S)  # a reset takes bytes with it that the client has not read yet
            self._connection.reset()
            await self._connection.gone()
            raise _CutError
        else:
            self._connection.close()
            await self._connection.gone()
            raise _CutError


class _FaultyRequest:
    """Passes a request's body on to an application, damaged."""

    def __init__(self, fault: Fault, connection: HubProtocol, receive: Receive) -> None:
        self._fault = fault
        self._connection = connection
        self._receive = receive
        self._received = 0

    async def __call__(self) -> Message:
        fault, start = self._fault, self._received
        message = await self._receive()
        body = message.get("body", b"")
        self._received += len(body)
        if self._reached(fault.reset_upload_after_bytes):
            self._connection.reset()
        if self._reached(fault.reset_upload_after_bytes) or self._reached(fault.stall_upload_after_bytes):
            await self._connection.gone()  # in a stall, the client's bytes pile up until the kernel takes no more
            return {"type": "http.disconnect"}
        if fault.upload_rate_bytes_s:
            await asyncio.sleep(len(body) / fault.upload_rate_bytes_s)
        return {**message, "body": _with_wrong_byte(body, start, fault.corrupt_upload_at)} if body else message

    def _reached(self, limit_bytes: int | None) -> bool:
        return limit_bytes is not None and self._received >= limit_bytes


class FaultMiddleware:
    """Applies the rules of a book in front of an application."""

    def __init__(self, app: Any, book: FaultBook) -> None:
        self._app = app
        self._book = book

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or spoil it."""
        fault = None
        if scope["type"] == "http" and not scope["path"].startswith("/_admin/"):
            fault = self._book.match(scope["method"], unquote(scope["raw_path"].decode("ascii")))
        if fault is None:
            await self._app(scope, receive, send)
            return
        connection: HubProtocol = scope["extensions"][CONNECTION]
        if fault.delay_s:
            await asyncio.sleep(fault.delay_s)
        if fault.reset:
            connection.reset()
            await connection.gone()
            return
        response = _FaultyResponse(fault, connection, send)
        try:
            if fault.status is not None:
                await self._answer(fault, response, scope["method"])
            else:
                await self._app(_spoiled_scope(scope, fault), _FaultyRequest(fault, connection, receive), response)
        except _CutError:
            return

    async def _answer(self, fault: Fault, response: _FaultyResponse, method: str) -> None:
        body = fault.body.encode()
        length = (b"content-length", str(len(body)).encode())
        await response({"type": "http.response.start", "status": fault.status, "headers": [length]})
        await response({"type": "http.response.body", "body": b"" if method == "HEAD" else body})


def _spoiled_scope(scope: Scope, fault: Fault) -> Scope:
    # Damage is done in Python: the kernel must not send the file past us.
    extensions = {key: value for key, value in scope["extensions"].items() if key != ZEROCOPY}
    headers = scope["headers"]
    if fault.ignore_range or fault.gzip:
        headers = [(key, value) for key, value in headers if key.lower() != b"range"]
    return {**scope, "extensions": extensions, "headers": headers}


def _with_wrong_byte(body: bytes, start: int, at: int | None) -> bytes:
    """A part of a body, which begins at offset ``start`` of it, with the byte at offset ``at`` inverted."""
    if at is None or not start <= at < start + len(body):
        return body
    index = at - start
    return body[:index] + bytes([body[index] ^ 0xFF]) + body[index + 1 :]
