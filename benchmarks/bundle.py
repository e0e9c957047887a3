"""Bundles of vision transformers: how large they are, what a further task costs, and how fast tasks are switched.

    python benchmarks/bundle.py                 # ViT-B/32 with up to 20 tasks, ViT-L/14 with two: ten minutes
    python benchmarks/bundle.py --quick         # a model of 1.5 MB: shows that everything runs, and no more

Weights are random, float32, with heads of different numbers of labels. A fine-tune is on the disk only while it is
added. A switch is timed beside a copy of the same weights from one place in memory to another, in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import machine_facts, tell

import hubmerge

THREADS = 2
FIRST, LAST = 2, 20
STORAGES = {"float32": 2.0, "int8": 1.55}
"""Forms of the merged vector, and what it may take together with the base, in units of the base, for eight tasks."""
PROMISED_TASKS = 8
COPIES = 4.0
"""How many copies of the weights a switch may cost."""
SAME_COST = 1.25
"""How much longer an addition to the large bundle may take than one to the small bundle and still count as the same."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A vision transformer, and what a switch of it may take."""

    name: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    patch: int
    limit_ms: float
    image: int = 224

    def config(self) -> Any:
        """As transformers has it."""
        from transformers import ViTConfig

        return ViTConfig(
            hidden_size=self.hidden, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            intermediate_size=self.intermediate, patch_size=self.patch, image_size=self.image,
        )  # fmt: skip


B32 = Shape("ViT-B/32", 768, 12, 12, 3072, 32, limit_ms=100)
L14 = Shape("ViT-L/14", 1024, 24, 16, 4096, 14, limit_ms=300)
TINY = Shape("tiny", 96, 4, 4, 192, 16, limit_ms=100, image=64)


@dataclass(frozen=True, slots=True)
class Size:
    """A bundle's weight files, in units of the base's."""

    shared: float
    heads: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call took."""

    wall_s: float
    cpu_s: float


def timed(call: Callable[[], object]) -> Cost:
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


# --- models -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says while it saves and loads: progress bars, and that a new head is new."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)


def make_base(shape: Shape, folder: Path) -> Path:
    from transformers import ViTModel

    torch.manual_seed(0)
    with quiet():
        ViTModel(shape.config(), add_pooling_layer=False).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def fine_tune(base: Path, number: int) -> Iterator[Path]:
    """A classifier near the base, with labels of its own."""
    from transformers import ViTForImageClassification

    torch.manual_seed(1 + number)
    with quiet(), torch.no_grad():
        model = ViTForImageClassification.from_pretrained(base, num_labels=10 + number)
        for value in model.vit.parameters():
            value.add_(torch.randn_like(value), alpha=3e-4)
    folder = base.parent / f"task{number}"
    with quiet():
        model.save_pretrained(folder)
    del model
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def create(base: Path, out: Path, storage: str) -> None:
    """A bundle of the first tasks."""
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(fine_tune(base, i)) for i in range(FIRST)]
        recipe = hubmerge.Recipe.from_data(
            {
                "method": "superposition",
                "base": str(base),
                "models": [{"repo": str(m)} for m in models],
                "parameters": {"storage": storage},
                "output": {"format": "bundle"},
            }
        )
        hubmerge.create_bundle(recipe, out=out, overwrite=True)


def weights_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*.safetensors"))


# --- what is measured -------------------------------------------------------------------------------------------


def grow(base: Path, out: Path, storage: str) -> dict[int, Size]:
    """The bundle's size for every number of tasks."""
    create(base, out, storage)
    found = {FIRST: size_of(out, base)}
    for number in range(FIRST, LAST):
        with fine_tune(base, number) as model:
            hubmerge.add_task(out, model, base=base)
        found[number + 1] = size_of(out, base)
        say(f"{storage}: {number + 1} tasks")
    return found


def size_of(bundle: Path, base: Path) -> Size:
    one, heads = weights_bytes(base), weights_bytes(bundle / "heads")
    return Size((weights_bytes(bundle) - heads) / one, heads / one)


def additions(base: Path, small: Path, large: Path, rounds: int) -> dict[str, list[Cost]]:
    """The same model added to a bundle of two and to one of twenty, in turns."""
    found: dict[str, list[Cost]] = {"small": [], "large": []}
    with fine_tune(base, LAST) as model:
        for _ in range(rounds + 1):
            for name, place in (("small", small), ("large", large)):
                trial = base.parent / "trial"
                shutil.copytree(place, trial)
                found[name].append(timed(lambda trial=trial: hubmerge.add_task(trial, model, base=base)))
                shutil.rmtree(trial)
    return {name: costs[1:] for name, costs in found.items()}  # the first round also warms up


def switches(base: Path, place: Path, rounds: int) -> dict[str, list[Cost]]:
    """Copies of the weights and switches, in turns; every switch is to a task that was there before."""
    bundle = hubmerge.load_bundle(place, base=base)
    with quiet():
        model = bundle.model(bundle.tasks[0])
    sources = [p.detach().clone() for p in model.parameters()]
    targets = [torch.zeros_like(p) for p in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    found: dict[str, list[Cost]] = {"copy": [], "switch": []}
    for number in range(rounds + 2):
        found["copy"].append(timed(copy))
        found["switch"].append(timed(lambda n=number: bundle.switch(model, bundle.tasks[(n + 1) % 2])))
    return {name: costs[2:] for name, costs in found.items()}  # both tasks have been opened


# --- what is printed --------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(r)} |" for r in (headings, ["---"] * len(headings), *rows)] + [""]


def mark(kept: bool) -> str:
    return "✓" if kept else "✗"


def spread_ms(costs: Sequence[Cost], what: str) -> str:
    values = sorted(1000 * getattr(c, what) for c in costs)
    return f"{statistics.median(values):.0f} ({values[0]:.0f}–{values[-1]:.0f})"


def median_s(costs: Sequence[Cost], what: str = "wall_s") -> float:
    return statistics.median(getattr(c, what) for c in costs)


def size_rows(sizes: dict[str, dict[int, Size]]) -> Iterator[list[str]]:
    for tasks in (2, 4, PROMISED_TASKS, 14, LAST):
        cells = []
        for storage, limit in STORAGES.items():
            together = 1 + sizes[storage][tasks].shared
            promised = f" ≤ {limit:.2f} {mark(round(together, 3) <= limit)}" if tasks == PROMISED_TASKS else ""
            cells.append(f"{together:.3f}{promised}")
        heads = sizes["float32"][tasks].heads
        yield [str(tasks), f"{tasks + heads:.3f}", *cells, f"{heads:.4f}"]


def addition_row(found: dict[str, list[Cost]]) -> list[str]:
    ratios = [median_s(found["large"], what) / median_s(found["small"], what) for what in ("wall_s", "cpu_s")]
    cells = [spread_ms(found[name], what) for what in ("wall_s", "cpu_s") for name in ("small", "large")]
    return [*cells, f"{ratios[0]:.2f} / {ratios[1]:.2f} {mark(min(ratios) <= SAME_COST)}"]


def switch_row(shape: Shape, storage: str, found: dict[str, list[Cost]]) -> list[str]:
    pairs = list(zip(found["switch"], found["copy"], strict=True))
    ratio = statistics.median(s.wall_s / c.wall_s for s, c in pairs)
    cpu = statistics.median(s.cpu_s / c.cpu_s for s, c in pairs)
    wall_ms = 1000 * median_s(found["switch"])
    return [
        shape.name, storage, spread_ms(found["switch"], "wall_s"), spread_ms(found["switch"], "cpu_s"),
        spread_ms(found["copy"], "wall_s"), spread_ms(found["copy"], "cpu_s"), f"{ratio:.1f} / {cpu:.1f}",
        f"≤ {shape.limit_ms:.0f} ms {mark(wall_ms <= shape.limit_ms)}, ≤ {COPIES:.0f}× {mark(ratio <= COPIES)}",
    ]  # fmt: skip


def report(shape: Shape, sizes: dict[str, dict[int, Size]], added: dict[str, list[Cost]], rows: list[list[str]]) -> str:
    lines = [f"- {k}: {v}" for k, v in machine_facts().items()] + ["", f"{shape.name}, sizes in units of the base:", ""]
    headings = ["tasks", "separate models", *(f"base and {s} sum" for s in STORAGES), "the tasks' heads"]
    lines += table(headings, size_rows(sizes))
    lines += [f"One more task, ms, median (range), to {FIRST} and to {LAST}:", ""]
    headings = [f"{what}, to {n}" for what in ("wall", "cpu") for n in (FIRST, LAST)]
    lines += table([*headings, "ratio, wall / cpu"], [addition_row(added)])
    lines += ["Switching, ms, median (range):", ""]
    headings = ["shapes", "storage", "switch", "cpu", "copy", "cpu", "ratio, wall / cpu", "promised"]
    return "\n".join(lines + table(headings, rows))


def measure(shapes: Sequence[Shape], work: Path, rounds: int) -> str:
    first, *others = shapes
    base = make_base(first, work / "base")
    sizes = {storage: grow(base, work / storage, storage) for storage in STORAGES}
    create(base, work / "small", "float32")
    added = additions(base, work / "small", work / "float32", max(3, rounds // 4))
    rows = [switch_row(first, s, switches(base, work / s, rounds)) for s in STORAGES]
    for shape in others:
        folder = work / "other"
        base = make_base(shape, folder / "base")
        for storage in STORAGES:
            create(base, folder / storage, storage)
            rows.append(switch_row(shape, storage, switches(base, folder / storage, rounds)))
        shutil.rmtree(folder)
    return report(first, sizes, added, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/hubmerge-bundle"), help="models (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="counted switches of each kind (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    args = parser.parse_args()
    if args.work.exists():
        parser.error(f"{args.work} exists; name another folder with --work, or remove it")
    torch.set_num_threads(THREADS)
    try:
        text = measure([TINY] if args.quick else [B32, L14], args.work, args.rounds)
    finally:
        shutil.rmtree(args.work, ignore_errors=True)
    tell(text, args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
