"""``hubmerge merge``: merge into a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubmerge.cli import _options, _output, _signals


@click.command("merge")
@_options.recipe_options
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder for the result; must not exist or be empty."
)
@click.option("--overwrite", is_flag=True, help="Replace what the folder holds.")
@_options.resume_option
@_options.license_option
@_options.diagnostics_option
@_options.evaluation_option
@_options.sign_options
@_options.run_options
def command(
    out: Path, overwrite: bool, resume: bool, license_: str | None, diagnostics: bool,
    evaluations: tuple[str, ...],
    sign_key: str | None, certificate: Path | None,
    workers: int | None, max_memory: str | None, max_disk: str | None, fetch: str, device: str,
    as_json: bool, quiet: bool, verbose: int, debug: bool, **recipe: Any,
) -> None:  # fmt: skip
    """Merge models into the folder --out.

    RECIPE is a YAML file (hubmerge's or mergekit's); without it, give --method, --base and --model.
    A run that is interrupted or fails keeps its finished files beside the folder; the same command continues there.
    """
    from hubmerge import api

    _output.configure_logging(verbose)
    sign = _options.signing(sign_key, certificate)
    settings = _options.run_settings(workers, max_memory, max_disk, fetch, device)
    loaded = _options.stating(_options.load_recipe(**recipe), license_)
    with _signals.together() as ranks, _output.progress(quiet=quiet or as_json, bar=ranks.size == 1) as progress:
        result = api.merge(
            loaded, out, options=settings, overwrite=overwrite, resume=resume, diagnostics=diagnostics,
            evaluations=evaluations,
            sign=sign, progress=progress, ranks=ranks,
        )  # fmt: skip
    if not ranks.first:
        return
    _output.problems(result.plan.problems, quiet=quiet)
    if result.license is not None and not as_json:
        _output.license_check(result.license, quiet=quiet)
    if as_json:
        _output.json_data(result.to_json())
    elif not quiet:
        _output.data(result.summary())
        _output.note(f"check it any time with: hubmerge verify {out}")
