"""What an adapter changes is known from its headers; a tensor that is not understood is an error."""

from __future__ import annotations

from typing import Any

import adapter_zoo as zoo
import pytest

from hubmerge.adapters import AdapterPart, inventory
from hubmerge.adapters.parts import roles
from hubmerge.errors import SourceError, UnsupportedAdapterError

Q = "base_model.model.model.layers.0.self_attn.q_proj"
LORA: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
PAIR = {f"{Q}.lora_A.weight": (4, 32), f"{Q}.lora_B.weight": (16, 4)}


def _parts(shapes: dict[str, tuple[int, ...]], **options: Any) -> dict[str, AdapterPart]:
    return {part.name: part for part in inventory(LORA | options, zoo.specs(shapes), "adapter")}


def test_a_plain_adapter_is_low_rank_and_keeps_the_files_order() -> None:
    shapes = {**{key.replace("layers.0", "layers.1"): shape for key, shape in PAIR.items()}, **PAIR}
    parts = inventory(LORA, zoo.specs(shapes), "adapter")
    assert [part.module for part in parts] == [f"model.layers.{i}.self_attn.q_proj" for i in (1, 0)]
    assert {(part.parameter, part.kind, part.rank) for part in parts} == {("weight", "low_rank", 4)}
    assert [spec.name for spec in parts[1].tensors] == list(PAIR)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "OLoRA"}]
)
def test_variants_that_need_the_base_are_generic(options: dict[str, Any]) -> None:
    magnitude = {f"{Q}.lora_magnitude_vector": (16,)} if "use_dora" in options else {}
    assert {part.kind for part in _parts(PAIR | magnitude, **options).values()} == {"generic"}


def test_whole_modules_biases_and_buffers_are_replaced() -> None:
    parts = _parts(
        {
            **PAIR,
            f"{Q}.base_layer.bias": (16,),
            "base_model.model.classifier.dense.weight": (3, 32),
            "base_model.model.norm.running_mean": (3,),
            "base_model.model.norm.num_batches_tracked": (),
            "base_model.model.lm_head.weight": (40, 32),
            "base_model.model.model.layers.0.mlp.bias": (32,),
        },
        modules_to_save=["classifier", "norm"],
    )
    replaced = {name for name, part in parts.items() if part.kind == "replace"}
    assert replaced == parts.keys() - {"model.layers.0.self_attn.q_proj.weight"}
    assert "norm.num_batches_tracked" in replaced


def test_an_adapted_embedding_starts_from_its_own_copy() -> None:
    module = "base_model.model.model.embed_tokens"
    shapes = {f"{module}.lora_embedding_A": (4, 40), f"{module}.lora_embedding_B": (32, 4)}
    assert _parts(shapes)["model.embed_tokens.weight"].kind == "low_rank"
    part = _parts(shapes | {f"{module}.base_layer.weight": (40, 32)})["model.embed_tokens.weight"]
    assert part.kind == "generic"
    assert sorted(roles(part)) == ["base_layer.weight", "lora_embedding_A", "lora_embedding_B"]


@pytest.mark.parametrize(
    "name",
    [
        f"{Q}.lora_C.weight",
        f"{Q}.lora_A.default.weight",
        f"{Q}.hada_w1_a",
        f"{Q}.modules_to_save.weight",
        "base_model.model.attn.base_layer.out_proj.lora_A.weight",
        "base_model.model.experts.base_layer.lora_A.weight",
        "base_model.model.model.layers.0.mystery",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "prompt_embeddings",
    ],
)
def test_unknown_tensors_are_errors_by_name(name: str) -> None:
    with pytest.raises(UnsupportedAdapterError) as caught:
        _parts(PAIR | {name: (4, 4)})
    assert name in caught.value.message


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({f"{Q}.lora_A.weight": (4, 32)}, {}, "lora_B.weight"),
        (PAIR, {"use_dora": True}, "lora_magnitude_vector"),
        (PAIR | {f"{Q}.lora_magnitude_vector": (16,)}, {}, "lora_magnitude_vector"),
        (PAIR, {"r": 8}, "config is 8"),
        (PAIR, {"rank_pattern": {"q_proj": 2}}, "config is 2"),
        ({f"{Q}.lora_A.weight": (4,), f"{Q}.lora_B.weight": (16,)}, {}, "config is 4"),
        (PAIR | {f"{Q}.weight": (16, 32)}, {}, "full weight"),
        ({}, {}, "no tensors"),
        ({f"{Q}.vera_lambda_b": (16,), f"{Q}.vera_lambda_d": (4,)}, {"peft_type": "VERA"}, "vera_A, vera_B"),
        ({f"{Q}.boft_R": (1, 4, 4, 4)}, {"peft_type": "BOFT"}, "boft_s"),
    ],
)
def test_adapters_that_are_not_whole_are_errors(
    shapes: dict[str, tuple[int, ...]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        _parts(shapes, **options)


def test_tokens_and_factors_on_one_module_are_refused() -> None:
    module = "base_model.model.model.embed_tokens"
    shapes = {
        f"{module}.token_adapter.trainable_tokens_delta": (2, 32),
        f"{module}.lora_embedding_A": (4, 40),
        f"{module}.lora_embedding_B": (32, 4),
    }
    with pytest.raises(UnsupportedAdapterError, match="trainable tokens"):
        _parts(shapes)


def test_ia3_scales_a_bias_if_there_is_one() -> None:
    options = {"peft_type": "IA3", "feedforward_modules": ["down_proj"]}
    shapes = {f"{Q}.ia3_l": (16, 1), "base_model.model.model.layers.0.mlp.down_proj.ia3_l": (1, 48)}
    parts = _parts(shapes, **options)
    assert {name.rpartition("self_attn.")[2]: part.optional for name, part in parts.items()} == {
        "q_proj.weight": False,
        "q_proj.bias": True,
        "model.layers.0.mlp.down_proj.weight": False,
    }


@pytest.mark.parametrize(
    ("shape", "transposed", "fits"),
    [((16, 32), False, True), ((32, 16), False, False), ((32, 16), True, True), ((16, 32), True, False)],
)
def test_shapes_are_checked_from_headers(shape: tuple[int, ...], transposed: bool, fits: bool) -> None:
    (part,) = _parts(PAIR).values()
    assert part.fits(shape, transposed=transposed) == fits


def test_convolutions_with_groups_are_refused() -> None:
    with pytest.raises(UnsupportedAdapterError, match="groups"):
        _parts({f"{Q}.lora_A.weight": (4, 8, 3, 3), f"{Q}.lora_B.weight": (12, 2, 1, 1)})
