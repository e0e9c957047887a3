"""The staging branch: what it holds, who may use it, and what becomes of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import hubmerge
from hubmerge.errors import AccessError, PublishError, TargetMovedError
from hubmerge.hub import Hub
from hubmerge.io.http import RetryPolicy
from hubmerge.journal import Resumable, Written
from hubmerge.localhub import Fault, LocalHub, User
from hubmerge.lock import LOCK_NAME
from hubmerge.publish import PublishedInfo, Publisher, PublishOptions
from hubmerge.spec import OutputFile
from hubmerge.staging import PREFIX, clean_up
from tests import factories as make

FAST = RetryPolicy(attempts=3, base_wait_s=0.01, max_wait_s=0.04, connect_timeout_s=2, read_timeout_s=2)
USERS = (User("ann", "hf_annWriteToken"), User("bob", "hf_bobWriteToken"))
REPO = "ann/merged"
SHARDS = {f"model-0000{n}-of-00003.safetensors": bytes([n]) * 50_000 for n in (1, 2, 3)}
NAMES = tuple(SHARDS)
OUTPUTS = tuple(OutputFile(name, b"", len(content)) for name, content in SHARDS.items())
WORK = Resumable(make.digest("plan"), OUTPUTS, recipe={"method": "ties"})
OTHER = dataclasses.replace(WORK, digest=make.digest("other plan"))
BRANCH = PREFIX + WORK.tag


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def lock(work: Resumable = WORK) -> bytes:
    """A lock of the plan, over the shards."""
    return json.dumps(
        {
            "format_version": 1,
            "hubmerge_version": hubmerge.__version__,
            "recipe": {},
            "sources": [{"role": "base", "name": "base", "repo": "a/b", "commit": "0" * 40, "files": []}],
            "plan_sha256": work.digest,
            "outputs": [{"path": n, "size_bytes": len(c), "sha256": digest(c)} for n, c in SHARDS.items()],
            "numerics": "exact",
            "seed": 0,
            "environment": {},
        }
    ).encode()


SMALL = {"config.json": b"{}", LOCK_NAME: lock()}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with LocalHub(tmp_path / "hub", users=USERS) as running:
        yield running
        close_session()


@pytest.fixture
def hub(server: LocalHub, tmp_path: Path) -> Hub:
    return another(server, tmp_path)


def another(server: LocalHub, tmp_path: Path, token: str = "hf_annWriteToken") -> Hub:
    return Hub(server.endpoint, token, cache_dir=tmp_path / "cache", policy=FAST)


def upload(publisher: Publisher, folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(SHARDS[name])
        publisher.shard_done(folder / name, name, digest(SHARDS[name]), len(SHARDS[name]))
        assert os.listdir(folder) == []


def stopped(hub: Hub, folder: Path, *names: str, options: PublishOptions | None = None, work: Resumable = WORK) -> str:
    """A run that ends after some shards; returns what is noted on its error."""
    with pytest.raises(RuntimeError) as caught, Publisher(hub, REPO, options, work) as publisher:  # noqa: PT012
        upload(publisher, folder, *names)
        raise RuntimeError
    return "\n".join(getattr(caught.value, "__notes__", []))


def published(
    hub: Hub,
    folder: Path,
    *names: str,
    done: tuple[str, ...] = (),
    options: PublishOptions | None = None,
    work: Resumable = WORK,
) -> PublishedInfo:
    """A run that finds these files done, and makes the others."""
    with Publisher(hub, REPO, options, work) as publisher:
        assert {w.path for w in publisher.done} == set(done)
        assert all(w == Written(w.path, len(SHARDS[w.path]), digest(SHARDS[w.path])) for w in publisher.done)
        upload(publisher, folder, *names)
        return publisher.finish(SMALL)


def branches(hub: Hub) -> set[str]:
    return set(hub.refs(REPO).branches)


def weights(hub: Hub, revision: str = "main") -> Mapping[str, str | None]:
    return {f.path: f.sha256 for f in hub.list_files(REPO, hub.pin(REPO, revision)) if f.path.endswith(".safetensors")}


WHOLE = {name: digest(content) for name, content in SHARDS.items()}


# --- what is staged ---------------------------------------------------------------------------------------------


def test_one_commit_for_each_shard_and_the_first_says_what_it_is(hub: Hub, tmp_path: Path) -> None:
    note = stopped(hub, tmp_path / "out", *NAMES[:2])
    assert note.startswith(f"2 of 3 files are staged in {REPO}@{BRANCH}; the same command continues from there")
    assert [c.title for c in hub.api.list_repo_commits(REPO, revision=BRANCH)][:-1] == [
        f"Stage {name}" for name in reversed(NAMES[:2])
    ]
    assert weights(hub, BRANCH) == {f"{BRANCH}/{name}": WHOLE[name] for name in NAMES[:2]}
    about = json.loads(hub.read_small(REPO, hub.pin(REPO, BRANCH), f"{BRANCH}/plan.json"))
    assert about["plan_sha256"] == WORK.digest
    assert about["recipe"] == {"method": "ties"}
    assert about["hubmerge_version"] == hubmerge.__version__
    assert not weights(hub)
    assert hub.check_write(REPO).private


def test_what_is_staged_is_published_by_copying_it(hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    stopped(hub, tmp_path / "out", *NAMES[:2])
    before = hub.pin(REPO)
    server.requests.clear()
    info = published(hub, tmp_path / "elsewhere", NAMES[2], done=NAMES[:2])
    assert len(server.requests.find("PUT", "^/_lfs/")) == 1
    assert weights(hub) == WHOLE
    assert branches(hub) == {"main"}
    assert [c.commit_id for c in hub.api.list_repo_commits(REPO)] == [info.commit, before]
    assert {f.path for f in hub.list_files(REPO, info.commit)} == {*NAMES, *SMALL, ".gitattributes"}


def test_everything_staged_nothing_to_do_but_the_commit(hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    stopped(hub, tmp_path / "out", *NAMES)
    server.requests.clear()
    published(hub, tmp_path / "out", done=NAMES)
    assert not server.requests.find("PUT", "^/_lfs/")
    assert weights(hub) == WHOLE


def test_the_target_branch_appears_with_its_content(hub: Hub, tmp_path: Path) -> None:
    options = PublishOptions(revision="dev")
    stopped(hub, tmp_path / "out", NAMES[0], options=options)
    assert branches(hub) == {"main", BRANCH}
    published(hub, tmp_path / "out", *NAMES[1:], done=NAMES[:1], options=options)
    assert branches(hub) == {"main", "dev"}
    assert weights(hub, "dev") == WHOLE
    assert not weights(hub)


def test_files_that_are_not_taken_over_are_uploaded_all_the_same(hub: Hub, tmp_path: Path) -> None:
    partly = dataclasses.replace(WORK, outputs=OUTPUTS[:2])
    assert "2 of 2 files are staged" in stopped(hub, tmp_path / "out", *NAMES, work=partly)
    published(hub, tmp_path / "out", NAMES[2], done=NAMES[:2], work=partly)
    assert weights(hub) == WHOLE


# --- whose it is ------------------------------------------------------------------------------------------------


def test_another_plan_has_another_branch(hub: Hub, tmp_path: Path) -> None:
    stopped(hub, tmp_path / "out", NAMES[0])
    published(hub, tmp_path / "out", *NAMES, work=OTHER)
    assert branches(hub) == {"main", BRANCH}
    assert weights(hub) == WHOLE


def test_a_branch_of_the_same_name_and_another_plan_is_never_used(hub: Hub, tmp_path: Path) -> None:
    stopped(hub, tmp_path / "out", NAMES[0])
    alike = dataclasses.replace(WORK, digest=WORK.digest[:12] + "0" * 52)
    with pytest.raises(PublishError, match="holds the files of another plan") as caught:
        published(hub, tmp_path / "out", work=alike)
    assert "--no-resume" in caught.value.hint
    published(hub, tmp_path / "out", *NAMES, work=dataclasses.replace(alike, resume=False))
    assert branches(hub) == {"main"}


def test_starting_over_removes_what_is_staged(hub: Hub, tmp_path: Path) -> None:
    stopped(hub, tmp_path / "out", *NAMES[:2])
    again = dataclasses.replace(WORK, resume=False)
    with Publisher(hub, REPO, None, again) as publisher:
        assert publisher.done == ()
        assert branches(hub) == {"main"}
        upload(publisher, tmp_path / "out", *NAMES)
        publisher.finish(SMALL)
    assert weights(hub) == WHOLE


def test_a_branch_that_was_only_just_made_is_used(hub: Hub, tmp_path: Path) -> None:
    hub.ensure_repo(REPO, private=True)
    hub.branch(REPO, BRANCH, hub.pin(REPO))
    published(hub, tmp_path / "out", *NAMES)
    assert branches(hub) == {"main"}


def test_a_staged_file_of_another_length_is_made_again(hub: Hub, tmp_path: Path) -> None:
    stopped(hub, tmp_path / "out", *NAMES[:2])
    shorter = tmp_path / "shorter"
    shorter.write_bytes(b"short")
    hub.append(REPO, BRANCH, [hub.upload(REPO, "main", shorter, f"{BRANCH}/{NAMES[0]}")], message="harm")
    published(hub, tmp_path / "out", NAMES[0], NAMES[2], done=NAMES[1:2])
    assert weights(hub) == WHOLE


# --- when the end of a run was not seen -------------------------------------------------------------------------


def test_published_already_means_nothing_to_do(hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    """A run that was killed after its commit left the stage, the visibility and the tag to the next."""
    first = published(hub, tmp_path / "out", *NAMES)
    hub.branch(REPO, BRANCH, first.commit)
    hub.tag(REPO, "v1", first.commit)
    server.requests.clear()
    again = published(hub, tmp_path / "out", done=NAMES, options=PublishOptions(public=True, tag="v1"))
    assert again.commit == first.commit
    assert not server.requests.find("PUT", "^/_lfs/")
    assert branches(hub) == {"main"}
    assert not hub.check_write(REPO).private


def test_a_tag_of_something_else_is_refused_also_then(hub: Hub, tmp_path: Path) -> None:
    hub.ensure_repo(REPO, private=True)
    hub.tag(REPO, "v1", hub.pin(REPO))
    published(hub, tmp_path / "out", *NAMES)
    with pytest.raises(PublishError, match="has a tag 'v1' already"):
        published(hub, tmp_path / "out", options=PublishOptions(tag="v1"))


def test_a_published_file_that_somebody_changed_is_made_again(hub: Hub, tmp_path: Path) -> None:
    published(hub, tmp_path / "out", *NAMES)
    other = tmp_path / "other"
    other.write_bytes(b"9" * 50_000)
    hub.append(REPO, "main", [hub.upload(REPO, "main", other, NAMES[1])], message="harm")
    published(hub, tmp_path / "out", NAMES[1], done=(NAMES[0], NAMES[2]))
    assert weights(hub) == WHOLE


def test_the_lock_of_another_plan_says_nothing(hub: Hub, tmp_path: Path) -> None:
    published(hub, tmp_path / "out", *NAMES)
    with Publisher(hub, REPO, None, OTHER) as publisher:
        assert publisher.done == ()


def test_one_pull_request_however_often_its_reply_is_lost(hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    hub.ensure_repo(REPO, private=True)
    options = PublishOptions(create_pr=True)
    stopped(hub, tmp_path / "out", *NAMES, options=options)
    first = published(hub, tmp_path / "out", done=NAMES, options=options)
    stopped(hub, tmp_path / "out", *NAMES, options=options)
    assert published(hub, tmp_path / "out", done=NAMES, options=options).url == first.url
    assert len(list(hub.api.get_repo_discussions(REPO))) == 1
    assert weights(hub, "refs/pr/1") == WHOLE


# --- several at once --------------------------------------------------------------------------------------------


def test_two_pushers_of_one_plan_make_one_commit(hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    hub.ensure_repo(REPO, private=True)
    meet, outcomes = threading.Barrier(2), []

    def run(number: int) -> None:
        mine = another(server, tmp_path)
        try:
            with Publisher(mine, REPO, None, WORK) as publisher:
                for name in NAMES if number else NAMES[::-1]:
                    meet.wait(30)
                    upload(publisher, tmp_path / f"out-{number}", name)
                outcomes.append(publisher.finish(SMALL).commit)
        except TargetMovedError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 2
    assert {o for o in outcomes if isinstance(o, str)} == {hub.pin(REPO)}
    assert len(hub.api.list_repo_commits(REPO)) == 2
    assert weights(hub) == WHOLE
    assert branches(hub) == {"main"}


def test_the_second_one_finds_the_branch_gone(hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    with Publisher(hub, REPO, None, WORK) as slow:
        upload(slow, tmp_path / "slow", NAMES[0])
        published(another(server, tmp_path), tmp_path / "out", *NAMES[1:], done=NAMES[:1])
        with pytest.raises(TargetMovedError, match="is gone: another run has published this plan"):
            upload(slow, tmp_path / "slow", NAMES[1])
    assert weights(hub) == WHOLE
    published(hub, tmp_path / "out", done=NAMES)


def test_a_repository_that_another_run_stages_in_is_not_taken_back(hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Publisher(hub, REPO, None, OTHER):  # noqa: PT012
        stopped(another(server, tmp_path), tmp_path / "out", NAMES[0])
        raise RuntimeError
    assert branches(hub) == {"main", BRANCH}
    published(hub, tmp_path / "out", *NAMES[1:], done=NAMES[:1])


def test_somebody_who_may_only_open_pull_requests_stages_nothing(hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    hub.ensure_repo(REPO, private=False)
    bob = another(server, tmp_path, "hf_bobWriteToken")
    assert stopped(bob, tmp_path / "out", NAMES[0], options=PublishOptions(create_pr=True)) == ""
    published(bob, tmp_path / "out", *NAMES, options=PublishOptions(create_pr=True))
    assert branches(hub) == {"main"}
    assert weights(hub, "refs/pr/1") == WHOLE


# --- failures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=412, body='{"error": "A commit has happened since. Please refresh and try again."}'),
        Fault(status=503),
        Fault(reset=True),
        Fault(reset_after_bytes=0),
    ],
    ids=["overtaken", "overloaded", "reset", "reply lost"],
)
def test_staging_survives_passing_failures(fault: Fault, hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    rule = server.faults.add(dataclasses.replace(fault, method="POST", path=f"/commit/{PREFIX}", times=2))
    stopped(hub, tmp_path / "out", NAMES[0])
    assert rule.hits == 2
    server.faults.clear()
    published(hub, tmp_path / "out", *NAMES[1:], done=NAMES[:1])
    assert weights(hub) == WHOLE


def test_a_first_shard_that_cannot_be_staged_leaves_nothing(hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    server.faults.add(Fault(method="POST", path=f"/commit/{PREFIX}", status=403, times=None))
    with pytest.raises(AccessError), Publisher(hub, REPO, None, WORK) as publisher:
        upload(publisher, tmp_path / "out", NAMES[0])
    assert not hub.check_write(REPO).exists


def test_a_branch_that_cannot_be_removed_is_reported_and_the_rest_done(
    hub: Hub, server: LocalHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults.add(Fault(method="DELETE", path="/branch/", status=403, times=None))
    info = published(hub, tmp_path / "out", *NAMES, options=PublishOptions(tag="v1"))
    assert f"`hubmerge push --to {REPO} --cleanup` removes it" in caplog.text
    assert hub.pin(REPO, "v1") == info.commit
    server.faults.clear()
    assert clean_up(hub, REPO) == (BRANCH,)


def test_clean_up_removes_all_that_is_staged_and_nothing_else(hub: Hub, server: LocalHub, tmp_path: Path) -> None:
    assert clean_up(hub, REPO) == ()
    stopped(hub, tmp_path / "out", NAMES[0])
    stopped(hub, tmp_path / "out", NAMES[0], work=OTHER)
    hub.branch(REPO, "hubmerge/mine", hub.pin(REPO))
    assert clean_up(hub, REPO) == tuple(sorted((BRANCH, PREFIX + OTHER.tag)))
    assert branches(hub) == {"main", "hubmerge/mine"}
    with pytest.raises(AccessError):
        clean_up(another(server, tmp_path, "hf_bobWriteToken"), REPO)
