"""Processes for jobs are forked from one that has no threads, no secrets, and a server to live for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from huggingface_hub import snapshot_download

from hubmerge import Recipe, api
from hubmerge.hub import Hub
from hubmerge.localhub import Fault, LocalHub
from hubmerge.space.forge import Child, Forge
from hubmerge.space.orders import Order
from hubmerge.space.runner import environment
from tests.space.scene import ANN, RECIPE, open_scene, wait_for

SOON_S = 60.0
"""For what takes moments, or the seconds of importing, where nothing else runs."""
MATRICES = RECIPE.replace("task_arithmetic", "tsv_merge")
"""Its decompositions use the threads of LAPACK."""


@pytest.fixture
def forge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Forge]:
    monkeypatch.setenv("OAUTH_CLIENT_SECRET", "nobody-else's")
    made = Forge(tmp_path, environment())
    yield made
    made.close()


def ended(child: Child) -> int | None:
    """Its exit code, after everything that it has told."""
    child.stdout.read()
    code = child.wait()
    child.close()
    return code


def soon(condition: Callable[[], bool]) -> bool:
    """Whether it comes true, within some time."""
    ends_at = time.monotonic() + SOON_S
    while not (true := condition()) and time.monotonic() < ends_at:
        time.sleep(0.02)
    return true


def gone(pid: int) -> bool:
    """Whether a process is no more, or only its number is."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def sockets(pid: int) -> int:
    """Those of the forge, if it has any."""
    return sum(os.readlink(link).startswith("socket:") for link in Path(f"/proc/{pid}/fd").iterdir())


def test_children_have_their_own_session_and_folder_can_be_ended_and_outlive_their_forge(
    forge: Forge, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c", "d")]
    for folder in folders:
        folder.mkdir()
    children = [forge.begin(folder) for folder in folders]
    (parent,) = {psutil.Process(child.pid).ppid() for child in children}
    assert psutil.Process(parent).num_threads() == 1
    for child, folder in zip(children, folders, strict=True):
        process = psutil.Process(child.pid)
        assert soon(lambda p=process, f=folder: (os.getsid(p.pid), p.cwd(), sockets(p.pid)) == (p.pid, str(f), 0))
        assert "OAUTH_CLIENT_SECRET" not in process.environ()

    children[0].send_signal(signal.SIGKILL)
    assert ended(children[0]) == -signal.SIGKILL
    children[1].send_signal(signal.SIGTERM)
    assert ended(children[1]) == -signal.SIGTERM
    children[2].stdin.close()  # before it was told what to do
    assert ended(children[2]) == 1

    os.kill(parent, signal.SIGKILL)
    assert soon(lambda: gone(parent))
    assert psutil.Process(children[3].pid).is_running()
    another = forge.begin(tmp_path)
    assert psutil.Process(another.pid).ppid() != parent
    for orphan_or_not, code in ((children[3], None), (another, -signal.SIGKILL)):
        orphan_or_not.send_signal(signal.SIGKILL)
        assert ended(orphan_or_not) == code


def test_a_forge_that_does_not_even_start_is_an_error(tmp_path: Path) -> None:
    broken = Forge(tmp_path, {**environment(), "PYTHONPATH": str(tmp_path)}, subprocess.DEVNULL)
    (tmp_path / "hubmerge").mkdir()
    (tmp_path / "hubmerge" / "__init__.py").write_text("raise SystemExit(3)")
    with pytest.raises(OSError, match=r"has ended|Broken pipe"):
        broken.begin(tmp_path)
    broken.close()
    with pytest.raises(ConnectionAbortedError):
        broken.begin(tmp_path)


@pytest.mark.slow
def test_a_forked_job_computes_the_bits_that_any_process_does(
    start_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    scene = open_scene(start_hub, tmp_path)
    with scene.server() as runner:
        job = runner.submit(scene.visitor(ANN), Order("merge", "ann/merged", recipe=MATRICES))
        done = wait_for(runner, "ann", job.id)
    assert (done.state, done.message) == ("done", "")
    hub = scene.town.hub
    theirs = Path(
        snapshot_download("ann/merged", endpoint=hub.endpoint, token=ANN.token, local_dir=tmp_path / "theirs")
    )
    api.merge(Recipe.loads(MATRICES), tmp_path / "ours", hub=Hub(hub.endpoint, ANN.token))
    names = [p.name for p in sorted(theirs.glob("*.safetensors"))]
    assert len(names) == 6
    assert {n: (theirs / n).read_bytes() for n in names} == {n: (tmp_path / "ours" / n).read_bytes() for n in names}


_SERVER = """
import json, sys, time
from pathlib import Path
from hubmerge.space.jobs import JobTable
from hubmerge.space.orders import Order
from hubmerge.space.runner import Runner
from hubmerge.space.safety import Limits
from hubmerge.space.visitors import Visitor
asked = json.loads(sys.stdin.readline())
folder = Path(asked["folder"])
with Runner(JobTable(folder / "jobs.db"), folder, Limits(min_shard_bytes=1)) as runner:
    visitor = Visitor("ann", asked["token"], asked["endpoint"])
    runner.submit(visitor, Order("merge", "ann/merged", asked["recipe"]))
    time.sleep(600)
"""


def test_nothing_outlives_a_server_that_is_killed(start_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    scene = open_scene(start_hub, tmp_path)
    hub = scene.town.hub
    rule = hub.faults.add(Fault(method="PUT", path="^/_lfs/", times=None, stall_upload_after_bytes=0))
    asked = {"folder": str(tmp_path / "server"), "token": ANN.token, "endpoint": hub.endpoint, "recipe": RECIPE}
    server = subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with server:
        assert server.stdin is not None
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        assert soon(lambda: rule.hits > 0)
        below = psutil.Process(server.pid).children(recursive=True)
        assert len(below) == 2
        server.kill()
    assert soon(lambda: all(gone(process.pid) for process in below))
