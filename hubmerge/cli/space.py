"""``hubmerge space``: the web form, here or as a Space on the Hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from hubmerge.cli import _output
from hubmerge.cli._options import FILE
from hubmerge.errors import UsageError

_NEEDS = "pip install 'hubmerge[space]'"


@click.group("space")
def command() -> None:
    """The web form: models are chosen, planned and merged in a browser."""


@command.command("serve", context_settings={"auto_envvar_prefix": "HUBMERGE_SPACE"})
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=7860, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one."
)
@click.option(
    "--data",
    default=Path("space-data"),
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the job table and of what jobs write to the disk.",
)
@click.option("--workers", type=click.IntRange(1, 64), help="Jobs that run at a time.  [default: 1]")
@click.option("--max-memory", metavar="SIZE", help="For all jobs together.  [default: 12GB]")
@click.option("--max-disk", metavar="SIZE", help="For all jobs together.  [default: 40GB]")
@click.option("--max-read", metavar="SIZE", help="What one job may read.  [default: 200GB]")
@click.option("--max-write", metavar="SIZE", help="What one job may write.  [default: 100GB]")
@click.option("--max-hours", type=click.FloatRange(0.01), help="When a job is ended.  [default: 6]")
@click.option("--per-hour", type=click.IntRange(1), help="Jobs that a visitor may begin in an hour.  [default: 20]")
@click.option("--min-shard", metavar="SIZE", help="Smallest shard size of a recipe.  [default: 100MB]")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def serve(
    host: str, port: int, data: Path, workers: int | None, max_memory: str | None, max_disk: str | None,
    max_read: str | None, max_write: str | None, max_hours: float | None, per_hour: int | None, min_shard: str | None,
    debug: bool,
) -> None:  # fmt: skip
    """Serve the form until interrupted; prints its address.

    On your own machine it works with your token. For others, people sign in with their own: docs/space.md. Every
    option can be given as a variable, too: HUBMERGE_SPACE_MAX_MEMORY is --max-memory.
    """
    from hubmerge.space.safety import Limits

    sizes = {
        "memory_bytes": ("--max-memory", max_memory), "disk_bytes": ("--max-disk", max_disk),
        "read_bytes": ("--max-read", max_read), "write_bytes": ("--max-write", max_write),
        "min_shard_bytes": ("--min-shard", min_shard),
    }  # fmt: skip
    given = {name: _size(flag, text) for name, (flag, text) in sizes.items() if text is not None}
    limits = replace(Limits(), **given)
    if workers is not None:
        limits = replace(limits, workers=workers)
    if per_hour is not None:
        limits = replace(limits, per_hour=per_hour)
    if max_hours is not None:
        limits = replace(limits, run_s=max_hours * 3600)
    try:
        from hubmerge.space import serving
    except ImportError as e:
        raise UsageError(f"the form needs {e.name}", hint=_NEEDS) from e

    def ready(url: str) -> None:
        _output.data(url)
        _output.note(f"jobs are written down in {data}; stop with Ctrl-C")

    serving.serve(host=host, port=port, data=data, limits=limits, ready=ready)


@command.command("deploy")
@click.option("--to", "repo", required=True, metavar="OWNER/NAME", help="The Space; it is made if it is not there.")
@click.option(
    "--private/--public", "private", default=None, help="Who sees it.  [default: as it is; a new one private]"
)
@click.option("--hardware", metavar="NAME", help="Machine to run on.  [default: as it is; a new one cpu-basic]")
@click.option("--title", default="hubmerge", show_default=True, help="Title of the Space.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["read-repos", "write-repos"]),
    help="Ask visitors for more: to merge their private models, to publish to repositories they have; repeat.",
)
@click.option("--wheel", type=FILE, help="A wheel of hubmerge to run.  [default: this version, of the package index]")
@click.option("--dry-run", is_flag=True, help="Show the files, and send nothing.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def deploy(
    repo: str, private: bool | None, hardware: str | None, title: str, scopes: tuple[str, ...], wheel: Path | None,
    dry_run: bool, debug: bool,
) -> None:  # fmt: skip
    """Make a Space of the form, or bring it up to date, with one commit; docs/space.md has the rest."""
    from hubmerge.hub import Hub
    from hubmerge.space import deploy as deploying

    choices = deploying.Choices(repo, title, private, hardware, wheel, tuple(dict.fromkeys(scopes)))
    if dry_run:
        for name, content in deploying.render(choices).items():
            shown = f"({_output.size(len(content))})\n" if name.endswith(".whl") else content.decode()
            _output.data(f"==> {name} <==\n{shown}")
        return
    deployed = deploying.deploy(choices, Hub())
    _output.data(deployed.url)
    _output.note(deploying.next_steps(choices, deployed))


def _size(flag: str, text: str) -> int:
    from hubmerge.recipe.schema import parse_size

    try:
        return parse_size(text)
    except ValueError as e:
        raise UsageError(f"{flag}: {e}") from e
