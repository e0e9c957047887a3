"""Push a merge of 8B models from a machine that cannot hold them, beside a copy of the same bytes by huggingface_hub.

    python benchmarks/llama8b.py                  # an hour on two cores with making the models, 55 GB of disk
    python benchmarks/llama8b.py --quick          # models of 50 MB: shows that everything runs, and no more
    python benchmarks/llama8b.py --only ties      # one case, beside the copy

A Llama-3.1-8B-shaped base and a fine-tune (random bfloat16 weights, shards of 5 GB) and five LoRA adapters lie on a
local Hub, a process of its own on the same machine. The copy downloads every file of both models with hf_hub_download,
removes it, and uploads the fine-tune's with upload_file, changed by a byte so that the Hub does not have it: the bytes
that a merge of the two reads and writes. What stands in the working folders meanwhile, HF_HOME and TMPDIR among them,
is looked at fifty times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import measure
from models import SHAPES, Shape, write_model
from report import sheet, tell

from hubmerge.localhub.process import HubProcess

os.environ["HF_HUB_DISABLE_XET"] = "1"  # the local Hub has large files the other way

HERE = Path(__file__).resolve().parent
SHARD_BYTES = 5_000_000_000
LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128256, SHARD_BYTES)
ADAPTERS, RANK = 5, 16
BASE, TUNED = "local/base", "local/tuned"
SHARD_SLACK, COPY_RATIO = 1.05, 1.5
HEADINGS = (
    "case", "s", "copy s", "of a copy", "peak MB", "peak disk / shard", "read GB", "written GB", "resolver calls",
    "promised",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One push, and the memory it may take."""

    method: str
    models: tuple[str, ...]
    limit_rss_bytes: int
    timed: bool = False
    """Whether its time is promised, too."""


CASES = {
    "task_arithmetic": Case("task_arithmetic", (TUNED,), 3_000_000_000, timed=True),
    "ties": Case("ties", (TUNED,), 3_500_000_000),
    "five adapters": Case("task_arithmetic", tuple(f"local/lora-{i}" for i in range(ADAPTERS)), 3_000_000_000),
}


# --- the Hub and what is on it ----------------------------------------------------------------------------------


def publish_models(shape: Shape, work: Path) -> Path:
    """A Hub's folder with all models on it; kept for later runs."""
    root, ready = work / "hub", work / "hub.ready"
    if ready.exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    with HubProcess(root) as hub:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        for seed, name in enumerate((BASE, TUNED)):
            folder = work / "model"
            write_model(shape, folder, seed)
            _publish(api, name, folder)
        for i in range(ADAPTERS):
            folder = work / "model"
            write_adapter(shape, folder, i)
            _publish(api, f"local/lora-{i}", folder)
    ready.touch()
    return root


def _publish(api: Any, name: str, folder: Path) -> None:
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path=folder)
    shutil.rmtree(folder)


def write_adapter(shape: Shape, folder: Path, seed: int) -> None:
    """A LoRA adapter of the attention layers, float32, as PEFT saves it."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    rng, tensors = torch.Generator().manual_seed(seed), {}
    for name, dims in shape.tensors():
        if ".self_attn." in name:
            at = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(RANK, dims[1], generator=rng) / dims[1] ** 0.5
            tensors[f"{at}.lora_B.weight"] = 0.01 * torch.randn(dims[0], RANK, generator=rng)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "task_type": "CAUSAL_LM", "bias": "none",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "base_model_name_or_path": BASE,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\nRandom weights, made for a benchmark.\n")


@contextmanager
def copy_of_hub(root: Path, work: Path) -> Iterator[HubProcess]:
    """The Hub as it was, for one run: blobs never change, so the copy has them as links."""
    copy = work / "hub-now"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy, copy_function=_link_blob)
    try:
        with HubProcess(copy) as hub:
            yield hub
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _link_blob(source: str, target: str) -> str:
    if "/objects/" in source:
        os.link(source, target)
        return target
    return shutil.copy2(source, target)


# --- runs -------------------------------------------------------------------------------------------------------


class DiskWatch(threading.Thread):
    """The most that stood in some folders at once."""

    def __init__(self, *folders: Path) -> None:
        super().__init__(daemon=True)
        self.peak_bytes, self._folders, self._stopped = 0, folders, threading.Event()

    def run(self) -> None:
        """Look, until told to stop."""
        while not self._stopped.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, sum(map(_size, self._folders)))

    def __enter__(self) -> DiskWatch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()


def _size(folder: Path) -> int:
    size = 0
    for at, _, names in os.walk(folder):
        for name in names:
            try:
                size += Path(at, name).lstat().st_blocks * 512
            except FileNotFoundError:
                continue
    return size


def run(arguments: list[str], root: Path, work: Path) -> dict[str, Any]:
    """One command as a process of its own, against a fresh copy of the Hub."""
    folders = [work / "now" / name for name in ("home", "tmp", "here")]
    shutil.rmtree(work / "now", ignore_errors=True)
    for folder in folders:
        folder.mkdir(parents=True)
    with copy_of_hub(root, work) as hub:
        before = hub_size(work)
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
            "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HOME": str(folders[0]),
            "TMPDIR": str(folders[1]), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }  # fmt: skip
        with DiskWatch(*folders) as disk:
            found = measure([sys.executable, *arguments], env=env, log=work / "run.log", cwd=folders[2])
        written, (read, calls) = hub_size(work) - before, traffic(hub)
    shutil.rmtree(work / "now")
    return {
        "wall_s": found.wall_s, "cpu_s": found.cpu_s, "peak_rss_bytes": found.peak_rss_bytes,
        "peak_disk_bytes": disk.peak_bytes, "written_bytes": written, "read_bytes": read, "resolver_calls": calls,
    }  # fmt: skip


def hub_size(work: Path) -> int:
    return _size(work / "hub-now" / "objects")


def traffic(hub: HubProcess) -> tuple[int, int]:
    """Bytes of large files that the Hub has sent, and how often it was asked where a file is."""
    with urllib.request.urlopen(f"{hub.endpoint}/_admin/requests") as reply:
        requests = json.load(reply)
    read = sum(r["response_bytes"] for r in requests if r["method"] == "GET" and r["path"].startswith("/_cdn/"))
    return read, sum("/resolve/" in r["path"] for r in requests)


def copy_here() -> None:
    """In a process of its own: download both models, upload the fine-tune's files again, one file after the other."""
    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi()
    api.create_repo("local/copy")
    for repo in (BASE, TUNED):
        for name in sorted(f for f in api.list_repo_files(repo) if f.endswith(".safetensors")):
            path = Path(hf_hub_download(repo, name, local_dir="."))
            if repo == TUNED:
                with path.open("r+b") as file:
                    file.seek(-1, os.SEEK_END)
                    last = file.read(1)[0]
                    file.seek(-1, os.SEEK_END)
                    file.write(bytes([last ^ 1]))
                api.upload_file(path_or_fileobj=path, path_in_repo=name, repo_id="local/copy")
            path.unlink()


def push_arguments(case: Case, shard_bytes: int) -> list[str]:
    models = [part for model in case.models for part in ("--model", model)]
    return [
        "-m", "hubmerge", "push", "--method", case.method, "--base", BASE, *models, "--to", "local/merged",
        "--fetch", "stream", "--shard-size", f"{shard_bytes // 1_000_000}MB", "--quiet",
    ]  # fmt: skip


# --- the table --------------------------------------------------------------------------------------------------


def row(name: str, found: dict[str, Any], copy: dict[str, Any], shard_bytes: int) -> tuple[str, ...]:
    case, ratio = CASES[name], found["wall_s"] / copy["wall_s"]
    disk = found["peak_disk_bytes"] / shard_bytes
    kept = found["peak_rss_bytes"] <= case.limit_rss_bytes and disk <= SHARD_SLACK
    kept = kept and (ratio <= COPY_RATIO or not case.timed)
    limits = f"≤ {case.limit_rss_bytes / 1e9:g} GB, ≤ {SHARD_SLACK:g} shards" + (
        f", ≤ {COPY_RATIO:g} copies" if case.timed else ""
    )
    return (
        name, f"{found['wall_s']:.0f}", f"{copy['wall_s']:.0f}", f"{ratio:.2f}×",
        f"{found['peak_rss_bytes'] / 1e6:,.0f}", f"{disk:.2f}",
        f"{found['read_bytes'] / 1e9:.1f}", f"{found['written_bytes'] / 1e9:.1f}",
        str(found["resolver_calls"]),
        f"{limits} {'✓' if kept else '✗'}",
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models: shows that it runs")
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES), help="only these")
    parser.add_argument("--work", type=Path, default=Path("/tmp/hubmerge-llama8b"), help="models (%(default)s)")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        copy_here()
        return 0
    shape = SHAPES["quick"] if args.quick else LLAMA_8B
    work = args.work / ("quick" if args.quick else "8b")
    work.mkdir(parents=True, exist_ok=True)
    root = publish_models(shape, work)
    copy = run([str(Path(__file__).resolve()), "--child"], root, work)
    print(f"copy: {copy['wall_s']:.0f} s", file=sys.stderr, flush=True)
    rows = []
    for name in args.only:
        time.sleep(1)
        found = run(push_arguments(CASES[name], shape.shard_bytes), root, work)
        rows.append(row(name, found, copy, shape.shard_bytes))
        print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    tell(sheet(HEADINGS, rows), args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
