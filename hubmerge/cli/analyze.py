"""``hubmerge analyze``: how the tasks of a merge lie to one another, in figures and plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hubmerge.cli import _options, _output, _signals

if TYPE_CHECKING:
    from hubmerge.analysis import Diagnostics


@click.command("analyze")
@_options.recipe_options
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for diagnostics.json and plots.")
@click.option(
    "--spectra",
    type=click.Choice(["sample", "all", "none"]),
    default="sample",
    show_default=True,
    help="Of which weights singular values are computed, which takes longest.",
)
@_options.run_options
def command(
    out: Path | None, spectra: str,
    workers: int | None, max_memory: str | None, max_disk: str | None, fetch: str, device: str,
    as_json: bool, quiet: bool, verbose: int, debug: bool, **recipe: Any,
) -> None:  # fmt: skip
    """Show how the models of a merge lie to one another, and to what would be merged; no model is written.

    RECIPE is a YAML file (hubmerge's or mergekit's); without it, give --method, --base and --model.
    docs/diagnostics.md says what the figures mean.
    """
    from hubmerge import api
    from hubmerge.plots import as_files

    _output.configure_logging(verbose)
    settings = _options.run_settings(workers, max_memory, max_disk, fetch, device)
    loaded = _options.load_recipe(**recipe)
    with _signals.terminable(), _output.progress(quiet=quiet or as_json, doing="measuring") as progress:
        found = api.analyze(loaded, options=settings, sampling=spectra, progress=progress)  # type: ignore[arg-type]
    if out is not None:
        _write(out, as_files(found))
    if as_json:
        _output.json_data(found.to_json())
    elif not quiet:
        _output.data(_render(found))


def _write(out: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        _output.note(f"wrote {path}")


def _render(found: Diagnostics) -> str:
    columns = ["task", "length", "mean cosine", "equal signs", "merged cosine", "distance"]
    rows = [
        [t.name, *(f"{v:.3g}" for v in (t.length, t.cosine, t.agreement, t.merged_cosine, t.distance))]
        for t in found.summary
    ]
    done = len(found.decomposed)
    facts = {"tensors": f"{len(found.tensors)} merged", "singular values": f"of {done} of {found.matrices} weights"}
    return f"{_output.table(columns, rows)}\n\n{_output.fields(facts)}"
