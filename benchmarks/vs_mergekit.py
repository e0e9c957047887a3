"""hubmerge against mergekit 0.1.5: whole processes, in turn, over the same recipe files and the same models.

    python benchmarks/vs_mergekit.py                    # 1.1B parameters, 14 GB of disk, about half an hour
    python benchmarks/vs_mergekit.py --quick            # 25M parameters: does everything run?
    python benchmarks/vs_mergekit.py --check            # do both tools compute the same numbers?

Both tools read the same mergekit file with their default flags (and a fixed seed), on warm input files, into a fresh
folder, without network. Beside them, in the same rounds, runs the floor: a program that only reads those inputs and
writes that many bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mergekit_env
import report
from cases import CASES, Case
from measure import CommandFailedError, Run, measure
from report import FLOOR_THREADS, Samples

HERE = Path(__file__).resolve().parent
CHECKED = ("linear", "task_arithmetic", "ties")
TOLERANCE = 1e-6
SETTLE_S = 3.0


class Bench:
    """The two tools, the models and a place to work."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work: Path = args.work
        self.hubmerge = [args.hubmerge] if args.hubmerge else [sys.executable, "-m", "hubmerge"]
        self.mergekit = str(mergekit_env.command(args.mergekit_python))
        self.tools: tuple[str, ...] = (args.only,) if args.only else ("mergekit", "hubmerge")
        self.output_bytes = 0
        home = self.work / "home"
        home.mkdir(parents=True, exist_ok=True)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH"))}
        self.env |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}

    def models(self, shape: str) -> Path:
        """The folder with the models of this shape, made if need be."""
        folder = self.work / f"models-{shape}"
        subprocess.run([sys.executable, HERE / "models.py", shape, folder], check=True)
        files = (folder / "base").glob("*.safetensors")
        self.output_bytes = sum(f.stat().st_size for f in files)
        return folder

    def write_recipe(self, case: Case, models: Path, dtype: str = "") -> Path:
        """The file both tools are given."""
        path = self.work / f"{case.name}.yml"
        path.write_text(case.recipe(models, dtype=dtype))
        return path

    def merge(self, tool: str, recipe: Path, out: Path) -> Run:
        """One whole run into a folder that does not exist."""
        if tool == "mergekit":
            argv = [self.mergekit, str(recipe), str(out), "--random-seed", "0"]
        else:
            argv = [*self.hubmerge, "merge", str(recipe), "--out", str(out), "--json"]
        settle(out)
        return measure(argv, env=self.env, log=self.work / f"{tool}.log", cwd=HERE.parent)

    def floor(self, case: Case, models: Path, threads: int) -> dict[str, float]:
        """One run of the floor program over the case's inputs."""
        with self.folder("floor") as out:
            settle(out)
            out.mkdir()
            argv = [sys.executable, str(HERE / "floor.py"), "--threads", str(threads), "--out", str(out / "bytes")]
            argv += ["--write-bytes", str(self.output_bytes), *map(str, case.inputs(models))]
            run = measure(argv, env=self.env, log=self.work / "floor.log", cwd=HERE)
            figures: dict[str, float] = json.loads(run.stdout)
            return figures | {"cpu_s": run.cpu_s}

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """A path for outputs that is gone afterwards."""
        path = self.work / f"out-{name}"
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def compare(self, a: Path, b: Path) -> dict[str, Any]:
        """What differs between two results; in a process of its own, as this one has to stay small."""
        argv = [sys.executable, str(HERE / "compare.py"), str(a), str(b)]
        found: dict[str, Any] = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
        return found


def settle(out: Path) -> None:
    """Make room, and give every run the same start, whatever ran before it."""
    shutil.rmtree(out, ignore_errors=True)
    # What was written must not be flushed at the next run's expense; and in a virtual machine memory that has just been
    # freed is quicker to get than any other, until it has been handed back to the host.
    os.sync()
    time.sleep(SETTLE_S)


def run_case(bench: Bench, case: Case, models: Path, rounds: int, warmup: int) -> Samples:
    """Warm up, compare the outputs once, then measure in turn."""
    recipe = bench.write_recipe(case, models)
    samples = Samples(case, sum(f.stat().st_size for f in case.inputs(models)))
    tools = [t for t in bench.tools if t == "hubmerge" or not case.native]
    for i in range(-warmup, rounds):
        counted = i >= 0
        comparing = i == -warmup and len(tools) == 2 and not case.random
        with bench.folder("mergekit") as a, bench.folder("hubmerge") as b:
            for tool, out in (("mergekit", a), ("hubmerge", b)):
                if tool in tools:
                    run = bench.merge(tool, recipe, out)
                    if not comparing:
                        shutil.rmtree(out)
                    say(f"{case.name}: {tool} {run.wall_s:.1f} s, {run.peak_rss_bytes / 1e6:.0f} MB", counted)
                    if counted:
                        getattr(samples, tool).append(run)
            if comparing:
                samples.comparison = bench.compare(a, b)
        for threads in FLOOR_THREADS:
            floor = bench.floor(case, models, threads)
            say(f"{case.name}: floor, {threads} thread(s) {floor['seconds']:.2f} s", counted)
            if counted:
                samples.floor[threads].append(floor)
    return samples


def say(line: str, counted: bool) -> None:
    print(line if counted else f"{line} (warm-up)", file=sys.stderr, flush=True)


def check(bench: Bench, chosen: list[Case]) -> bool:
    """Whether both tools compute the same float32 numbers; reports bfloat16, where rounding differs, beside it."""
    checks = (("float32", bench.models("check")), ("bfloat16", bench.models("check-bf16")))
    good = True
    for case in chosen:
        if case.name not in CHECKED:
            continue
        for dtype, models in checks:
            recipe = bench.write_recipe(replace(case, name=f"{case.name}-{dtype}"), models, dtype)
            with bench.folder("mergekit") as a, bench.folder("hubmerge") as b:
                bench.merge("mergekit", recipe, a)
                bench.merge("hubmerge", recipe, b)
                found = bench.compare(a, b)
            same = not found["only_in_one"] and (dtype != "float32" or found["max_abs_difference"] <= TOLERANCE)
            good = good and same
            print(
                f"{case.name:16} {dtype:9} {'ok  ' if same else 'FAIL'} "
                f"equal {found['equal_fraction']:.4%} of {found['elements']:,}, "
                f"largest difference {found['max_abs_difference']:.2e} {found['worst_tensor']}"
            )
    return good


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    work = Path("/tmp/hubmerge-bench")
    parser.add_argument("--work", type=Path, default=work, help="models, outputs and logs (%(default)s)")
    parser.add_argument("--mergekit-python", type=Path, help="with mergekit (WORK/mergekit-venv, made if missing)")
    parser.add_argument("--hubmerge", help="hubmerge program (that of this interpreter)")
    parser.add_argument("--cases", help=f"comma-separated, of {', '.join(c.name for c in CASES)} (all)")
    parser.add_argument("--only", choices=["mergekit", "hubmerge"], help="run one tool only")
    parser.add_argument("--runs", type=int, default=3, help="counted rounds (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them (%(default)s)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="write the report here")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="a small model; speeds mean nothing")
    mode.add_argument("--check", action="store_true", help="compare numbers instead of speeds")
    args = parser.parse_args()
    args.work = args.work.resolve()
    # Not resolve(): the interpreter of a virtual environment is a link that must not be followed.
    args.mergekit_python = (args.mergekit_python or args.work / "mergekit-venv/bin/python").absolute()
    return args


def main() -> int:
    args = parse()
    names = args.cases.split(",") if args.cases else [c.name for c in CASES]
    if unknown := set(names) - {c.name for c in CASES}:
        raise SystemExit(f"--cases: unknown {', '.join(sorted(unknown))}; known: {', '.join(c.name for c in CASES)}")
    chosen = [c for c in CASES if c.name in names]
    mergekit_versions = mergekit_env.ensure(args.mergekit_python)
    bench = Bench(args)
    try:
        if args.check:
            return 0 if check(bench, chosen) else 1
        models = bench.models("quick" if args.quick else "1b")
        all_samples = [run_case(bench, case, models, args.runs, args.warmup) for case in chosen]
    except CommandFailedError as e:
        raise SystemExit(str(e)) from e
    results = report.summarise(all_samples, bench.output_bytes)
    facts = report.machine(mergekit_versions, quick=args.quick)
    print(report.table(results))
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, "cases": results}, indent=2) + "\n")
    if args.markdown:
        args.markdown.write_text(report.markdown(facts, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
