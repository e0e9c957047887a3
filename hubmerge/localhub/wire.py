"""What crosses the wire: a log of all requests, and server-wide bandwidth limits."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import unquote

from hubmerge.localhub.protocol import ZEROCOPY, Message, Receive, Scope, Send

LOG_LENGTH = 100_000
SLICE_BYTES = 256 << 10
BURST_S = 0.1


@dataclass(slots=True)
class RequestRecord:
    """One request; counts grow while it is being answered.

    Attributes:
        path: Decoded path.
        port: Port it came in on, which tells the API from a separate CDN.
        range: The ``Range`` header.
        authorized: Whether an ``Authorization`` header came along (its value is not kept).
        status: 0 until the answer starts; stays 0 if there was none.
    """

    method: str
    path: str
    query: str
    port: int
    range: str | None
    authorized: bool
    status: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    started_at: float = field(default_factory=time.time)


class RequestLog:
    """The latest requests, oldest first."""

    def __init__(self) -> None:
        self._records: deque[RequestRecord] = deque(maxlen=LOG_LENGTH)
        self._lock = threading.Lock()

    def add(self, record: RequestRecord) -> None:
        """Append one."""
        with self._lock:
            self._records.append(record)

    def __iter__(self) -> Iterator[RequestRecord]:
        with self._lock:
            return iter(list(self._records))

    def __len__(self) -> int:
        return len(self._records)

    def clear(self) -> None:
        """Forget everything so far."""
        with self._lock:
            self._records.clear()

    def find(self, method: str | None = None, path: str = "", status: int | None = None) -> list[RequestRecord]:
        """Requests of a method (any if ``None``) whose path contains a match of the regular expression."""
        return [
            record
            for record in self
            if method in (None, record.method) and re.search(path, record.path) and status in (None, record.status)
        ]

    def as_dicts(self) -> list[dict[str, Any]]:
        """All records, ready for JSON."""
        return [asdict(record) for record in self]


@dataclass(slots=True)
class Limits:
    """Server-wide bandwidth, changeable while the server runs; ``None`` is unlimited.

    Attributes:
        read_bytes_s: What all downloads together may take.
        write_bytes_s: What all uploads together may take.
    """

    read_bytes_s: float | None = None
    write_bytes_s: float | None = None


class _Throttle:
    """Shares a rate among all who take from it, in order of arrival."""

    def __init__(self) -> None:
        self._free_at = 0.0

    async def take(self, count: int, rate: float | None) -> None:
        if rate is None or not count:
            return
        at = time.monotonic()
        # A little credit for time lost elsewhere, or the rate would never be reached.
        self._free_at = max(at - BURST_S, self._free_at) + count / rate
        await asyncio.sleep(max(0.0, self._free_at - at))


class WireMiddleware:
    """Counts and, if asked to, slows what passes between the network and an application."""

    def __init__(self, app: Any, log: RequestLog, limits: Limits) -> None:
        self._app = app
        self._log = log
        self._limits = limits
        self._reads = _Throttle()
        self._writes = _Throttle()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http" or scope["path"].startswith("/_admin/"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        asked = headers.get(b"range")
        record = RequestRecord(
            scope["method"], unquote(scope["raw_path"].decode("ascii")), scope["query_string"].decode("ascii"),
            scope["server"][1], asked.decode("latin-1") if asked else None, b"authorization" in headers,
        )  # fmt: skip
        self._log.add(record)

        async def counted_receive() -> Message:
            message = await receive()
            size = len(message.get("body", b""))
            record.request_bytes += size
            await self._writes.take(size, self._limits.write_bytes_s)
            return message

        async def counted_send(message: Message) -> None:
            # Counts move before the bytes do: a client that has its answer must find it in the log.
            if message["type"] == "http.response.start":
                record.status = message["status"]
                await send(message)
            elif message["type"] == ZEROCOPY:
                record.response_bytes += message["count"]
                await send(message)
            else:
                record.response_bytes += len(message.get("body", b""))
                await self._send_body(message, send)

        if self._limits.read_bytes_s is not None:
            scope["extensions"].pop(ZEROCOPY, None)
        await self._app(scope, counted_receive, counted_send)

    async def _send_body(self, message: Message, send: Send) -> None:
        rate, body = self._limits.read_bytes_s, message.get("body", b"")
        if rate is None or len(body) <= SLICE_BYTES:
            await self._reads.take(len(body), rate)
            await send(message)
            return
        for start in range(0, len(body), SLICE_BYTES):
            part = body[start : start + SLICE_BYTES]
            await self._reads.take(len(part), rate)
            more = bool(message.get("more_body", False)) or start + SLICE_BYTES < len(body)
            await send({"type": "http.response.body", "body": part, "more_body": more})
