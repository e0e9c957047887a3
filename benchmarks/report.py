"""Turns measured runs into figures, and figures into a table for a terminal or a page."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cases import Case
from measure import Run

FLOOR_THREADS = (1, 2)
HEADINGS = (
    "case",
    "mergekit s",
    "MB",
    "hubmerge s",
    "MB",
    "faster",
    "merge s",
    "floor s, 1 / 2 threads",
    "merge / floor",
    "promised",
)


@dataclass(slots=True)
class Samples:
    """All counted runs of one case."""

    case: Case
    input_bytes: int
    mergekit: list[Run] = field(default_factory=list)
    hubmerge: list[Run] = field(default_factory=list)
    floor: dict[int, list[dict[str, float]]] = field(default_factory=lambda: {n: [] for n in FLOOR_THREADS})
    comparison: dict[str, Any] | None = None


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Median and range; None without values."""
    found = list(values)
    return {"median": statistics.median(found), "min": min(found), "max": max(found)} if found else None


def tool_figures(runs: Sequence[Run]) -> dict[str, Any]:
    """What the operating system counted, over all runs of one tool."""
    figures = ("wall_s", "cpu_s", "peak_rss_bytes", "peak_anonymous_bytes")
    return {name: spread(getattr(run, name) for run in runs) for name in figures}


def summarise(all_samples: Sequence[Samples], output_bytes: int) -> list[dict[str, Any]]:
    """The figures of every case, and whether they are what was promised."""
    rivals = {s.case.name: s.mergekit for s in all_samples}
    return [_summarise(s, rivals.get(s.case.against or s.case.name, []), output_bytes) for s in all_samples]


def _summarise(samples: Samples, rival: Sequence[Run], output_bytes: int) -> dict[str, Any]:
    case = samples.case
    phases = [float(json.loads(run.stdout)["timings"]["merge_s"]) for run in samples.hubmerge]
    merge_s = spread(phases)
    floor_s = {str(n): spread(f["seconds"] for f in runs) for n, runs in samples.floor.items()}
    result: dict[str, Any] = {
        "case": case.name,
        "native": case.native,
        "input_bytes": samples.input_bytes,
        "output_bytes": output_bytes,
        "mergekit": tool_figures(samples.mergekit),
        "hubmerge": tool_figures(samples.hubmerge),
        "merge_s": merge_s,
        "floor_s": floor_s,
        "floor_cpu_s": {str(n): spread(f["cpu_s"] for f in runs) for n, runs in samples.floor.items()},
        "floor_fsync_s": {str(n): spread(f["fsync_s"] for f in runs) for n, runs in samples.floor.items()},
        "comparison": samples.comparison,
        "speedup": None,
        "merge_over_floor": None,
    }
    if rival and samples.hubmerge:
        result["speedup"] = _median(r.wall_s for r in rival) / _median(r.wall_s for r in samples.hubmerge)
    if merge_s and all(floor_s.values()):
        result["merge_over_floor"] = {n: merge_s["median"] / f["median"] for n, f in floor_s.items() if f}
    result["promises"] = _promises(samples, result)
    return result


def _promises(samples: Samples, result: dict[str, Any]) -> list[dict[str, Any]]:
    case = samples.case
    promises: list[dict[str, Any]] = []
    if case.min_speedup and result["speedup"] is not None:
        promises.append(_promise(f"≥ {case.min_speedup:g}×", result["speedup"], result["speedup"] >= case.min_speedup))
    if case.max_rss_mb and samples.hubmerge:
        worst_mb = max(run.peak_rss_bytes for run in samples.hubmerge) / 1e6
        promises.append(_promise(f"≤ {case.max_rss_mb:g} MB", worst_mb, worst_mb <= case.max_rss_mb))
    if case.max_floor_ratio and result["merge_over_floor"] is not None:
        ratio = result["merge_over_floor"]["1"]
        promises.append(_promise(f"≤ {case.max_floor_ratio:g}× floor", ratio, ratio <= case.max_floor_ratio))
    return promises


def _promise(what: str, found: float, kept: bool) -> dict[str, Any]:
    return {"what": what, "found": found, "kept": kept}


def _median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


# --- rendering --------------------------------------------------------------------------------------------------


def rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row for each case."""
    return [
        (
            r["case"],
            _seconds(r["mergekit"]["wall_s"]),
            _megabytes(r["mergekit"]["peak_rss_bytes"]),
            _seconds(r["hubmerge"]["wall_s"]),
            _megabytes(r["hubmerge"]["peak_rss_bytes"]),
            f"{r['speedup']:.1f}×" if r["speedup"] else "–",
            _seconds(r["merge_s"]),
            " / ".join(f"{f['median']:.2f}" if f else "–" for f in r["floor_s"].values()),
            " / ".join(f"{v:.2f}" for v in (r["merge_over_floor"] or {}).values()) or "–",
            ", ".join(f"{p['what']} {'✓' if p['kept'] else '✗'}" for p in r["promises"]) or "–",
        )
        for r in results
    ]


def _seconds(figure: dict[str, float] | None) -> str:
    return f"{figure['median']:.2f} ({figure['min']:.2f}–{figure['max']:.2f})" if figure else "–"


def _megabytes(figure: dict[str, float] | None) -> str:
    return f"{figure['max'] / 1e6:,.0f}" if figure else "–"


def table(results: Sequence[dict[str, Any]]) -> str:
    """Aligned columns."""
    lines = [HEADINGS, *rows(results)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown(facts: dict[str, str], results: Sequence[dict[str, Any]]) -> str:
    """A section of a page."""
    lines = ["## hubmerge and mergekit", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows(results)]
    lines += ["", *_NOTES]
    compared = [r for r in results if r["comparison"]]
    if compared:
        lines += ["", "| outputs compared | equal elements | largest difference |", "|---|---|---|"]
        lines += [
            f"| {r['case']} | {r['comparison']['equal_fraction']:.3%} of {r['comparison']['elements']:,} "
            f"| {r['comparison']['max_abs_difference']:.2e} |"
            for r in compared
        ]
    return "\n".join(lines) + "\n"


_NOTES = (
    "Seconds are the median (lowest–highest) of whole processes that ran in turn, start-up included. MB is the highest",
    "peak resident set of all runs; mergekit's memory-mapped inputs count in it. Both tools read the same mergekit",
    "file, with their default flags, from a warm page cache. hubmerge's time includes the sha256 of every output file",
    "and an fsync; mergekit does neither. *ties_model* and *dare_ties_own* are hubmerge's own defaults (one threshold",
    "for the whole model, as in the paper; rescaling by 1/density), beside mergekit's times for the plain case. The",
    "floor only reads the inputs in blocks of 1 MiB and writes as many bytes as the output has; *merge s* is",
    "hubmerge's merge phase alone.",
)


def machine(mergekit_versions: str, *, quick: bool) -> dict[str, str]:
    """What the figures hold for."""
    size = "25 million parameters, for which speeds mean nothing" if quick else "1.1 billion parameters"
    return machine_facts() | {
        "mergekit": mergekit_versions.removeprefix("mergekit "),
        "models": f"Llama-shaped base and three fine-tunes, random weights, bfloat16, sharded; {size} each",
    }


def sheet(headings: Sequence[str], rows: Iterable[Sequence[str]], facts: dict[str, str] | None = None) -> str:
    """A table in Markdown, under what it was measured on."""
    lines = [f"- {k}: {v}" for k, v in (facts or machine_facts()).items()]
    lines += ["", f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def tell(text: str, path: Path | None) -> None:
    """Print a report, and write it to a file if one is named."""
    print(text)
    if path:
        path.write_text(text)


def machine_facts() -> dict[str, str]:
    """The machine, and the versions of what ran on it."""
    probe = [sys.executable, "-c", "import hubmerge; print(hubmerge.__version__)"]
    root = Path(__file__).resolve().parent.parent
    version = subprocess.run(probe, capture_output=True, text=True, check=True, cwd=root).stdout.strip()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": f"{_cpu_name()}, {cores} cores, {memory_bytes / 2**30:.0f} GiB, {platform.system()}",
        "hubmerge": f"{version} torch {importlib.metadata.version('torch')} Python {platform.python_version()}",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
