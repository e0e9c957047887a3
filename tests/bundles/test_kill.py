"""A change of a local bundle that is killed: the bundle is the old one or the new one, and the next run succeeds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import hubmerge
from hubmerge.localhub import LocalHub
from tests.bundles.scene import bundle, done, manifest, recipe, save, stored
from tests.end_to_end import support

SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (500, 400) for i in range(6)}
NAMES = ("a", "b")

# A run that ends itself when the old folder has been put aside, or when it is about to be removed.
_RUN = """
import os, shutil, signal, sys
from pathlib import Path
from hubmerge.cli import main

rename, remove = Path.rename, shutil.rmtree
moment, *arguments = sys.argv[1:]

def end():
    os.kill(os.getpid(), signal.SIGKILL)

def stopping_rename(self, target):
    if moment == "between" and ".hubmerge-old" not in str(target):
        end()
    return rename(self, target)

def stopping_remove(path, *more, **options):
    if moment == "after" and str(path).endswith(".hubmerge-old"):
        end()
    return remove(path, *more, **options)

Path.rename, shutil.rmtree = stopping_rename, stopping_remove
main(arguments)
"""


def killed_when(ready: Callable[[], object], *arguments: str | Path) -> None:
    """Start a command in a process of its own, and kill it as soon as something is to be seen."""
    command = [sys.executable, "-m", "hubmerge", "bundle", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ.copy()) as child:
        deadline = time.monotonic() + 120
        while not ready():
            assert child.poll() is None, child.stderr.read() if child.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL


def test_killed_while_it_encodes(start_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    town = support.open_town(start_hub)
    for seed, name in enumerate(("base", *NAMES, "c")):
        town.publish(f"local/{name}", save(tmp_path / "in" / name, seed, SHAPES))
    place = tmp_path / "out" / "bundle"
    hubmerge.create_bundle(recipe("superposition", "local/base", [f"local/{n}" for n in NAMES]), out=place)
    before = support.folder_state(place)
    add = ("add", place, "--model", "local/c", "--fetch", "stream")
    town.hub.limits.read_bytes_s = 1_000_000  # seconds, of which the first that shows a file is enough
    killed_when(lambda: list(place.parent.glob(".bundle.hubmerge-*/bundle-*.safetensors")), *add)
    town.hub.limits.read_bytes_s = None
    assert support.folder_state(place) == before
    assert support.hubmerge("verify", place).code == 0
    assert [t["name"] for t in done("ls", place)["tasks"]] == list(NAMES)
    assert [t["id"] for t in done(*add)["tasks"]] == [0, 1, 2]
    assert support.hubmerge("verify", place).code == 0
    assert [p.name for p in place.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("moment", ["between", "after"])
def test_killed_while_folders_change_places(moment: str, tmp_path: Path) -> None:
    """The two renames at the end, and the removal of the old folder after them, are stopped in their middle."""
    for seed, name in enumerate(("base", *NAMES, "c")):
        save(tmp_path / name, seed)
    place, old = tmp_path / "bundle", tmp_path / ".bundle.hubmerge-old"
    hubmerge.create_bundle(recipe("superposition", tmp_path / "base", [tmp_path / n for n in NAMES]), out=place)
    before = support.folder_state(place)
    add = ["bundle", "add", place, "--model", tmp_path / "c", "--base", tmp_path / "base"]
    ended = subprocess.run([sys.executable, "-c", _RUN, moment, *add], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert old.exists()
    assert place.exists() is (moment == "after")
    listed = [t["name"] for t in done("ls", place)["tasks"]]  # brings the old folder back where there is none
    if moment == "between":
        assert listed == list(NAMES)
        assert support.folder_state(place) == before
        assert not old.exists()
        done("add", place, "--model", tmp_path / "c", "--base", tmp_path / "base")
    assert [t.name for t in manifest(place).tasks] == [*NAMES, "c"]
    done("remove", place, "--task", "c", "--model", tmp_path / "c", "--base", tmp_path / "base")
    assert not old.exists()
    assert support.hubmerge("verify", place).code == 0
    retrieved = bundle("retrieve", place, "--task", "a", "--out", tmp_path / "out", "--base", tmp_path / "base")
    assert retrieved.code == 0, retrieved.text
    assert stored(tmp_path / "out")
