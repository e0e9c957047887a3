"""Disentangling a model of a billion parameters: two reads of the inputs, and little memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end import support
from tests.end_to_end.test_streaming import MB, make_models

# Runs a command; at its end the process tells what the system counted for it.
COUNTED = """
import atexit, sys
def tell():
    counts = dict(line.split(":") for file in ("io", "status") for line in open(f"/proc/self/{file}"))
    print(int(counts["rchar"]), int(counts["VmHWM"].split()[0]) * 1024)
atexit.register(tell)
from hubmerge.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not outlive the test: it will hold 11 GB."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_model_of_a_billion_parameters_is_read_twice(scene: Path) -> None:
    base, *models = (scene / "in" / name for name in make_models("SHAPES['1b']", scene / "in"))
    recipe = {"method": "awd", "base": str(base), "models": [str(model) for model in models]}
    (scene / "merge.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-c", COUNTED, "merge", scene / "merge.yaml", "--out", scene / "out", "-q"]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout.split()
    read, peak = (int(number) for number in told[-2:])

    given, made = size_bytes(scene / "in"), size_bytes(scene / "out")
    # The output is read once, to hash it. Of what stays as it is in the base, the models' tensors are not read.
    passes = (read - made) / given
    print(f"awd: {given / MB:.0f} MB read {passes:.3f} times, peak {peak / MB:.0f} MB")
    assert 1.5 <= passes <= 2.05
    assert peak < 1000 * MB
    assert support.hubmerge("verify", scene / "out").code == 0
