"""Adapters that cannot be merged, or not into this base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tests.end_to_end import support
from tests.end_to_end.scene import Arguments, Case, Scene
from tests.end_to_end.support import tensors


def place(scene: Scene) -> Path:
    return scene.tmp / "in" / "adapter"


def adapter(base: str | None = None, **config: Any) -> Callable[[Scene], Arguments]:
    """Merge an adapter."""

    def arrange(scene: Scene) -> Arguments:
        support.save_adapter(place(scene), base=base, **config)
        return scene.merge(models=[str(place(scene))])

    return arrange


def adapter_of_another_base(scene: Scene) -> Arguments:
    scene.town.publish("local/base", scene.base)
    return [
        *adapter("org/another")(scene)[:1],
        scene.described(base="local/base", models=[str(place(scene))]),
        "--out",
        scene.out,
    ]


def adapter_without_safetensors(scene: Scene) -> Arguments:
    arguments = adapter()(scene)
    (place(scene) / "adapter_model.safetensors").rename(place(scene) / "adapter_model.bin")
    return arguments


def adapter_as_base(scene: Scene) -> Arguments:
    arguments = adapter()(scene)
    return [arguments[0], scene.described(base=str(place(scene))), *arguments[2:]]


def adapter_of_other_layers(scene: Scene) -> Arguments:
    values = {n: t for n, t in tensors(0).items() if ".layers.1." not in n}
    save_file(values, scene.base / "model.safetensors")
    return adapter()(scene)


def broken_adapter_config(scene: Scene) -> Arguments:
    arguments = adapter()(scene)
    (place(scene) / "adapter_config.json").write_text("{")
    return arguments


ADAPTER_CASES = [
    Case(
        "adapter of another base",
        1,
        adapter_of_another_base,
        ("/adapter: adapter of another base", "org/another", "local/base"),
        "Set base to org/another",
    ),
    Case(
        "prompt adapter",
        1,
        adapter(peft_type="PROMPT_TUNING"),
        ("/adapter: PROMPT_TUNING adapters cannot be merged",),
        "Leave this model out",
    ),
    Case(
        "adapter that leaves the arithmetic",
        1,
        adapter(layer_replication=[[0, 1]]),
        ("/adapter: LoRA with layer_replication",),
        "Leave this model out",
    ),
    Case(
        "adapter without safetensors",
        1,
        adapter_without_safetensors,
        ("/adapter: adapter_config.json is there, adapter_model.safetensors is not",),
        "safe_serialization=True",
    ),
    Case("adapter as base", 1, adapter_as_base, ("/adapter: the base is an adapter",), "give the full model"),
    Case(
        "adapter of other layers",
        1,
        adapter_of_other_layers,
        ("/adapter: the adapter changes 'model.layers.1.mlp.up_proj.weight'", "{base} does not store"),
        "use the base the adapter was made for",
    ),
    Case(
        "broken adapter config",
        1,
        broken_adapter_config,
        ("/adapter/adapter_config.json: not valid JSON",),
        "repair or download it again",
    ),
]
