"""Five LoRA adapters with Llama-3.1-8B's shapes merged into one adapter, without reading a weight of the base.

    python benchmarks/lora_8b.py                # tsv_merge and drm, attention only and all linear layers

The base is 16 GB of header and holes: sparse files that take no disk, in which every weight would be read as zero.
Each merge is a whole process; what it read is what the operating system counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import measure
from report import sheet, tell

HERE = Path(__file__).resolve().parent
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCAB = 4096, 14336, 32, 32, 8, 128256
ADAPTERS, RANK, ALPHA = 5, 16, 32
ATTENTION = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (1024, HIDDEN), "v_proj": (1024, HIDDEN), "o_proj": (HIDDEN, HIDDEN)}
MLP = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}
TARGETS = {"attention": ATTENTION, "all": ATTENTION | MLP}
LIMITS_S = {"attention": 30.0, "all": 60.0}
LIMIT_RSS_BYTES = 2_000_000_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "dtype": "bfloat16",
    "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "tie_word_embeddings": False,
}  # fmt: skip
METHODS: dict[str, tuple[str, list[str]]] = {
    "tsv_merge": ("tsv_merge", []),
    "drm, horizontal": ("drm", []),
    "drm, vertical": ("drm", ["direction=vertical"]),
}


def base_tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the 8 billion parameters."""
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for i in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{i}.{norm}.weight", (HIDDEN,)
        for name, shape in TARGETS["all"].items():
            yield f"model.layers.{i}.{_path(name)}.weight", shape
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def _path(name: str) -> str:
    return f"self_attn.{name}" if name in ATTENTION else f"mlp.{name}"


def make_base(folder: Path) -> None:
    """A checkpoint whose weights are holes in its file."""
    from hubmerge.io.header import build_header
    from hubmerge.spec import DTYPES

    folder.mkdir(parents=True, exist_ok=True)
    header, spans = build_header((name, DTYPES["BF16"], shape) for name, shape in base_tensors())
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(spans[-1][1])
    (folder / "config.json").write_text(json.dumps(CONFIG))


def make_adapters(folder: Path, targets: str) -> list[Path]:
    """Adapters as PEFT saves them: float32, A as initialised, B as large as a short training leaves it."""
    import torch
    from safetensors.torch import save_file

    made = []
    for n in range(ADAPTERS):
        path = folder / f"{targets}-{n}"
        path.mkdir(parents=True, exist_ok=True)
        rng = torch.Generator().manual_seed(n)
        tensors = {}
        for i in range(LAYERS):
            for name, (rows, columns) in TARGETS[targets].items():
                at = f"base_model.model.model.layers.{i}.{_path(name)}"
                bound = 1 / math.sqrt(columns)
                tensors[f"{at}.lora_A.weight"] = (torch.rand(RANK, columns, generator=rng) * 2 - 1) * bound
                tensors[f"{at}.lora_B.weight"] = 0.01 * torch.randn(rows, RANK, generator=rng)
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(TARGETS[targets]),
            "task_type": "CAUSAL_LM", "bias": "none", "base_model_name_or_path": "base",
        }  # fmt: skip
        (path / "adapter_config.json").write_text(json.dumps(config))
        made.append(path)
    return made


def merge_here(method: str, params: list[str], base: Path, models: list[Path], out: Path) -> dict[str, Any]:
    """Merge in this process and say what the operating system counted for it."""
    import hubmerge

    recipe = hubmerge.Recipe.from_flags(
        method, str(base), [str(m) for m in models], params, output={"format": "adapter"}
    )
    result = hubmerge.merge(recipe, out)
    read = int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])
    return result.to_json() | {"read_bytes": read}


def run(method: str, targets: str, base: Path, models: list[Path], work: Path) -> dict[str, Any]:
    """One merge as a process of its own."""
    name, params = METHODS[method]
    out = work / "out"
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1"}
    argv = [sys.executable, __file__, "--child", name, *(f"--param={p}" for p in params)]
    argv += ["--base", str(base), "--out", str(out), *map(str, models)]
    found = measure(argv, env=env, log=work / "merge.log", cwd=HERE)
    facts = json.loads(found.stdout)
    size = sum(m.stat().st_size for folder in models for m in folder.iterdir())
    written = next(f["size_bytes"] for f in facts["files"] if f["path"] == "adapter_model.safetensors")
    return {
        "method": method, "targets": targets, "merge_s": facts["timings"]["merge_s"], "wall_s": found.wall_s,
        "peak_rss_bytes": found.peak_rss_bytes, "adapters_bytes": size, "read_bytes": facts["read_bytes"],
        "written_bytes": written,
    }  # fmt: skip


def row(found: dict[str, Any]) -> tuple[str, ...]:
    limit_s = LIMITS_S[found["targets"]]
    kept = found["merge_s"] <= limit_s and found["peak_rss_bytes"] <= LIMIT_RSS_BYTES
    return (
        found["method"], found["targets"], f"{found['merge_s']:.1f}", f"{found['wall_s']:.1f}",
        f"{found['peak_rss_bytes'] / 1e6:,.0f}", f"{found['adapters_bytes'] / 1e6:,.0f}",
        f"{found['read_bytes'] / 1e6:,.0f}", f"{found['written_bytes'] / 1e6:,.0f}",
        f"≤ {limit_s:.0f} s, ≤ 2 GB {'✓' if kept else '✗'}",
    )  # fmt: skip


HEADINGS = ("method", "layers", "merge s", "process s", "peak MB", "adapters MB", "read MB", "written MB", "promised")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/hubmerge-lora-8b"), help="models (%(default)s)")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--param", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("models", type=Path, nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(merge_here(args.child, args.param, args.base, args.models, args.out)))
        return 0
    base = args.work / "base"
    make_base(base)
    results = []
    for targets in TARGETS:
        models = make_adapters(args.work, targets)
        for method in METHODS:
            subprocess_out = args.work / "out"
            _remove(subprocess_out)
            time.sleep(1)
            results.append(run(method, targets, base, models, args.work))
            print("  ".join(row(results[-1])), file=sys.stderr, flush=True)
            _remove(subprocess_out)
    tell(sheet(HEADINGS, map(row, results)), args.markdown)
    return 0


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
