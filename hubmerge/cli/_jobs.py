"""``hubmerge push --on jobs``: ask, start, follow."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from hubmerge.cli import _output, _signals
from hubmerge.errors import CancelledError, PlanError, UsageError

if TYPE_CHECKING:
    from hubmerge.recipe import Recipe

OPTIONS = (
    click.option("--on", type=click.Choice(["here", "jobs"]), default="here", show_default=True,
                 help="Where to run: on this machine, or on Hugging Face Jobs, which costs money."),
    click.option("--flavor", help="Machine of the job.  [default: cpu-upgrade]"),
    click.option("--timeout", metavar="TIME", help="End of the job at the latest, e.g. 45m.  [default: 2h]"),
    click.option("--image", help="Container image of the job.  [default: python:3.12]"),
    click.option("--yes", is_flag=True, help="Start the job without asking."),
    click.option("--dry-run", is_flag=True, help="Show what the job would be and cost, and stop there."),
)  # fmt: skip
_NOT_SENT = {
    "recipe",
    "method",
    "base",
    "models",
    "params",
    "dtype",
    "seed",
    "format",
    "rank",
    "shard_size",
    "license_",
}
"""What the recipe says already, and what is about this side."""
_NOT_SENT |= {"on", "flavor", "timeout", "image", "yes", "dry_run", "as_json", "quiet", "cleanup"}


def options(f: Any) -> Any:
    """Add the options that are about jobs."""
    for option in reversed(OPTIONS):
        f = option(f)
    return f


def check_here(flavor: str | None, timeout: str | None, image: str | None, *, yes: bool, dry_run: bool) -> None:
    """Refuse what only makes sense with ``--on jobs``.

    Raises:
        UsageError: Something of it is given.
    """
    given = {"--flavor": flavor, "--timeout": timeout, "--image": image, "--yes": yes, "--dry-run": dry_run}
    named = [name for name, value in given.items() if value]
    if named:
        raise UsageError(
            f"{', '.join(named)}: only together with --on jobs",
            hint="`hubmerge plan` shows what a push on this machine would do",
        )


def push(
    recipe: Recipe, *, flavor: str | None, timeout: str | None, image: str | None, yes: bool, dry_run: bool,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Check the plan, show the job, start it if that is wanted, and print what it prints.

    Raises:
        PlanError: The merge has a problem that would end it.
        UsageError: No such machine or time; nobody to ask.
        PublishError: The job failed.
    """
    from hubmerge import api, remote
    from hubmerge.hub import Hub

    try:
        timeout_s = remote.parse_duration(timeout) if timeout else remote.TIMEOUT_S
    except ValueError as e:
        raise UsageError(f"--timeout: {e}") from e
    hub = Hub()
    found = remote.prepare(
        recipe, sent_again(click.get_current_context()), hub,
        flavor=flavor or remote.FLAVOR, timeout_s=timeout_s, image=image or remote.IMAGE,
    )  # fmt: skip
    report = api.report(recipe, hub=hub)
    _output.problems(report.plan.problems, quiet=quiet)
    if any(p.severity == "error" for p in report.plan.problems):
        raise PlanError("this merge cannot run", hint="solve what is listed above; no job was started")
    facts = found.facts() | {
        "read": _output.size(report.footprint.read_bytes),
        "write": _output.size(report.footprint.write_bytes),
        "memory": f"about {_output.size(report.footprint.memory_bytes)} with this machine's number of threads",
    }
    if not as_json:
        _output.note(_output.fields(facts))
    if dry_run:
        if as_json:
            _output.json_data({"job": None, **asdict(found), "highest_cost_usd": found.highest_cost_usd})
        return
    if not yes:
        _ask(found.highest_cost_usd)
    job = remote.submit(found, hub)
    try:
        with _signals.terminable():
            _output.note(f"started {job.url}")
            if as_json:
                _output.json_data({"job": job.id, "url": job.url, "highest_cost_usd": found.highest_cost_usd})
            for line in remote.follow(job, hub):
                if not quiet:
                    _output.note(line) if as_json else _output.data(line)
    except KeyboardInterrupt:
        raise CancelledError(
            f"no longer following {job.url}, which goes on",
            hint=f"end it with: hf jobs cancel {job.id} --namespace {job.namespace}",
        ) from None


def _ask(cost_usd: float) -> None:
    try:
        agreed = click.confirm(f"start this job for at most ${cost_usd:.2f}?", err=True)
    except click.Abort:
        raise UsageError("nobody answered", hint="give --yes to start the job without asking") from None
    if not agreed:
        raise CancelledError("no job was started", hint="--dry-run shows the same without asking")


def sent_again(context: click.Context) -> tuple[str, ...]:
    """The options of this command that the job gets, too, as they were given."""
    words: list[str] = []
    for option in context.command.params:
        name = option.name or ""
        source = context.get_parameter_source(name)
        if (
            not isinstance(option, click.Option)
            or name in _NOT_SENT
            or source != click.core.ParameterSource.COMMANDLINE
        ):
            continue
        value = context.params[name]
        if option.count:
            words += [option.opts[0]] * value
        elif option.is_flag:
            words.append(option.opts[0] if value else option.secondary_opts[0])
        else:
            words += [option.opts[0], str(value)]
    return tuple(words)
