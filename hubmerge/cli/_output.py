"""The only place that prints: data to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hubmerge.errors import HubMergeError
from hubmerge.quantities import size as size

if TYPE_CHECKING:
    from collections.abc import Callable

    from hubmerge.engine import Progress
    from hubmerge.licenses import Decision


def data(text: str) -> None:
    """Print to stdout."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def json_data(value: Any) -> None:
    """Print a value as JSON to stdout."""
    data(json.dumps(value, indent=2, ensure_ascii=False))


def note(text: str) -> None:
    """Print to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def error(e: HubMergeError, *, debug: bool = False) -> None:
    """Print what went wrong and the next step; with ``debug`` the traceback first."""
    if debug:
        traceback.print_exception(e)
    note(f"{_paint('error:', '31;1')} {e.message}")
    for line in (e.hint, *getattr(e, "__notes__", ())):
        if line:
            note(f"  {line}")


def problems(found: Sequence[Any], *, quiet: bool) -> None:
    """Print a plan's problems, errors first."""
    colors = {"error": "31;1", "warning": "33;1", "note": "36"}
    for severity in ("error", "warning", "note"):
        for p in found:
            if p.severity == severity and not (quiet and severity == "note"):
                note(f"{_paint(severity + ':', colors[severity])} {p.message}")
                if p.hint:
                    note(f"  {p.hint}")


def license_check(found: Decision, *, quiet: bool) -> None:
    """Print what the check of the parents' licences found: what is wrong, and what is left to whoever publishes."""
    color = {"blocked": "31;1", "unknown": "33;1", "allowed": "36"}[found.verdict]
    if found.verdict != "allowed" or not quiet:
        note(f"{_paint('licence:', color)} {found.headline}")
    for reason in found.reasons:
        note(f"  {reason}")
    if not quiet:
        for duty in found.left:
            note(f"  left to you: {duty.text} ({', '.join(duty.of)})")


def _paint(text: str, code: str) -> str:
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def configure_logging(verbosity: int) -> None:
    """Let the library's log through: -v for info, -vv for debug."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    logging.getLogger("hubmerge").setLevel(level)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    # One progress bar is enough, and it is ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table whose columns fit their contents."""
    widths = [max(len(r[i]) for r in [headers, *rows]) for i in range(len(headers))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [headers, *rows]]
    return "\n".join([lines[0], "  ".join("─" * w for w in widths), *lines[1:]])


def fields(values: Mapping[str, str]) -> str:
    """Aligned ``name  value`` lines."""
    width = max(map(len, values), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in values.items())


@contextmanager
def progress(*, quiet: bool, doing: str = "merging", bar: bool = True) -> Iterator[Callable[[Progress], None]]:
    """A callback for the engine: a bar on a terminal, one line per finished file otherwise, or without ``bar``."""
    if quiet:
        yield lambda _: None
    elif bar and sys.stderr.isatty():
        with _bar(doing) as callback:
            yield callback
    else:
        yield _line


def _line(p: Progress) -> None:
    """One line for each finished file, for logs of CI runs."""
    if p.finished:
        note(f"finished {p.finished} ({100 * p.done_bytes // max(p.total_bytes, 1)}% of {size(p.total_bytes)})")


@contextmanager
def _bar(doing: str) -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(doing, total=None)

        def update(p: Progress) -> None:
            bar.update(task, completed=p.done_bytes, total=p.total_bytes)

        yield update
