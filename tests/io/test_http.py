"""HttpSource against a real server that misbehaves on purpose."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hubmerge.errors import SourceError, TransportError
from hubmerge.hub import Hub
from hubmerge.io.http import HttpSource, Location, RetryPolicy, server_wait_s
from hubmerge.localhub import Fault, LocalHub

SIZE = 3_000_000
CONTENT = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8).tobytes()
FAST = RetryPolicy(
    attempts=4, base_wait_s=0.01, max_wait_s=0.04, max_server_wait_s=5, connect_timeout_s=2, read_timeout_s=0.5
)
CDN = "^/_cdn/"


class Opener:
    """Opens sources on one file the way the Hub client does, and counts how often it asked for the location."""

    def __init__(self, hub: LocalHub, client: httpx2.Client) -> None:
        writer = Hub(hub.endpoint, hub.token, policy=FAST)
        writer.ensure_repo("local/m", True)
        head = writer.head("local/m")
        assert head is not None
        staged = [writer.upload("local/m", "main", CONTENT, "model.safetensors")]
        staged.append(writer.upload("local/m", "main", CONTENT[:100], "small.txt"))
        writer.commit("local/m", staged, parent=head, message="weights")
        hub.requests.clear()
        self.hub = hub
        self.client = client
        self.located = 0

    def locate(self, path: str) -> Callable[[Location | None], Location]:
        url = f"{self.hub.endpoint}/local/m/resolve/main/{path}"
        auth = {"Authorization": f"Bearer {self.hub.token}"}

        known: list[Location] = []

        def locate(stale: Location | None) -> Location:
            if known and known[-1] is not stale:
                return known[-1]
            self.located += 1
            response = self.client.head(url, headers=auth, follow_redirects=False)
            if "location" in response.headers:
                known.append(Location(response.headers["location"], int(response.headers["x-linked-size"])))
            else:
                known.append(Location(url, int(response.headers["content-length"]), headers=auth))
            return known[-1]

        return locate

    def open(self, path: str = "model.safetensors", policy: RetryPolicy = FAST) -> HttpSource:
        size = SIZE if path == "model.safetensors" else 100
        return HttpSource(
            self.locate(path), lambda: self.client, label=f"local/m/{path}", size_bytes=size, policy=policy
        )

    def ranges(self) -> list[str | None]:
        return [r.range for r in self.hub.requests.find("GET", CDN)]


@pytest.fixture
def opener(hub: LocalHub) -> Iterator[Opener]:
    with httpx2.Client(timeout=None) as client:
        yield Opener(hub, client)


def read(source: HttpSource, start: int = 0, end: int = SIZE) -> bytes:
    buffer = bytearray(end - start)
    source.read_into(start, memoryview(buffer))
    return bytes(buffer)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_range_is_the_same_slice(opener: Opener, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, SIZE))
    end = data.draw(st.integers(start, min(SIZE, start + 70_000)))
    assert read(opener.open(), start, end) == CONTENT[start:end]


def test_counts_requests_and_bytes(opener: Opener) -> None:
    source = opener.open()
    assert (source.requests, source.bytes_read) == (0, 0)
    assert read(source, 10, 20) == CONTENT[10:20]
    assert read(source, 5, 5) == b""
    assert (source.requests, source.bytes_read) == (1, 10)
    assert opener.ranges() == ["bytes=10-19"]


def test_fills_a_typed_buffer(opener: Opener) -> None:
    array = np.zeros(1000, dtype=np.float32)
    opener.open().read_into(40, memoryview(array))
    assert array.tobytes() == CONTENT[40:4040]


def test_no_credentials_to_another_origin(opener: Opener) -> None:
    read(opener.open(), 0, 100)
    read(opener.open("small.txt"), 0, 100)
    cdn = opener.hub.requests.find("GET", CDN)
    assert [r.port for r in cdn] == [opener.hub.cdn_port]
    assert not any(r.authorized for r in cdn)
    assert all(r.authorized for r in opener.hub.requests.find("GET", "small.txt"))


def test_range_outside_the_file_is_refused_without_a_request(opener: Opener) -> None:
    source = opener.open()
    for start, length in ((SIZE - 1, 2), (-1, 1), (SIZE + 5, 1)):
        with pytest.raises(SourceError, match=f"the file has {SIZE}"):
            source.read_into(start, memoryview(bytearray(length)))
    assert source.requests == 0


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_recovers_from_passing_failures(opener: Opener, status: int) -> None:
    opener.hub.faults.add(Fault(path=CDN, status=status, times=2))
    source = opener.open()
    assert read(source, 100, 200) == CONTENT[100:200]
    assert source.requests == 3


def test_gives_up_with_what_where_and_next_step(opener: Opener) -> None:
    rule = opener.hub.faults.add(Fault(path=CDN, status=503, times=None))
    with pytest.raises(TransportError) as caught:
        read(opener.open(), 100, 200)
    assert rule.hits == FAST.attempts
    text = str(caught.value)
    for part in (
        "local/m/model.safetensors",
        "bytes 100 to 200",
        f":{opener.hub.cdn_port}",
        "HTTP 503",
        "run the same",
    ):
        assert part in text
    assert "?" not in text  # the signature of the address stays out


def test_rate_limit_is_waited_out(opener: Opener) -> None:
    opener.hub.faults.add(Fault.rate_limited(CDN, reset_s=0))
    started = time.monotonic()
    assert read(opener.open(), 0, 10) == CONTENT[:10]
    assert time.monotonic() - started >= 1.0


def test_retry_after_is_waited_out(opener: Opener) -> None:
    opener.hub.faults.add(Fault(path=CDN, status=503, headers={"Retry-After": "1"}))
    started = time.monotonic()
    assert read(opener.open(), 0, 10) == CONTENT[:10]
    assert time.monotonic() - started >= 1.0


def test_a_server_that_asks_for_too_much_patience_ends_the_read(opener: Opener) -> None:
    opener.hub.faults.add(Fault.rate_limited(CDN, reset_s=3000))
    with pytest.raises(TransportError, match="wait 3001 s"):
        read(opener.open(), 0, 10)


def test_server_wait_s() -> None:
    assert server_wait_s(429, {"ratelimit": '"api";r=0;t=55'}) == 56.0
    assert server_wait_s(429, {"ratelimit": '"api";r=7;t=55'}) is None
    assert server_wait_s(503, {"ratelimit": '"api";r=0;t=55'}) is None
    assert server_wait_s(429, {"ratelimit": '"api";r=3;t=55', "retry-after": "9"}) == 9.0
    assert server_wait_s(503, {"retry-after": "soon"}) is None
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 25 < (server_wait_s(503, {"retry-after": date}) or 0) <= 30
    assert server_wait_s(503, {}) is None


@pytest.mark.parametrize("fault", ["reset_after_bytes", "truncate_after_bytes", "stall_after_bytes"])
def test_resumes_where_the_body_broke_off(opener: Opener, fault: str) -> None:
    opener.hub.faults.add(Fault(path=CDN, **{fault: 1_000_000}))
    source = opener.open()
    assert read(source) == CONTENT
    first, second = opener.ranges()
    assert first == f"bytes=0-{SIZE - 1}"
    assert second is not None
    resumed = int(second.removeprefix("bytes=").partition("-")[0])
    assert 0 < resumed <= 1_000_000
    assert source.bytes_read == SIZE  # nothing was fetched twice


def test_a_long_read_survives_more_breaks_than_attempts(opener: Opener) -> None:
    opener.hub.faults.add(Fault(path=CDN, truncate_after_bytes=1_100_000, times=None))
    source = opener.open(policy=RetryPolicy(attempts=2, base_wait_s=0.01))
    assert read(source) == CONTENT
    assert source.requests == 3


def test_a_trickle_is_not_progress(opener: Opener) -> None:
    rule = opener.hub.faults.add(Fault(path=CDN, truncate_after_bytes=10, times=None))
    with pytest.raises(TransportError, match=r"after 10 of|RemoteProtocolError"):
        read(opener.open())
    assert rule.hits == FAST.attempts


def test_expired_address_is_renewed_once(opener: Opener) -> None:
    opener.hub.faults.add(Fault.expired_url())
    assert read(opener.open(), 7, 70) == CONTENT[7:70]
    assert opener.located == 2  # once at the start, once for the new address


def test_expired_address_that_stays_expired(opener: Opener) -> None:
    opener.hub.faults.add(Fault.expired_url(times=None))
    with pytest.raises(TransportError, match="no longer valid"):
        read(opener.open(), 7, 70)
    assert opener.located == FAST.attempts


def test_error_of_a_refresh_reaches_the_caller(opener: Opener) -> None:
    opener.hub.faults.add(Fault.expired_url(times=None))
    working = opener.locate("model.safetensors")

    def locate(stale: Location | None) -> Location:
        if stale is not None:
            raise SourceError("access was withdrawn")
        return working(None)

    source = HttpSource(locate, lambda: opener.client, label="x", size_bytes=SIZE, policy=FAST)
    with pytest.raises(SourceError, match="access was withdrawn"):
        read(source, 0, 1)


def test_whole_file_may_come_without_a_range(opener: Opener) -> None:
    opener.hub.faults.add(Fault(path=CDN, ignore_range=True, times=None))
    assert read(opener.open()) == CONTENT


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(ignore_range=True), "ignored the range"),
        (Fault(gzip=True), "gzip|ignored the range"),
        (Fault(headers={"Content-Range": f"bytes 0-99/{SIZE}"}), "sent the range"),
        (Fault(headers={"Content-Range": f"bytes 100-199/{SIZE + 1}"}), "sent the range"),
        (Fault(headers={"Content-Range": "nonsense"}), "sent the range"),
        (Fault(headers={"Content-Encoding": "br"}), "br encoded"),
    ],
)
def test_wrong_answers_are_refused(opener: Opener, fault: Fault, words: str) -> None:
    opener.hub.faults.add(replace(fault, path=CDN, times=2))
    source = opener.open()
    assert read(source, 100, 200) == CONTENT[100:200]
    assert source.requests == 3
    opener.hub.faults.add(replace(fault, path=CDN, times=None))
    with pytest.raises(TransportError, match=words):
        read(opener.open(), 100, 200)


def test_gzipped_whole_file_is_refused(opener: Opener) -> None:
    opener.hub.faults.add(Fault(path=CDN, gzip=True, times=None))
    with pytest.raises(TransportError, match="gzip encoded"):
        read(opener.open())


def test_a_file_that_shrank_is_an_error_at_once(opener: Opener) -> None:
    rule = opener.hub.faults.add(Fault(path=CDN, status=416, times=None))
    with pytest.raises(TransportError, match="HTTP 416"):
        read(opener.open(), 0, 10)
    assert rule.hits == 1


def test_nobody_listens() -> None:
    with httpx2.Client() as client:
        source = HttpSource(
            lambda stale: Location("http://127.0.0.1:9/x?X-Signature=secret", 10),
            lambda: client,
            label="a/b",
            size_bytes=10,
            policy=FAST,
        )
        with pytest.raises(TransportError, match=r"127\.0\.0\.1:9.*ConnectError") as caught:
            read(source, 0, 10)
        assert "secret" not in repr(caught.value) + str(caught.value) + repr(Location("http://h/?secret", 1))


def test_many_threads_share_a_source(opener: Opener) -> None:
    opener.hub.faults.add(Fault(path=CDN, status=500, times=3))
    opener.hub.faults.add(Fault(path=CDN, reset_after_bytes=1000, times=3))
    source = opener.open()
    edges = list(range(0, SIZE + 1, SIZE // 12))
    with ThreadPoolExecutor(6) as pool:
        parts = pool.map(lambda span: read(source, *span), itertools.pairwise(edges))
    assert b"".join(parts) == CONTENT


def test_replaced_client_is_picked_up(opener: Opener) -> None:
    first = httpx2.Client()
    clients = [first, opener.client]
    source = HttpSource(
        opener.locate("model.safetensors"), lambda: clients.pop(0), label="m", size_bytes=SIZE, policy=FAST
    )
    first.close()
    assert read(source, 0, 10) == CONTENT[:10]


def test_close_wakes_a_waiting_reader(opener: Opener) -> None:
    opener.hub.faults.add(Fault.rate_limited(CDN, reset_s=3, times=None))
    source = opener.open()
    timer = threading.Timer(0.2, source.close)
    timer.start()
    started = time.monotonic()
    with pytest.raises(SourceError, match="after close"):
        read(source, 0, 10)
    timer.join()
    assert time.monotonic() - started < 2
