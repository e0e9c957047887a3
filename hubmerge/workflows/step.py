"""One step of a workflow: plan, then merge or push if that is asked for, and leave behind what people want to see."""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hubmerge.errors import CancelledError, HubMergeError, PlanError
from hubmerge.hub import Hub, JobToken
from hubmerge.workflows import flags, identity
from hubmerge.workflows.inputs import PREFIX, Inputs
from hubmerge.workflows.runner import Runner
from hubmerge.workflows.summary import MAX_LOG_LINES, Story, render

LOCK, CARD = "hubmerge.lock.json", "README.md"
_LOG = "log.txt"
_PATIENCE_S = 6.0
"""GitHub waits 7.5 s between the signal that asks and the one that does not."""


class Step:
    """A step, from its inputs to its summary.

    Args:
        inputs: What to do.
        runner: Where.
        environment: Variables of the step, the secrets among them.
        known: Of each command of hubmerge, its options and whether they take a value.
        tell: Shows a line to whoever looks at the log.
    """

    def __init__(
        self,
        inputs: Inputs,
        runner: Runner,
        environment: Mapping[str, str],
        known: Mapping[str, flags.Options],
        tell: Callable[[str], None],
    ) -> None:
        self.inputs, self.runner, self._environment = inputs, runner, environment
        self._known, self._tell = known, tell
        self.report = Path(tempfile.mkdtemp(prefix=f"hubmerge-{inputs.mode}-", dir=runner.temp))
        """What becomes the artifact: plan, result, lock, card and log."""
        self._shown: deque[str] = deque(maxlen=MAX_LOG_LINES)
        self._story = Story(inputs, runner, Hub(token=False).endpoint)

    def run(self) -> int:
        """Do it, and say in the summary how it went, however that is; returns the exit code."""
        self.runner.set_output("report", str(self.report))
        self.runner.set_output("artifact", self.report.name)
        code = 1
        try:
            code = self._steps()
        except HubMergeError as error:
            code = error.exit_code
            with self._quoted("error"):
                self._show(f"error: {error.message}")
                self._show(f"  {error.hint}")
        except KeyboardInterrupt:
            code = CancelledError.exit_code
            self._show("cancelled")
        finally:
            self._story.code, self._story.log = code, tuple(self._shown)
            self.runner.add_summary(render(self._story))
        return code

    def _steps(self) -> int:
        for command in ("plan", self.inputs.mode):
            self._arguments(command)  # what is wrong with the flags shows before anything is asked of the Hub
        if Path(self.inputs.recipe).is_file():
            shutil.copyfile(self.inputs.recipe, self.report / "recipe.yaml")
        code, self._story.plan = self._planned()
        if code or self._story.plan is None:
            return code
        digest = self._story.plan["plan_sha256"]
        self.runner.set_output("plan", digest)
        check_approved(self.inputs.expected_plan, digest)
        return 0 if self.inputs.mode == "plan" else self._made(self._story.plan)

    def _planned(self) -> tuple[int, Mapping[str, Any] | None]:
        return self._hubmerge("plan", self._arguments("plan"), identity.for_reading(self.inputs, self._environment))

    def _made(self, plan: Mapping[str, Any]) -> int:
        inputs, mode = self.inputs, self.inputs.mode
        out = self.report.with_name(f"{self.report.name}-model")
        budgets = self._budgets(plan)
        arguments = [*(f"--max-{name}={amount}" for name, amount in budgets.items()), *self._arguments(mode)]
        if mode == "push":
            who = identity.for_publishing(inputs, self._environment)
            arguments += [f"--to={inputs.repo}", *["--pr"] * inputs.create_pr, *["--private"] * inputs.private]
        else:
            who = identity.for_reading(inputs, self._environment)
            arguments += [f"--out={out}"]
        code, result = self._hubmerge(mode, arguments, who)
        if code or result is None:
            return code
        self._story.result = result
        check_approved(inputs.expected_plan, result["plan_sha256"], done=True)
        self._hand_on(result, who)
        return 0

    def _budgets(self, plan: Mapping[str, Any]) -> Mapping[str, int]:
        """What the run may use: all that the machine has left now, and in a folder the result takes some of it."""
        taken = 0 if self.inputs.mode == "push" else int(plan["write_bytes"])
        measured = {"disk": max(self.runner.disk_bytes() - taken, 0), "memory": self.runner.memory_bytes()}
        given = {flag.partition("=")[0] for flag in self.inputs.flags}
        self._story.budgets = {name: amount for name, amount in measured.items() if f"--max-{name}" not in given}
        return self._story.budgets

    def _arguments(self, command: str) -> list[str]:
        mode = self.inputs.mode
        # A plan is shown for a later push as well, so that it takes no offence at what only a push knows.
        others = ("merge", "push") if mode == "plan" else (mode,)
        return flags.for_command(self.inputs.flags, self._known[command], [self._known[other] for other in others])

    def _hand_on(self, result: Mapping[str, Any], who: Mapping[str, str]) -> None:
        """Set the outputs, and put lock and card beside the log."""
        lock = next((f["sha256"] for f in result["files"] if f["path"] == LOCK), "")
        self._story.lock_sha256 = lock or None
        outputs = {"url": result["url"], "commit": result["commit"], "path": result["path"], "lock_sha256": lock}
        for name, value in outputs.items():
            self.runner.set_output(name, str(value or ""))
        for name in (LOCK, CARD):
            if result["path"]:
                shutil.copyfile(Path(result["path"]) / name, self.report / name)
            else:
                self._fetch(name, str(result["commit"]), who)

    def _fetch(self, name: str, commit: str, who: Mapping[str, str]) -> None:
        """Read a small file back from what was published; a failure is only said, since the push has succeeded."""
        assert self.inputs.repo is not None
        endpoint = self._story.hub
        hub = Hub(endpoint, who.get("HF_TOKEN") or JobToken(self.inputs.repo, endpoint))
        try:
            (self.report / name).write_bytes(hub.read_small(self.inputs.repo, commit, name))
        except HubMergeError as error:
            self._show(f"note: {name} is not among the artifacts: {error.message}")

    def _variables(self, who: Mapping[str, str]) -> dict[str, str]:
        """What a command has of the step's environment: everything but the inputs and other identities."""
        kept = {k: v for k, v in identity.without_identity(self._environment).items() if not k.startswith(PREFIX)}
        temp = str(self.runner.temp)
        return {"HF_HOME": f"{temp}/huggingface", **kept, "TMPDIR": temp, **who}

    def _hubmerge(
        self, command: str, arguments: Sequence[str], who: Mapping[str, str]
    ) -> tuple[int, Mapping[str, Any] | None]:
        """Run a command of hubmerge and show what it says; returns its exit code and what it prints as JSON."""
        printed = self.report / ("plan.json" if command == "plan" else "result.json")
        words = [sys.executable, "-P", "-m", "hubmerge", command, "--json", *arguments, "--", self.inputs.recipe]
        with self._quoted(f"hubmerge {command}"), printed.open("w") as stdout, (self.report / _LOG).open("a") as log:
            code = self._followed(words, stdout, log, self._variables(who))
        text = printed.read_text()
        return code, json.loads(text) if text.strip() else None

    def _followed(self, words: Sequence[str], stdout: Any, log: Any, variables: Mapping[str, str]) -> int:
        with subprocess.Popen(  # noqa: S603 - a list of words, no shell
            words, stdout=stdout, stderr=subprocess.PIPE, env=variables, encoding="utf-8", errors="replace",
            start_new_session=True,
        ) as child:  # fmt: skip
            assert child.stderr is not None
            try:
                for line in child.stderr:
                    log.write(line)
                    self._show(line.rstrip("\n"))
            except KeyboardInterrupt:
                child.send_signal(signal.SIGINT)
                try:
                    log.write(child.communicate(timeout=_PATIENCE_S)[1])
                except subprocess.TimeoutExpired:
                    log.write("killed: it did not end in time\n")
                finally:
                    child.kill()
                raise
        # A signal's number is negative here, and 128 more than that for everybody else.
        return child.returncode if child.returncode >= 0 else 128 - child.returncode

    @contextmanager
    def _quoted(self, title: str) -> Iterator[None]:
        """A group of lines that are only text: the runner looks for its commands in all that is shown."""
        resume = secrets.token_hex(16)
        self._tell(f"::group::{title}")
        self._tell(f"::stop-commands::{resume}")
        try:
            yield
        finally:
            self._tell(f"::{resume}::")
            self._tell("::endgroup::")

    def _show(self, line: str) -> None:
        self._shown.append(line)
        self._tell(line)


def check_approved(expected: str | None, digest: str, *, done: bool = False) -> None:
    """Refuse a plan that is not the one that somebody has looked at.

    Raises:
        PlanError: It is another one; with ``done``, it has been run already.
    """
    if expected not in (None, digest):
        raise PlanError(
            f"the plan {'that was run is' if done else 'is now'} {digest}, approved was {expected}",
            hint="an input has moved, or the recipe or hubmerge has changed, since the plan was made: plan again",
        )
