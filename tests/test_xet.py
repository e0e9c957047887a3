"""Uploads without a file: hf_xet's own streams into a local Hub's storage, and the way by files where there is none."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hubmerge import api
from hubmerge.errors import AccessError, BudgetError, HubMergeError, IntegrityError, PublishError, TransportError
from hubmerge.hub import Hub, xet
from hubmerge.io.http import RetryPolicy
from hubmerge.localhub import Fault, LocalHub, User
from hubmerge.publish import Publisher, PublishOptions
from hubmerge.recipe import Recipe
from tests.end_to_end import support
from tests.end_to_end.killing import Runs
from tests.end_to_end.support import OWNER, Town, save, tensors

FAST = RetryPolicy(attempts=2, base_wait_s=0.01, max_wait_s=0.02, connect_timeout_s=2, read_timeout_s=2)
USERS = (User("ann", "hf_annWriteToken"), User("bob", "hf_bobWriteToken"))
REPO, PATH = "ann/merged", "model.safetensors"
CONTENT = random.Random(0).randbytes(700_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (200, 100) for i in range(3)}
TARGET = "local/merged"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """hf_xet tries again soon, and not often."""
    settings = {"client.retry_max_attempts": 1, "client.retry_base_delay": "10ms"}
    monkeypatch.setattr(xet, "_SETTINGS", {**xet._SETTINGS, **settings})
    xet._session.cache_clear()
    yield
    xet._session.cache_clear()


@pytest.fixture
def server(start_hub: Callable[..., LocalHub], monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """A Hub with xet storage."""
    return with_xet(start_hub, monkeypatch, xet=True, users=USERS)


def with_xet(start_hub: Callable[..., LocalHub], monkeypatch: pytest.MonkeyPatch, **options: object) -> LocalHub:
    """A Hub, and a client library that has not been told to leave xet alone."""
    running = start_hub(**options)
    let_xet(monkeypatch)
    return running


def let_xet(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)


@pytest.fixture
def hub(server: LocalHub, tmp_path: Path) -> Hub:
    made = another(server, tmp_path)
    made.ensure_repo(REPO, private=False)
    return made


def another(server: LocalHub, tmp_path: Path, token: str = USERS[0].token) -> Hub:
    return Hub(server.endpoint, token, cache_dir=tmp_path / "cache", policy=FAST)


def opened(hub: Hub) -> xet.XetStream:
    return hub.open_stream(REPO, "main", PATH)


def fill(stream: xet.XetStream, content: bytes = CONTENT) -> None:
    for start in range(0, len(content), 90_001):
        stream.write(content[start : start + 90_001])


def kept(server: LocalHub) -> list[str]:
    """What the storage knows as a file."""
    return [path.name for path in Path(server.core.xet.url.removeprefix("local://")).rglob("shards/*.mdb")]  # type: ignore[union-attr]


# --- one stream -------------------------------------------------------------------------------------------------


def test_a_stream_becomes_a_file_of_a_commit(hub: Hub, server: LocalHub) -> None:
    assert hub.why_no_stream(REPO) is None
    stream = opened(hub)
    fill(stream)
    staged = hub.upload(REPO, "main", stream, PATH, sha256=SHA256)
    assert (staged.path, staged.size_bytes, staged.sha256) == (PATH, len(CONTENT), SHA256)
    made = hub.commit(REPO, [staged], parent=hub.pin(REPO), message="streamed")
    assert hub.read_small(REPO, made.oid, PATH) == CONTENT
    assert {f.path: f.sha256 for f in hub.list_files(REPO, made.oid)}[PATH] == SHA256
    assert not server.requests.find("PUT", "^/_lfs/")


@contextmanager
def storage_of(server: LocalHub, answer: Callable[[BaseHTTPRequestHandler], object]) -> Iterator[None]:
    """Another server in the place of the storage."""

    class Storage(BaseHTTPRequestHandler):
        def answer(self) -> None:
            answer(self)

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Storage) as storage:
        threading.Thread(target=storage.serve_forever, daemon=True).start()
        assert server.core.xet is not None
        server.core.xet.url = f"http://127.0.0.1:{storage.server_port}"
        yield
        storage.shutdown()


def test_the_storage_does_not_get_the_token_of_the_hub(hub: Hub, server: LocalHub) -> None:
    asked: list[tuple[str, str]] = []

    def refuse(request: BaseHTTPRequestHandler) -> None:
        asked.extend(request.headers.items())
        request.send_error(400)

    with storage_of(server, refuse):
        stream = opened(hub)
        with pytest.raises(HubMergeError, match="cannot upload model"):  # noqa: PT012
            fill(stream)
            stream.finish(SHA256)
    assert {value for name, value in asked if name.lower() == "authorization"} == {"Bearer local"}
    assert USERS[0].token not in str(asked)


def test_other_bytes_than_expected_are_no_file(hub: Hub, server: LocalHub) -> None:
    stream = opened(hub)
    fill(stream)
    with pytest.raises(IntegrityError, match=f"hf_xet has taken 700000 of digest {SHA256}"):
        stream.finish("0" * 64)
    assert kept(server) == []


def test_an_aborted_stream_leaves_nothing(hub: Hub, server: LocalHub) -> None:
    stream = opened(hub)
    fill(stream)
    stream.abort()
    stream.abort()
    assert kept(server) == []
    with pytest.raises(PublishError, match="cannot upload"):
        stream.write(b"more")


def test_abort_does_no_harm_to_what_is_finished(hub: Hub) -> None:
    stream = opened(hub)
    fill(stream)
    staged = hub.upload(REPO, "main", stream, PATH, sha256=SHA256)
    stream.abort()
    made = hub.commit(REPO, [staged], parent=hub.pin(REPO), message="streamed")
    assert hub.read_small(REPO, made.oid, PATH) == CONTENT


def test_a_commit_cannot_name_what_was_never_sent(hub: Hub) -> None:
    stream = opened(hub)
    fill(stream)
    staged = hub.upload(REPO, "main", stream, PATH, sha256=SHA256)
    staged.operation.upload_info.sha256 = bytes(32)  # type: ignore[union-attr]
    with pytest.raises(PublishError, match="pointed to a file that does not exist"):
        hub.commit(REPO, [staged], parent=hub.pin(REPO), message="streamed")


def test_who_may_not_write_gets_no_stream(hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    with pytest.raises(AccessError) as caught:
        opened(another(server, tmp_path, USERS[1].token))
    assert "cannot upload model.safetensors to ann/merged" in caught.value.message
    assert USERS[1].token not in str(caught.value)


def test_a_storage_that_is_not_there_says_what_to_do(hub: Hub, server: LocalHub) -> None:
    stored = server.core.xet
    assert stored is not None
    stored.url = "http://127.0.0.1:9"
    stream = opened(hub)
    with pytest.raises(TransportError) as caught:  # noqa: PT012
        fill(stream)
        stream.finish(SHA256)
    assert "Run the same command again: it continues" in caught.value.hint


# --- where there is none ----------------------------------------------------------------------------------------


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    let_xet(monkeypatch)
    assert xet.unusable() is None
    for module, name, reason in (
        ("hf_xet", "XetSession.new_parcel", "this version of hf_xet has no XetSession.new_parcel"),
        ("hf_xet_of_tomorrow", "XetSession", "hf_xet_of_tomorrow is not installed"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(xet, "_NEEDED", (*xet._NEEDED, (module, name)))
            assert xet.unusable() == reason
    xet._session.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(xet, "_SETTINGS", {"client.of_tomorrow": 4})
        assert str(xet.unusable()).startswith("hf_xet cannot be set up as needed: ")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert xet.unusable() == "xet storage is switched off (HF_HUB_DISABLE_XET)"


def merge_town(hub: LocalHub, tmp_path: Path) -> Town:
    """A base, two models, and a recipe for three shards."""
    town = Town(hub)
    for seed, name in enumerate(("base", "a", "b")):
        town.publish(f"local/{name}", save(tmp_path / name, tensors(seed, SHAPES)))
    (tmp_path / "merge.yaml").write_text(
        "method: ties\nbase: local/base\nmodels: [local/a, local/b]\noutput: {shard_size: 80KB}\n"
    )
    hub.requests.clear()
    return town


def weights(town: Town, repo: str = TARGET) -> dict[str, str]:
    listed = town.api.list_repo_tree(repo)
    return {f.path: f.lfs.sha256 for f in listed if f.path.endswith(".safetensors")}


def pushed(tmp_path: Path, *flags: str, to: str = TARGET) -> dict[str, object]:
    done = support.hubmerge("push", tmp_path / "merge.yaml", "--to", to, "--json", *flags)
    assert done.code == 0, done.text
    answer: dict[str, object] = json.loads(done.out)
    return answer


def test_a_hub_without_xet_gets_files_and_that_is_said_once(
    start_hub: Callable[..., LocalHub],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    town = merge_town(hub := start_hub(users=(OWNER,)), tmp_path)
    let_xet(monkeypatch)
    with caplog.at_level(logging.WARNING, "hubmerge"):
        streamed = pushed(tmp_path, "--upload", "stream")
    assert [r.getMessage() for r in caplog.records if "shards are uploaded" in r.getMessage()] == [
        f"shards are uploaded from files, one at a time: {hub.endpoint} has no xet storage"
    ]
    assert len(hub.requests.find("PUT", "^/_lfs/")) == 3
    assert streamed["peak_disk_bytes"] > 80_000  # type: ignore[operator]
    pushed(tmp_path, to="local/by-file")
    assert weights(town) == weights(town, "local/by-file")


# --- whole pushes -----------------------------------------------------------------------------------------------


@pytest.fixture
def town(start_hub: Callable[..., LocalHub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Town:
    return merge_town(with_xet(start_hub, monkeypatch, xet=True, users=(OWNER,)), tmp_path)


def test_a_streamed_push_publishes_the_same_bytes_without_any_disk(town: Town, tmp_path: Path) -> None:
    refused = support.hubmerge(
        "push", tmp_path / "merge.yaml", "--to", TARGET, "--fetch", "stream", "--max-disk", "1KB"
    )
    assert refused.code == BudgetError.exit_code, refused.text
    answer = pushed(tmp_path, "--upload", "stream", "--fetch", "stream", "--max-disk", "1KB")
    assert answer["peak_disk_bytes"] == 0
    assert not town.hub.requests.find("PUT", "^/_lfs/")
    pushed(tmp_path, to="local/by-file")
    assert len(weights(town)) == 3
    assert weights(town) == weights(town, "local/by-file")
    checked = support.hubmerge("verify", TARGET)
    assert checked.code == 0, checked.text


def test_a_run_that_ends_early_keeps_the_streams_that_were_finished(town: Town, tmp_path: Path) -> None:
    recipe = Recipe.load(tmp_path / "merge.yaml")
    options = api.RunOptions(upload="stream", workers=1)

    def stop(progress: object) -> None:
        if getattr(progress, "finished", None) is not None:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        api.push(recipe, TARGET, options=options, progress=stop)
    (stage,) = (name for name in town.state(TARGET).branches if name != "main")  # type: ignore[union-attr]
    staged = {f.rpartition("/")[2] for f in town.api.list_repo_files(TARGET, revision=stage) if f.startswith(stage)}
    assert staged == {"plan.json", "model-00001-of-00003.safetensors"}
    before = kept(town.hub)
    api.push(recipe, TARGET, options=options)
    assert len(kept(town.hub)) == len(before) + 2
    assert len(weights(town)) == 3


def test_a_stream_that_cannot_be_opened_leaves_nothing_behind(town: Town, tmp_path: Path) -> None:
    town.hub.faults.add(Fault("GET", "xet-write-token/main", status=403, skip=1, times=None))
    failed = support.hubmerge("push", tmp_path / "merge.yaml", "--to", TARGET, "--upload", "stream")
    assert failed.code == AccessError.exit_code, failed.text
    assert town.state(TARGET) is None


def test_a_pull_request_of_somebody_else_is_streamed_too(hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    bob = another(server, tmp_path, USERS[1].token)
    with Publisher(bob, REPO, PublishOptions(create_pr=True)) as publisher:
        assert publisher.takes_streams()
        stream = publisher.open_stream(PATH)
        fill(stream)
        publisher.shard_done(stream, PATH, SHA256, len(CONTENT))
        publisher.finish({"config.json": b"{}"})
    assert hub.read_small(REPO, hub.pin(REPO, "refs/pr/1"), PATH) == CONTENT


def test_plan_says_what_a_streamed_push_takes(town: Town, tmp_path: Path) -> None:
    def planned(*flags: str) -> support.Outcome:
        done = support.hubmerge("plan", tmp_path / "merge.yaml", "--max-disk", "1KB", "--fetch", "stream", *flags)
        assert done.code == 0, done.text
        return done

    assert "80.1 kB at a time for a push" in planned().out
    assert "more than 1 kB" in planned().err
    streamed = planned("--upload", "stream")
    assert "0 B at a time for a push" in streamed.out
    assert "a push needs" not in streamed.err
    memory = [json.loads(planned("--json", *flags).out)["memory_bytes"] for flags in ((), ("--upload", "stream"))]
    assert memory[1] > memory[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_whose_storage_is_silent(town: Town, tmp_path: Path, number: int) -> None:
    asked, over = threading.Event(), threading.Event()

    def stay_silent(request: BaseHTTPRequestHandler) -> None:
        asked.set()
        over.wait()

    where = {"HF_ENDPOINT": town.hub.endpoint, "HF_TOKEN": OWNER.token, "HF_HUB_DISABLE_XET": "0"}
    with storage_of(town.hub, stay_silent), Runs(tmp_path / "runs", where) as runs:
        ended = runs.run(
            ["push", tmp_path / "merge.yaml", "--to", TARGET, "--upload", "stream"], lambda: asked.wait(60), number
        )
        over.set()
    assert asked.is_set()
    assert ended.code == 130, ended.text
    assert ended.dying_s < 5
    assert "cancelled" in ended.text
    assert "Traceback" not in ended.text
    assert town.state(TARGET) is None
