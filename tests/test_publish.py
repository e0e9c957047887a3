"""Publishing to a local Hub: one atomic commit or nothing, one shard on disk, and no debris after a failure."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from hubmerge.errors import (
    AccessError,
    IntegrityError,
    PublishError,
    SourceError,
    TargetMovedError,
    TargetNotEmptyError,
    TransportError,
    UsageError,
)
from hubmerge.hub import Hub
from hubmerge.io.http import RetryPolicy
from hubmerge.localhub import Fault, LocalHub, User
from hubmerge.lock import LOCK_NAME as LOCK_FILE
from hubmerge.publish import PublishedInfo, Publisher, PublishOptions
from hubmerge.target import is_weight_file

FAST = RetryPolicy(attempts=3, base_wait_s=0.01, max_wait_s=0.04, connect_timeout_s=2, read_timeout_s=2)
USERS = (User("ann", "hf_annWriteToken"), User("ann", "hf_annReadToken", "read"), User("bob", "hf_bobWriteToken"))
REPO = "ann/merged"
CARD = b"---\nlicense: mit\n---\n# merged\n"
SMALL = {"config.json": b"{}", "README.md": CARD, LOCK_FILE: b"{}"}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with LocalHub(tmp_path / "hub", users=USERS, separate_cdn=True) as running:
        yield running
        close_session()


@pytest.fixture
def hub(server: LocalHub, tmp_path: Path) -> Hub:
    return Hub(server.endpoint, "hf_annWriteToken", cache_dir=tmp_path / "cache", policy=FAST)


def shard(n: int) -> tuple[str, bytes]:
    return f"model-{n:05d}-of-00003.safetensors", bytes([n]) * 200_000


def write_shards(publisher: Publisher, folder: Path, numbers: tuple[int, ...] = (1, 2, 3)) -> None:
    """What the engine does; at no time is there more than one file in the folder."""
    folder.mkdir(exist_ok=True)
    for n in numbers:
        name, content = shard(n)
        local = folder / name
        local.write_bytes(content)
        assert os.listdir(folder) == [name]
        publisher.shard_done(local, name, hashlib.sha256(content).hexdigest(), len(content))
        assert os.listdir(folder) == []


def publish(
    hub: Hub,
    folder: Path,
    options: PublishOptions | None = None,
    *,
    repo: str = REPO,
    small: Mapping[str, bytes] = SMALL,
) -> PublishedInfo:
    with Publisher(hub, repo, options) as publisher:
        write_shards(publisher, folder)
        return publisher.finish(small)


def contents(hub: Hub, commit: str, repo: str = REPO) -> Mapping[str, bytes]:
    return {f.path: hub.read_small(repo, commit, f.path) for f in hub.list_files(repo, commit)}


def make_repo(hub: Hub, files: Mapping[str, bytes], repo: str = REPO, private: bool = True) -> str:
    hub.ensure_repo(repo, private)
    head = hub.head(repo)
    assert head is not None
    return hub.commit(
        repo, [hub.upload(repo, "main", data, path) for path, data in files.items()], parent=head, message="old"
    ).oid


# --- what gets published ----------------------------------------------------------------------------------------


def test_new_repository(hub: Hub, tmp_path: Path) -> None:
    info = publish(hub, tmp_path / "out")
    assert info == PublishedInfo(REPO, hub.pin(REPO), f"{hub.endpoint}/{REPO}")
    files = dict(contents(hub, info.commit))
    assert files.pop(".gitattributes")
    assert files == {**SMALL, **dict(shard(n) for n in (1, 2, 3))}
    assert hub.check_write(REPO).private
    history = hub.api.list_repo_commits(REPO)
    assert len(history) == 2  # the Hub's own first commit, and ours
    assert history[0].title.startswith("Publish a merge made with hubmerge")


def test_own_namespace_is_the_default(hub: Hub, tmp_path: Path) -> None:
    assert publish(hub, tmp_path / "out", repo="merged").repo == REPO


def test_nothing_is_visible_before_the_commit(hub: Hub, tmp_path: Path) -> None:
    with Publisher(hub, REPO) as publisher:
        write_shards(publisher, tmp_path / "out")
        assert [f.path for f in hub.list_files(REPO, hub.pin(REPO))] == [".gitattributes"]
        publisher.finish(SMALL)


def test_own_repository_is_replaced_without_stale_weights(hub: Hub, tmp_path: Path) -> None:
    stale = {
        "model.safetensors": b"old",
        "model-00001-of-00003.safetensors": b"older version of a new file",
        "model.safetensors.index.json": b"{}",
        "pytorch_model-00001-of-00002.bin": b"p",
        "heads/a.safetensors": b"h",
    }
    kept = {"training_args.bin": b"t", "notes/model.safetensors.txt": b"n", "sub/model.safetensors": b"s"}
    before = make_repo(hub, {**stale, **kept, LOCK_FILE: b"{}", "config.json": b"old"})
    info = publish(hub, tmp_path / "out")
    files = dict(contents(hub, info.commit))
    files.pop(".gitattributes")
    assert files == {**SMALL, **kept, **dict(shard(n) for n in (1, 2, 3))}
    assert [c.commit_id for c in hub.api.list_repo_commits(REPO)][:2] == [info.commit, before]


def test_the_same_result_twice_changes_nothing(hub: Hub, tmp_path: Path, server: LocalHub) -> None:
    first = publish(hub, tmp_path / "out")
    server.requests.clear()
    assert publish(hub, tmp_path / "out") == first
    assert not server.requests.find("PUT", "^/_lfs/")


def test_foreign_repository_needs_permission(hub: Hub, tmp_path: Path) -> None:
    before = make_repo(hub, {"paper.txt": b"mine", "model.safetensors": b"mine"})
    with pytest.raises(TargetNotEmptyError, match=r"ann/merged@main holds 2 files .* model.safetensors") as caught:
        publish(hub, tmp_path / "out")
    assert "overwrite" in (caught.value.hint or "")
    assert hub.pin(REPO) == before
    info = publish(hub, tmp_path / "out", PublishOptions(overwrite=True))
    assert "paper.txt" in contents(hub, info.commit)
    assert "model.safetensors" not in contents(hub, info.commit)


def test_empty_repository_is_fine(hub: Hub, tmp_path: Path) -> None:
    hub.ensure_repo(REPO, private=True)
    assert publish(hub, tmp_path / "out").commit == hub.pin(REPO)


def test_pull_request(hub: Hub, tmp_path: Path) -> None:
    before = make_repo(hub, {"model.safetensors": b"theirs"})
    info = publish(hub, tmp_path / "out", PublishOptions(create_pr=True))
    assert info.url == f"{hub.endpoint}/{REPO}/discussions/1"
    assert hub.pin(REPO) == before
    hub.api.merge_pull_request(REPO, 1)
    assert set(SMALL) <= set(contents(hub, hub.pin(REPO)))


def test_pull_request_to_somebody_elses_repository(hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    before = make_repo(hub, {"model.safetensors": b"theirs"}, private=False)
    bob = Hub(server.endpoint, "hf_bobWriteToken", policy=FAST)
    with pytest.raises(AccessError, match="permission denied"):
        publish(bob, tmp_path / "out")
    info = publish(bob, tmp_path / "out", PublishOptions(create_pr=True))
    assert info.url == f"{hub.endpoint}/{REPO}/discussions/1"
    assert hub.pin(REPO) == before
    assert hub.read_small(REPO, info.commit, "config.json") == b"{}"


def test_uploads_survive_passing_failures(hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    server.faults.add(Fault(method="PUT", path="^/_lfs/", reset_upload_after_bytes=50_000))
    server.faults.add(Fault(method="POST", path="/objects/batch", status=503, skip=1))
    server.faults.add(Fault(method="POST", path="/preupload/", reset=True, skip=2))
    info = publish(hub, tmp_path / "out")
    assert {shard(n)[0] for n in (1, 2, 3)} <= set(contents(hub, info.commit))


def test_branch_tag_and_visibility(hub: Hub, tmp_path: Path) -> None:
    before = make_repo(hub, {LOCK_FILE: b"{}"})
    info = publish(hub, tmp_path / "out", PublishOptions(revision="dev", tag="v1", public=True))
    assert info.url == f"{hub.endpoint}/{REPO}/tree/dev"
    assert (hub.pin(REPO, "dev"), hub.pin(REPO, "v1"), hub.pin(REPO)) == (info.commit, info.commit, before)
    assert not hub.check_write(REPO).private
    again = publish(hub, tmp_path / "out", PublishOptions(revision="dev", tag="v2"))
    assert hub.pin(REPO, "v2") == again.commit


# --- refusals before any weight is read -------------------------------------------------------------------------


def test_preflight(hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    for token, words in (("hf_annReadToken", "read-only"), (False, "no token"), ("hf_bobWriteToken", "may not create")):
        with pytest.raises(AccessError, match=words):
            publish(Hub(server.endpoint, token, policy=FAST), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    make_repo(hub, {LOCK_FILE: b"{}"}, private=False)
    hub.tag(REPO, "v1", hub.pin(REPO))
    for options, words in (
        (PublishOptions(tag="v1"), "has a tag 'v1' already"),
        (PublishOptions(revision="v1"), "'v1' is a tag"),
        (PublishOptions(revision="nope", create_pr=True), "has no branch 'nope'"),
        (PublishOptions(public=False), "is public, and a private result was asked for"),
    ):
        with pytest.raises(PublishError, match=words):
            publish(hub, tmp_path / "out", options)
    with pytest.raises(UsageError, match="pull request cannot be combined"):
        publish(hub, tmp_path / "out", PublishOptions(create_pr=True, tag="x"))
    assert hub.refs(REPO).branches.keys() == {"main"}


def publish_too_late(hub: Hub, folder: Path) -> None:
    with Publisher(hub, REPO) as publisher:
        write_shards(publisher, folder)
        make_repo(hub, {"theirs.txt": b"1"})
        publisher.finish(SMALL)


# --- failures ---------------------------------------------------------------------------------------------------


def _break_upload(server: LocalHub) -> None:
    server.faults.add(Fault(method="PUT", path="^/_lfs/", status=403, times=None))


def _break_commit(server: LocalHub) -> None:
    server.faults.add(Fault(method="POST", path="/commit/", status=422, body='{"error": "no"}', times=None))


def _kill_commit(server: LocalHub) -> None:
    server.faults.add(Fault(method="POST", path="/commit/", reset=True, times=None))


@pytest.mark.parametrize("harm", [_break_upload, _break_commit, _kill_commit])
def test_new_repository_is_removed_after_a_failure(
    hub: Hub, server: LocalHub, tmp_path: Path, harm: Callable[[LocalHub], None]
) -> None:
    harm(server)
    with pytest.raises((PublishError, TransportError)):
        publish(hub, tmp_path / "out")
    assert not hub.check_write(REPO).exists


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_exit_by_exception_takes_everything_back(hub: Hub, tmp_path: Path, error: type[BaseException]) -> None:
    def run() -> None:
        with Publisher(hub, REPO) as publisher:
            write_shards(publisher, tmp_path / "out", (1,))
            assert hub.check_write(REPO).private
            raise error

    with pytest.raises(error):
        run()
    assert not hub.check_write(REPO).exists


def test_leaving_without_finish_takes_everything_back(hub: Hub) -> None:
    with Publisher(hub, REPO):
        assert hub.check_write(REPO).exists
    assert not hub.check_write(REPO).exists


def test_refusal_inside_enter_takes_the_new_repository_back(hub: Hub, server: LocalHub) -> None:
    server.faults.add(Fault(path="/tree/", status=422, times=None))
    with pytest.raises(SourceError, match="refused"):
        Publisher(hub, REPO).__enter__()
    assert not hub.check_write(REPO).exists


@pytest.mark.parametrize("harm", [_break_upload, _break_commit, _kill_commit])
def test_existing_repository_is_untouched_by_a_failure(
    hub: Hub, server: LocalHub, tmp_path: Path, harm: Callable[[LocalHub], None]
) -> None:
    before = make_repo(hub, {LOCK_FILE: b"{}", "model.safetensors": b"old"})
    harm(server)
    with pytest.raises((PublishError, TransportError)):
        publish(hub, tmp_path / "out", PublishOptions(revision="dev", tag="v1", public=True))
    assert hub.refs(REPO).branches == {"main": before}
    assert hub.refs(REPO).tags == {}
    assert hub.check_write(REPO).private


def test_somebody_elses_work_in_a_new_repository_is_kept(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(TargetMovedError):
        publish_too_late(hub, tmp_path / "out")
    assert hub.read_small(REPO, hub.pin(REPO), "theirs.txt") == b"1"


def test_stale_parent_commits_nothing(hub: Hub, tmp_path: Path) -> None:
    before = make_repo(hub, {LOCK_FILE: b"{}", "model.safetensors": b"old"})
    with pytest.raises(TargetMovedError) as caught:
        publish_too_late(hub, tmp_path / "out")
    theirs = hub.pin(REPO)
    assert "theirs.txt" in contents(hub, theirs)
    assert before in caught.value.message
    assert theirs in caught.value.message
    assert hub.read_small(REPO, theirs, "model.safetensors") == b"old"


@pytest.mark.parametrize("fault", [Fault(reset_after_bytes=0), Fault(reset=True), Fault(truncate_after_bytes=3)])
def test_lost_reply_of_the_commit(hub: Hub, server: LocalHub, tmp_path: Path, fault: Fault) -> None:

    server.faults.add(replace(fault, method="POST", path="/commit/"))
    info = publish(hub, tmp_path / "out", PublishOptions(public=True))
    assert info.commit == hub.pin(REPO)
    assert len(hub.api.list_repo_commits(REPO)) == 2
    assert not hub.check_write(REPO).private


def test_bad_card_is_named_and_nothing_is_published(hub: Hub, tmp_path: Path) -> None:
    small = {**SMALL, "README.md": b"---\nlicense: no-such-licence\n---\n"}
    with pytest.raises(PublishError, match=r"front matter of README.md.*license"):
        publish(hub, tmp_path / "out", PublishOptions(public=True), small=small)
    assert not hub.check_write(REPO).exists


def test_failure_after_the_commit_keeps_it_and_says_so(hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    server.faults.add(Fault(method="PUT", path="/settings", status=403, times=None))
    with pytest.raises(PublishError, match=r"published as commit [0-9a-f]{40} of ann/merged, but cannot make"):
        publish(hub, tmp_path / "out", PublishOptions(public=True))
    assert set(SMALL) <= set(contents(hub, hub.pin(REPO)))
    assert hub.check_write(REPO).private


def test_cleanup_that_fails_is_a_note_on_the_first_error(hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    _break_upload(server)
    server.faults.add(Fault(method="DELETE", status=403, times=None))
    with pytest.raises(PublishError, match="cannot upload") as caught:
        publish(hub, tmp_path / "out")
    assert "cannot delete ann/merged" in caught.value.__notes__[0]


def test_changed_shard_is_refused(hub: Hub, tmp_path: Path) -> None:
    local = tmp_path / "x.safetensors"
    local.write_bytes(b"12345")
    with pytest.raises(IntegrityError, match="has 5 bytes, 6 were written"), Publisher(hub, REPO) as publisher:
        publisher.shard_done(local, "x.safetensors", hashlib.sha256(b"12345").hexdigest(), 6)
    assert local.exists()


def test_wrong_digest_is_refused_by_the_server(hub: Hub, tmp_path: Path) -> None:
    local = tmp_path / "x.safetensors"
    local.write_bytes(b"12345")
    with pytest.raises(PublishError, match=r"cannot upload x\.safetensors"), Publisher(hub, REPO) as publisher:
        publisher.shard_done(local, "x.safetensors", hashlib.sha256(b"other").hexdigest(), 5)
    assert local.exists()


def test_shards_from_several_threads_are_sent_one_after_the_other(hub: Hub, tmp_path: Path) -> None:
    with Publisher(hub, REPO) as publisher:
        threads = []
        for n in (1, 2, 3):
            name, content = shard(n)
            (tmp_path / name).write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            thread = threading.Thread(target=publisher.shard_done, args=(tmp_path / name, name, digest, len(content)))
            threads.append(thread)
            thread.start()
        for thread in threads:
            thread.join()
        info = publisher.finish(SMALL)
    assert {shard(n)[0] for n in (1, 2, 3)} <= set(contents(hub, info.commit))


_CHILD = """
import hashlib, json, sys
from dataclasses import replace
from pathlib import Path
from hubmerge.hub import Hub
from hubmerge.publish import Publisher, PublishOptions
endpoint, token, folder = sys.argv[1:]
with Publisher(Hub(endpoint, token), "ann/merged", PublishOptions(public=True)) as publisher:
    for n in range(1, 4):
        local = Path(folder) / f"model-{n}.safetensors"
        local.write_bytes(bytes([n]) * 300_000)
        publisher.shard_done(local, local.name, hashlib.sha256(local.read_bytes()).hexdigest(), 300_000)
        print("shard", n, flush=True)
    publisher.finish({"config.json": b"{}", "hubmerge.lock.json": b"{}"})
"""


def test_killed_process_leaves_nothing_public_and_can_be_run_again(hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _CHILD, server.endpoint, "hf_annWriteToken", str(tmp_path)]
    root = Path(__file__).parents[1]
    server.faults.add(Fault(method="POST", path="/commit/", delay_s=60, times=1))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as child:
        assert child.stdout is not None
        assert [child.stdout.readline().strip() for _ in range(3)] == ["shard 1", "shard 2", "shard 3"]
        deadline = time.monotonic() + 20
        while not server.requests.find("POST", "/commit/") and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    assert hub.check_write(REPO).private
    assert [f.path for f in hub.list_files(REPO, hub.pin(REPO))] == [".gitattributes"]
    server.faults.clear()
    server.requests.clear()
    subprocess.run(command, check=True, capture_output=True, cwd=root)
    assert not hub.check_write(REPO).private
    assert not server.requests.find("PUT", "^/_lfs/")  # what was uploaded before is not sent again
    assert json.loads(hub.read_small(REPO, hub.pin(REPO), LOCK_FILE)) == {}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("pytorch_model.bin", True),
        ("adapter_model.safetensors", True),
        ("adapter_config.json", True),
        ("heads/task.safetensors", True),
        ("bundle-00001-of-00001.safetensors", True),
        ("training_args.bin", False),
        ("config.json", False),
        ("sub/model.safetensors", False),
        ("heads/task.config.json", True),
        ("heads/task/tokenizer.json", True),
        ("notes/task.json", False),
        ("tokenizer.json", False),
    ],
)
def test_weight_files(path: str, expected: bool) -> None:
    assert is_weight_file(path) is expected
