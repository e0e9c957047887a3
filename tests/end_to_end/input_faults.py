"""Inputs that are damaged, of another kind, or do not belong together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.end_to_end.scene import Arguments, Case, Scene
from tests.end_to_end.support import CONFIG, UP, save, tensors


def changed(change: Callable[[Scene], None], **keys: Any) -> Callable[[Scene], Arguments]:
    """A merge with something done to its inputs before."""

    def arrange(scene: Scene) -> Arguments:
        change(scene)
        return scene.merge(**keys)

    return arrange


def with_values(**keys: Any) -> Callable[..., Callable[[Scene], Arguments]]:
    """A merge in which tensors of model a are others."""

    def build(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Scene], Arguments]:
        def arrange(scene: Scene) -> Arguments:
            values = tensors(1)
            change(values)
            shutil.rmtree(scene.a)
            save(scene.a, values, config=keys.pop("config", CONFIG))
            return scene.merge(**keys)

        return arrange

    return build


def without_weights(scene: Scene, *files: str) -> None:
    (scene.a / "model.safetensors").unlink()
    for file in files:
        (scene.a / file).write_bytes(b"weights")


def config_of(model: str, **keys: Any) -> Callable[[Scene], None]:
    return lambda s: void((getattr(s, model) / "config.json").write_text(json.dumps(CONFIG | keys)))


def void(_: object) -> None:
    """For lambdas that are there for what they do."""


def sharded(scene: Scene) -> Path:
    shutil.rmtree(scene.a)
    save(scene.a, tensors(1), shards=3)
    return scene.a / "model.safetensors.index.json"


def index_names_missing_shard(scene: Scene) -> None:
    sharded(scene)
    (scene.a / "model-00002-of-00003.safetensors").unlink()


def index_leaves_the_folder(scene: Scene) -> None:
    index = sharded(scene)
    index.write_text(index.read_text().replace("model-00002-of-00003", "../b/model"))


def tensor_in_two_shards(scene: Scene) -> None:
    index = sharded(scene)
    twice = scene.a / "model-00003-of-00003.safetensors"
    shutil.copy(scene.a / "model-00001-of-00003.safetensors", twice)
    assert twice.name in index.read_text()


def rewrite(edit: Callable[[bytes], bytes]) -> Callable[[Scene], None]:
    """Change the weight file of model a."""

    def change(scene: Scene) -> None:
        path = scene.a / "model.safetensors"
        path.write_bytes(edit(path.read_bytes()))

    return change


def stored_dtype(model: str, dtype: torch.dtype) -> Callable[[Scene], None]:
    """Store one matrix of a model in another dtype."""

    def change(scene: Scene) -> None:
        values = tensors(0) | {UP: tensors(0)[UP].to(dtype)}
        save_file(values, getattr(scene, model) / "model.safetensors")

    return change


def put(index: int, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(values: dict[str, torch.Tensor]) -> None:
        values[UP].view(-1)[index] = value

    return change


def fewer_layers(values: dict[str, torch.Tensor]) -> None:
    for name in [n for n in values if ".layers.1." in n]:
        del values[name]


def more_layers(values: dict[str, torch.Tensor]) -> None:
    values["model.layers.2.mlp.up_proj.weight"] = torch.zeros(16, 8)


def other_names(values: dict[str, torch.Tensor]) -> None:
    values.clear()
    values.update({"stem.kernel": torch.zeros(3, 3), "top.kernel": torch.zeros(3)})


INPUT_CASES = [
    Case(
        "missing folder",
        1,
        lambda s: s.merge(base=str(s.tmp / "nothing")),
        ("{tmp}/nothing: no such folder",),
        "give a folder with config.json",
    ),
    Case(
        "pickle only",
        1,
        changed(lambda s: without_weights(s, "pytorch_model.bin")),
        ("{a}: no safetensors weights, only pytorch_model.bin",),
        "convert it once",
    ),
    Case(
        "GGUF only",
        1,
        changed(lambda s: without_weights(s, "model-Q4.gguf")),
        ("{a}: only GGUF files",),
        "use the checkpoint they were made from",
    ),
    Case("no weights", 1, changed(without_weights), ("{a}: no weights found",), "check the repo id and revision"),
    Case(
        "weight files without an index",
        1,
        changed(lambda s: sharded(s).unlink()),
        ("{a}: 3 safetensors files and no model.safetensors.index.json",),
        "save_pretrained",
    ),
    Case(
        "quantised config",
        1,
        changed(config_of("a", quantization_config={"quant_method": "awq"})),
        ("{a}: quantised weights (awq)",),
        "use the unquantised checkpoint",
    ),
    Case(
        "float8 in a model",
        1,
        changed(stored_dtype("a", torch.float8_e4m3fn)),
        ("{a}", UP, "F8_E4M3"),
        "use the unquantised checkpoint",
    ),
    Case(
        "float8 in the base",
        1,
        changed(stored_dtype("base", torch.float8_e4m3fn)),
        ("{base}", UP, "F8_E4M3"),
        "use the unquantised checkpoint",
    ),
    Case(
        "int8 in a model",
        1,
        changed(stored_dtype("a", torch.int8)),
        ("{a}", UP, "I8"),
        "use the unquantised checkpoint",
    ),
    Case(
        "int8 in the base",
        1,
        changed(stored_dtype("base", torch.int8)),
        ("{base}", UP, "I8"),
        "use the unquantised checkpoint",
    ),
    Case(
        "unknown tensor type",
        1,
        changed(rewrite(lambda d: d.replace(b'"F32"', b'"F4 "', 1))),
        ("{a}/model.safetensors", "dtype 'F4 '"),
        "use an unquantised checkpoint",
    ),
    Case(
        "other shape",
        1,
        with_values()(lambda v: v.update({UP: torch.zeros(17, 8)})),
        (UP, "(16, 8) in {base}", "(17, 8) in {a}"),
        "leave that model out",
    ),
    Case(
        "other vocabulary",
        1,
        with_values()(lambda v: v.update({"model.embed_tokens.weight": torch.zeros(14, 8)})),
        ("model.embed_tokens.weight", "12 vocabulary rows in {base}, 14 in {a}"),
        "set `vocab: base`",
    ),
    Case(
        "fewer layers",
        1,
        with_values()(fewer_layers),
        ("{a}: 2 tensors of the base's layers are missing", "model.layers.1."),
        "the same number of layers",
    ),
    Case(
        "more layers",
        1,
        with_values()(more_layers),
        ("{a}: tensor 'model.layers.2.mlp.up_proj.weight' (16, 8) is not in the base",),
        "the same layers",
    ),
    Case(
        "nothing in common",
        1,
        with_values()(other_names),
        ("{a}: none of its 2 tensors has a counterpart in the base",),
        "use a fine-tune of the base",
    ),
    Case(
        "NaN in a model",
        1,
        with_values()(put(5, float("nan"))),
        (UP, "{a}", "NaN", "element 5"),
        "that checkpoint is damaged",
    ),
    Case(
        "infinity in a model",
        1,
        with_values()(put(0, float("-inf"))),
        (UP, "{a}", "infinity", "element 0"),
        "that checkpoint is damaged",
    ),
    Case(
        "NaN in the base",
        1,
        changed(lambda s: void(save(s.base, {**tensors(0), UP: torch.full((16, 8), float("nan"))}))),
        (UP, "{base}", "128 in"),
        "that checkpoint is damaged",
    ),
    Case("overflow", 1, with_values(dtype="float16")(put(7, 1e6)), (UP, "overflows float16"), "dtype: float32"),
    Case(
        "overflow of a copied tensor",
        1,
        changed(
            lambda s: void(save(s.base, {**tensors(0), UP: torch.full((16, 8), 1e6)})),
            dtype="float16",
            exclude=["*up_proj*"],
        ),
        (UP, "{base}", "overflows float16", "copied"),
        "dtype: float32",
    ),
    Case(
        "index names a missing shard",
        1,
        changed(index_names_missing_shard),
        ("{a}/model.safetensors.index.json", "'model-00002-of-00003.safetensors'"),
        "the upload was incomplete",
    ),
    Case(
        "index leaves the folder",
        1,
        changed(index_leaves_the_folder),
        ("{a}/model.safetensors.index.json", "'../b/model.safetensors'"),
        "the upload was incomplete",
    ),
    Case(
        "index without a map",
        1,
        changed(lambda s: void(sharded(s).write_text('{"weight_map": [1]}'))),
        ("{a}/model.safetensors.index.json: has no weight_map",),
        "save_pretrained",
    ),
    Case(
        "tensor in two shards",
        1,
        changed(tensor_in_two_shards),
        (
            "{a}: tensor 'model.embed_tokens.weight' is in model-00001-of-00003.safetensors",
            "and in model-00003-of-00003.safetensors",
        ),
        "save",
    ),
    Case(
        "broken config",
        1,
        changed(lambda s: void((s.a / "config.json").write_text('{"vocab_size": '))),
        ("{a}/config.json: not valid JSON",),
        "repair or download it again",
    ),
    Case(
        "config is a list",
        1,
        changed(lambda s: void((s.base / "config.json").write_text("[]"))),
        ("{base}/config.json: not a JSON object",),
        "repair or download it again",
    ),
    Case(
        "header lies about a shape",
        1,
        changed(rewrite(lambda d: d.replace(b"[16,8]", b"[99,8]", 1))),
        ("{a}/model.safetensors", "F32[99, 8] spans 512 bytes"),
        "download it again",
    ),
    Case(
        "header lies about its length",
        1,
        changed(rewrite(lambda d: (2**50).to_bytes(8, "little") + d[8:])),
        ("{a}/model.safetensors", f"claims {2**50} bytes"),
        "download it again",
    ),
    Case(
        "header is not JSON",
        1,
        changed(rewrite(lambda d: d[:8] + b"?" + d[9:])),
        ("{a}/model.safetensors", "its header is not valid JSON"),
        "download it again",
    ),
    Case(
        "truncated file",
        1,
        changed(rewrite(lambda d: d[:-100])),
        ("{a}/model.safetensors", "tensors end at byte"),
        "download it again",
    ),
    Case(
        "bytes too many",
        1,
        changed(rewrite(lambda d: d + b"more")),
        ("{a}/model.safetensors", "tensors end at byte"),
        "download it again",
    ),
    Case(
        "empty weight file",
        1,
        changed(rewrite(lambda _: b"")),
        ("{a}/model.safetensors", "it has 0 bytes"),
        "download it again",
    ),
    Case(
        "no tensors",
        1,
        changed(rewrite(lambda _: b"\2\0\0\0\0\0\0\0{}")),
        ("{a}: its weight files hold no tensors",),
        "check the repo id and revision",
    ),
]
