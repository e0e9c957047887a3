"""What GitHub does with action.yml, as far as it matters here: expressions, environment, scripts, outputs, commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from hubmerge.localhub import LocalHub

ROOT = Path(__file__).parents[2]
ACTION = ROOT / "action.yml"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
REPOSITORY = "me/recipes"
_EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
_SHELLS = {"bash": ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail"]}
_UPLOAD_IF = "${{ always() && steps.run.outputs.artifact != '' }}"


def load(path: Path) -> dict[str, Any]:
    """A YAML file as GitHub reads it: ``on`` is a word."""
    loaded: dict[str, Any] = YAML(typ="safe").load(path.read_text())
    return loaded


def outputs_of(file: Path) -> dict[str, str]:
    """The outputs that a step has set, by GitHub's rules for that file."""
    found: dict[str, str] = {}
    lines = iter(file.read_text().split("\n")) if file.exists() else iter(())
    for line in lines:
        if "<<" in line:
            name, end = line.split("<<", 1)
            value: list[str] = []
            while (part := next(lines)) != end:
                value.append(part)
            found[name] = "\n".join(value)
        elif line:
            raise AssertionError(f"neither a value nor its end: {line!r}")
    return found


@dataclass
class Ran:
    """What became of the action."""

    code: int
    text: str
    outputs: Mapping[str, str]
    summary: str
    artifact: Path | None

    @property
    def log(self) -> str:
        """What people see: the lines that are no commands."""
        return "\n".join(line for line in self.text.splitlines() if not line.startswith("::"))

    @property
    def files(self) -> set[str]:
        return {p.name for p in self.artifact.iterdir()} if self.artifact else set()


@dataclass
class Runner:
    """A machine of GitHub's, with a checkout and a Hub in reach."""

    temp: Path
    workspace: Path
    hub: LocalHub
    identity: bool = True
    """Whether the job has ``id-token: write``."""
    variables: dict[str, str] = field(default_factory=dict)
    """Set by the workflow for the whole job."""

    def environment(self) -> dict[str, str]:
        """What a step finds before its own ``env``."""
        job = self.hub.job_environment(REPOSITORY) if self.identity else {"GITHUB_ACTIONS": "true"}
        return {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.temp / "home"),
            "CI": "true",
            "GITHUB_ACTION_PATH": str(ROOT),
            "GITHUB_REPOSITORY": REPOSITORY,
            "GITHUB_RUN_ID": "4711",
            "GITHUB_SERVER_URL": "https://git.example",
            "GITHUB_SHA": "0" * 40,
            "GITHUB_WORKSPACE": str(self.workspace),
            "RUNNER_TEMP": str(self.temp),
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            # torch and the like come from here instead of from a package index; hubmerge does not.
            "PYTHONPATH": sysconfig.get_path("purelib"),
            "PIP_NO_INDEX": "1",
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
            **job,
            **self.variables,
        }

    def uses(self, *, install: bool = False, **given: str) -> Ran:
        """Run the action's scripts as they stand, in the order in which they stand.

        Args:
            install: Also the step that installs hubmerge; others find what it has left in the folder.
            given: Inputs, as text.
        """
        action = load(ACTION)
        inputs = {name: given.get(name, str(spec.get("default", ""))) for name, spec in action["inputs"].items()}
        assert given.keys() <= inputs.keys()
        steps: dict[str, Mapping[str, str]] = {}
        code, text, summary, artifact = 0, "", "", None
        for step in action["runs"]["steps"]:
            if "uses" in step:
                if step["uses"].startswith("actions/upload-artifact@"):
                    assert step["if"] == _UPLOAD_IF
                    if steps.get("run", {}).get("artifact"):
                        artifact = Path(expand(step["with"]["path"], inputs, steps))
                        assert expand(step["with"]["name"], inputs, steps) == artifact.name
                continue
            if code or (step["name"] == "Install hubmerge" and not install):
                continue
            done, outputs, added = self._run(step, inputs, steps)
            code, text, summary = done.returncode, text + done.stdout, summary + added
            steps[step.get("id", step["name"])] = outputs
        found = {name: expand(spec["value"], inputs, steps) for name, spec in action["outputs"].items()}
        return Ran(code, text, found, summary, artifact)

    def _run(
        self, step: Mapping[str, Any], inputs: Mapping[str, str], steps: Mapping[str, Mapping[str, str]]
    ) -> tuple[subprocess.CompletedProcess[str], dict[str, str], str]:
        """One script, with the files that GitHub makes for each step."""
        files = {name: self.temp / f"_{name.lower()}" for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for file in files.values():
            file.write_text("")
        own = {name: expand(str(value), inputs, steps) for name, value in step.get("env", {}).items()}
        script = self.temp / "_script.sh"
        script.write_text(step["run"])
        done = subprocess.run(
            [*_SHELLS[step["shell"]], str(script)],
            env={**self.environment(), **own, **{name: str(file) for name, file in files.items()}},
            cwd=self.workspace, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240,
        )  # fmt: skip
        return done, outputs_of(files["GITHUB_OUTPUT"]), files["GITHUB_STEP_SUMMARY"].read_text()


def expand(text: str, inputs: Mapping[str, str], steps: Mapping[str, Mapping[str, str]]) -> str:
    """Replace expressions, once: what a value holds is not looked at again."""

    def value(found: re.Match[str]) -> str:
        context, _, rest = found[1].partition(".")
        if context == "inputs":
            return inputs[rest]
        step, outputs, name = rest.split(".")
        assert (context, outputs) == ("steps", "outputs"), f"an expression that this runner does not know: {found[0]}"
        return steps.get(step, {}).get(name, "")

    return _EXPRESSION.sub(value, text)


def scripts_of(path: Path) -> dict[str, str]:
    """All ``run:`` blocks of a workflow or action, by where they stand."""
    loaded = load(path)
    jobs = loaded.get("jobs", {"runs": loaded.get("runs", {})})
    return {
        f"{path.name}: {job}: {step.get('name', i)}": step["run"]
        for job, body in jobs.items()
        for i, step in enumerate(body.get("steps", ()))
        if "run" in step
    }
