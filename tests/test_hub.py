"""The Hub client against a local Hub: reading, access, uploads, commits, and errors that never show a token."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from hubmerge.errors import (
    AccessError,
    HubMergeError,
    IntegrityError,
    PublishError,
    SourceError,
    TargetMovedError,
    TransportError,
    UsageError,
)
from hubmerge.hub import CommitInfo, Hub, StagedFile
from hubmerge.io.http import RetryPolicy
from hubmerge.localhub import Fault, LocalHub, User
from hubmerge.localhub.faults import EXPIRED_BODY

FAST = RetryPolicy(
    attempts=4, base_wait_s=0.01, max_wait_s=0.04, max_server_wait_s=5, connect_timeout_s=2, read_timeout_s=2
)
WEIGHTS = bytes(range(256)) * 4000
REPO = "ann/model"
USERS = (
    User("ann", "hf_annWriteTokenAAAA", "write", orgs=("lab",)),
    User("ann", "hf_annReadTokenBBBBB", "read"),
    User("bob", "hf_bobWriteTokenCCCC", "write"),
)
WRITE, READ, BOB = (user.token for user in USERS)
WRONG = "hf_wrongTokenDDDDDDDD"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)  # as a user who has set nothing
    with LocalHub(tmp_path / "hub", users=USERS, separate_cdn=True, page_size=3) as running:
        yield running
        close_session()


@pytest.fixture
def connect(server: LocalHub, tmp_path: Path) -> Callable[..., Hub]:
    def connect(token: str | bool = WRITE) -> Hub:
        return Hub(server.endpoint, token, cache_dir=tmp_path / "cache", policy=FAST)

    return connect


@pytest.fixture
def hub(connect: Callable[..., Hub]) -> Hub:
    return connect()


@pytest.fixture
def commit(hub: Hub, server: LocalHub) -> str:
    """A private repository with weights, a config and more files than fit one page of a listing."""
    hub.ensure_repo(REPO, private=True)
    files = {"config.json": b'{"a": 1}', "README.md": b"---\nlicense: mit\n---\n# m\n", "a/b.txt": b"deep"}
    files |= {f"extra-{i}.txt": b"%d" % i for i in range(3)}
    oid = push(hub, REPO, {"model.safetensors": WEIGHTS, **files})
    server.requests.clear()
    return oid


def push(hub: Hub, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
    parent = hub.head(repo, revision)
    assert parent is not None
    staged = [hub.upload(repo, revision, content, path) for path, content in files.items()]
    return hub.commit(repo, staged, parent=parent, message="files", revision=revision).oid


# --- reading ----------------------------------------------------------------------------------------------------


def test_pin_resolves_branches_tags_and_short_commits(hub: Hub, commit: str) -> None:
    hub.tag(REPO, "v1", commit)
    hub.branch(REPO, "dev", commit)
    newer = push(hub, REPO, {"more.txt": b"1"})
    assert hub.pin(REPO) == hub.pin(REPO, "main") == newer
    assert hub.pin(REPO, "v1") == hub.pin(REPO, "dev") == hub.pin(REPO, commit) == commit


def test_list_files_has_all_pages_sizes_and_digests(hub: Hub, commit: str, server: LocalHub) -> None:
    files = {file.path: file for file in hub.list_files(REPO, commit)}
    assert len(files) == 8
    weights, config = files["model.safetensors"], files["config.json"]
    assert (weights.size_bytes, weights.sha256) == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    assert weights.git_sha1 is None
    blob = hashlib.sha1(b'blob 8\0{"a": 1}').hexdigest()
    assert (config.size_bytes, config.sha256, config.git_sha1) == (8, None, blob)
    assert files["a/b.txt"].size_bytes == 4
    asked = len(server.requests)
    assert asked == 3
    hub.list_files(REPO, commit)
    assert len(server.requests) == asked  # a commit never changes


def test_read_small_checks_digest_and_size(hub: Hub, commit: str, server: LocalHub) -> None:
    assert hub.read_small(REPO, commit, "config.json") == b'{"a": 1}'
    assert hub.read_small(REPO, commit, "model.safetensors") == WEIGHTS
    with pytest.raises(SourceError, match="1024000 bytes; at most 1000"):
        hub.read_small(REPO, commit, "model.safetensors", max_bytes=1000)
    with pytest.raises(SourceError, match=r"ann/model@.{7}/nope.json does not exist"):
        hub.read_small(REPO, commit, "nope.json")
    for path in ("config.json", "model.safetensors"):
        server.faults.add(Fault(method="GET", path=rf"/resolve/.*/{path}|^/_cdn/", corrupt_at=3))
        with pytest.raises(IntegrityError, match=f"{path}: the bytes received"):
            hub.read_small(REPO, commit, path)
        server.faults.clear()


def test_read_small_uses_the_cache_but_not_a_damaged_one(hub: Hub, commit: str, server: LocalHub) -> None:
    assert hub.cached_path(REPO, commit, "config.json") is None
    stored = hub.download(REPO, commit, "config.json")
    assert hub.cached_path(REPO, commit, "config.json") == stored
    server.requests.clear()
    assert hub.read_small(REPO, commit, "config.json") == b'{"a": 1}'
    assert not server.requests.find(path="/resolve/")
    stored.write_bytes(b'{"a": 2}')
    assert hub.read_small(REPO, commit, "config.json") == b'{"a": 1}'


def test_download_checks_the_size(hub: Hub, commit: str) -> None:
    stored = hub.download(REPO, commit, "model.safetensors")
    assert stored.read_bytes() == WEIGHTS
    stored.write_bytes(b"short")
    with pytest.raises(IntegrityError, match="has 5 bytes"):
        hub.download(REPO, commit, "model.safetensors")


def test_download_checks_the_digest_and_keeps_no_wrong_file(hub: Hub, commit: str, server: LocalHub) -> None:
    server.faults.add(Fault(method="GET", path="^/_cdn/", corrupt_at=7))
    with pytest.raises(IntegrityError, match=r"ann/model@.*/model.safetensors: .* do not have the digest"):
        hub.download(REPO, commit, "model.safetensors")
    assert hub.cached_path(REPO, commit, "model.safetensors") is None
    assert hub.download(REPO, commit, "model.safetensors").read_bytes() == WEIGHTS


def test_open_asks_for_the_location_once(hub: Hub, commit: str, server: LocalHub) -> None:
    file = hub.file(REPO, commit, "model.safetensors")

    def read(start: int) -> bytes:
        buffer = bytearray(1000)
        hub.open(REPO, commit, file).read_into(start, memoryview(buffer))
        return bytes(buffer)

    with ThreadPoolExecutor(4) as pool:
        for start, found in zip(range(0, 16_000, 1000), pool.map(read, range(0, 16_000, 1000)), strict=True):
            assert found == WEIGHTS[start : start + 1000]
    assert len(server.requests.find("HEAD", "/resolve/")) == 1
    gets = server.requests.find("GET", "^/_cdn/")
    assert len(gets) == 16
    assert not any(r.authorized for r in gets)
    assert hub.traffic.requests == 16
    assert hub.traffic.bytes_read == 16_000


def test_expired_location_is_renewed_once_for_all_readers(hub: Hub, commit: str, server: LocalHub) -> None:
    source = hub.open(REPO, commit, hub.file(REPO, commit, "model.safetensors"))
    source.read_into(0, memoryview(bytearray(1)))
    server.faults.add(Fault.expired_url(times=4))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: source.read_into(i, memoryview(bytearray(10))), range(4)))
    assert 2 <= len(server.requests.find("HEAD", "/resolve/")) <= 5


def test_server_that_contradicts_its_listing(hub: Hub, commit: str, server: LocalHub) -> None:
    server.faults.add(Fault(method="HEAD", etag="0" * 64))
    source = hub.open(REPO, commit, hub.file(REPO, commit, "model.safetensors"))
    with pytest.raises(IntegrityError, match="etag 0000"):
        source.read_into(0, memoryview(bytearray(1)))


@pytest.mark.parametrize("path", ["../evil.txt", "/etc/passwd", "a/../../b", "a\\b", "C:x", "nul\0"])
def test_paths_that_leave_the_folder_are_refused(path: str) -> None:
    from hubmerge.hub.reading import _file_spec

    with pytest.raises(IntegrityError, match="outside the folder"):
        _file_spec("a/b", {"path": path, "size": 1, "oid": "0" * 40})


@pytest.mark.parametrize(
    "fault", [Fault(status=503), Fault(status=500), Fault(reset=True), Fault.rate_limited(reset_s=0)]
)
def test_metadata_calls_are_retried(hub: Hub, commit: str, server: LocalHub, fault: Fault) -> None:
    server.faults.add(fault)
    assert hub.pin(REPO) == commit
    server.faults.add(fault)
    assert hub.list_files(REPO, commit)


def test_a_silent_server_does_not_hang(server: LocalHub) -> None:
    hub = Hub(server.endpoint, WRITE, policy=RetryPolicy(attempts=2, base_wait_s=0.01, read_timeout_s=0.2))
    server.faults.add(Fault(delay_s=1.5, times=None))
    for call, words in ((hub.pin, "find ann/model"), (hub.refs, "list the branches of ann/model")):
        started = time.monotonic()
        with pytest.raises(TransportError, match=rf"cannot {words}: http://127.0.0.1:\d+ failed"):
            call(REPO)
        assert time.monotonic() - started < 1.4


def test_unreachable_and_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TransportError, match="Connection refused") as caught:
        Hub("http://127.0.0.1:9", False, policy=FAST).pin(REPO)
    assert "run the same command again" in str(caught.value)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TransportError, match="offline mode is on") as caught:
        Hub("http://127.0.0.1:9", False, policy=FAST).pin(REPO)
    assert caught.value.hint == "Unset HF_HUB_OFFLINE."


def test_endpoint_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://example.org/")
    assert Hub().endpoint == "http://example.org"
    assert Hub("http://other.org").endpoint == "http://other.org"
    assert Hub("http://h:80").is_own_origin("http://h/x")
    assert not Hub("http://h").is_own_origin("https://h/x")


# --- access -----------------------------------------------------------------------------------------------------


def test_private_repository(connect: Callable[..., Hub], commit: str) -> None:
    for token, hint in ((False, "hf auth login"), (BOB, "use a token of an account that may see it")):
        with pytest.raises(AccessError, match="ann/model does not exist, or is private") as caught:
            connect(token).pin(REPO)
        assert hint in (caught.value.hint or "")
    assert connect(READ).pin(REPO) == commit


def test_missing_revision_and_bad_ids(hub: Hub, commit: str) -> None:
    with pytest.raises(AccessError, match="no such branch, tag or commit"):
        hub.pin(REPO, "nope")
    with pytest.raises(AccessError, match="no such branch, tag or commit"):
        hub.list_files(REPO, "f" * 40)
    with pytest.raises(UsageError, match="a/b/c"):
        hub.pin("a/b/c")


def test_gated_repository(connect: Callable[..., Hub], commit: str, server: LocalHub) -> None:
    server.set_private(REPO, False)
    server.set_gated(REPO, True)
    for token in (False, BOB):
        with pytest.raises(AccessError, match="ann/model is gated") as caught:
            connect(token).read_small(REPO, commit, "config.json")
        assert f"{server.endpoint}/{REPO}" in (caught.value.hint or "")
    server.grant_access(REPO, "bob")
    assert connect(BOB).read_small(REPO, commit, "config.json") == b'{"a": 1}'


def test_access_withdrawn_in_the_middle(connect: Callable[..., Hub], commit: str, server: LocalHub) -> None:
    server.set_private(REPO, False)
    hub = connect(BOB)
    source = hub.open(REPO, commit, hub.file(REPO, commit, "model.safetensors"))
    source.read_into(0, memoryview(bytearray(1)))
    server.set_private(REPO, True)
    server.faults.add(Fault.expired_url(times=None))
    with pytest.raises(AccessError, match="private"):
        source.read_into(0, memoryview(bytearray(1)))


def test_disabled_repository(hub: Hub, commit: str, server: LocalHub) -> None:
    server.set_disabled(REPO, True)
    with pytest.raises(AccessError, match="was disabled"):
        hub.pin(REPO)


def test_check_write(connect: Callable[..., Hub], commit: str, server: LocalHub) -> None:
    hub = connect()
    assert hub.check_write(REPO).exists
    assert hub.check_write("model").repo == REPO
    assert hub.check_write(REPO).private
    for repo in ("ann/new", "lab/new"):
        target = hub.check_write(repo)
        assert (target.repo, target.exists) == (repo, False)
    for token, words in (
        (False, "there is no token"),
        (WRONG, "did not accept the token"),
        (READ, "the token of ann is read-only"),
    ):
        for repo in (REPO, "ann/new"):
            with pytest.raises(AccessError, match=words) as caught:
                connect(token).check_write(repo)
            assert caught.value.exit_code == 4
    with pytest.raises(AccessError, match="bob may not create it in ann"):
        connect(BOB).check_write("ann/new")
    server.set_private(REPO, False)
    with pytest.raises(AccessError, match="permission denied"):
        connect(BOB).check_write(REPO)


@pytest.mark.parametrize("token", ["", "hf_with space", "hf_näh", "hf_a\nb"])
def test_tokens_that_cannot_be_sent(token: str) -> None:
    with pytest.raises(AccessError, match="the token is empty or has characters") as caught:
        Hub("http://127.0.0.1:9", token)
    assert not token or token not in str(caught.value)


# --- writing ----------------------------------------------------------------------------------------------------


def test_ensure_repo_says_whether_it_created(hub: Hub) -> None:
    assert hub.ensure_repo("ann/new", private=True)
    assert not hub.ensure_repo("ann/new", private=True)
    assert hub.check_write("ann/new").private
    hub.set_visibility("ann/new", private=False)
    assert not hub.check_write("ann/new").private
    hub.delete_repo("ann/new")
    assert not hub.check_write("ann/new").exists


def test_uploads_need_no_setting_where_there_is_no_xet(hub: Hub, commit: str, server: LocalHub) -> None:
    from huggingface_hub import constants

    asked = len(server.requests.find("GET", "xet-write-token"))
    assert constants.HF_HUB_DISABLE_XET
    hub.upload(REPO, "main", WEIGHTS[1:], "model.safetensors")
    assert len(server.requests.find("GET", "xet-write-token")) == asked  # asked once, before


def test_uploaded_file_is_not_needed_any_more(hub: Hub, commit: str, tmp_path: Path) -> None:
    staged = []
    for name, content in (("model.safetensors", WEIGHTS[2:]), ("notes.txt", b"regular"), ("empty.txt", b"")):
        local = tmp_path / name
        local.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        staged.append(hub.upload(REPO, "main", local, name, sha256=digest))
        assert (staged[-1].size_bytes, staged[-1].sha256) == (len(content), digest)
        local.unlink()
    made = hub.commit(REPO, staged, parent=commit, message="more")
    assert hub.read_small(REPO, made.oid, "model.safetensors") == WEIGHTS[2:]
    assert hub.read_small(REPO, made.oid, "notes.txt") == b"regular"
    assert hub.read_small(REPO, made.oid, "empty.txt") == b""


def test_gitignore_of_the_target_drops_nothing(hub: Hub, commit: str) -> None:
    push(hub, REPO, {".gitignore": b"*.safetensors\n*.json\n"})
    made = push(hub, REPO, {"model-2.safetensors": WEIGHTS, "index.json": b"{}"})
    assert {"model-2.safetensors", "index.json"} <= {file.path for file in hub.list_files(REPO, made)}


def test_commit_adds_and_deletes_at_once(hub: Hub, commit: str) -> None:
    staged = [hub.upload(REPO, "main", b"new", "config.json")]
    made = hub.commit(REPO, staged, parent=commit, message="swap", delete=["extra-1.txt"])
    assert made.url == f"{hub.endpoint}/{REPO}/commit/{made.oid}"
    paths = {file.path for file in hub.list_files(REPO, made.oid)}
    assert "extra-1.txt" not in paths
    assert len(paths) == 7
    assert hub.read_small(REPO, made.oid, "config.json") == b"new"


def test_stale_parent_names_both_commits(hub: Hub, commit: str) -> None:
    staged = [hub.upload(REPO, "main", b"mine", "mine.txt")]
    theirs = push(hub, REPO, {"theirs.txt": b"1"})
    for create_pr in (False, True):
        with pytest.raises(TargetMovedError) as caught:
            hub.commit(REPO, staged, parent=commit, message="late", create_pr=create_pr)
        assert commit in caught.value.message
        assert theirs in caught.value.message
        assert hub.head(REPO) == theirs


def _commit_one(hub: Hub, parent: str, **options: bool) -> tuple[StagedFile, CommitInfo]:
    staged = hub.upload(REPO, "main", b"once", "once.txt")
    return staged, hub.commit(REPO, [staged], parent=parent, message="once", **options)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(reset=True),  # never arrived
        Fault(status=503),  # refused
        Fault(reset_after_bytes=0),  # landed, and the reply got lost
        Fault(truncate_after_bytes=5),  # landed, and the reply is half
        Fault(stall_after_bytes=0, stall_s=10),  # landed, and the reply never comes
    ],
)
def test_lost_reply_leaves_exactly_one_commit(hub: Hub, commit: str, server: LocalHub, fault: Fault) -> None:
    server.faults.add(replace(fault, method="POST", path="/commit/"))
    _, made = _commit_one(hub, commit)
    history = hub.api.list_repo_commits(REPO)
    assert [item.commit_id for item in history[:2]] == [made.oid, commit]
    assert history[0].title == "once"


def test_lost_reply_with_somebody_on_top(hub: Hub, connect: Callable[..., Hub], commit: str, server: LocalHub) -> None:
    server.faults.add(Fault(method="POST", path="/commit/", reset_after_bytes=0))
    gate = threading.Event()
    landed = hub._landed

    def after_them(*args: object, **options: object) -> CommitInfo | None:
        push(connect(), REPO, {"theirs.txt": b"1"})
        gate.set()
        return landed(*args, **options)  # type: ignore[arg-type]

    hub._landed = after_them  # type: ignore[method-assign]
    _, made = _commit_one(hub, commit)
    assert gate.is_set()
    assert [item.commit_id for item in hub.api.list_repo_commits(REPO)][1:3] == [made.oid, commit]


def test_lost_reply_of_a_pull_request(hub: Hub, commit: str, server: LocalHub) -> None:
    server.faults.add(Fault(method="POST", path="/commit/", reset_after_bytes=0))
    _, made = _commit_one(hub, commit, create_pr=True)
    assert made.pr_url == f"{hub.endpoint}/{REPO}/discussions/1"
    assert hub.head(REPO) == commit
    assert hub.pin(REPO, "refs/pr/1") == made.oid
    server.faults.add(Fault(method="POST", path="/commit/", reset=True))
    staged = hub.upload(REPO, "main", b"two", "two.txt")
    with pytest.raises(TransportError, match="cannot commit to ann/model@main"):
        hub.commit(REPO, [staged], parent=commit, message="two", create_pr=True)


def test_pull_request(hub: Hub, commit: str) -> None:
    _, made = _commit_one(hub, commit, create_pr=True)
    assert made.pr_url == f"{hub.endpoint}/{REPO}/discussions/1"
    assert hub.head(REPO) == commit


def test_refused_commit_is_a_publish_error(hub: Hub, commit: str) -> None:
    with pytest.raises(PublishError, match=r"cannot commit to ann/model@main.*does-not-exist"):
        hub.commit(REPO, [], parent=commit, message="x", delete=["does-not-exist.txt"])


def test_card_is_checked(hub: Hub, server: LocalHub) -> None:
    hub.validate_card("---\nlicense: mit\n---\n# fine\n")
    with pytest.raises(PublishError, match=r"front matter of README.md: .*license"):
        hub.validate_card("---\nlicense: no-such-licence\n---\n# m\n")


def test_broken_uploads(hub: Hub, commit: str, server: LocalHub) -> None:
    server.faults.add(Fault(method="PUT", path="^/_lfs/", status=403, times=None))
    refusal = rf"cannot upload model-9.safetensors to ann/model: 127.0.0.1:{server.cdn_port} refused \(HTTP 403"
    with pytest.raises(PublishError, match=refusal) as caught:
        hub.upload(REPO, "main", WEIGHTS[9:], "model-9.safetensors")
    assert "?" not in caught.value.message


@pytest.mark.parametrize(
    "fault", [Fault(status=403, body=EXPIRED_BODY), Fault(corrupt_upload_at=7)], ids=["expired", "wrong byte"]
)
def test_an_upload_that_storage_refuses_is_sent_once_more_to_a_new_address(
    hub: Hub, commit: str, server: LocalHub, fault: Fault
) -> None:
    server.requests.clear()
    server.faults.add(replace(fault, method="PUT", path="^/_lfs/"))
    content = bytes(fault.corrupt_upload_at or 3) * 1000
    hub.commit(REPO, [hub.upload(REPO, "main", content, "x.safetensors")], parent=commit, message="x")
    statuses = [r.status for r in server.requests.find("PUT", "^/_lfs/")]
    assert statuses == [fault.status or 400, 200]
    assert len(server.requests.find("POST", "/objects/batch")) == 2


def test_a_commit_waits_as_long_as_the_hub_asks(hub: Hub, commit: str, server: LocalHub) -> None:
    server.faults.add(Fault.rate_limited("/commit/", method="POST", reset_s=0))
    started = time.monotonic()
    _commit_one(hub, commit)
    assert time.monotonic() - started >= 1
    rule = server.faults.add(Fault.rate_limited("/commit/", method="POST", reset_s=3000, times=None))
    staged = hub.upload(REPO, "main", b"two", "two.txt")
    with pytest.raises(TransportError, match="HTTP 429"):
        hub.commit(REPO, [staged], parent=hub.pin(REPO), message="two")
    assert rule.hits == 1


def test_tags_and_branches(hub: Hub, commit: str) -> None:
    hub.tag(REPO, "v1", commit)
    hub.tag(REPO, "v1", commit)  # a lost reply may have made it
    newer = push(hub, REPO, {"x.txt": b"1"})
    with pytest.raises(PublishError, match="cannot tag ann/model as 'v1'"):
        hub.tag(REPO, "v1", newer)
    hub.branch(REPO, "dev", commit)
    assert hub.refs(REPO).branches == {"main": newer, "dev": commit}
    hub.delete_branch(REPO, "dev")
    assert hub.head(REPO, "dev") is None


def test_commit_whose_fate_is_unknown(hub: Hub, commit: str, server: LocalHub) -> None:
    staged = hub.upload(REPO, "main", b"x", "x.txt")
    server.faults.add(Fault(reset=True, times=None))
    with pytest.raises(TransportError, match="whether the commit landed could not be found out") as caught:
        hub.commit(REPO, [staged], parent=commit, message="x")
    assert f"{REPO}/commits/main" in (caught.value.hint or "")


# --- secrets ----------------------------------------------------------------------------------------------------


def _failure(call: Callable[[], object]) -> HubMergeError | None:
    try:
        call()
    except HubMergeError as error:
        return error
    return None


def _everything(error: BaseException) -> str:
    return f"{error} {error!r} {''.join(traceback.format_exception(error))} {getattr(error, 'hint', '')}"


def test_no_error_shows_a_token(
    connect: Callable[..., Hub], commit: str, server: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client library's own back-off takes a minute
    echo = {"X-Error-Message": f"who is {WRITE}?", "X-Error-Code": "Weird"}
    faults = [
        Fault(
            status=status, headers=echo, body=f'{{"error": "Bearer {WRITE} at http://x/y?X-Signature=abc"}}', times=None
        )
        for status in (400, 401, 403, 404, 409, 412, 422, 429, 500)
    ]
    faults += [Fault(reset=True, times=None), Fault(status=200, body=f"<html>{WRITE}", times=None)]
    seen = 0
    for fault in faults:
        hub = connect()
        staged = hub.upload(REPO, "main", b"x", f"{seen}.txt")
        server.faults.add(fault)
        calls: list[Callable[[], object]] = [
            lambda hub=hub: hub.pin(REPO),
            lambda hub=hub: hub.list_files(REPO, commit),
            lambda hub=hub: hub.check_write(REPO),
            lambda hub=hub: hub.ensure_repo("ann/other", private=True),
            lambda hub=hub: hub.upload(REPO, "main", WEIGHTS[:999], "model-x.safetensors"),
            lambda hub=hub, staged=staged: hub.commit(REPO, [staged], parent=commit, message="m"),
            lambda hub=hub: hub.refs(REPO),
            lambda hub=hub: hub.set_visibility(REPO, private=False),
            lambda hub=hub: hub.validate_card("x"),
        ]
        for error in filter(None, map(_failure, calls)):
            assert WRITE not in _everything(error)
            assert "X-Signature" not in _everything(error)
            assert error.hint
            seen += 1
        server.faults.clear()
        assert WRITE not in repr(hub)
        assert WRITE not in repr(staged)
    assert seen > 80


def test_location_repr_has_no_credentials(hub: Hub, commit: str) -> None:
    location = hub._locate(REPO, commit, hub.file(REPO, commit, "config.json"))
    assert WRITE in str(location.headers)
    assert WRITE not in repr(location)


def test_importing_the_client_is_light() -> None:
    heavy = ("torch", "transformers", "huggingface_hub")
    code = f"import hubmerge.hub, hubmerge.publish, sys; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert found.stdout.strip() == "[]"
