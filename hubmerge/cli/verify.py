"""``hubmerge verify``: an artifact against its lock, and the lock against a signature."""

from __future__ import annotations

from pathlib import Path

import click

from hubmerge.cli import _options, _output
from hubmerge.errors import VerificationError


@click.command("verify")
@click.argument("target")
@click.option("--public-key", type=_options.FILE, help="Also check that model.sig was made by whom this key is of.")
@click.option("--certificate", type=_options.FILE, help="Or: by somebody whom these certificates vouch for.")
@_options.output_options
def command(
    target: str, public_key: Path | None, certificate: Path | None,
    as_json: bool, quiet: bool, verbose: int, debug: bool,
) -> None:  # fmt: skip
    """Check every file of TARGET, a folder or a repository (repo[@revision]), against its hubmerge.lock.json.

    Exit code 3 if anything differs, or if the signature that was asked for does not hold.
    """
    from hubmerge import api

    _output.configure_logging(verbose)
    report = api.verify(target, public_key=public_key, certificate=certificate)
    if as_json:
        _output.json_data(report.to_json())
    elif not quiet:
        _output.data(report.text())
    if not report.ok and report.signature is not None and not report.mismatches:
        raise VerificationError(f"{target}: {report.signature.says}")
    if not report.ok:
        raise VerificationError(
            f"{target} differs from its lock in {len(report.mismatches)} file{'s' * (len(report.mismatches) != 1)}"
        )
