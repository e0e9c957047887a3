"""Every kind of fault, as a real client sees it."""

from __future__ import annotations

import gzip
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, constants, hf_hub_url, utils
from huggingface_hub.errors import HfHubHTTPError

from hubmerge.localhub import Fault, HubProcess, LocalHub

DATA = hashlib.sha256(b"seed").digest() * 20_000  # 640,000 bytes


@pytest.fixture
def large(api: HfApi, hub: LocalHub) -> str:
    """Address of a large file's content, signed."""
    api.upload_file(path_or_fileobj=DATA, path_in_repo="w.bin", repo_id="local/m")
    return httpx2.head(hf_hub_url("local/m", "w.bin", endpoint=hub.endpoint)).headers["Location"]


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The client's pauses between retries, which do not happen."""
    pauses: list[float] = []
    monkeypatch.setattr(utils._http.time, "sleep", pauses.append)
    return pauses


def test_status_with_headers_is_retried_by_the_client(api: HfApi, hub: LocalHub, no_waiting: list[float]):
    rule = hub.faults.add(Fault.rate_limited("/preupload/", reset_s=7))
    api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="local/m")
    assert rule.hits == 1
    assert no_waiting == [8]
    assert [r.status for r in hub.requests.find("POST", "/preupload/")] == [429, 200]


def test_retry_after_and_server_errors(large: str, hub: LocalHub, no_waiting: list[float]):
    hub.faults.add(Fault(path="/_cdn/", status=503, headers={"Retry-After": "3"}, body="busy", times=2))
    answer = utils.http_backoff("GET", large)
    assert (answer.status_code, answer.content == DATA, len(no_waiting)) == (200, True, 2)


def test_errors_reach_the_caller(api: HfApi, hub: LocalHub):
    hub.faults.add(Fault(method="POST", path="/commit/", status=500, body="boom"))
    with pytest.raises(HfHubHTTPError) as caught:
        api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="local/m")
    assert caught.value.response.status_code == 500
    assert not api.file_exists("local/m", "a.txt")


def test_reset_before_headers(large: str, hub: LocalHub):
    hub.faults.add(Fault(path="/_cdn/", reset=True))
    with pytest.raises(httpx2.ReadError):
        httpx2.get(large)
    assert httpx2.get(large).content == DATA


def read_until_it_breaks(address: str, timeout: float = 5) -> tuple[bytes, int, type[Exception] | None]:
    """What arrives, how much was promised, and how it ended."""
    received = bytearray()
    with httpx2.stream("GET", address, timeout=timeout) as answer:
        promised = int(answer.headers["Content-Length"])
        try:
            for chunk in answer.iter_raw():
                received += chunk
        except httpx2.HTTPError as error:
            return bytes(received), promised, type(error)
    return bytes(received), promised, None


def test_reset_after_some_bytes(large: str, hub: LocalHub):
    hub.faults.add(Fault(path="/_cdn/", reset_after_bytes=100_000))
    assert read_until_it_breaks(large) == (DATA[:100_000], len(DATA), httpx2.ReadError)
    assert read_until_it_breaks(large) == (DATA, len(DATA), None)


def test_early_clean_close(large: str, hub: LocalHub):
    hub.faults.add(Fault(path="/_cdn/", truncate_after_bytes=1234))
    assert read_until_it_breaks(large) == (DATA[:1234], len(DATA), httpx2.RemoteProtocolError)


def test_the_client_resumes_a_download_that_broke(
    large: str, api: HfApi, hub: LocalHub, no_waiting: list[float], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    # of broken connections, its plain download resumes those that were closed early, not those that were reset
    hub.faults.add(Fault(method="GET", path="/_cdn/", truncate_after_bytes=200_000, times=2))
    assert Path(api.hf_hub_download("local/m", "w.bin")).read_bytes() == DATA
    ranges = [r.range for r in hub.requests.find("GET", "/_cdn/")]
    assert ranges == [None, "bytes=200000-", "bytes=400000-"]


def test_upload_reset_and_retried(api: HfApi, hub: LocalHub, no_waiting: list[float]):
    rule = hub.faults.add(Fault(method="PUT", reset_upload_after_bytes=1000, times=2))
    api.upload_file(path_or_fileobj=DATA, path_in_repo="w.bin", repo_id="local/m")
    assert rule.hits == 2
    assert Path(api.hf_hub_download("local/m", "w.bin")).read_bytes() == DATA


def test_delay_before_headers(large: str, hub: LocalHub):
    hub.faults.add(Fault(path="/_cdn/", delay_s=0.5))
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.get(large, timeout=0.2)
    assert httpx2.get(large, timeout=5).content == DATA


def test_slow_drip(large: str, hub: LocalHub):
    hub.faults.add(Fault(path="/_cdn/", rate_bytes_s=40_000))
    started = time.monotonic()
    assert httpx2.get(large, headers={"Range": "bytes=0-19999"}).content == DATA[:20_000]
    assert 0.4 < time.monotonic() - started < 3


def test_stall(large: str, hub: LocalHub):
    hub.faults.add(Fault(path="/_cdn/", stall_after_bytes=5000))
    assert read_until_it_breaks(large, timeout=0.3) == (DATA[:5000], len(DATA), httpx2.ReadTimeout)
    hub.faults.add(Fault(path="/_cdn/", stall_after_bytes=5000, stall_s=0.1))
    assert read_until_it_breaks(large) == (DATA, len(DATA), None)


def put(hub: LocalHub, api: HfApi, content: bytes, timeout: float | None = None) -> httpx2.Response:
    """Send a large file as the client does, without its patience."""
    oid = hashlib.sha256(content).hexdigest()
    asked = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": len(content)}]}
    url = f"{hub.endpoint}/local/m.git/info/lfs/objects/batch"
    answer = httpx2.post(url, json=asked, headers={"Authorization": f"Bearer {hub.token}"}).json()
    return httpx2.put(answer["objects"][0]["actions"]["upload"]["href"], content=content, timeout=timeout)


def test_a_server_that_takes_no_more(api: HfApi, hub: LocalHub):
    hub.faults.add(Fault(method="PUT", stall_upload_after_bytes=50_000))
    with pytest.raises(httpx2.WriteTimeout):
        put(hub, api, bytes(30_000_000), timeout=0.3)
    assert put(hub, api, bytes(30_000_000)).status_code == 200


def test_a_server_that_takes_it_slowly(api: HfApi, hub: LocalHub):
    hub.faults.add(Fault(method="PUT", upload_rate_bytes_s=1_000_000))
    started = time.monotonic()
    assert put(hub, api, DATA).status_code == 200
    assert 0.5 < time.monotonic() - started < 10


def test_a_wrong_byte_on_the_way_to_the_server(api: HfApi, hub: LocalHub):
    hub.faults.add(Fault(method="PUT", corrupt_upload_at=100_000))
    refused = put(hub, api, DATA)
    assert (refused.status_code, "does not match its announced hash" in refused.text) == (400, True)
    assert put(hub, api, DATA).status_code == 200


def test_expired_address(large: str, api: HfApi, hub: LocalHub):
    hub.faults.add(Fault.expired_url())
    with pytest.raises(HfHubHTTPError) as caught:
        utils.hf_raise_for_status(httpx2.get(large))
    assert caught.value.response.status_code == 403
    assert "expired" in caught.value.response.text
    assert httpx2.get(large).status_code == 200


def test_whole_file_instead_of_the_range(large: str, hub: LocalHub):
    hub.faults.add(Fault(path="/_cdn/", ignore_range=True))
    answer = httpx2.get(large, headers={"Range": "bytes=10-19"})
    assert (answer.status_code, len(answer.content)) == (200, len(DATA))
    answer = httpx2.get(large, headers={"Range": "bytes=10-19"})
    assert (answer.status_code, answer.content) == (206, DATA[10:20])


def test_wrong_bytes(large: str, hub: LocalHub):
    hub.faults.add(Fault(path="/_cdn/", corrupt_at=7))
    content = httpx2.get(large, headers={"Range": "bytes=100-199"}).content
    assert [i for i in range(100) if content[i] != DATA[100 + i]] == [7]


def test_wrong_etag(api: HfApi, hub: LocalHub, large: str):
    hub.faults.add(Fault(method="HEAD", path="/resolve/", etag="0" * 64))
    url = hf_hub_url("local/m", "w.bin", endpoint=hub.endpoint)
    assert api.get_hf_file_metadata(url=url).etag == "0" * 64
    assert api.get_hf_file_metadata(url=url).etag == hashlib.sha256(DATA).hexdigest()


def test_compressed_body_ignores_the_range(large: str, hub: LocalHub):
    hub.faults.add(Fault(path="/_cdn/", gzip=True))
    with httpx2.stream("GET", large, headers={"Range": "bytes=0-9"}) as answer:
        raw = b"".join(answer.iter_raw())
    assert (answer.status_code, answer.headers["Content-Encoding"]) == (200, "gzip")
    assert "Content-Length" not in answer.headers
    assert gzip.decompress(raw) == DATA


def test_rules_are_counted_and_cleared(large: str, hub: LocalHub):
    rule = hub.faults.add(Fault(method="GET", path="/_cdn/", skip=1, times=2, status=418))
    assert [httpx2.get(large).status_code for _ in range(5)] == [200, 418, 418, 200, 200]
    assert (rule.seen, rule.hits) == (5, 2)
    hub.faults.add(Fault(times=None, status=500))
    assert httpx2.get(large).status_code == 500
    hub.faults.clear()
    assert httpx2.get(large).status_code == 200


def test_server_wide_bandwidth(large: str, hub: LocalHub, api: HfApi):
    hub.limits.read_bytes_s = 1_000_000
    started = time.monotonic()
    assert httpx2.get(large).content == DATA
    assert 0.4 < time.monotonic() - started < 5
    hub.limits.read_bytes_s, hub.limits.write_bytes_s = None, 1_000_000
    started = time.monotonic()
    api.upload_file(path_or_fileobj=DATA[::-1], path_in_repo="v.bin", repo_id="local/m")
    assert 0.4 < time.monotonic() - started < 5


def test_the_admin_endpoint(tmp_path: Path):
    with HubProcess(tmp_path / "hub") as hub:
        admin = f"{hub.endpoint}/_admin"
        rule = httpx2.post(f"{admin}/faults", json={"path": "/_health", "status": 418, "headers": {"X-Y": "z"}}).json()
        answer = httpx2.get(f"{hub.endpoint}/_health")
        assert (answer.status_code, answer.headers["X-Y"]) == (418, "z")
        assert httpx2.get(f"{hub.endpoint}/_health").json() == {"status": "ok"}
        assert [(r["id"], r["hits"]) for r in httpx2.get(f"{admin}/faults").json()] == [(rule["id"], 1)]
        assert [r["status"] for r in httpx2.get(f"{admin}/requests").json()] == [418, 200]
        assert httpx2.post(f"{admin}/faults", json={"pth": "x"}).status_code == 400
        assert httpx2.post(f"{admin}/faults", json={"path": "("}).status_code == 400
        assert httpx2.put(f"{admin}/limits", json={"read_bytes_s": 5e6}).json()["read_bytes_s"] == 5e6
        assert httpx2.delete(f"{admin}/faults").json() == []
        assert httpx2.get(f"{admin}/nothing").status_code == 404
    assert hub.stop() == 0


def test_admin_is_off_unless_asked_for(start_hub: Callable[..., LocalHub]):
    hub = start_hub(faults=False)
    assert httpx2.get(f"{hub.endpoint}/_admin/requests").status_code == 404
