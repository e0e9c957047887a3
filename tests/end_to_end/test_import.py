"""Starting up is cheap: neither the package nor its help loads what only a merge needs."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "huggingface_hub", "peft", "accelerate", "numpy", "safetensors")
CPU_LIMIT_S = 0.4
_REPORT = "import json, sys; print(json.dumps(sorted(sys.modules)))"
_HELP = "import hubmerge.cli as c, contextlib\nwith contextlib.suppress(SystemExit): c.main({})\n"


def modules_after(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", f"{code}\n{_REPORT}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    ["import hubmerge, hubmerge.errors", *(_HELP.format(a) for a in (["--help"], ["push", "--help"], ["--version"]))],
    ids=["package", "help", "help-of-a-command", "version"],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    loaded = modules_after(code)
    assert "hubmerge" in loaded
    assert not loaded & set(HEAVY)


def cpu_s(command: list[str]) -> float:
    """Processor time of a child and its children: not a matter of what else the machine does, unlike its duration."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True, env=dict(os.environ))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


@pytest.mark.parametrize("arguments", [["-c", "import hubmerge"], ["-m", "hubmerge", "--help"]], ids=["import", "help"])
def test_start_takes_little_time(arguments: list[str]) -> None:
    assert min(cpu_s([sys.executable, *arguments]) for _ in range(3)) < CPU_LIMIT_S
