"""The fault matrix, run: each fault ends with the right bytes, or with its message and exit code and nothing lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, constants, utils

import hubmerge
from hubmerge.api import RunOptions
from hubmerge.engine import Progress
from hubmerge.errors import HubMergeError, TargetMovedError
from hubmerge.hub import Hub
from hubmerge.io.http import RetryPolicy
from hubmerge.localhub import Fault, LocalHub
from tests.end_to_end import support
from tests.end_to_end.fault_matrix import CELLS, MODELS, MOVING, TARGET, Cell, Stage, table
from tests.end_to_end.output_faults import file_size_limit
from tests.end_to_end.support import OWNER, SECRETS, STRANGER, USERS, Outcome, Town, folder_state, save, tensors

# As patient as by default with a server that asks to wait, and with nothing else.
FAST = RetryPolicy(attempts=6, base_wait_s=0.01, max_wait_s=0.04, connect_timeout_s=2, read_timeout_s=1)
SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (200, 100) for i in range(3)}
SHARDS = tuple(f"model-{i + 1:05d}-of-00003.safetensors" for i in range(3))
RECIPE = f"""\
method: task_arithmetic
base: {MODELS[0]}
models: [{MODELS[1]}@{MOVING}, {MODELS[2]}]
output: {{shard_size: 80KB}}
"""
Files = dict[str, str]


# --- the stage --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    """A Hub with three models, one of them somebody else's."""
    tmp = tmp_path_factory.mktemp("matrix")
    with pytest.MonkeyPatch.context() as patch, LocalHub(tmp / "hub", users=USERS, separate_cdn=True) as hub:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        made = Town(hub)
        for seed, repo in enumerate(MODELS):
            folder = save(tmp / repo, tensors(seed, SHAPES))
            owner = OWNER if repo.startswith("local/") else STRANGER
            api = HfApi(endpoint=hub.endpoint, token=owner.token)
            api.create_repo(repo)
            api.upload_folder(repo_id=repo, folder_path=folder)
        yield made


@pytest.fixture
def stage(town: Town, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """The Hub without a target, and a command that is not patient."""
    (tmp_path / "merge.yaml").write_text(RECIPE)
    (tmp_path / "tmp").mkdir()
    for name, value in (
        ("HF_ENDPOINT", town.hub.endpoint),
        ("HF_TOKEN", OWNER.token),
        ("TMPDIR", str(tmp_path / "tmp")),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("hubmerge.hub.connection.RetryPolicy", lambda: FAST)
    # The client library has pauses of its own, of seconds.
    monkeypatch.setattr(utils._http, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 100)))
    town.hub.set_private("mallory/b", False)
    town.api.create_branch("local/a", branch=MOVING)
    made = Stage(town)
    with made.stack:
        yield made
    town.hub.faults.clear()
    town.api.delete_repo(TARGET, missing_ok=True)
    town.api.delete_branch("local/a", branch=MOVING)


def push(folder: Path, *flags: str) -> Outcome:
    return support.hubmerge("push", folder / "merge.yaml", "--to", TARGET, "--fetch", "stream", *flags)


def files_of(town: Town) -> Files:
    tree = town.api.list_repo_tree(TARGET, recursive=True)
    return {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in tree if hasattr(f, "blob_id")}


def staged_in(town: Town) -> set[str]:
    """The files in staging branches."""
    if not town.api.repo_exists(TARGET):
        return set()
    names = [ref.name for ref in town.api.list_repo_refs(TARGET).branches if ref.name.startswith("hubmerge/stage-")]
    return {
        Path(path).name
        for name in names
        for path in town.api.list_repo_files(TARGET, revision=name)
        if path.startswith(f"{name}/")
    }


@pytest.fixture(scope="module")
def whole(town: Town) -> dict[str, Files]:
    """What an undisturbed push publishes, once it is known."""
    return {}


@pytest.fixture
def expected(stage: Stage, whole: dict[str, Files], tmp_path: Path) -> Files:
    """What an undisturbed push publishes."""
    if not whole:
        done = push(tmp_path)
        assert done.code == 0, done.text
        whole["files"] = files_of(stage.town)
        assert set(SHARDS) < set(whole["files"])
        stage.town.api.delete_repo(TARGET)
    return whole["files"]


# --- the table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, marks=pytest.mark.slow if cell.slow else (), id=cell.id) for cell in CELLS]
)
def test_cell(cell: Cell, stage: Stage, expected: Files, tmp_path: Path) -> None:
    cell.arrange(stage)
    ended = push(tmp_path, "--overwrite")
    stage.stack.close()
    assert any(rule.hits for rule in stage.town.hub.faults.rules()) or not stage.town.hub.faults.rules()
    stage.town.hub.faults.clear()
    assert ended.code == cell.code, ended.text
    assert os.listdir(tmp_path / "tmp") == []
    if cell.code:
        assert_explained(ended, cell)
        assert bool(staged_in(stage.town) & set(SHARDS)) == cell.keeps
        assert not stage.town.api.repo_exists(TARGET) or set(files_of(stage.town)) <= {".gitattributes", "theirs.txt"}
        stage.town.hub.set_private("mallory/b", False)
        again = push(tmp_path, "--overwrite")
        assert again.code == 0, again.text
    found = files_of(stage.town)
    found.pop("theirs.txt", None)
    assert found == expected
    assert staged_in(stage.town) == set()


def assert_explained(ended: Outcome, cell: Cell) -> None:
    for part in cell.says:
        assert part in ended.err, ended.text
    assert ("files are staged in" in ended.err) == cell.keeps, ended.text
    assert any(line.startswith("  ") for line in ended.err.splitlines())
    assert "Traceback" not in ended.text
    assert "internal error" not in ended.text
    for secret in SECRETS:
        assert secret not in ended.text


# --- what is no single fault ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [Fault(status=503), Fault(reset=True), Fault(reset_after_bytes=0)],
    ids=["refused", "lost on the way", "reply lost"],
)
def test_any_request_may_fail_once(fault: Fault, stage: Stage, expected: Files, tmp_path: Path) -> None:
    """Each kind of request that a push makes is hit once, all of them in one run."""
    hub = stage.town.hub
    hub.requests.clear()
    flags = ("--tag", "v1", "--public")
    assert push(tmp_path, *flags).code == 0
    kinds = sorted({(r.method, re.sub(r"[0-9a-f]{40,}|(?<=_lfs/)\d+", "[0-9a-f]+", r.path)) for r in hub.requests})
    assert len(kinds) > 20
    stage.town.api.delete_repo(TARGET)
    rules = [hub.faults.add(replace(fault, method=method, path=f"^{path}$")) for method, path in kinds]
    ended = push(tmp_path, *flags)
    assert ended.code == 0, ended.text
    assert [rule.fault.path for rule in rules if not rule.hits] == []
    hub.faults.clear()
    assert files_of(stage.town) == expected
    assert stage.town.state(TARGET).branches.keys() == {"main"}


def test_two_pushers_to_one_target(stage: Stage, expected: Files, tmp_path: Path) -> None:
    """Different merges at once: one is published, the other one ends and says so, and can be published on top."""
    stage.town.api.create_repo(TARGET, private=True)
    (tmp_path / "other.yaml").write_text(RECIPE + "parameters: {scale: 0.5}\n")
    recipes = [hubmerge.Recipe.load(tmp_path / name) for name in ("merge.yaml", "other.yaml")]
    uploading = threading.Barrier(2)
    ended: list[object] = []

    def run(recipe: hubmerge.Recipe) -> None:
        started = iter([lambda: uploading.wait(30)])
        try:
            hubmerge.push(recipe, TARGET, hub=Hub(), progress=lambda _: next(started, lambda: None)())
            ended.append("published")
        except TargetMovedError as error:
            ended.append(error.message)

    threads = [threading.Thread(target=run, args=(recipe,)) for recipe in recipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended.count("published") == 1
    assert any(f"{TARGET}@main moved from" in str(outcome) for outcome in ended), ended
    assert staged_in(stage.town) == {"plan.json", *SHARDS}
    assert push(tmp_path).code == 0
    assert files_of(stage.town) == expected


# --- a full disk ------------------------------------------------------------------------------------------------


def test_no_room_for_a_shard_in_the_temporary_folder(stage: Stage, expected: Files, tmp_path: Path) -> None:
    """No file may be larger than half a shard; in a process of its own, for the Hub's database has to grow."""
    arguments = ["push", tmp_path / "merge.yaml", "--to", TARGET, "--fetch", "stream"]
    limited = ["sh", "-c", 'ulimit -f 80; exec "$@"', "sh", sys.executable, "-m", "hubmerge", *map(str, arguments)]
    ended = subprocess.run(limited, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    assert f"{SHARDS[0]}: 0.00 GB cannot be reserved: File too large" in ended.stderr
    assert "free some disk space" in ended.stderr
    assert not stage.town.api.repo_exists(TARGET)
    assert os.listdir(tmp_path / "tmp") == []
    assert push(tmp_path).code == 0
    assert files_of(stage.town) == expected


def test_no_room_for_more_in_the_output_folder(stage: Stage, tmp_path: Path) -> None:
    """The disk takes two files and then no more; they are kept, and the next run goes on there."""
    recipe, out = hubmerge.Recipe.load(tmp_path / "merge.yaml"), tmp_path / "results" / "out"
    hubmerge.merge(recipe, tmp_path / "whole", hub=Hub())
    with ExitStack() as limits:
        finished: list[str] = []

        def fill(progress: Progress) -> None:
            finished.extend([progress.finished] if progress.finished else [])
            if len(finished) == 2:
                limits.enter_context(file_size_limit(50_000))

        with pytest.raises(HubMergeError, match=r"cannot be (reserved|written): File too large") as caught:
            hubmerge.merge(recipe, out, hub=Hub(), options=RunOptions(workers=1), progress=fill)
    assert caught.value.exit_code == 1
    assert "2 finished files kept in" in "".join(caught.value.__notes__)
    assert not out.exists()
    again: list[str | None] = []
    hubmerge.merge(recipe, out, hub=Hub(), progress=lambda p: again.append(p.finished))
    assert {name for name in again if name} == set(SHARDS) - set(finished)
    assert folder_state(out) == folder_state(tmp_path / "whole")
    assert os.listdir(out.parent) == ["out"]


# --- the page about it ------------------------------------------------------------------------------------------


def test_the_documentation_has_this_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    assert table() in page, f"docs/reliability.md should have this table:\n{table()}"
