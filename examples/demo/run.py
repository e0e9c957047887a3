"""The demo: start a local Hub, train and push five models, merge them three ways, load the merges back, measure.

Run it from the repository's root with `make demo`, or `python -m examples.demo.run`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.demo.data import SPLITS, TASKS, Split, load_images
from examples.demo.server import local_hub

MARKER = ".hubmerge-demo"


def main() -> int:
    """Run the whole demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path(".demo"), help="folder for all that the demo makes")
    parser.add_argument("--split", choices=SPLITS, default="test", help="images to measure on (recipes: validation)")
    parser.add_argument("--serve", action="store_true", help="keep the local Hub up at the end, until Ctrl-C")
    options = parser.parse_args()
    # A terminated demo must stop its Hub too: make the signal an exception, so that `with` blocks end properly.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        workdir = prepare(options.workdir.resolve())
        with local_hub(workdir / "hub", workdir / "hub.log") as exports:
            # Hugging Face's libraries read these when they are imported, so nothing of theirs is imported before.
            os.environ.update(exports, HF_HOME=str(workdir / "hf-home"), HF_HUB_DISABLE_TELEMETRY="1")
            os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1")
            for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "TRANSFORMERS_OFFLINE"):
                os.environ.pop(name, None)
            demonstrate(workdir, options.split, exports["HF_ENDPOINT"])
            if options.serve:
                wait_for_interrupt(exports)
    except KeyboardInterrupt:
        return 130
    except subprocess.CalledProcessError as e:
        print(f"the demo stopped: {shlex.join(e.cmd[2:])} ended with exit code {e.returncode}", file=sys.stderr)
        return 1
    return 0


def prepare(workdir: Path) -> Path:
    """An empty work folder; only what an earlier run of the demo has made is removed."""
    if workdir.exists() and any(workdir.iterdir()):
        if not (workdir / MARKER).is_file():
            sys.exit(f"{workdir}: not empty, and not a work folder of this demo; choose another --workdir")
        shutil.rmtree(workdir)
    (workdir / "recipes").mkdir(parents=True)
    (workdir / MARKER).write_text("Made by hubmerge's demo, which deletes this folder when it starts again.\n")
    return workdir


def demonstrate(workdir: Path, split: Split, endpoint: str) -> None:
    """All steps, and the table."""
    from examples.demo import pipeline

    console = Console(highlight=False)
    start_s = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - start_s:5.0f} s[/dim]  {text}", soft_wrap=True)

    say(f"local Hub on {endpoint}")
    images = load_images()
    scores = pipeline.train_and_push(images, split, say)
    for method in pipeline.METHODS:
        say(f"merging: hubmerge push recipes/demo-{method}.yaml --to {pipeline.merged_repo(method)}")
        pipeline.merge_and_push(method, workdir / "recipes")
    say("loading everything back from the Hub, and measuring")
    pipeline.measure(images, split, scores)
    say("pushing the merges once more, with these results and with diagnostics")
    pipeline.publish_results(scores, split, workdir / "results")
    say("checking: hubmerge verify")
    for method in pipeline.METHODS:
        pipeline.hubmerge(["verify", pipeline.merged_repo(method), "-q"])
    (workdir / "results.json").write_text(json.dumps({"split": split, "accuracy": scores}, indent=2) + "\n")
    cards = pipeline.fetch_cards(workdir / "cards")
    console.print(build_table(scores, split))
    for method, path in cards.items():
        console.print(f"card of {method}: {endpoint}/{pipeline.merged_repo(method)}, copy in {path}", soft_wrap=True)
    say(f"done; the Hub's data stay in {workdir / 'hub'}: hubmerge hub serve --root {workdir / 'hub'}")


def build_table(scores: dict[str, dict[str, float]], split: Split) -> Table:
    """Task x (base, own fine-tune, each merge), in percent right, and the mean."""
    columns = list(next(iter(scores.values())))
    table = Table(title=f"accuracy on the {split} images, %", caption="base: linear probe; all: the same head per task")
    table.add_column("task")
    for column in columns:
        table.add_column(column, justify="right")
    for task in TASKS:
        table.add_row(task.name, *(f"{100 * scores[task.name][column]:.1f}" for column in columns))
    means = [sum(row[column] for row in scores.values()) / len(scores) for column in columns]
    table.add_section()
    table.add_row("mean", *(f"{100 * mean:.1f}" for mean in means))
    return table


def wait_for_interrupt(exports: dict[str, str]) -> None:
    """Leave the Hub up, and say how to use it."""
    print("The local Hub stays up until Ctrl-C. To use it from another shell:")
    for name, value in exports.items():
        print(f"  export {name}={value}")
    signal.pause()


if __name__ == "__main__":
    raise SystemExit(main())
