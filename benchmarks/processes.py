"""Two processes of one worker each beside one process of two workers, on the same merge.

    python benchmarks/processes.py            # ten minutes on two cores, 12 GB of disk
    python benchmarks/processes.py --quick    # a model of 50 MB: shows that it runs

A Llama-shaped base and three fine-tunes of 1.1 billion parameters, local, in shards of 250 MB; the two take turns. The
processes are started by torchrun. *merge* is the phase in which weights are read, merged and written, as rank 0 reports
it; *whole* is from the command's start to its end, and counts torchrun and a second import of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

from cases import FINE_TUNES
from measure import measure
from report import sheet, tell

HERE = Path(__file__).resolve().parent
METHODS = {
    "linear": [],
    "ties": ["--param", "density=0.2"],
    "dare_linear": ["--param", "density=0.5"],
    "awd": [],
}
ONE = [sys.executable, "-m", "hubmerge"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hubmerge"]
STARTS = {"one process, two workers": (ONE, 2), "two processes, one worker each": (TWO, 1)}
HEADINGS = ("method", "one process: merge s", "whole s", "two processes: merge s", "whole s", "throughput")


def run(method: str, start: str, models: Path, work: Path) -> tuple[float, float]:
    """Seconds of the merge phase, and of the whole command."""
    command, workers = STARTS[start]
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    parts = [part for name in FINE_TUNES for part in ("--model", str(models / name))]
    argv = [
        *command, "merge", "--method", method, "--base", str(models / "base"), *parts, *METHODS[method],
        "--out", str(out), "--shard-size", "250MB", "--workers", str(workers), "--json", "--quiet",
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    found = measure(argv, env=env, log=work / "merge.log", cwd=HERE)
    shutil.rmtree(out)
    return json.loads(found.stdout)["timings"]["merge_s"], found.wall_s


def main() -> int:
    """Make the models, run everything in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("/tmp/hubmerge-processes"), help="models (%(default)s)")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    args = parser.parse_args()
    models = args.work / ("quick" if args.quick else "1b")
    subprocess.run([sys.executable, str(HERE / "models.py"), models.name, str(models)], check=True)
    merge_s, whole_s = defaultdict(list), defaultdict(list)
    for method in METHODS:
        for n in range(args.rounds + 1):
            for start in STARTS:
                merging, whole = run(method, start, models, args.work)
                print(f"{method}, {start}: {merging:.2f} s of {whole:.2f} s", file=sys.stderr, flush=True)
                if n > 0:  # the first round warms the page cache
                    merge_s[method, start].append(merging)
                    whole_s[method, start].append(whole)
    rows = []
    for method in METHODS:
        merging = [median(merge_s[method, start]) for start in STARTS]
        whole = [median(whole_s[method, start]) for start in STARTS]
        figures = (f"{merging[0]:.2f}", f"{whole[0]:.2f}", f"{merging[1]:.2f}", f"{whole[1]:.2f}")
        rows.append((method, *figures, f"{merging[0] / merging[1]:.2f}×"))
    tell(sheet(HEADINGS, rows), args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
