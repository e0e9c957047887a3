"""Ranged reads of one remote file over HTTP, straight into the caller's buffer."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx2

from hubmerge.errors import SourceError, TransportError
from hubmerge.spec import ByteSource

log = logging.getLogger(__name__)

RETRY_STATUS = frozenset({408, 425, 429})  # and every 5xx
EXPIRED_STATUS = frozenset({401, 403, 404, 410})
# A connection that delivered this much has earned a fresh set of attempts: a long read may survive many resets, yet
# a server that trickles a few bytes per connection still runs out of them.
PROGRESS_BYTES = 1 << 20

_RATE_LIMIT = re.compile(r"r\s*=\s*(\d+)\s*;\s*t\s*=\s*(\d+)")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class Location:
    """Where a file's bytes can be fetched for now. URL and headers may carry credentials, so neither is in the repr."""

    url: str = field(repr=False)
    size_bytes: int
    etag: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def host(self) -> str:
        """Host and port: the part of the URL that may be shown."""
        return urlsplit(self.url).netloc.rpartition("@")[2]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How patient to be with a server."""

    attempts: int = 6
    """Requests in a row that may fail without progress."""
    base_wait_s: float = 1.0
    max_wait_s: float = 16.0
    """Cap of the exponential back-off."""
    max_server_wait_s: float = 330.0
    """Longest wait a server may ask for; the Hub counts its quotas over 300 s."""
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0
    """Longest silence in the middle of a transfer."""

    def timeout(self) -> httpx2.Timeout:
        """The same as the HTTP client wants it; a read timeout also bounds writes and the wait for a connection."""
        return httpx2.Timeout(self.read_timeout_s, connect=self.connect_timeout_s)

    def wait_s(self, failures: int) -> float:
        """Back-off after the n-th failure in a row, n from 1."""
        return float(min(self.max_wait_s, self.base_wait_s * 2 ** (failures - 1)))


def is_retryable(status: int) -> bool:
    """Whether the same request may succeed later."""
    return status in RETRY_STATUS or status >= 500


def server_wait_s(status: int, headers: Mapping[str, str]) -> float | None:
    """Seconds the server asks to wait, by ``RateLimit: "api";r=0;t=55`` or ``Retry-After``; None if it does not ask."""
    # RateLimit comes with every answer; it is a reason to wait only when it is the reason for the refusal.
    if status == 429 and (match := _RATE_LIMIT.search(headers.get("ratelimit", ""))) and match[1] == "0":
        return float(match[2]) + 1.0
    value = headers.get("retry-after", "").strip()
    if value.isdigit():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when - datetime.now(UTC)).total_seconds()) if when.tzinfo else None


class Traffic:
    """Counts requests and body bytes; shared by as many sources and threads as wanted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests = 0
        self.bytes_read = 0

    def add(self, *, requests: int = 0, bytes_read: int = 0) -> None:
        """Count."""
        with self._lock:
            self.requests += requests
            self.bytes_read += bytes_read


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one request achieved: the bytes that count, and what went wrong."""

    received: int
    problem: str | None = None
    wait_s: float | None = None
    expired: bool = False


class HttpSource(ByteSource):
    """One remote file, read by ranges; safe to use from several threads.

    Args:
        locate: Gives the current location; called with a location that no longer works, it fetches a new one. It raises
            the error that the user should see when the file is not accessible any more.
        client: Gives the HTTP client to use for the next request (a shared client may be replaced at any time).
        label: The file's name in messages, e.g. ``org/model@1a2b3c4/model.safetensors``.
        size_bytes: Length of the file.
        policy: Timeouts and retries.
        traffic: Counter to add to; a private one by default.
    """

    def __init__(
        self,
        locate: Callable[[Location | None], Location],
        client: Callable[[], httpx2.Client],
        *,
        label: str,
        size_bytes: int,
        policy: RetryPolicy | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self.size_bytes = size_bytes
        self.label = label
        self._locate = locate
        self._client = client
        self._policy = policy or RetryPolicy()
        self._own = Traffic()
        self._traffic = traffic
        self._closed = threading.Event()

    @property
    def requests(self) -> int:
        """GET requests sent so far."""
        return self._own.requests

    @property
    def bytes_read(self) -> int:
        """Body bytes received so far, repeated ones included."""
        return self._own.bytes_read

    def close(self) -> None:
        """Wake every waiting reader and refuse further reads."""
        self._closed.set()

    def read_into(self, start_byte: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``start_byte`` on.

        Raises:
            SourceError: The range lies outside the file, or the source was closed.
            TransportError: The bytes could not be had within the policy's attempts.
        """
        view = buffer.cast("B")
        end_byte = start_byte + len(view)
        if not 0 <= start_byte <= end_byte <= self.size_bytes:
            raise SourceError(
                f"{self.label}: bytes {start_byte} to {end_byte} asked for, the file has {self.size_bytes}",
                hint="The file's header and its length disagree; check that the upload of the source is complete.",
            )
        done = failures = 0
        stale: Location | None = None
        while done < len(view):
            location = self._locate(stale)
            outcome = self._fetch(location, start_byte + done, view[done:])
            done += outcome.received
            if outcome.problem is None:
                continue
            failures = 1 if outcome.received >= PROGRESS_BYTES else failures + 1
            stale = location if outcome.expired else None
            self._pause(start_byte + done, end_byte, failures, outcome, location)

    def _fetch(self, location: Location, start_byte: int, view: memoryview) -> _Outcome:
        """One request; fills the front of ``view``."""
        headers = {**location.headers, "Accept-Encoding": "identity"}
        headers["Range"] = f"bytes={start_byte}-{start_byte + len(view) - 1}"
        received = 0
        client = self._client()
        self._count(requests=1)
        try:
            with client.stream(
                "GET", location.url, headers=headers, timeout=self._policy.timeout(), follow_redirects=True
            ) as response:
                refusal = self._refusal(response, start_byte, start_byte + len(view))
                if refusal is not None:
                    return refusal
                for chunk in response.iter_raw():
                    self._raise_if_closed()
                    self._count(bytes_read=len(chunk))
                    if received + len(chunk) > len(view):
                        return _Outcome(0, "the server sent more bytes than it announced")
                    view[received : received + len(chunk)] = chunk
                    received += len(chunk)
        except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as error:
            return _Outcome(received, _describe(error))
        except RuntimeError:
            # Another thread closed the shared client under us; the next call to client() gives a new one.
            if not client.is_closed:
                raise
            return _Outcome(received, "the connection pool was closed")
        if received < len(view):
            return _Outcome(received, f"the body ended after {received} of {len(view)} bytes")
        return _Outcome(received)

    def _refusal(self, response: httpx2.Response, start_byte: int, end_byte: int) -> _Outcome | None:
        """Why this response's body must not be used; None if it is exactly what was asked for."""
        status, headers = response.status_code, response.headers
        if status in EXPIRED_STATUS:
            return _Outcome(0, f"HTTP {status}: the download address is no longer valid", expired=True)
        if is_retryable(status):
            return _Outcome(0, f"HTTP {status}", wait_s=server_wait_s(status, headers))
        if status == 200 and not (start_byte == 0 and end_byte == self.size_bytes):
            return _Outcome(0, "the server ignored the range (HTTP 200 instead of 206)")
        if status not in (200, 206):
            raise TransportError(
                f"{self.label}: HTTP {status} from {response.url.host} for bytes {start_byte} to {end_byte}",
                hint="The file on the server is not what its listing says; check the repository, then run again.",
            )
        if headers.get("content-encoding", "identity").lower() != "identity":
            return _Outcome(0, f"the server sent a {headers['content-encoding']} encoded body")
        if headers.get("content-length", str(end_byte - start_byte)) != str(end_byte - start_byte):
            return _Outcome(0, f"the server announced {headers['content-length']} bytes of {end_byte - start_byte}")
        if status == 206:
            given = headers.get("content-range", "")
            match = _CONTENT_RANGE.fullmatch(given.strip())
            wanted = (str(start_byte), str(end_byte - 1))
            if not match or match.group(1, 2) != wanted or match[3] not in ("*", str(self.size_bytes)):
                return _Outcome(0, f"the server sent the range {given!r} of {self.size_bytes} bytes")
        return None

    def _pause(self, start_byte: int, end_byte: int, failures: int, outcome: _Outcome, location: Location) -> None:
        """Wait before the next attempt, or give up."""
        wait_s = self._policy.wait_s(failures) if outcome.wait_s is None else outcome.wait_s
        if failures >= self._policy.attempts or wait_s > self._policy.max_server_wait_s:
            asked = f", which asks to wait {wait_s:.0f} s" if wait_s > self._policy.max_server_wait_s else ""
            raise TransportError(
                f"{self.label}: bytes {start_byte} to {end_byte} could not be read from {location.host}{asked}; "
                f"attempt {failures}: {outcome.problem}",
                hint="Check the connection and run the same command again, later if the server is overloaded.",
            )
        if outcome.expired and failures == 1:
            wait_s = 0.0
        log.info("%s at byte %d: %s; next attempt in %.1f s", self.label, start_byte, outcome.problem, wait_s)
        self._closed.wait(wait_s)
        self._raise_if_closed()

    def _count(self, *, requests: int = 0, bytes_read: int = 0) -> None:
        for traffic in (self._own, self._traffic):
            if traffic is not None:
                traffic.add(requests=requests, bytes_read=bytes_read)

    def _raise_if_closed(self) -> None:
        if self._closed.is_set():
            raise SourceError(f"{self.label}: read after close", hint="This is a bug in hubmerge; please report it.")


def _describe(error: Exception) -> str:
    """The error in words; some timeouts have no text of their own."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
