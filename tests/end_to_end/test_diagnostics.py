"""``hubmerge analyze``, and what ``--diagnostics`` adds to a published model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from safetensors.torch import save_file

from hubmerge.localhub import LocalHub
from tests.end_to_end import support
from tests.end_to_end.support import CONFIG, folder_state, save, tensors

TARGET = "local/merged"
ASSETS = {"assets/cosines.svg", "assets/interference.svg", "assets/spectrum.svg"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, tensors(seed))
    path = tmp_path / "merge.yaml"
    models = [str(tmp_path / name) for name in ("a", "b")]
    path.write_text(json.dumps({"method": "ties", "base": str(tmp_path / "base"), "models": models}))
    return path


def test_push_with_diagnostics(start_hub: Callable[..., LocalHub], recipe: Path, tmp_path: Path) -> None:
    town = support.open_town(start_hub)
    for name in ("base", "a", "b"):
        town.publish(f"local/{name}", tmp_path / name)
    data = {"method": "ties", "base": "local/base", "models": ["local/a", "local/b"]}
    recipe.write_text(json.dumps(data))
    done = support.hubmerge("push", recipe, "--to", TARGET, "--diagnostics", "--fetch", "stream")
    assert done.code == 0, done.text
    state = town.state(TARGET)
    assert state is not None
    assert {"diagnostics.json", *ASSETS} <= set(state.files)
    folder = Path(snapshot_download(TARGET))
    card = ModelCard.load(TARGET)
    card.validate()
    assert "## How the tasks get along" in card.text
    assert all(f"]({asset})" in card.text for asset in ASSETS)
    said = json.loads((folder / "diagnostics.json").read_text())
    lock = json.loads((folder / "hubmerge.lock.json").read_text())
    assert said["plan_sha256"][:12] in card.text
    assert {"diagnostics.json", *ASSETS} <= {f["path"] for f in lock["outputs"]}
    assert support.hubmerge("verify", TARGET).code == 0
    # The figures do not depend on where the inputs are.
    analyzed = support.hubmerge("analyze", recipe, "--json")
    assert analyzed.code == 0, analyzed.text
    assert json.loads(analyzed.out) == said


def test_analyze_writes_figures_and_no_model(recipe: Path, tmp_path: Path) -> None:
    before = folder_state(tmp_path)
    done = support.hubmerge("analyze", recipe, "--out", tmp_path / "out")
    assert done.code == 0, done.text
    assert before is not None
    after = folder_state(tmp_path)
    assert after is not None
    assert set(after) - set(before) == {f"out/{name}" for name in ("diagnostics.json", *ASSETS)}
    assert "mean cosine" in done.out
    assert [line.split()[0] for line in done.out.splitlines()[2:4]] == ["a", "b"]
    assert "of 4 of 4 weights" in done.out
    assert support.hubmerge("analyze", recipe, "--out", tmp_path / "none", "--spectra", "none").code == 0
    assert not (tmp_path / "none/assets/spectrum.svg").exists()


def test_a_merge_without_a_base_says_what_is_missing(tmp_path: Path, recipe: Path) -> None:
    recipe.write_text(json.dumps({"method": "linear", "models": [str(tmp_path / "a"), str(tmp_path / "b")]}))
    done = support.hubmerge("analyze", recipe)
    assert done.code == 2
    assert "without a base" in done.err
    assert "name the models' common base" in done.err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_eight_models_of_the_shape_of_a_1b_model_take_less_than_a_gigabyte(tmp_path: Path) -> None:
    """One of TinyLlama's layers, and its embeddings: memory does not depend on how many layers there are."""
    shapes = {"model.embed_tokens.weight": (32000, 2048)}
    shapes |= {
        f"model.layers.0.self_attn.{n}_proj.weight": (r, 2048) for n, r in {"q": 2048, "k": 256, "v": 256}.items()
    }
    shapes |= {"model.layers.0.mlp.up_proj.weight": (5632, 2048), "model.layers.0.mlp.down_proj.weight": (2048, 5632)}
    generator = torch.Generator().manual_seed(0)
    base = {n: 0.02 * torch.randn(s, generator=generator) for n, s in shapes.items()}
    for i in range(-1, 8):
        folder = tmp_path / ("base" if i < 0 else f"task{i}")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 32000}))
        own = {n: t if i < 0 else t + 0.002 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        save_file({n: t.bfloat16() for n, t in own.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = tmp_path / "merge.yaml"
    models = [str(tmp_path / f"task{i}") for i in range(8)]
    recipe.write_text(json.dumps({"method": "task_arithmetic", "base": str(tmp_path / "base"), "models": models}))
    # Not ru_maxrss, which a process inherits from the one that started it: this one, with all the tensors.
    command = (
        "import sys; from hubmerge.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "held = next(line for line in open('/proc/self/status') if line.startswith('VmHWM:'))\n"
        "print(1024 * int(held.split()[1]), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", command, "analyze", str(recipe), "--workers", "2", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = json.loads(done.stdout)
    assert said["matrices_decomposed"] == said["matrices"] == 5
    peak_bytes = int(done.stderr.split()[-1])
    print(f"peak {peak_bytes / 1e6:.0f} MB")
    assert peak_bytes < 1_000_000_000
