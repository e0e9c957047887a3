"""``hubmerge verify``: an artifact against its lock."""

from __future__ import annotations

import click

from hubmerge.cli import _options, _output
from hubmerge.errors import VerificationError


@click.command("verify")
@click.argument("target")
@_options.output_options
def command(target: str, as_json: bool, quiet: bool, verbose: int, debug: bool) -> None:
    """Check every file of TARGET, a folder or a repository (repo[@revision]), against its hubmerge.lock.json.

    Exit code 3 if anything differs.
    """
    from hubmerge import api

    _output.configure_logging(verbose)
    report = api.verify(target)
    if as_json:
        _output.json_data(report.to_json())
    elif not quiet:
        _output.data(report.text())
    if not report.ok:
        raise VerificationError(
            f"{target} differs from its lock in {len(report.mismatches)} file{'s' * (len(report.mismatches) != 1)}"
        )
