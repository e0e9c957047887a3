"""tsv_merge and drm on dense matrices, beside full singular value decompositions as the papers' code computes them.

    python benchmarks/dense_speed.py                        # every case, three quarters of an hour
    python benchmarks/dense_speed.py --shapes 768x3072      # one shape
    python benchmarks/dense_speed.py --quick                # small matrices, for which speeds mean nothing

The straightforward computation decomposes in float32 with torch's default number of threads, one matrix after the
other. hubmerge merges as many matrices at once as that, each in a worker with one thread, as its engine does; its time
is that of all of them divided by their number. Both begin with deltas in memory and end with the merged delta. Seconds
are of the clock, and in brackets of the processors, all cores together.

LAPACK takes longer for wide matrices than for their transposes: *transposed* is what the straightforward computation
takes where it is told to transpose them.

Differences are relative, in the Frobenius norm: of tsv_merge to the straightforward computation that is timed; of drm
to the same in float64, because in float32 entries at the edge of what is pruned fall on either side of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from report import machine_facts, sheet, tell

import hubmerge
from hubmerge.devices import CPU
from hubmerge.schedule import Schedule

T = TypeVar("T")
SHAPES = ((2048, 5632), (4096, 4096), (768, 3072))
QUICK_SHAPES = ((300, 400), (320, 320))
COUNTS = (3, 8)
SPEEDUPS = {"tsv_merge": 3.0, "drm": 2.0}
DIFFERENCE = 1e-4
SHARED = 16
HEADINGS = (
    "method", "shape", "models", "straightforward s", "transposed s", "hubmerge s", "faster", "than transposed",
    "difference", "promised",
)  # fmt: skip


def deltas(shape: tuple[int, int], count: int, seed: int) -> list[torch.Tensor]:
    """Float32 matrices A diag(s) B with sᵢ = (1 + i / 16)^-½, and in all of them 16 equal directions as large as s₀.

    A and B hold normal numbers, so that columns of A and rows of B have length 1 on average.
    """
    rng = torch.Generator().manual_seed(seed)
    (m, n), r = shape, min(shape)
    spectrum = (1 + torch.arange(r) / 16) ** -0.5
    left, right = torch.randn(m, SHARED, generator=rng) / m**0.5, torch.randn(SHARED, n, generator=rng) / n**0.5
    found = []
    for _ in range(count):
        outer, inner = torch.randn(m, r, generator=rng) / m**0.5, torch.randn(r, n, generator=rng) / n**0.5
        own = (outer * spectrum) @ inner
        found.append(own.addmm_(left * torch.rand(SHARED, generator=rng), right))
    return found


Svd = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def tall_svd(matrix: torch.Tensor, *, full_matrices: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``torch.linalg.svd``, but never of a wide matrix, for which LAPACK takes several times longer."""
    if matrix.shape[0] >= matrix.shape[1]:
        return torch.linalg.svd(matrix, full_matrices=full_matrices)
    u, s, v = torch.linalg.svd(matrix.T, full_matrices=full_matrices)
    return v.T, s, u.T


def straightforward_tsv(given: Sequence[torch.Tensor], svd: Svd = torch.linalg.svd) -> torch.Tensor:
    """TSV-Merge with full decompositions of every delta and of both concatenations (arXiv 2412.00081, algorithm 1)."""
    k = min(given[0].shape) // len(given)
    lefts, values, rights = [], [], []
    for delta in given:
        u, s, v = svd(delta, full_matrices=False)
        lefts.append(u[:, :k])
        values.append(s[:k])
        rights.append(v[:k])
    u_left, _, v_left = svd(torch.cat(lefts, dim=1), full_matrices=False)
    u_right, _, v_right = svd(torch.cat(rights, dim=0), full_matrices=False)
    return torch.linalg.multi_dot((u_left, v_left, torch.cat(values).diag(), u_right, v_right))


def straightforward_drm(
    given: Sequence[torch.Tensor], svd: Svd = torch.linalg.svd, density: float = 0.2, cutoff: float = 0.01
) -> torch.Tensor:
    """Horizontal Decom-Renorm-Merge with the full decomposition of the deltas side by side (arXiv 2505.23117)."""
    u, s, v = svd(torch.cat(list(given), dim=1), full_matrices=False)
    q = int((s > cutoff * s[0]).sum())
    rows = torch.stack(v[:q].split(given[0].shape[1], dim=1))
    norms = rows.norm(dim=2, keepdim=True)
    rows = rows / norms
    magnitudes = rows.abs()
    dropped = magnitudes.numel() - int(density * magnitudes.numel())
    threshold = magnitudes.flatten().kthvalue(dropped).values if dropped else -1.0
    rows = torch.where(magnitudes > threshold, rows, 0.0) * (s[:q, None] * norms)
    agreeing = torch.where(rows.sign() == rows.sum(dim=0).sign(), rows, 0.0)
    return u[:, :q] @ (agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp(min=1))


STRAIGHTFORWARD = {"tsv_merge": straightforward_tsv, "drm": straightforward_drm}


class Seconds(NamedTuple):
    """What some work took, by the clock and of the processors."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:.2f} ({self.cpu:.1f})"


def timed(work: Callable[[], T], matrices: int = 1) -> tuple[T, Seconds]:
    """What the work gives, and what it took for each of so many matrices."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, Seconds((time.perf_counter() - wall) / matrices, (time.process_time() - cpu) / matrices)


def merged(method: str, matrices: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """The merged deltas of several matrices, in workers as the engine has them."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(matrices)

    def work(i: int, given: Sequence[torch.Tensor]) -> None:
        found[i] = hubmerge.merge_tensors(method, torch.zeros_like(given[0]), given)

    schedule = Schedule()
    for i, given in enumerate(matrices):
        schedule.add((i,), lambda _, i=i, given=given: work(i, given))
    schedule.run({CPU: len(matrices)})
    return found


def reference(given: Sequence[torch.Tensor], keep: Path | None) -> torch.Tensor:
    """Straightforward drm in float64; kept for later runs if there is a folder."""
    kept = keep and keep / f"drm-{'x'.join(map(str, given[0].shape))}-{len(given)}.pt"
    if kept and kept.exists():
        found: torch.Tensor = torch.load(kept)
        return found
    found = straightforward_drm([d.double() for d in given], tall_svd)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, kept)
    return found


def measured(
    method: str, shape: tuple[int, int], count: int, *, cores: int, rounds: int, keep: Path | None
) -> dict[str, Any]:
    """Both computations of one case: the fastest of some rounds."""
    matrices = [deltas(shape, count, seed) for seed in range(cores)]
    straightforward, transposed, ours = [], [], []
    for _ in range(rounds):
        found, seconds = timed(lambda: merged(method, matrices), cores)
        ours.append(seconds)
        first = found[0]
        del found
        simple, seconds = timed(lambda: STRAIGHTFORWARD[method](matrices[0]))
        straightforward.append(seconds)
        if method == "drm" or shape[0] < shape[1]:
            transposed.append(timed(lambda: STRAIGHTFORWARD[method](matrices[0], tall_svd))[1])
    del matrices[1:]
    exact = reference(matrices[0], keep) if method == "drm" else simple
    return {
        "method": method, "shape": shape, "models": count, "straightforward_s": min(straightforward),
        "transposed_s": min(transposed, default=None), "hubmerge_s": min(ours), "difference": difference(first, exact),
    }  # fmt: skip


def difference(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def row(found: dict[str, Any]) -> tuple[str, ...]:
    ours, least = found["hubmerge_s"].wall, SPEEDUPS[found["method"]]
    faster, tall = found["straightforward_s"].wall / ours, found["transposed_s"]
    kept = faster >= least and found["difference"] <= DIFFERENCE
    return (
        found["method"], "×".join(map(str, found["shape"])), str(found["models"]), str(found["straightforward_s"]),
        str(tall or "–"), str(found["hubmerge_s"]), f"{faster:.1f}×", f"{tall.wall / ours:.1f}×" if tall else "–",
        f"{found['difference']:.1e}", f"≥ {least:g}×, ≤ {DIFFERENCE:g} {'✓' if kept else '✗'}",
    )  # fmt: skip


def shape_of(text: str) -> tuple[int, int]:
    m, _, n = text.partition("x")
    return int(m), int(n)


def cases(args: argparse.Namespace) -> Iterator[tuple[tuple[int, int], int, str]]:
    for shape in args.shapes or (QUICK_SHAPES if args.quick else SHAPES):
        for count in args.models or COUNTS:
            for method in args.methods or STRAIGHTFORWARD:
                yield shape, count, method


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small matrices: shows that it runs")
    parser.add_argument("--shapes", type=shape_of, nargs="+", metavar="MxN", help="only these")
    parser.add_argument("--models", type=int, nargs="+", help="only these numbers of models")
    parser.add_argument("--methods", choices=STRAIGHTFORWARD, nargs="+", help="only these")
    parser.add_argument("--rounds", type=int, default=1, help="take the fastest of so many (%(default)s)")
    parser.add_argument("--references", type=Path, help="keep results in float64 here, and use those that are")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    args = parser.parse_args()
    cores = torch.get_num_threads()
    results = []
    merged("tsv_merge", [deltas((8, 8), 2, 0)])  # what is imported on first use
    for shape, count, method in cases(args):
        results.append(measured(method, shape, count, cores=cores, rounds=args.rounds, keep=args.references))
        print("  ".join(row(results[-1])), file=sys.stderr, flush=True)
    facts = machine_facts() | {"threads": f"{cores} for both", "matrices": " ".join((deltas.__doc__ or "").split())}
    tell(sheet(HEADINGS, map(row, results), facts), args.markdown)
    if args.json:
        args.json.write_text(json.dumps({"facts": facts, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
