"""``hubmerge reproduce``: from the lock alone, in a fresh environment, with a verdict that can be relied on."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file

from hubmerge.localhub import LocalHub
from hubmerge.lock import LOCK_NAME
from tests.end_to_end import support
from tests.end_to_end.support import OWNER, Town, hubmerge, save, save_adapter, tensors

TARGET = "local/merged"
SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (24, 16) for i in range(3)} | {"model.norm.weight": (16,)}


@pytest.fixture
def town(start_hub: Callable[..., LocalHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Town:
    monkeypatch.setenv("HF_TOKEN", OWNER.token)
    monkeypatch.chdir(tmp_path)
    made = support.open_town(start_hub)
    for seed, name in enumerate(("base", "a", "b")):
        made.publish(f"local/{name}", save(tmp_path / "in" / name, tensors(seed, SHAPES)))
    return made


def push(method: str, *flags: str) -> None:
    models = ("--base", "local/base", "--model", "local/a", "--model", "local/b:0.5")
    done = hubmerge("push", "--method", method, *models, "--to", TARGET, "--shard-size", "2KB", *flags)
    assert done.code == 0, done.text


@pytest.mark.parametrize(
    ("method", "flags"), [("dare_ties", ("--seed", "7", "--diagnostics")), ("tsv_merge", ()), ("ties", ())]
)
def test_the_same_bytes_from_the_commits_of_then(
    method: str, flags: tuple[str, ...], town: Town, tmp_path: Path
) -> None:
    push(method, *flags)
    for repo in ("local/base", "local/a"):  # the world has moved on since
        town.publish(repo, save(tmp_path / "later", tensors(9, SHAPES)))
    found = hubmerge("reproduce", TARGET)
    assert found.code == 0, found.text
    assert found.out.startswith(f"REPRODUCED: {TARGET} at ")
    assert "bit for bit" in found.out
    told = json.loads(hubmerge("reproduce", TARGET, "--json", "--out", "again").out)
    assert told["identical"]
    assert {f["path"] for f in told["files"]} >= {"config.json", "model-00001-of-00003.safetensors"}
    weights = [f for f in sorted(Path("again").iterdir()) if f.suffix == ".safetensors"]
    lock = json.loads(Path("again", LOCK_NAME).read_text())
    assert len(weights) == 3
    assert {s["commit"] for s in lock["sources"]} == {s["commit"] for s in published_lock(town)["sources"]}


def published_lock(town: Town) -> dict[str, list[dict[str, object]]]:
    found: dict[str, list[dict[str, object]]] = json.loads(
        Path(town.api.hf_hub_download(TARGET, LOCK_NAME)).read_text()
    )
    return found


def changed(folder: Path, size: float, *, dtype: torch.dtype | None = None) -> None:
    """Every weight moved by this fraction, and the lock rewritten to vouch for it."""
    lock = json.loads((folder / LOCK_NAME).read_text())
    for file in lock["outputs"]:
        path = folder / file["path"]
        if path.suffix == ".safetensors":
            values = {n: t * (1 + size) for n, t in load_file(path).items()}
            save_file({n: t.to(dtype or t.dtype) for n, t in values.items()}, path, metadata={"format": "pt"})
            file |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size_bytes": path.stat().st_size}
    (folder / LOCK_NAME).write_text(json.dumps(lock))


@pytest.mark.parametrize(
    ("method", "size", "code", "verdict"),
    [
        ("tsv_merge", 1e-6, 0, "within the tolerance of matrix methods"),
        ("tsv_merge", 1e-2, 3, "NOT REPRODUCED"),
        ("task_arithmetic", 1e-6, 3, "NOT REPRODUCED"),  # this one promises its bits
    ],
)
def test_other_bits(method: str, size: float, code: int, verdict: str, town: Town) -> None:
    done = hubmerge("merge", "--method", method, "--base", "local/base", "--model", "local/a", "--out", "first")
    assert done.code == 0, done.text
    changed(Path("first"), size)
    assert hubmerge("verify", "./first").code == 0
    found = hubmerge("reproduce", "./first")
    assert found.code == code, found.text
    assert verdict in found.out
    assert "not compared: README.md" in found.out


@pytest.mark.parametrize(("size", "verdict"), [(1e-6, "within tolerance"), (1e-2, "different")])
def test_other_bits_of_a_push(size: float, verdict: str, town: Town, tmp_path: Path) -> None:
    """What is on the Hub is compared tensor by tensor, where it is, and the verdict is told."""
    push("tsv_merge")
    folder = Path(snapshot_download(TARGET, local_dir=tmp_path / "copy"))
    changed(folder, size)
    for path in (LOCK_NAME, *(p.name for p in folder.glob("*.safetensors"))):
        town.commit(TARGET, path, (folder / path).read_bytes())
    assert hubmerge("verify", TARGET).code == 0
    found = hubmerge("reproduce", TARGET)
    assert found.code == (0 if verdict == "within tolerance" else 3), found.text
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(shards) == 3
    for name in shards:
        assert f"  {verdict}: {name} (a tensor differs by " in found.out
    if verdict == "within tolerance":
        assert ", 3 of them within the tolerance of matrix methods\n" in found.out


def test_in_a_fresh_environment(town: Town, tmp_path: Path) -> None:
    """Another process with other hashes, another home and nothing in its cache: the lock is all it has."""
    push("dare_ties", "--seed", "7")
    place = tmp_path / "elsewhere"
    place.mkdir()
    known = {name: os.environ[name] for name in ("PATH", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_DISABLE_XET")}
    fresh = {"HF_HOME": str(place / "home"), "HOME": str(place), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hubmerge", "reproduce", TARGET, "--json", "--out", "again"],
        cwd=place, env=known | fresh, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["identical"]
    then, now = (
        {f["path"]: f["sha256"] for f in lock["outputs"]}
        for lock in (published_lock(town), json.loads((place / "again" / LOCK_NAME).read_text()))
    )
    about_itself = {"README.md", "hubmerge.yaml", "aibom.cdx.json"}
    assert {p: d for p, d in then.items() if p not in about_itself} == {
        p: d for p, d in now.items() if p not in about_itself
    }


def test_another_dtype_is_another_result(town: Town) -> None:
    flags = ("--method", "tsv_merge", "--base", "local/base", "--model", "local/a")
    assert hubmerge("merge", *flags, "--out", "first").code == 0
    changed(Path("first"), 0.0, dtype=torch.float16)
    found = hubmerge("reproduce", "./first")
    assert found.code == 3
    assert "different: model.safetensors\n" in found.out


def test_adapters_merged_into_one(town: Town, tmp_path: Path) -> None:
    for rank in (2, 3):
        folder = save_adapter(tmp_path / f"lora{rank}", base="local/small", rank=rank)
        town.publish(f"local/lora{rank}", folder)
    town.publish("local/small", save(tmp_path / "small", tensors(0)))
    models = ("--model", "local/lora2", "--model", "local/lora3")
    done = hubmerge(
        "push", "--method", "tsv_merge", "--base", "local/small", *models, "--to", TARGET, "--format", "adapter"
    )
    assert done.code == 0, done.text
    assert "bit for bit" in hubmerge("reproduce", TARGET).out


def test_local_inputs_must_be_here_and_the_same(town: Town, tmp_path: Path) -> None:
    flags = ("--method", "linear", "--base", "./in/base", "--model", "./in/a")
    assert hubmerge("merge", *flags, "--out", "first").code == 0
    missing = hubmerge("reproduce", "./first")
    assert missing.code == 2
    assert "put the folder, or a link to it, here as ./base" in missing.err
    for name in ("base", "a"):
        Path(name).symlink_to(Path("in", name))
    assert hubmerge("reproduce", "./first").code == 0
    Path("a").unlink()
    save(Path("a"), tensors(1, SHAPES), shards=2)
    other = hubmerge("reproduce", "./first")
    assert other.code == 1
    assert "a: its tensors have other names, types, shapes or places" in other.err


def test_what_cannot_be_reproduced(town: Town, tmp_path: Path) -> None:
    push("linear")
    town.api.delete_repo("local/a")
    gone = hubmerge("reproduce", TARGET)
    assert gone.code == 4
    assert "local/a" in gone.err
    unlocked = hubmerge("reproduce", "local/base")
    assert unlocked.code == 3
    assert "has no hubmerge.lock.json" in unlocked.err
