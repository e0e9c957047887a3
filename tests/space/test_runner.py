"""Jobs in processes of their own: they publish, end when they are told to, continue, and are their owner's alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from huggingface_hub import HfApi

from hubmerge.errors import UsageError
from hubmerge.localhub import Fault, LocalHub
from hubmerge.space.forge import Child, Forge
from hubmerge.space.jobs import Job, JobTable
from hubmerge.space.orders import Order
from hubmerge.space.runner import Runner, environment, whose_turn
from hubmerge.space.worker import asked_of
from tests.space.scene import ANN, BOB, RECIPE, SMALL, USERS, Scene, open_scene, wait_for

MERGE = Order("merge", "ann/merged", recipe=RECIPE)
SOON_S = 20.0
"""For what takes a second or two where nothing else runs."""


@pytest.fixture
def scene(start_hub: Callable[..., LocalHub], tmp_path: Path) -> Scene:
    return open_scene(start_hub, tmp_path)


def api_of(scene: Scene) -> HfApi:
    return HfApi(endpoint=scene.town.hub.endpoint, token=ANN.token)


def staged(scene: Scene) -> set[str]:
    api = api_of(scene)
    (stage,) = (b.name for b in api.list_repo_refs("ann/merged").branches if b.name.startswith("hubmerge/stage-"))
    return {f for f in api.list_repo_files("ann/merged", revision=stage) if f.endswith(".safetensors")}


def workers() -> list[psutil.Process]:
    forges = [p for p in psutil.Process().children() if "hubmerge.space.forge" in p.cmdline()]
    return [child for forge in forges for child in forge.children()]


def no_secrets(scene: Scene) -> None:
    """No token in any file of the server's, nor in what its processes have printed."""
    files = [p for p in (scene.tmp / "server").rglob("*") if p.is_file()]
    assert scene.table_path in files
    for path in (*files, scene.log_path):
        content = path.read_bytes()
        assert not [user.name for user in USERS if user.token.encode() in content], path


def test_a_job_is_cancelled_resumed_interrupted_by_a_restart_and_done(scene: Scene) -> None:
    ann, bob = scene.visitor(ANN), scene.visitor(BOB)
    hub = scene.town.hub
    rule = hub.faults.add(Fault(method="PUT", path="^/_lfs/", skip=2, times=None, stall_upload_after_bytes=0))
    with scene.server() as runner:
        job = runner.submit(ann, MERGE)
        wait_for(runner, "ann", job.id, until=lambda _: rule.hits > 0)
        (worker,) = workers()
        assert ANN.token not in "".join([*worker.cmdline(), *worker.environ().values()])
        assert worker.environ()["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"
        assert "HF_TOKEN" not in worker.environ()
        for forbidden in (runner.cancel, runner.resume):
            with pytest.raises(UsageError, match="you have no job"):
                forbidden(bob, job.id)
        assert runner.table.of("bob") == ()
        no_secrets(scene)

        asked = time.monotonic()
        assert runner.cancel(ann, job.id).stage == "cancelling"
        assert wait_for(runner, "ann", job.id).state == "cancelled"
        assert time.monotonic() - asked < SOON_S
        assert workers() == []
        before = staged(scene)
        assert len(before) == 2

        hub.faults.clear()
        rule = hub.faults.add(Fault(method="PUT", path="^/_lfs/", skip=1, times=None, stall_upload_after_bytes=0))
        runner.resume(ann, job.id)
        found = wait_for(runner, "ann", job.id, until=lambda _: rule.hits > 0)
        assert (found.state, found.shards_done, found.shards_total) == ("running", 3, 6)

    assert workers() == []
    hub.faults.clear()
    with scene.server() as runner:
        assert runner.table.get("ann", job.id).state == "interrupted"
        assert runner.signed_in(bob) == 0
        assert runner.signed_in(ann) == 1
        done = wait_for(runner, "ann", job.id)
    assert (done.state, done.message) == ("done", "")
    assert (done.url, done.shards_done) == (f"{hub.endpoint}/ann/merged", 6)
    api = api_of(scene)
    assert api.model_info("ann/merged").sha == done.commit_id
    assert [b.name for b in api.list_repo_refs("ann/merged").branches] == ["main"]
    assert {Path(f).name for f in before} <= set(api.list_repo_files("ann/merged"))
    no_secrets(scene)


@pytest.mark.slow
def test_a_job_that_is_killed_hurts_nobody_and_continues(scene: Scene) -> None:
    ann, bob = scene.visitor(ANN), scene.visitor(BOB)
    rule = scene.town.hub.faults.add(Fault(method="PUT", path="^/_lfs/", skip=2, times=1, stall_upload_after_bytes=0))
    with scene.server() as runner:
        mine, other = runner.submit(ann, MERGE), runner.submit(bob, replace(MERGE, target="bob/merged"))
        wait_for(runner, "ann", mine.id, until=lambda _: rule.hits > 0)
        (worker,) = workers()
        assert runner.table.get("bob", other.id).state == "queued"
        worker.kill()
        ended = wait_for(runner, "ann", mine.id)
        assert (ended.state, "perhaps because memory ran out" in ended.message) == ("failed", True)
        assert len(staged(scene)) == 2
        assert wait_for(runner, "bob", other.id).state == "done"
        runner.resume(ann, mine.id)
        assert wait_for(runner, "ann", mine.id).state == "done"
    assert list((scene.tmp / "server" / "running").iterdir()) == []
    no_secrets(scene)


def test_a_job_ends_by_itself_when_its_server_is_gone_and_its_failure_names_no_token(scene: Scene) -> None:
    """Of two workers, one loses its server while it uploads, the other one is asked for what it may not read."""
    scene.town.hub.faults.add(Fault(method="PUT", path="^/_lfs/", times=None, stall_upload_after_bytes=0))
    forge = Forge(scene.tmp, environment())
    orphan = _worker(forge, MERGE, scene)
    refused = _worker(forge, replace(MERGE, recipe=RECIPE.replace("local/a", "local/missing")), scene)
    states = (json.loads(line)["state"] for line in orphan.stdout)
    assert "running" in states  # and its first upload stalls
    orphan.stdin.close()
    assert json.loads(orphan.stdout.read().splitlines()[-1])["end"] == "cancelled"
    said = refused.stdout.read()
    end = json.loads(said.splitlines()[-1])
    assert (end["end"], ANN.token in said) == ("failed", False)
    assert "local/missing" in end["message"]
    for child in (orphan, refused):
        assert child.wait() == 0
        child.close()
    forge.close()


def _worker(forge: Forge, order: Order, scene: Scene) -> Child:
    child = forge.begin(scene.tmp)
    child.stdin.write(asked_of(order, scene.visitor(ANN), SMALL))
    child.stdin.flush()
    return child


# --- whose turn it is: no process is needed for that ------------------------------------------------------------


def _closed(scene: Scene, **limits: int) -> Runner:
    """A server that takes orders and runs none."""
    return Runner(JobTable(scene.table_path), scene.tmp, replace(SMALL, **limits))


def test_a_visitor_can_have_so_many_jobs_unfinished_and_begin_so_many_in_an_hour(scene: Scene) -> None:
    ann, bob = scene.visitor(ANN), scene.visitor(BOB)
    runner = _closed(scene, waiting=2, per_hour=3)
    first, _ = runner.submit(ann, MERGE), runner.submit(ann, MERGE)
    with pytest.raises(UsageError, match="2 of your jobs are not finished"):
        runner.submit(ann, MERGE)
    runner.submit(bob, MERGE)
    assert runner.cancel(ann, first.id).state == "cancelled"
    runner.submit(ann, MERGE)
    with pytest.raises(UsageError, match="2 of your jobs are not finished"):
        runner.resume(ann, first.id)
    runner.cancel(ann, runner.table.of("ann")[0].id)
    runner.table.forget("ann", first.id)  # which changes nothing in what an hour has seen
    with pytest.raises(UsageError, match="begun 3 jobs in an hour"):
        runner.submit(ann, MERGE)
    runner.table.close()


def test_the_queue_is_bounded_for_all_together(scene: Scene) -> None:
    runner = _closed(scene, queue=3, waiting=2)
    for user in (ANN, ANN, BOB):
        runner.submit(scene.visitor(user), MERGE)
    with pytest.raises(UsageError, match="3 jobs are waiting here"):
        runner.submit(scene.visitor(BOB), MERGE)
    keys = [j.id for j in runner.table.in_state("queued")]
    assert [runner.place_in_queue(scene.visitor(u), k) for u, k in zip((ANN, ANN, BOB), keys, strict=True)] == [0, 1, 2]
    with pytest.raises(UsageError, match="no job"):
        runner.place_in_queue(scene.visitor(BOB), keys[0])
    runner.table.close()


def test_visitors_take_turns_whoever_has_asked_for_more(tmp_path: Path) -> None:
    table = JobTable(tmp_path / "jobs.db")
    names = ["ann"] * 5 + ["bob"] * 2 + ["cy"]
    queued = [table.add(name, MERGE) for name in names]
    table.close()
    order: list[str] = []
    busy: dict[str, int] = {}
    last: dict[str, float] = {}
    running: list[Job] = []
    while queued or running:
        job = whose_turn(queued, busy, last, 1)
        if job is None or len(running) == 2:  # two workers, and the first that began ends first
            busy[running.pop(0).owner] -= 1
            continue
        queued.remove(job)
        running.append(job)
        order.append(job.owner)
        busy[job.owner] = busy.get(job.owner, 0) + 1
        last[job.owner] = float(len(order))
        assert max(busy.values()) == 1
    assert order == ["ann", "bob", "cy", "ann", "bob", "ann", "ann", "ann"]
