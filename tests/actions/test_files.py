"""Action and workflows as files: schemas, shell, pins, permissions, and that no value ever becomes part of a script."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hubmerge.workflows.writing import Choices, render
from tests.actions.github import ACTION, ROOT, WORKFLOWS, load, scripts_of

TOOLS = Path(sys.executable).parent
PINNED = re.compile(r"uses: (?P<action>\S+)@(?P<commit>[0-9a-f]{40}) # v\d+\.\d+\.\d+$", re.M)
EVERYTHING = [ACTION, *WORKFLOWS]
SCRIPTS = {where: script for path in EVERYTHING for where, script in scripts_of(path).items()}


def tool(name: str, *arguments: str | Path, text: str | None = None) -> str:
    done = subprocess.run(
        [TOOLS / name, *arguments], input=text, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_is_what_is_checked() -> None:
    assert {p.name for p in WORKFLOWS} >= {"ci.yml", "merge.yml", "merge-call.yml", "release.yml"}
    assert len(SCRIPTS) >= 5


def test_zizmor_finds_nothing_that_is_not_explained() -> None:
    tool("zizmor", "--offline", "--persona=pedantic", "--no-progress", "--config=.github/zizmor.yml", *EVERYTHING,
         ".github/dependabot.yml")  # fmt: skip


@pytest.mark.parametrize("reusable", [False, True])
def test_zizmor_finds_nothing_in_what_init_writes(reusable: bool, tmp_path: Path) -> None:
    path = tmp_path / ".github" / "workflows" / "merge.yml"
    path.parent.mkdir(parents=True)
    action = f"org/hubmerge@{'a' * 40}"
    path.write_text(render(Choices(action=action, repo="me/merged", read_as="me", reusable=reusable)))
    tool("zizmor", "--offline", "--persona=pedantic", "--no-progress", "--no-config", path)


def test_every_exception_from_zizmor_has_its_reason() -> None:
    lines = (ROOT / ".github" / "zizmor.yml").read_text().splitlines()
    exceptions = [i for i, line in enumerate(lines) if re.match(r"\s+- \S+\.yml(:|$)|\s+disable: true", line)]
    assert exceptions
    for i in exceptions:
        above = [line for line in lines[:i] if line.strip()]
        while above and not above[-1].strip().startswith("#"):
            assert re.match(r"\s+(- \S+|[\w-]+:)", above[-1]), f"line {i + 1} of zizmor.yml has no reason above it"
            above.pop()
        assert above


def test_the_files_and_what_init_writes_have_the_form_that_github_publishes(tmp_path: Path) -> None:
    written = []
    for i, (action, reusable) in enumerate(itertools.product(("org/hubmerge@v1", "./"), (False, True))):
        written.append(tmp_path / f"{i}.yml")
        written[-1].write_text(render(Choices(action=action, repo="me/merged", read_as="me", reusable=reusable)))
    tool("check-jsonschema", "--builtin-schema", "vendor.github-actions", ACTION)
    tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS, *written)


@pytest.mark.parametrize("where", SCRIPTS)
def test_every_script_is_sound(where: str, tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(SCRIPTS[where])
    subprocess.run(["bash", "-n", script], check=True, timeout=30)
    tool("shellcheck", "--shell=bash", "--severity=style", script)


@pytest.mark.parametrize("where", SCRIPTS)
def test_no_expression_is_part_of_a_script(where: str) -> None:
    assert "${{" not in SCRIPTS[where]


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda p: p.name)
def test_every_action_is_pinned_and_has_its_version_beside_it(path: Path) -> None:
    used = [line.strip() for line in path.read_text().splitlines() if re.match(r"\s*(- )?uses:", line)]
    elsewhere = [line for line in used if not re.fullmatch(r"(- )?uses: (\./|\./\.hubmerge)", line)]
    assert len(PINNED.findall("\n".join(elsewhere))) == len(elsewhere)


def test_an_action_has_one_pin_everywhere() -> None:
    texts = [p.read_text() for p in [*EVERYTHING, *(ROOT / "hubmerge/workflows/templates").iterdir()]]
    pins: dict[str, set[str]] = {}
    for found in PINNED.finditer("\n".join(texts)):
        pins.setdefault(found["action"], set()).add(found["commit"])
    assert pins
    assert {name: len(commits) for name, commits in pins.items()} == dict.fromkeys(pins, 1)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_no_job_may_more_than_it_needs(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        allowed = job["permissions"]
        assert set(allowed.items()) <= {("contents", "read"), ("id-token", "write"), ("attestations", "write")}, name
        assert job["timeout-minutes"] <= 360
        for step in job["steps"]:
            if str(step.get("uses", "")).startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("reusable", [False, True])
def test_the_projects_own_workflows_are_what_init_writes(reusable: bool) -> None:
    path = ROOT / ".github" / "workflows" / ("merge-call.yml" if reusable else "merge.yml")
    assert path.read_text() == render(Choices(action="./", reusable=reusable))


@pytest.mark.parametrize("reusable", [False, True])
def test_a_push_waits_for_its_environment_and_runs_the_plan_that_was_shown(reusable: bool) -> None:
    workflow = load(ROOT / ".github" / "workflows" / ("merge-call.yml" if reusable else "merge.yml"))
    push: dict[str, Any] = workflow["jobs"]["push"]
    assert push["needs"] == "plan"
    assert push["environment"]["name"] == ("${{ inputs.environment }}" if reusable else "hubmerge")
    assert push["concurrency"] == {"group": "hubmerge-push-${{ inputs.repo_id }}", "cancel-in-progress": False}
    step = push["steps"][-1]["with"]
    assert (step["mode"], step["plan"]) == ("push", "${{ needs.plan.outputs.plan }}")
    assert "hf_token" not in workflow["jobs"]["plan"]["steps"][-1]["with"]
    declared = load(ACTION)["inputs"]
    assert all(job["steps"][-1]["with"].keys() <= declared.keys() for job in workflow["jobs"].values())
