"""A new method is one new file: commands, documentation and contract tests find it by themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hubmerge.cli.methods import reference_page
from hubmerge.codecs import all_codecs
from hubmerge.methods import all_methods

ROOT = Path(__file__).parents[2]
TOY = '''
"""The largest: every entry takes the largest delta."""

import torch

from hubmerge.spec import Method, Params


class LargestParams(Params):
    scale: float = 1.0
    """Multiplies the result."""


class Largest(Method):
    name = "toy_largest"
    summary = "Every entry takes the delta of largest magnitude."
    paper = "An example, doi 10.0000/none"
    parameters = LargestParams

    def merge(self, group, p, stats):
        best = group.delta(0)
        for i in range(1, len(group)):
            delta = group.delta(i)
            best = torch.where(delta.abs() > best.abs(), delta, best)
        return best.mul_(p.scale).add_(group.base())
'''


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and its tests with one more file in hubmerge/methods/."""
    root = tmp_path_factory.mktemp("checkout")
    for folder in ("hubmerge", "templates"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(
        ROOT / "tests" / "methods", root / "tests" / "methods", ignore=shutil.ignore_patterns("__pycache__")
    )
    for file in ("tests/__init__.py", "tests/conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / file, root / file)
    (root / "hubmerge" / "methods" / "toy_largest.py").write_text(TOY)
    return root


def run(checkout: Path, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *args],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_commands_list_and_describe_it(checkout: Path) -> None:
    assert "toy_largest" in run(checkout, "hubmerge", "methods")
    described = run(checkout, "hubmerge", "methods", "toy_largest")
    assert "Every entry takes the delta of largest magnitude." in described
    assert "Multiplies the result." in described


def test_the_documentation_page_has_a_section_for_it(checkout: Path) -> None:
    page = run(checkout, "hubmerge", "methods", "--markdown")
    assert "## `toy_largest`" in page
    assert "| `scale` | float | `1.0` |" in page


def test_the_contract_tests_cover_it(checkout: Path) -> None:
    out = run(
        checkout,
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/methods/test_contract.py",
        "-k",
        "toy_largest",
        "-m",
        "",
    )
    passed = int(out.split(" passed")[0].split()[-1])
    assert passed >= 5


def test_the_committed_page_is_current() -> None:
    page = reference_page(all_methods(), all_codecs())
    assert (ROOT / "docs" / "methods.md").read_text() == page, "run `make docs`"
