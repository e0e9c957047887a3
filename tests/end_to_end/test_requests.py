"""How often a merge of a model with as many tensors and shards as Llama-3.1-8B calls the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from hubmerge.localhub import Fault, LocalHub
from tests.end_to_end import support
from tests.end_to_end.support import Tensors, Town

LAYERS, SHARDS = 32, 4
PER_LAYER = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (4, 16), "self_attn.v_proj": (4, 16),
    "self_attn.o_proj": (16, 16), "mlp.gate_proj": (56, 16), "mlp.up_proj": (56, 16), "mlp.down_proj": (16, 56),
    "input_layernorm": (16,), "post_attention_layernorm": (16,),
}  # fmt: skip
OUTSIDE = {"model.embed_tokens.weight": (500, 16), "model.norm.weight": (16,), "lm_head.weight": (500, 16)}
SHAPES: dict[str, tuple[int, ...]] = OUTSIDE | {
    f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in PER_LAYER.items()
}
NAMES = ("base", "a", "b")


def save(folder: Path, seed: int) -> Path:
    """A checkpoint in shards, with its index and config."""
    generator = torch.Generator().manual_seed(seed)
    values: Tensors = {n: torch.randn(s, generator=generator).bfloat16() for n, s in SHAPES.items()}
    names = sorted(values)
    files = [f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors" for i in range(SHARDS)]
    where = {name: files[i * SHARDS // len(names)] for i, name in enumerate(names)}
    folder.mkdir(parents=True)
    for file in files:
        save_file({n: values[n] for n in names if where[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(support.CONFIG))
    return folder


@pytest.mark.parametrize(
    ("method", "passes"), [("task_arithmetic", 1), pytest.param("ties", 6, marks=pytest.mark.slow)]
)
def test_few_resolver_calls(method: str, passes: int, start_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    """A file's address is asked for once, also when it is looked at in several passes, and again when it expires."""
    assert len(SHAPES) == 291
    town: Town = support.open_town(start_hub)
    for seed, name in enumerate(NAMES):
        town.publish(f"local/{name}", save(tmp_path / name, seed))
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(
        f"method: {method}\nbase: local/base\nmodels: [local/a, local/b]\noutput: {{shard_size: 200KB}}\n"
    )
    hub = town.hub
    hub.requests.clear()
    expired = hub.faults.add(Fault.expired_url(times=len(NAMES), skip=100))
    done = support.hubmerge("push", recipe, "--to", "local/merged", "--fetch", "stream", "--verbose")
    assert done.code == 0, done.text
    assert expired.hits == len(NAMES)
    assert "not compared" not in done.err  # all digests were

    weights = hub.requests.find(None, r"/resolve/.*\.safetensors$")
    assert {r.method for r in weights} == {"HEAD"}
    assert len(weights) <= len(NAMES) * SHARDS + len(NAMES)
    assert len(hub.requests.find(None, "/resolve/")) < 40  # of the thousand that an hour's quota leaves room for
    # Each version of each tensor, at most once for each time the method looks at it, and each file's header twice.
    ranges = hub.requests.find("GET", "^/_cdn/")
    assert len(ranges) <= passes * len(NAMES) * len(SHAPES) + 2 * len(NAMES) * SHARDS + len(NAMES)


@pytest.mark.parametrize("output", ["full", "adapter"])
def test_a_streamed_adapter_is_read_once(output: str, start_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    """Its many small tensors are one range of its file, which no folder keeps; the merge is that of the cached one."""
    town: Town = support.open_town(start_hub)
    town.publish("local/base", support.save(tmp_path / "base", support.tensors(0)))
    names = [f"local/lora-{rank}" for rank in (1, 2)]
    for name, rank in zip(names, (1, 2), strict=True):
        town.publish(name, support.save_adapter(tmp_path / name, base="local/base", rank=rank))
    models = [part for name in names for part in ("--model", name)]
    merged = {}
    for fetch in ("stream", "cache"):
        town.hub.requests.clear()
        out = tmp_path / fetch
        asked = ("merge", "--method", "task_arithmetic", "--base", "local/base", *models, "--out", out)
        done = support.hubmerge(*asked, "--format", output, "--fetch", fetch, "--verbose")
        assert done.code == 0, done.text
        assert "not compared" not in done.err  # their digests were
        weights = {f.name: f.read_bytes() for f in out.glob("*.safetensors")}
        assert weights
        merged[fetch] = weights
        if fetch == "stream":
            kept = list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
            assert not kept
            ranges = town.hub.requests.find("GET", "^/_cdn/")
            base_reads = 0 if output == "adapter" else len(support.SHAPES)
            assert len(ranges) <= base_reads + 3 * (2 * len(names) + 1)
    assert merged["stream"] == merged["cache"]
