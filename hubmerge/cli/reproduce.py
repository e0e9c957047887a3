"""``hubmerge reproduce``: a published model made again from its lock."""

from __future__ import annotations

import click

from hubmerge.cli import _options, _output, _signals
from hubmerge.errors import VerificationError


@click.command("reproduce")
@click.argument("target")
@click.option("--out", type=click.Path(file_okay=False), help="Keep the new result in this folder.")
@_options.run_options
def command(
    target: str, out: str | None,
    workers: int | None, max_memory: str | None, max_disk: str | None, fetch: str, device: str,
    as_json: bool, quiet: bool, verbose: int, debug: bool,
) -> None:  # fmt: skip
    """Merge TARGET again, a folder or a repository (repo[@revision]), and compare.

    The recipe and the commits of its inputs are taken from hubmerge.lock.json. Most methods give the same bytes on any
    machine; those that decompose matrices give the same weights within a tolerance, and the verdict says which of
    the two it was. Exit code 3 if neither.
    """
    from hubmerge.reproduction import reproduce

    _output.configure_logging(verbose)
    settings = _options.run_settings(workers, max_memory, max_disk, fetch, device)
    with _signals.terminable(), _output.progress(quiet=quiet or as_json) as progress:
        found = reproduce(target, out=out, options=settings, progress=progress)
    if as_json:
        _output.json_data(found.to_json())
    elif not quiet:
        _output.data(found.text())
    if not found.ok:
        differ = sum(not f.ok for f in found.files)
        raise VerificationError(
            f"{target} could not be reproduced: {differ} of {len(found.files)} files differ",
            hint="`hubmerge verify` tells whether the published files are those of the lock",
        )
