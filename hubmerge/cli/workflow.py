"""``hubmerge workflow``: merges that start from a repository's Actions tab."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import click

from hubmerge.cli import _output, _signals
from hubmerge.errors import UsageError

_COMMANDS = ("plan", "merge", "push")


@click.group("workflow")
def command() -> None:
    """Merge in GitHub Actions: write a workflow, and run a step of one."""


@command.command("init")
@click.option("--repo", help="Repository to publish to, as the form suggests it: namespace/name.")
@click.option("--recipe", default="merge.yaml", show_default=True, help="Recipe, as the form suggests it.")
@click.option(
    "--environment", default="hubmerge", show_default=True, help="Environment whose reviewers approve a push."
)
@click.option("--read-as", metavar="USER", help="User whose gated repositories the job may read, by its identity.")
@click.option("--action", metavar="OWNER/REPO@REF", help="Action to use; default: hubmerge's, of this version.")
@click.option("--reusable", is_flag=True, help="Write the twin that other workflows call.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False),
    help="File to write.  [default: .github/workflows/merge.yml, or merge-call.yml]",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def init(
    repo: str | None, recipe: str, environment: str, read_as: str | None, action: str | None, reusable: bool,
    out: Path | None, overwrite: bool, debug: bool,
) -> None:  # fmt: skip
    """Write a workflow that plans a merge, waits for an approval, and publishes; docs/actions.md has the rest."""
    from hubmerge.workflows.writing import Choices, check_writable, default_path, render, used_action

    choices = Choices(
        action=used_action(action), recipe=recipe, repo=repo, environment=environment, read_as=read_as,
        reusable=reusable,
    )  # fmt: skip
    text = render(choices)
    path = out or default_path(reusable=reusable)
    check_writable(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    _output.data(str(path))
    _output.note(choices.next_steps())


@command.command("run")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def run(context: click.Context, debug: bool) -> None:
    """Run one step of a workflow: what action.yml does; the inputs are in the environment."""
    from hubmerge.workflows.inputs import Inputs
    from hubmerge.workflows.runner import Runner
    from hubmerge.workflows.step import Step
    from hubmerge.workflows.summary import refusal

    known = {name: _options_of(name) for name in _COMMANDS}
    runner = Runner.of(os.environ)
    try:
        inputs = Inputs.of(os.environ)
    except UsageError as error:
        runner.add_summary(refusal(error))
        raise
    step = Step(inputs, runner, os.environ, known, _output.data)
    with _signals.terminable():
        context.exit(step.run())


def _options_of(name: str) -> dict[str, bool]:
    """A command's options, and whether each takes a value."""
    found = importlib.import_module(f"hubmerge.cli.{name}").command
    options = (p for p in found.params if isinstance(p, click.Option))
    return {text: not (p.is_flag or p.count) for p in options for text in (*p.opts, *p.secondary_opts)}
