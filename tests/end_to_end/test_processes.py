"""A run of several processes: the bytes of a single one; when one of them dies the others end, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from hubmerge.localhub import LocalHub
from tests.end_to_end.ranked import Ended, Group, rank_of, torchrun
from tests.end_to_end.support import OWNER, READER, STRANGER, USERS, Town, folder_state, save, tensors
from tests.end_to_end.test_kill import files_of, noted, until

TARGET = "local/merged"
NAMES = ("base", "a", "b", "c")
SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (200, 100 + 4 * i) for i in range(6)}
SHARDS = 6
# What looks at the whole model before it merges, what draws random numbers, and what does neither.
METHODS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "ties": ("density=0.3",),
    "ties-published": ("density=0.3", "rule=published"),
    "dare_linear": ("density=0.5",),
    "dare_ties": ("density=0.4", "rescale=l1"),
    "awd": (),
    "knots": ("density=0.3",),
}
# The others are slow only because there are many.
FEW = {("ties", "folder"), ("ties", "hub"), ("linear", "hub"), ("dare_linear", "folder"), ("awd", "hub")}
Files = dict[str, str]


@dataclass
class World:
    """A Hub with four models, which lie in folders too."""

    tmp: Path
    hub: LocalHub
    town: Town
    count: int = 0
    _expected: dict[tuple[str, str], Files] = field(default_factory=dict)

    def fresh(self) -> Path:
        """A folder's name that nobody had."""
        self.count += 1
        return self.tmp / f"fresh-{self.count}"

    def place(self, place: str) -> Path | str:
        """Where a result may go."""
        return self.fresh() / "out" if place == "folder" else TARGET

    def command(self, method: str, where: Path | str, *flags: str, inputs: str = "local") -> list[Any]:
        """Merge by a method into a folder or a repository."""
        models = [part for i, n in enumerate(NAMES[1:]) for part in ("--model", f"{inputs}/{n}:{1 - i / 4}")]
        params = [part for p in METHODS[method] for part in ("--param", p)]
        name = ["--method", method.partition("-")[0], "--seed", "7", "--shard-size", "100KB", "--fetch", "stream"]
        verb = ["merge", "--out", where] if isinstance(where, Path) else ["push", "--to", where]
        return [*verb, *name, "--base", f"{inputs}/base", *models, *params, *flags]

    def group(self, *commands: Sequence[Any], tokens: Sequence[str] = ()) -> Group:
        """Ranks, one for each command."""
        tokens = tokens or [OWNER.token] * len(commands)
        return Group(self.fresh(), commands, [self.environment(token) for token in tokens])

    def environment(self, token: str = OWNER.token) -> dict[str, str]:
        """What a process needs to know to reach the Hub."""
        return {"HF_ENDPOINT": self.hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}

    def run(self, count: int, command: Sequence[Any]) -> list[Ended]:
        """A command run by so many processes, to its good end."""
        ranks = self.group(*[command] * count).end()
        assert [r.code for r in ranks] == [0] * count, ranks
        return ranks

    def taken(self, where: Path | str) -> Files:
        """Every file of a result and its digest; the result is removed, and nothing else was there."""
        if isinstance(where, Path):
            state = folder_state(where)
            assert state is not None
            assert [p.name for p in where.parent.iterdir()] == [where.name]
            shutil.rmtree(where.parent)
            return state
        found = files_of(self.town.api)
        assert [b.name for b in self.town.api.list_repo_refs(where).branches] == ["main"]
        self.town.api.delete_repo(where)
        return found

    def expected(self, method: str, place: str) -> Files:
        """What one process makes."""
        if (method, place) not in self._expected:
            where = self.place(place)
            (ended,) = self.run(1, self.command(method, where))
            assert len(ended.begun) == SHARDS
            self._expected[method, place] = self.taken(where)
        return self._expected[method, place]

    def finished(self, where: Path | str) -> set[str]:
        """The files that a run has finished and not published."""
        if isinstance(where, Path):
            return noted(where)
        api = self.town.api
        if not api.repo_exists(where):
            return set()
        stages = [b.name for b in api.list_repo_refs(where).branches if b.name.startswith("hubmerge/stage-")]
        return {Path(f).name for s in stages for f in files_of(api, s) if f.startswith(s) and f.endswith("tensors")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    tmp = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch, LocalHub(tmp / "hub", users=USERS, faults=True) as hub:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        town = Town(hub)
        for seed, name in enumerate(NAMES):
            town.publish(f"local/{name}", save(tmp / "in" / name, tensors(seed, SHAPES)))
        yield World(tmp, hub, town)


@pytest.fixture(autouse=True)
def _full_speed(world: World) -> Iterator[None]:
    yield
    at_full_speed(world)


# --- the same bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "place"),
    [
        pytest.param(method, place, marks=[] if (method, place) in FEW else [pytest.mark.slow])
        for method in METHODS
        for place in ("folder", "hub")
    ],
)
def test_two_processes_make_the_bytes_of_one(method: str, place: str, world: World) -> None:
    expected, where = world.expected(method, place), world.place(place)
    ranks = world.run(2, world.command(method, where))
    assert all(r.begun for r in ranks)
    assert sum(len(r.begun) for r in ranks) == SHARDS
    assert world.taken(where) == expected


def test_more_processes_than_files(world: World) -> None:
    """Those that have no file to make take part in the statistics nevertheless: none of them is left waiting."""
    expected, where = world.expected("ties", "folder"), world.place("folder")
    ranks = world.run(SHARDS + 1, world.command("ties", where))
    assert sorted(len(r.begun) for r in ranks) == [0] + [1] * SHARDS
    assert world.taken(where) == expected


def test_a_pull_request_of_somebody_who_may_not_write(world: World) -> None:
    """There is no branch to stage in: what each process has uploaded goes into the commit of the first one."""
    world.run(1, world.command("linear", TARGET, "--public"))
    ranks = world.group(*[world.command("ties", TARGET, "--pr")] * 2, tokens=[STRANGER.token] * 2).end()
    assert [r.code for r in ranks] == [0, 0], ranks
    found = files_of(world.town.api, "refs/pr/1")
    expected = world.expected("ties", "folder")
    assert {p: d for p, d in found.items() if p.endswith("tensors")} == {
        p: d for p, d in expected.items() if p.endswith("tensors")
    }
    world.town.api.delete_repo(TARGET)


# --- when one of them dies ----------------------------------------------------------------------------------------


def at_full_speed(world: World) -> None:
    world.hub.limits.read_bytes_s = world.hub.limits.write_bytes_s = None


def slowed(world: World, where: Path | str) -> None:
    """Let a run take seconds."""
    world.hub.limits.read_bytes_s = 700_000 if isinstance(where, Path) else None
    world.hub.limits.write_bytes_s = None if isinstance(where, Path) else 200_000


@pytest.mark.parametrize(
    ("place", "victim", "then"),
    [("folder", 1, 1), ("hub", 0, 3), pytest.param("folder", 0, 2, marks=pytest.mark.slow),
     pytest.param("hub", 1, 1, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_killed_rank_ends_the_others_and_the_next_run_continues(
    place: str, victim: int, then: int, world: World
) -> None:
    expected, where = world.expected("ties", place), world.place(place)
    slowed(world, where)
    group = world.group(*[world.command("ties", where)] * 2)
    until(lambda: len(world.finished(where)) >= 2, timeout_s=240)
    group.kill(victim)
    killed = time.monotonic()
    ranks = group.end()
    assert time.monotonic() - killed < 10
    left = ranks[1 - victim]
    assert ranks[victim].code == -signal.SIGKILL
    assert left.code == 1
    assert f"error: rank {victim} (" in left.text
    assert "is gone: it was killed" in left.text
    assert "run the same command again, with any number of processes" in left.text
    assert "continue with: hubmerge " in left.text
    assert "Traceback" not in left.text

    at_full_speed(world)
    finished = world.finished(where)
    assert 2 <= len(finished) < SHARDS
    again = world.run(then, world.command("ties", where))
    assert sorted(f for r in again for f in r.begun) == sorted(set(all_shards()) - finished)
    assert world.taken(where) == expected


def all_shards() -> list[str]:
    return [f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors" for i in range(SHARDS)]


def test_a_rank_that_fails_ends_the_others_with_its_reason(world: World) -> None:
    command = world.command("linear", TARGET)
    first, other = world.group(command, command, tokens=[OWNER.token, READER.token]).end()
    assert other.code == 4
    assert first.code == 1
    reason = other.text.partition("error: ")[2].splitlines()[0]
    assert f"failed: {reason[:100]}" in first.text
    world.run(1, command)
    assert world.taken(TARGET) == world.expected("linear", "hub")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_all_cancels_all(number: int, world: World) -> None:
    """As Ctrl-C does, and a scheduler."""
    slowed(world, TARGET)
    group = world.group(*[world.command("linear", TARGET)] * 2)
    until(lambda: len(world.finished(TARGET)) >= 1, timeout_s=240)
    for rank in range(2):
        group.kill(rank, number)
    ranks = group.end()
    assert [r.code for r in ranks] == [130, 130], ranks
    assert all("continue with: hubmerge push " in r.text for r in ranks)
    world.town.api.delete_repo(TARGET)


def test_a_signal_to_one_is_told_to_the_others(world: World) -> None:
    where = world.place("folder")
    slowed(world, where)
    group = world.group(*[world.command("linear", where)] * 2)
    until(lambda: len(world.finished(where)) >= 1, timeout_s=240)
    group.kill(1, signal.SIGTERM)
    first, other = group.end()
    assert (first.code, other.code) == (1, 130)
    assert "was interrupted" in first.text


@pytest.mark.slow
def test_a_rank_that_stands_still_is_given_up(world: World) -> None:
    """As one on a machine that is gone from the network, which closes no connection."""
    slowed(world, TARGET)
    group = world.group(*[world.command("linear", TARGET)] * 2)
    until(lambda: len(world.finished(TARGET)) >= 1, timeout_s=240)
    group.kill(1, signal.SIGSTOP)
    stopped = time.monotonic()
    until(lambda: "is gone" in (group.folders[0] / "output.txt").read_text(), timeout_s=60)
    assert time.monotonic() - stopped > 20
    group.kill(1)
    first, _ = group.end()
    assert first.code == 1
    world.town.api.delete_repo(TARGET)


# --- when they are not about the same thing -----------------------------------------------------------------------


def test_ranks_with_different_plans_make_nothing(world: World) -> None:
    where = world.place("folder")
    command = world.command("linear", where)
    other = [a if a != "7" else "8" for a in command]
    for ended in world.group(command, other).end():
        assert ended.code == 1
        assert "rank 1 (" in ended.text
        assert "has another plan (of digest) than rank 0" in ended.text
    assert not Path(where).parent.exists()


def test_a_revision_that_moves_between_two_ranks_is_named(world: World) -> None:
    commits = [c.commit_id for c in world.town.api.list_repo_commits("local/a")]
    assert len(commits) == 2  # of an empty repository, and of the model
    world.town.commit("local/a", "notes.txt", b"more")
    command = world.command("linear", TARGET)
    other = [a.replace("local/a:", f"local/a@{commits[0]}:") if isinstance(a, str) else a for a in command]
    for ended in world.group(command, other).end():
        assert ended.code == 1
        assert f"has another commit of local/a than rank 0: {commits[0][:12]}" in ended.text
    assert not world.town.api.repo_exists(TARGET)


def test_machines_that_share_no_folder_are_found_out(world: World) -> None:
    command = world.command("linear", Path("out"))
    group = world.group(command, command)  # each in a folder of its own
    for ended in group.end():
        assert ended.code == 1
        assert ": 1 of 2 processes do not see the folder of the others" in ended.text
    assert not any(list(folder.glob("*out*.hubmerge*")) for folder in group.folders)


def test_ranks_with_different_targets_make_nothing(world: World) -> None:
    command = world.command("linear", TARGET)
    for ended in world.group(command, [*command, "--public"]).end():
        assert ended.code == 1
        assert "has another value of private than rank 0: False, not None" in ended.text
    assert not world.town.api.repo_exists(TARGET)


# --- under torchrun -----------------------------------------------------------------------------------------------


def test_torchrun_makes_the_bytes_of_one_process(world: World) -> None:
    """Into a folder, from folders."""
    one, two = (world.fresh() / "out" for _ in range(2))
    inputs = str(world.tmp / "in")
    world.run(1, world.command("ties", one, inputs=inputs))
    with torchrun(world.fresh(), world.command("ties", two, inputs=inputs), world.environment()) as launcher:
        text = launcher.communicate(timeout=240)[0]
    assert launcher.returncode == 0, text
    assert text.count(f"{two}: ") == 1
    assert world.taken(two) == world.taken(one)


@pytest.mark.slow
def test_torchrun_with_a_killed_rank_ends_in_seconds(world: World) -> None:
    """Its own signal to the rank that is left does not come between: the message says what happened."""
    expected = world.expected("awd", "hub")
    slowed(world, TARGET)
    command = world.command("awd", TARGET)
    with torchrun(world.fresh(), command, world.environment()) as launcher:
        until(lambda: len(world.finished(TARGET)) >= 2, timeout_s=240)
        os.kill(rank_of(launcher, 1), signal.SIGKILL)
        killed = time.monotonic()
        text = launcher.communicate(timeout=120)[0]
    assert time.monotonic() - killed < 15
    assert launcher.returncode == 1
    assert "error: rank 1 (" in text
    assert "is gone: it was killed" in text
    assert "continue with: hubmerge push --to local/merged" in text
    at_full_speed(world)
    finished = world.finished(TARGET)
    (again,) = world.run(1, command)
    assert sorted(again.begun) == sorted(set(all_shards()) - finished)
    assert world.taken(TARGET) == expected
