"""``hubmerge push --on jobs``: what it shows, asks, starts and follows; jobs are processes of the local Hub."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubmerge.localhub import LocalHub
from hubmerge.remote import duration, parse_duration
from tests.end_to_end import support
from tests.end_to_end.support import OWNER, SECRETS, Town, hubmerge, save, tensors

TARGET = "local/merged"
FLAGS = ("--method", "task_arithmetic", "--base", "local/base", "--model", "local/a", "--param", "scale=0.5")


@pytest.fixture
def town(start_hub: Callable[..., LocalHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Town:
    # The job's machine is this one, and its image one that brings hubmerge along.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_TOKEN", OWNER.token)
    made = support.open_town(start_hub, jobs=True)
    for seed, name in enumerate(("base", "a")):
        made.publish(f"local/{name}", save(tmp_path / name, tensors(seed)))
    return made


def jobs_started(town: Town) -> int:
    return sum(r.method == "POST" for r in town.hub.requests.find("POST", "^/api/jobs/local$"))


def test_a_dry_run_shows_the_machine_and_the_highest_cost(town: Town) -> None:
    shown = hubmerge("push", *FLAGS, "--to", TARGET, "--on", "jobs", "--timeout", "90m", "--dry-run")
    assert shown.code == 0, shown.text
    for text in ("cpu-upgrade (8 vCPU, 32 GB memory, 50 GB disk)", "1 h 30 min", "at most $0.05 ($0.03 per hour"):
        assert text in shown.err
    told = hubmerge(
        "push", *FLAGS, "--to", TARGET, "--on", "jobs", "--flavor", "t4-small", "--tag", "v1", "--no-resume", "--json",
        "--dry-run",
    )  # fmt: skip
    found = json.loads(told.out)
    assert found["highest_cost_usd"] == pytest.approx(0.81)
    assert found["arguments"] == ["--to", TARGET, "--tag", "v1", "--no-resume"]
    assert jobs_started(town) == 0
    assert town.state(TARGET) is None


@pytest.mark.parametrize(("answer", "code", "hint"), [("", 2, "--yes"), ("n\n", 130, "--dry-run")])
def test_nothing_is_started_without_a_yes(
    answer: str, code: int, hint: str, town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    asked = hubmerge("push", *FLAGS, "--to", TARGET, "--on", "jobs")
    assert asked.code == code
    assert "start this job for at most $0.06?" in asked.err
    assert hint in asked.err
    assert jobs_started(town) == 0


def test_a_job_publishes_what_a_push_from_here_does(town: Town) -> None:
    here = hubmerge("push", *FLAGS, "--to", "local/here", "--shard-size", "1KB")
    assert here.code == 0, here.text
    there = hubmerge("push", *FLAGS, "--to", TARGET, "--shard-size", "1KB", "--on", "jobs", "--yes")
    assert there.code == 0, there.text
    assert "started http" in there.err
    assert "finished model-00001-of-" in there.out  # the job's own output

    def weights(repo: str) -> dict[str, str]:
        files = town.api.list_repo_tree(repo, recursive=True)
        named = ("hubmerge.lock.json", "aibom.cdx.json")  # they say which repository they belong to
        return {f.path: f.blob_id for f in files if f.path.endswith((".safetensors", ".json")) and f.path not in named}

    assert weights(TARGET) == weights("local/here")
    assert hubmerge("verify", TARGET).code == 0
    assert not any(secret in there.text for secret in SECRETS)


def test_a_job_that_fails_says_so_here(town: Town) -> None:
    failed = hubmerge("push", *FLAGS, "--to", TARGET, "--on", "jobs", "--yes", "--timeout", "1s")
    assert failed.code == 1
    assert "ended as ERROR: Job timeout" in failed.err
    assert "continues with the files it has staged" in failed.err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--on", "jobs", "--flavor", "cray-1"), 2, "there are cpu-basic ($0.01/h), cpu-upgrade ($0.03/h)"),
        (("--on", "jobs", "--timeout", "soon"), 2, "'soon' is no time; write for example 45m or 2h"),
        (("--flavor", "cpu-xl", "--dry-run"), 2, "--flavor, --dry-run: only together with --on jobs"),
        (("--on", "jobs", "--model", "./another"), 2, "which a job does not see"),
        (("--on", "jobs", "--model", "local/no-such-model"), 4, "local/no-such-model"),
    ],
)
def test_what_is_refused_before_anything_costs(
    flags: tuple[str, ...], code: int, message: str, town: Town, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = hubmerge("push", *FLAGS, "--to", TARGET, *flags)
    assert done.code == code, done.text
    assert message in done.err
    assert jobs_started(town) == 0


def test_a_hub_without_jobs_and_a_lost_reply(
    town: Town, start_hub: Callable[..., LocalHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubmerge.localhub import Fault

    town.hub.faults.add(Fault(method="POST", path="^/api/jobs/local$", reset_after_bytes=0))
    lost = hubmerge("push", *FLAGS, "--to", TARGET, "--on", "jobs", "--yes")
    assert lost.code == 1
    assert "cannot start a job in local" in lost.err
    assert jobs_started(town) == 1  # a second one would cost a second time


def test_interrupted_while_following_the_job_goes_on(town: Town) -> None:
    town.hub.limits.read_bytes_s = 10_000
    command = [sys.executable, "-m", "hubmerge", "push", *FLAGS, "--to", TARGET, "--on", "jobs", "--yes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        while not (line := child.stderr.readline()).startswith("started"):
            assert line, child.wait()
        child.send_signal(signal.SIGINT)
        _, error = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "which goes on" in error
    assert "hf jobs cancel" in error
    town.hub.limits.read_bytes_s = None
    until = time.monotonic() + 60
    while not town.api.repo_exists(TARGET) or "README.md" not in town.api.list_repo_files(TARGET):
        assert time.monotonic() < until
        time.sleep(0.2)


@given(st.integers(1, 10**6))
def test_times_are_read_as_they_are_written(seconds: int) -> None:
    assert parse_duration(f"{seconds}s") == parse_duration(str(seconds)) == seconds
    assert parse_duration(f"{seconds}h") == 3600 * seconds if seconds < 1e5 else True


@pytest.mark.parametrize("text", ["", "h", "-1h", "0", "nan", "infh", "1w", "2 hours"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="no time"):
        parse_duration(text)


def test_times_in_words() -> None:
    assert [duration(s) for s in (90, 3600, 5400, 2700, 7320)] == ["90 s", "1 h", "1 h 30 min", "45 min", "2 h 2 min"]
