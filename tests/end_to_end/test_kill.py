"""Killed at any moment: what is published in the end is what an undisturbed run publishes, and nothing is lost."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file

from hubmerge.localhub import Fault, LocalHub
from tests.end_to_end.killing import Ended, Runs
from tests.end_to_end.support import OWNER, USERS, Town, folder_state, save, tensors

TARGET = "local/merged"
SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (200, 100) for i in range(8)}
SHARDS = tuple(f"model-{i + 1:05d}-of-00008.safetensors" for i in range(8))
WRITE_BYTES_S = 1_000_000  # eight shards of 80 kB take two thirds of a second to upload
RECIPE = """\
method: task_arithmetic
base: {base}
models: [{a}, {b}]
parameters: {{scale: {scale}}}
output: {{shard_size: 80KB}}
"""
Files = dict[str, str]
new = pytest.mark.parametrize("world", ["new"], indirect=True)
new_or_existing = pytest.mark.parametrize("world", ["new", "existing"], indirect=True)


# --- the stage --------------------------------------------------------------------------------------------------


@dataclass
class World:
    """A Hub with three models, perhaps with an earlier merge of them; it can be put back to that state."""

    tmp: Path
    port: int
    runs: Runs
    count: int = 0

    @contextmanager
    def town(self) -> Iterator[Town]:
        """The Hub as it was in the beginning."""
        self.count += 1
        root = self.tmp / f"hub-{self.count}"
        shutil.copytree(self.tmp / "saved", root)
        with LocalHub(root, port=self.port, users=USERS, faults=True) as hub:
            hub.limits.write_bytes_s = WRITE_BYTES_S
            yield Town(hub)

    def push(self, *flags: str, wait: Callable[[], object] | None = None, number: int = signal.SIGKILL) -> Ended:
        """Push, undisturbed or until ``wait`` returns."""
        return self.runs.run(
            ["push", self.tmp / "merge.yaml", "--to", TARGET, "--fetch", "stream", *flags], wait, number
        )

    def at_step(self, town: Town, step: int, pause_s: float) -> Callable[[], None]:
        """Waits for a moment of a run: a while after so many of its steps, or its end if it has fewer."""
        first = steps_in(town)

        def wait() -> None:
            until(lambda: steps_in(town) - first >= step or self.runs.is_over())
            time.sleep(pause_s)

        return wait

    @cached_property
    def reference(self) -> tuple[Files, Files | None, int]:
        """What an undisturbed run publishes, what was there before, and the steps it takes."""
        with self.town() as town:
            before = files_of(town.api) if town.api.repo_exists(TARGET) else None
            first = self.push()
            assert first.code == 0, first.text
            assert sorted(first.begun) == list(SHARDS)
            return files_of(town.api), before, steps_in(town)


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The target is not there, or has an earlier merge."""
    tmp = tmp_path_factory.mktemp("world")
    models = {name: f"local/{name}" for name in ("base", "a", "b")}
    with pytest.MonkeyPatch.context() as patch, LocalHub(tmp / "saved", users=USERS) as hub:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for seed, name in enumerate(models):
            Town(hub).publish(f"local/{name}", save(tmp / "in" / name, tensors(seed, SHAPES), shards=3))
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": OWNER.token, "HF_HUB_DISABLE_XET": "1"}
        with Runs(tmp / "runs", environment) as runs:
            made = World(tmp, int(hub.endpoint.rpartition(":")[2]), runs)
            if request.param == "existing":
                (tmp / "merge.yaml").write_text(RECIPE.format(scale=0.4, **models))
                assert made.push().code == 0
            (tmp / "merge.yaml").write_text(RECIPE.format(scale=0.5, **models))
            hub.stop()  # its address is taken over by copies of it
            yield made


# --- what others see --------------------------------------------------------------------------------------------


def files_of(api: HfApi, revision: str = "main") -> Files:
    """All files of a revision, each with the digest of its content."""
    tree = api.list_repo_tree(TARGET, revision=revision, recursive=True)
    return {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in tree if hasattr(f, "blob_id")}


def steps_in(town: Town) -> int:
    """How far runs have got, on a machine of any speed: the ranges they have read, and all they have sent."""
    return sum(r.method not in ("GET", "HEAD") or r.path.startswith("/_cdn/") for r in town.hub.requests)


def staged_in(town: Town) -> set[str]:
    """The shards that are staged."""
    if not town.api.repo_exists(TARGET):
        return set()
    refs = town.api.list_repo_refs(TARGET)
    found = [b.name for b in refs.branches if b.name.startswith("hubmerge/stage-")]
    assert len(found) <= 1
    return {Path(f).name for name in found for f in files_of(town.api, name) if f.startswith(name)} & set(SHARDS)


@dataclass
class Reader:
    """Somebody who reads main all the time, and loads the model whenever it changes."""

    town: Town
    folder: Path
    seen: list[Files] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    looks: int = 0

    def __enter__(self) -> Reader:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        assert not self.errors

    def _read(self) -> None:
        api, last = HfApi(endpoint=self.town.hub.endpoint, token=OWNER.token), None
        while not self._ended.is_set():
            try:
                commit = api.model_info(TARGET).sha
                if commit != last:
                    self.seen.append(files_of(api, str(commit)))
                    self._load(api, str(commit))
                last = commit
            except (RepositoryNotFoundError, RevisionNotFoundError):
                last = None
            except BaseException as error:
                self.errors.append(error)
                return
            self.looks += 1
            time.sleep(0.05)

    def _load(self, api: HfApi, commit: str) -> None:
        weights = [path for path in self.seen[-1] if path.endswith(".safetensors")]
        if weights:
            where = self.folder / commit
            api.snapshot_download(TARGET, revision=commit, local_dir=where)
            assert {name for path in weights for name in load_file(where / path)} == set(SHAPES)


@dataclass
class Series:
    """A push that is killed again and again, and what must hold of it."""

    world: World
    town: Town
    expected: Files
    kills: int = 0
    begun: list[str] = field(default_factory=list)

    def run(self, *flags: str, wait: Callable[[], object] | None = None) -> Ended:
        """One more run; it computes nothing that the ones before have staged."""
        staged = staged_in(self.town)
        complete = self.town.api.repo_exists(TARGET) and files_of(self.town.api) == self.expected
        ended = self.world.push(*flags, wait=wait)
        assert ended.code in ((0, -signal.SIGKILL) if wait is not None else (0,)), ended.text
        assert not staged & set(ended.begun)
        assert not (complete and ended.begun)
        self.begun += ended.begun
        self.kills += ended.code != 0
        # Whatever was begun and is not staged was lost with this kill: one file, for there is no room for two.
        assert len(self.begun) <= len(SHARDS) + self.kills
        return ended

    def finish(self, *flags: str) -> None:
        """The last run, which nobody kills, and a look at what is published."""
        assert self.run(*flags).code == 0
        assert files_of(self.town.api) == self.expected
        assert [b.name for b in self.town.api.list_repo_refs(TARGET).branches] == ["main"]


def assert_never_partial(reader: Reader, before: Files | None, after: Files) -> None:
    assert reader.looks > 5
    for state in reader.seen:
        assert state in (after, before) or (before is None and set(state) == {".gitattributes"})
    assert reader.seen[-1] == after


# --- killed at random -------------------------------------------------------------------------------------------


def kill_at_random(world: World, kills: int, per_push: int, seed: int) -> None:
    expected, before, steps = world.reference
    chance = random.Random(seed)
    moments: list[int] = []
    while len(moments) < kills:
        with world.town() as town, Reader(town, world.tmp / f"read-{world.count}") as reader:
            series = Series(world, town, expected)
            while series.kills < per_push and len(moments) < kills:
                step = chance.randrange(steps)
                if series.run(wait=world.at_step(town, step, chance.uniform(0, 0.03))).code == 0:
                    break  # it was through before
                moments.append(step)
            series.finish()
            print(f"{series.kills} kills, {len(series.begun)} shards begun, {reader.looks} looks")
            time.sleep(0.05)  # for a last look
        assert_never_partial(reader, before, expected)
    print(f"killed after {sorted(moments)} of {steps} steps")


@pytest.mark.parametrize("world", ["new", pytest.param("existing", marks=pytest.mark.slow)], indirect=True)
def test_killed_at_random_moments(world: World) -> None:
    kill_at_random(world, kills=3, per_push=3, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@new_or_existing
def test_killed_at_many_random_moments(world: World) -> None:
    kill_at_random(world, kills=60, per_push=6, seed=2)


# --- killed at every step of the protocol -----------------------------------------------------------------------

STEPS = [
    ("POST", "/api/repos/create"),
    ("PUT", "^/_lfs/"),
    ("POST", "/branch/hubmerge/stage-"),
    ("POST", "/commit/hubmerge/stage-"),
    ("POST", "/commit/main"),
    ("DELETE", "/branch/hubmerge/stage-"),
    ("PUT", "/settings"),
    ("POST", "/tag/"),
]


@pytest.mark.parametrize("world", ["new", pytest.param("existing", marks=pytest.mark.slow)], indirect=True)
def test_killed_at_every_step(world: World) -> None:
    """Once while the request is on its way and never arrives, and once when it was done and only the reply is lost."""
    flags = ("--public", "--tag", "v1")
    expected, before, _ = world.reference
    steps = STEPS[1:] if before is not None else STEPS
    with world.town() as town, Reader(town, world.tmp / "read") as reader:
        series = Series(world, town, expected)
        for method, path in steps:
            for fault in (Fault(method, path, delay_s=1, reset=True), Fault(method, path, stall_after_bytes=0)):
                rule = town.hub.faults.add(fault)
                ended = series.run(*flags, wait=lambda rule=rule: until(lambda: rule.hits > 0))
                town.hub.faults.clear()
                assert ended.code == -signal.SIGKILL, (method, path, ended.text)
        series.finish(*flags)
        time.sleep(0.05)
        refs = town.api.list_repo_refs(TARGET)
        assert [t.target_commit for t in refs.tags] == [town.api.model_info(TARGET).sha]
        assert not town.api.model_info(TARGET).private
    assert_never_partial(reader, before, expected)


# --- ended by a signal ------------------------------------------------------------------------------------------


@new
@pytest.mark.parametrize(
    ("number", "method", "path", "skip"),
    [
        (signal.SIGINT, "GET", "^/_cdn/", 36),
        (signal.SIGTERM, "PUT", "^/_lfs/", 2),
        (signal.SIGINT, "POST", "/commit/hubmerge/stage-", 1),
        (signal.SIGTERM, "POST", "/commit/main", 0),
    ],
    ids=["reading", "uploading", "staging", "publishing"],
)
def test_signals_end_a_run_in_seconds(world: World, number: int, method: str, path: str, skip: int) -> None:
    """Also when a server says nothing any more; what is staged stays, and the command that continues is printed."""
    expected, _, _ = world.reference
    with world.town() as town:
        series = Series(world, town, expected)
        rule = town.hub.faults.add(Fault(method, path, skip=skip, times=None, stall_after_bytes=0))
        ended = world.push(wait=lambda: until(lambda: rule.hits > 0), number=number)
        town.hub.faults.clear()
        assert ended.code == 130, ended.text
        assert ended.dying_s < 5
        assert "cancelled" in ended.text
        assert "Traceback" not in ended.text
        assert f"continue with: hubmerge push {world.tmp}/merge.yaml --to {TARGET} --fetch stream" in ended.text
        assert f"{len(staged_in(town) & set(ended.begun)) or 8} of 8 files are staged" in ended.text or skip == 1
        assert staged_in(town) or files_of(town.api) == expected
        series.finish()


# --- into a folder ----------------------------------------------------------------------------------------------


@new
def test_a_merge_into_a_folder_killed_at_random_moments(world: World) -> None:
    with world.town() as town:
        town.hub.limits.read_bytes_s = 2_000_000
        whole, out = world.tmp / "whole" / "out", world.tmp / "killed" / "out"
        merge = ["merge", world.tmp / "merge.yaml", "--fetch", "stream", "--workers", "2", "--out"]
        undisturbed = world.runs.run([*merge, whole])
        assert undisturbed.code == 0, undisturbed.text
        chance, kills, begun = random.Random(3), 0, list[str]()
        while kills < 4 and not out.exists():
            finished = noted(out)
            moment_s = chance.uniform(0, undisturbed.took_s)
            ended = world.runs.run([*merge, out], wait=lambda s=moment_s: time.sleep(s))
            assert not finished & set(ended.begun)
            begun += ended.begun
            kills += ended.code != 0
        assert len(begun) <= len(SHARDS) + 2 * kills  # two workers begin two files
        if not out.exists():
            finished = noted(out)
            last = world.runs.run([*merge, out])
            assert last.code == 0, last.text
            assert not finished & set(last.begun)
            assert os.listdir(out.parent) == ["out"]
        assert folder_state(out) == folder_state(whole)


def noted(out: Path) -> set[str]:
    """The finished files that the journal beside the folder names, each whole."""
    found = set()
    for journal in out.parent.glob(f".{out.name}.hubmerge-*.journal"):
        for line in journal.read_text().splitlines(keepends=True)[1:]:
            if line.endswith("\n"):
                entry = json.loads(line)
                content = (journal.with_suffix("") / entry["path"]).read_bytes()
                assert hashlib.sha256(content).hexdigest() == entry["sha256"]
                found.add(entry["path"])
    return found


def until(there: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.005)
