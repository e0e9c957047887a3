"""How good are merges and bundles? Eight tasks on real images, one small encoder, every method and codec.

    python benchmarks/quality.py                                  # three seeds; about half an hour on two cores
    python benchmarks/quality.py --scale small                    # one seed, little training: does everything run?
    python benchmarks/quality.py --out results.md --json results.json

Base, fine-tunes and LoRA adapters are trained here, saved as folders, merged or bundled by hubmerge into folders, and
read back with transformers. Heads are fitted on the base and stay fixed. Scales are chosen on validation images; all
figures, at the defaults and at the best scale, are for test images.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

# Every seed computes on one thread, so that the same machine gives the same figures. All models are local folders.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
sys.path.append(str(Path(__file__).resolve().parent.parent))  # for examples.demo

from quality_models import SCALES
from quality_report import facts, sheets, show, to_markdown
from quality_study import Study, run_seed
from rich.console import Console

LOG_WIDTH = 160


def run_seeds(seeds: Sequence[int], scale: str, jobs: int, work: Path) -> list[Study]:
    """One process per seed, ``jobs`` of them at a time."""
    # A forked process would inherit the state of torch's threads.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(run_seed, seeds, [scale] * len(seeds), [work / f"seed-{seed}" for seed in seeds]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="full", help="how much to train and measure (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="seeds to run at the same time (%(default)s)")
    parser.add_argument(
        "--work", type=Path, help="keep all models here, and use those that are there (by default none are kept)"
    )
    parser.add_argument("--out", type=Path, help="write the tables here, in Markdown")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    scale = SCALES[options.scale]
    start_s = time.monotonic()
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hubmerge-quality-")))
        studies = run_seeds(range(scale.seeds), options.scale, options.jobs, work.resolve())
    known = facts(options.scale, scale, studies, time.monotonic() - start_s)
    found = sheets(studies)
    show(Console(highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH), known, found)
    if options.out:
        options.out.write_text(to_markdown(known, found))
    if options.json:
        figures = {"facts": known, "studies": [asdict(study) for study in studies]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
