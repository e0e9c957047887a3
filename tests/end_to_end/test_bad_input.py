"""Everything a person can get wrong: a message with the next step, the documented exit code, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hubmerge.localhub import Fault, LocalHub
from tests.end_to_end.access_faults import ACCESS_CASES, WRONG_TOKEN
from tests.end_to_end.adapter_faults import ADAPTER_CASES
from tests.end_to_end.input_faults import INPUT_CASES
from tests.end_to_end.output_faults import OUTPUT_CASES
from tests.end_to_end.recipe_faults import RECIPE_CASES
from tests.end_to_end.scene import TARGET, Case, Scene
from tests.end_to_end.support import SECRETS, Outcome, folder_state, hubmerge

CASES = [*RECIPE_CASES, *ACCESS_CASES, *INPUT_CASES, *ADAPTER_CASES, *OUTPUT_CASES]


@pytest.fixture
def scene(tmp_path: Path, start_hub: Callable[..., LocalHub], monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # torch makes it when it is imported
    monkeypatch.setattr(tempfile, "tempdir", None)
    with ExitStack() as stack:
        yield Scene(tmp_path, start_hub, monkeypatch, stack)


def test_the_table_is_long_enough() -> None:
    assert len({case.id for case in CASES}) == len(CASES) >= 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id.replace(" ", "-"))
def test_fault(case: Case, scene: Scene) -> None:
    arguments = case.arrange(scene)
    before = folder_state(scene.out)
    target_before = scene.town.state(TARGET) if scene.has_town else None
    outcome = hubmerge(*arguments)
    scene.stack.close()  # ends limits and helpers before looking around

    assert_explained(outcome, case, scene)
    assert folder_state(scene.out) == before
    assert_no_debris(scene)
    if scene.has_town:
        scene.town.hub.faults.clear()
        assert scene.town.state(TARGET) == scene.expected_target(target_before)


def assert_explained(outcome: Outcome, case: Case, scene: Scene) -> None:
    text = outcome.text
    assert outcome.code == case.code, text
    for part in case.says:
        assert scene.filled(part) in text
    hints = [line for line in outcome.err.splitlines() if line.startswith(("  ", "Try "))]
    assert any(scene.filled(case.hint) in line for line in hints), text
    assert "Traceback" not in text
    assert "internal error" not in text
    for secret in (*SECRETS, WRONG_TOKEN):
        assert secret not in text


def assert_no_debris(scene: Scene) -> None:
    """No temporary folder beside the result, none in TMPDIR."""
    parent = scene.out.parent
    if parent.is_dir():
        assert os.listdir(parent) in ([], [scene.out.name])
    assert os.listdir(scene.tmp / "tmp") == []


@pytest.mark.parametrize("requests_before", [0, 2], ids=["while-planning", "while-merging"])
def test_interrupt(scene: Scene, requests_before: int) -> None:
    """Ctrl-C ends a push at once, also while the network hangs, and takes back what it had made."""
    town = scene.town
    town.publish("local/base", scene.base)
    town.publish("local/a", scene.a)
    hang = town.hub.faults.add(Fault(path="^/_cdn/", stall_after_bytes=10, times=None, skip=requests_before))
    arguments = ["push", scene.described(base="local/base", models=["local/a"]), "--to", TARGET, "--fetch", "stream"]
    command = [sys.executable, "-m", "hubmerge", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        deadline = time.monotonic() + 120
        while not hang.hits and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        try:
            output = child.communicate(timeout=30)[0]  # a read alone would wait for 60 s
        finally:
            child.kill()
    assert hang.hits
    assert child.returncode == 130, output
    assert "cancelled" in output
    assert "Traceback" not in output
    town.hub.faults.clear()
    assert town.state(TARGET) is None
    assert_no_debris(scene)
