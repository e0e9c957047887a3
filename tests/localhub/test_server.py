"""The server as a process: starting, stopping, being killed, staying responsive, staying small."""

from __future__ import annotations

import hashlib
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import psutil
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError

from hubmerge.localhub import HubProcess, LocalHub, RootInUseError


@pytest.fixture(autouse=True)
def _plain_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def push(api: HfApi, worker: int, stop: threading.Event, acknowledged: list[tuple[str, str, bytes]]) -> None:
    number = 0
    while not stop.is_set():
        content = hashlib.sha256(f"{worker}-{number}".encode()).digest() * 20_000
        files = {f"{worker}/{number}.bin": content, f"{worker}/{number}.txt": content[:99]}
        operations = [CommitOperationAdd(path, data) for path, data in files.items()]
        try:
            oid = api.create_commit("local/m", operations, commit_message=f"{worker}-{number}").oid
        except (HfHubHTTPError, httpx2.HTTPError, RuntimeError, OSError):
            return
        except AttributeError as error:
            # huggingface_hub closes its shared client after a lost connection; another thread may then find None.
            assert "'NoneType' object has no attribute" in str(error)  # noqa: PT017
            return
        acknowledged.append((oid, f"{worker}/{number}.bin", content))
        number += 1


def test_killed_during_pushes_it_loses_nothing_it_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda _seconds: None)
    acknowledged: list[tuple[str, str, bytes]] = []
    root, port = tmp_path / "hub", 0
    for round_number in range(3):
        hub = HubProcess(root, port=port, part_size_bytes=200_000)
        port = hub.port
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("local/m", exist_ok=True)
        stop, before = threading.Event(), len(acknowledged)
        workers = [
            threading.Thread(target=push, args=(api, 10 * round_number + n, stop, acknowledged)) for n in range(3)
        ]
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + 30
        while len(acknowledged) < before + 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        hub.kill()
        stop.set()
        for worker in workers:
            worker.join()
    with LocalHub(root) as survivor:
        assert not list((root / "tmp").iterdir())
        api = HfApi(endpoint=survivor.endpoint, token=survivor.token)
        history = {commit.commit_id for commit in api.list_repo_commits("local/m")}
        assert len(acknowledged) >= 12
        assert {oid for oid, _, _ in acknowledged} <= history
        for oid in history:  # every commit, acknowledged or not, is whole
            for item in api.list_repo_tree("local/m", recursive=True, revision=oid):
                sha256 = getattr(getattr(item, "lfs", None), "sha256", None)
                assert sha256 is None or survivor.core.objects.size_bytes(sha256) == item.size
        for oid, path, content in acknowledged:
            url = hf_hub_url("local/m", path, revision=oid, endpoint=survivor.endpoint)
            assert httpx2.get(url, follow_redirects=True).content == content
        for file in (root / "objects").glob("*/*"):
            assert hashlib.sha256(file.read_bytes()).hexdigest() == file.parent.name + file.name
        push(api, 99, _after_one(), acknowledged)
        assert api.file_exists("local/m", "99/0.bin")


def _after_one() -> threading.Event:
    class Once(threading.Event):
        def is_set(self) -> bool:
            seen = super().is_set()
            self.set()
            return seen

    return Once()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_cleanly(tmp_path: Path, number: signal.Signals):
    hub = HubProcess(tmp_path / "hub")
    assert httpx2.get(f"{hub.endpoint}/_health").status_code == 200
    psutil.Process(hub.pid).send_signal(number)
    psutil.Process(hub.pid).wait(10)
    assert hub.stop() == 0


def test_one_folder_belongs_to_one_server(tmp_path: Path):
    with LocalHub(tmp_path / "hub"):
        with pytest.raises(RootInUseError, match="another hub"):
            LocalHub(tmp_path / "hub")
        with pytest.raises(RuntimeError, match="did not start"):
            HubProcess(tmp_path / "hub")
    with LocalHub(tmp_path / "hub"):
        pass


def test_taken_ports_are_reported(tmp_path: Path):
    with LocalHub(tmp_path / "a") as hub, pytest.raises(OSError, match="in use"):
        LocalHub(tmp_path / "b", port=hub.port)


def test_content_outlives_the_server(tmp_path: Path):
    with LocalHub(tmp_path / "hub") as hub:
        hub.create_repo("local/m", private=True)
        address = hub.endpoint
    with LocalHub(tmp_path / "hub") as hub:
        assert HfApi(endpoint=hub.endpoint, token=hub.token).model_info("local/m").private
        assert hub.endpoint != address


def test_importing_it_is_cheap():
    code = "import sys, hubmerge.localhub as _; print(*{'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_a_slow_transfer_does_not_hold_up_others(tmp_path: Path):
    size = 32 << 20
    with HubProcess(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("local/m")
        content = bytes(size)
        api.upload_file(path_or_fileobj=content, path_in_repo="w.bin", repo_id="local/m")
        address = httpx2.head(hf_hub_url("local/m", "w.bin", endpoint=hub.endpoint)).headers["Location"]
        lazy = socket.create_connection(("127.0.0.1", hub.port))
        lazy.sendall(f"GET {address.partition(str(hub.port))[2]} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        half = socket.create_connection(("127.0.0.1", hub.port))
        half.sendall(b"POST /api/validate-yaml HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        started = time.monotonic()
        for _ in range(20):
            assert httpx2.get(f"{hub.endpoint}/_health", timeout=5).status_code == 200
        assert time.monotonic() - started < 5
        lazy.close()
        half.close()
        assert httpx2.get(address).content == content


def test_memory_stays_bounded_whatever_the_size(tmp_path: Path):
    path = tmp_path / "w.bin"
    with path.open("wb") as file:
        file.truncate(200 << 20)
    with HubProcess(tmp_path / "hub", part_size_bytes=80 << 20) as hub:
        process = psutil.Process(hub.pid)
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("local/m")
        before = process.memory_info().rss
        api.upload_file(path_or_fileobj=path, path_in_repo="w.bin", repo_id="local/m")
        with httpx2.stream(
            "GET", hf_hub_url("local/m", "w.bin", endpoint=hub.endpoint), follow_redirects=True
        ) as answer:
            received = sum(len(chunk) for chunk in answer.iter_raw(1 << 20))
        assert received == 200 << 20
        assert process.memory_info().rss - before < 64 << 20


def test_clients_that_go_away_are_no_news(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with HubProcess(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("local/m")
        content = bytes(32 << 20)
        api.upload_file(path_or_fileobj=content, path_in_repo="w.bin", repo_id="local/m")
        address = httpx2.head(hf_hub_url("local/m", "w.bin", endpoint=hub.endpoint)).headers["Location"]
        path = address.partition(str(hub.port))[2]
        for method, body in (("GET", b""), ("GET", b""), ("PUT", b"x")):
            client = socket.create_connection(("127.0.0.1", hub.port))
            client.sendall(
                f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {9 * len(body)}\r\n\r\n".encode() + body
            )
            client.recv(1000)
            client.close()
        lazy = socket.create_connection(("127.0.0.1", hub.port))
        lazy.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert httpx2.get(address).content == content
        assert hub.stop() == 0  # with a transfer still under way
        lazy.close()
    noise = [line for line in capfd.readouterr().err.splitlines() if "graceful shutdown" not in line]
    assert noise == []


def test_a_hub_that_never_started_lets_go_of_its_folder(tmp_path: Path):
    LocalHub(tmp_path / "hub").stop()
    LocalHub(tmp_path / "hub").stop()
