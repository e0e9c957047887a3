"""The same inputs give the same bytes: for any hash seed, number of workers, chunk size, shard layout, and way of
reading. Matrix methods give the same values within a tolerance."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hubmerge
from hubmerge.api import RunOptions
from hubmerge.localhub import LocalHub
from hubmerge.methods import all_methods
from hubmerge.ranking import GRAIN
from tests.merge.models import stored

SHAPES = {
    "layers.0.w": (300, 400), "layers.1.w": (300, 400), "layers.10.w": (7, 11), "embed.weight": (513, 200), "norm":
    (5,), "layers.2.w": (40000,),
}  # fmt: skip
TASKS = ("a", "b", "c")
ELEMENT = [m.name for m in all_methods() if m.unit == "element"]
MATRIX = [m.name for m in all_methods() if m.unit == "matrix"]
# Every element-wise method once, and the options that take other paths through statistics and random bits.
SETTINGS = [(name, ()) for name in ELEMENT if name != "slerp"] + [
    ("slerp", ("t=0.3",)),
    ("ties", ("trim=tensor", "density=0.3")),
    ("ties", ("rule=published",)),
    ("dare_ties", ("density=0.4", "rescale=l1")),
    ("dare_ties", ("density=0.6", "trim_after=true")),
    ("breadcrumbs", ("density=0.5", "gamma=0.05", "elect_sign=true")),
]


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) * 0.02 for n, s in SHAPES.items()}


def save(values: dict[str, torch.Tensor], folder: Path, n_shards: int, order: int) -> None:
    folder.mkdir(parents=True)
    names = sorted(values, key=lambda n: zlib.crc32(f"{order}{n}".encode()) if order else n)
    parts = [names[i::n_shards] for i in range(n_shards)]
    files = [
        f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors" if n_shards > 1 else "model.safetensors"
        for i in range(n_shards)
    ]
    for part, file in zip(parts, files, strict=True):
        save_file({n: values[n] for n in part}, folder / file, metadata={"format": "pt"})
    if n_shards > 1:
        index = {"metadata": {}, "weight_map": {n: f for part, f in zip(parts, files, strict=True) for n in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "homemade"}')


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models"), 1, 0)


def make(folder: Path, n_shards: int, order: int) -> Path:
    base = tensors(0)
    save({n: t.bfloat16() for n, t in base.items()}, folder / "base", n_shards, order)
    for i, task in enumerate(TASKS):
        step = tensors(i + 1)
        save({n: (t + 0.1 * step[n]).bfloat16() for n, t in base.items()}, folder / task, n_shards, order)
    return folder


def recipe(prefix: str, method: str, params: tuple[str, ...]) -> hubmerge.Recipe:
    tasks = TASKS[:1] if method == "slerp" else TASKS
    weights = ("", ":0.5", ":0.25") if method != "model_stock" else ("", "", "")
    models = [f"{prefix}{t}{w}" for t, w in zip(tasks, weights, strict=False)]
    return hubmerge.Recipe.from_flags(
        method, f"{prefix}base", models, list(params), seed=7, output={"shard_size": "300KB"}
    )


def digests(prefix: str, method: str, params: tuple[str, ...], out: Path, **options: object) -> dict[str, str]:
    result = hubmerge.merge(recipe(prefix, method, params), out, options=RunOptions(**options))  # type: ignore[arg-type]
    shutil.rmtree(out)
    return {f.path: f.sha256 for f in result.files if f.path.endswith((".safetensors", "index.json"))}


@pytest.mark.parametrize(("method", "params"), SETTINGS, ids=str)
def test_workers_and_chunk_sizes(method: str, params: tuple[str, ...], root: Path, tmp_path: Path) -> None:
    prefix, out = f"{root}/", tmp_path / "out"
    expected = digests(prefix, method, params, out, workers=1)
    assert len(expected) == 5  # four shards and their index
    for workers, grains in ((2, 1), (4, 2), (1, 8)):
        assert digests(prefix, method, params, out, workers=workers, chunk_elements=grains * GRAIN) == expected


@pytest.mark.parametrize("method", MATRIX)
def test_matrix_methods_agree_within_a_tolerance(method: str, root: Path, tmp_path: Path) -> None:
    def merged(name: str, source: Path, **options: int) -> dict[str, torch.Tensor]:
        models = [f"{source}/{t}" for t in TASKS]
        parsed = hubmerge.Recipe.from_flags(method, f"{source}/base", models, [], dtype="float32")
        hubmerge.merge(parsed, tmp_path / name, options=RunOptions(**options))
        return stored(tmp_path / name)

    expected = merged("one", root, workers=1)
    other = make(tmp_path / "layout", 3, 5)
    for found in (merged("four", root, workers=4, chunk_elements=GRAIN), merged("shards", other, workers=2)):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert float((found[name] - value).norm()) <= 1e-6 * float(value.norm()), name


@pytest.mark.parametrize(("method", "params"), [SETTINGS[i] for i in (3, 4, 7, 9)], ids=str)
def test_shard_layouts_of_the_inputs(method: str, params: tuple[str, ...], root: Path, tmp_path: Path) -> None:
    expected = digests(f"{root}/", method, params, tmp_path / "out")
    for n_shards, order in ((2, 1), (3, 5)):
        other = make(tmp_path / f"layout{n_shards}", n_shards, order)
        assert digests(f"{other}/", method, params, tmp_path / "out") == expected


def test_local_cached_and_streamed_inputs(root: Path, tmp_path: Path, hub: LocalHub) -> None:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    for name in ("base", *TASKS):
        api.create_repo(f"local/{name}")
        api.upload_folder(repo_id=f"local/{name}", folder_path=root / name)
    for method, params in SETTINGS:
        expected = digests(f"{root}/", method, params, tmp_path / "out")
        for fetch in ("stream", "cache"):
            assert digests("local/", method, params, tmp_path / "out", fetch=fetch) == expected


@pytest.mark.parametrize(("method", "params"), [("dare_ties", ("trim_after=true",)), ("ties", ())], ids=str)
def test_hash_seeds(method: str, params: tuple[str, ...], root: Path, tmp_path: Path) -> None:
    found = []
    for seed in ("1", "2"):
        out = tmp_path / f"out{seed}"
        script = (
            "import sys, hubmerge\n"
            "from tests.merge.test_same_bits import recipe\n"
            "result = hubmerge.merge(recipe(sys.argv[1], sys.argv[2], tuple(sys.argv[4:])), sys.argv[3])\n"
            "print([(f.path, f.sha256) for f in result.files], result.plan.digest)\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", script, f"{root}/", method, str(out), *params],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.append(run.stdout)
    # Card, recipe and lock included.
    assert found[0] == found[1]


def test_order_of_models_is_the_order_of_computation(root: Path, tmp_path: Path) -> None:
    models = [f"{root}/{t}" for t in TASKS]
    orders = [models, models[::-1]]
    plans = [hubmerge.plan(hubmerge.Recipe.from_flags("linear", f"{root}/base", order)) for order in orders]
    assert [[m.name for m in p.models] for p in plans] == [list(TASKS), list(TASKS[::-1])]
    assert plans[0].digest != plans[1].digest
