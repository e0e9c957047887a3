"""The rival's virtual environment: mergekit lives in one of its own, and is only ever run as a program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
MERGEKIT = "mergekit==0.1.5"
_PROBE = (
    "import importlib.metadata as m, platform;"
    "print('mergekit', m.version('mergekit'), 'torch', m.version('torch'), 'Python', platform.python_version())"
)


def ensure(python: Path) -> str:
    """Check that this interpreter has the right mergekit, after making its environment if there is none.

    Returns:
        Its versions, for the report.

    Raises:
        SystemExit: It has another mergekit, or the result does not run.
    """
    if not python.exists():
        _create(python)
    probe = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=False)
    wanted = MERGEKIT.replace("==", " ") + " "
    if probe.returncode != 0 or not probe.stdout.startswith(wanted):
        found = (probe.stdout or probe.stderr).strip().splitlines()[-1:]
        raise SystemExit(f"{python}: needs {MERGEKIT}, found {' '.join(found)}; remove it, or name another")
    subprocess.run([command(python), "--help"], stdout=subprocess.DEVNULL, check=True)
    return probe.stdout.strip()


def command(python: Path) -> Path:
    """The program that is measured."""
    return python.parent / "mergekit-yaml"


def _create(python: Path) -> None:
    if python.parent.name != "bin" or python.parent.parent.exists():
        raise SystemExit(f"{python}: no such interpreter")
    environment = python.parent.parent
    print(f"making {environment} with {TORCH} and {MERGEKIT} …", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    # torch first: a requirement that comes later then finds it in place and takes no other build.
    for requirement in (TORCH, MERGEKIT):
        subprocess.run([python, "-m", "pip", "install", "--quiet", requirement], check=True, stdout=sys.stderr)
