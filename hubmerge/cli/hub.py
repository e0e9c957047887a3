"""``hubmerge hub serve``: a local Hub for trying things out, tests and closed networks."""

from __future__ import annotations

from pathlib import Path

import click

from hubmerge.cli import _output
from hubmerge.errors import UsageError


@click.group("hub")
def command() -> None:
    """A local, Hub-compatible server."""


@command.command("serve")
@click.option(
    "--root", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder that holds its data."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8765, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one."
)
@click.option(
    "--user",
    "users",
    multiple=True,
    metavar="NAME:TOKEN[:read|write]",
    help="A user; repeat. Default: local:hf_local:write.",
)
@click.option("--jobs", is_flag=True, help="Accept jobs: whoever has a write token may run commands on this machine.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def serve(root: Path, host: str, port: int, users: tuple[str, ...], jobs: bool, debug: bool) -> None:
    """Serve repositories from --root until interrupted; prints the lines that point clients here."""
    try:
        from hubmerge import localhub
    except ImportError as e:
        raise UsageError(f"the local Hub needs {e.name}", hint="pip install 'hubmerge[demo]'") from e

    def ready(hub: localhub.LocalHub) -> None:
        _output.data(f"export HF_ENDPOINT={hub.endpoint}\nexport HF_TOKEN={hub.token}\nexport HF_HUB_DISABLE_XET=1")
        _output.note(f"serving {root} on {hub.endpoint}; stop with Ctrl-C")

    try:
        parsed = [localhub.parse_user(u) for u in users]
    except ValueError as e:
        raise UsageError(f"--user: {e}") from e
    try:
        localhub.serve(root, host=host, port=port, users=parsed, ready=ready, jobs=jobs)
    except localhub.RootInUseError as e:
        raise UsageError(str(e), hint="give another --root, or stop the other server") from e
    except OSError as e:
        raise UsageError(
            f"cannot listen on {host}:{port}: {e.strerror}", hint="give another --port; 0 takes a free one"
        ) from e
