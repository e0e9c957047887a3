"""Kinds and options that cannot be merged are refused by name, and another base's adapter is recognised."""

from __future__ import annotations

import json
from typing import Any

import adapter_zoo as zoo
import pytest

from hubmerge.adapters import check_base, check_config
from hubmerge.adapters import config as config_module
from hubmerge.adapters.config import lora_scale
from hubmerge.errors import SourceError, UnsupportedAdapterError


def _as_saved(name: str, **options: Any) -> dict[str, Any]:
    """A config as PEFT writes it to ``adapter_config.json``."""
    import peft

    with zoo.quiet():
        values = getattr(peft, name)(**options).to_dict()
    return dict(json.loads(json.dumps(values, default=list)))


LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PromptTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}),
        ("PrefixTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}),
        ("PromptEncoderConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}),
        ("MultitaskPromptTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "num_tasks": 2}),
        ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2, "task_type": "CAUSAL_LM"}),
        ("XLoraConfig", {"hidden_size": 8, "adapters": {"a": "a"}, "task_type": "CAUSAL_LM"}),
        ("PolyConfig", {"target_modules": ["q_proj"]}),
        ("ShiraConfig", {"target_modules": ["q_proj"]}),
    ],
)
def test_kinds_that_are_no_weights_are_refused(name: str, options: dict[str, Any]) -> None:
    config = _as_saved(name, **options)
    with pytest.raises(UnsupportedAdapterError) as caught:
        check_config(config, "owner/adapter")
    assert caught.value.message.startswith(f"owner/adapter: {config['peft_type']} adapters cannot be merged: ")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 2}),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {} | {"beta": 1.0}),
        ("velora_config", {"rank": 1}),
        ("monteclora_config", {"n": 1}),
        ("megatron_config", {"a": 1}),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "tomorrow"),
        ("use_tomorrow", True),
    ],
)
def test_options_of_lora_that_change_more_than_weights_are_refused(option: str, value: Any) -> None:
    with pytest.raises(UnsupportedAdapterError, match=option) as caught:
        check_config(LORA | {option: value}, "owner/adapter")
    assert caught.value.message.startswith("owner/adapter: ")
    assert caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"use_tomorrow": None, "use_yesterday": False},
        {"layers_to_transform": [0], "target_modules": "all-linear", "lora_dropout": 0.1},
    ],
)
def test_options_that_leave_the_arithmetic_alone_pass(options: dict[str, Any]) -> None:
    check_config(LORA | options, "owner/adapter")


def test_every_option_of_the_installed_lora_is_known() -> None:
    from peft import LoraConfig

    with zoo.quiet():
        defaults = LoraConfig().to_dict()
    known = set(config_module._LORA_FIELDS) | {"runtime_config"}
    assert defaults.keys() <= known


@pytest.mark.parametrize(
    "options",
    [
        {"r": 0},
        {"r": "8"},
        {"r": True},
        {"lora_alpha": None},
        {"rank_pattern": {"q_proj": 2.5}},
        {"alpha_pattern": {"(": 2}},
        {"rank_pattern": ["q_proj"]},
        {"modules_to_save": "classifier"},
    ],
)
def test_values_that_make_no_sense_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match="owner/adapter"):
        check_config(LORA | options, "owner/adapter")


def test_other_kinds_are_checked_by_peft() -> None:
    config = _as_saved("LoHaConfig", target_modules=["q_proj"])
    check_config(config, "adapter")
    with pytest.raises(UnsupportedAdapterError, match="use_tomorrow"):
        check_config(config | {"use_tomorrow": True}, "adapter")
    with pytest.raises(UnsupportedAdapterError, match="save_projection"):
        check_config(_as_saved("VeraConfig", save_projection=False, target_modules=["q_proj"]), "adapter")
    with pytest.raises(UnsupportedAdapterError, match="feedforward_modules"):
        check_config(_as_saved("IA3Config", target_modules=["q_proj"]) | {"feedforward_modules": None}, "adapter")
    with pytest.raises(UnsupportedAdapterError, match="peft_type"):
        check_config({}, "adapter")


@pytest.mark.parametrize(
    ("config", "module", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, "a.q", 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, "a.q", 4.0),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"q": 2}}, "a.q", 4.0),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"q": 2}}, "a.qq", 2.0),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"a\\.q": 2, "q": 1}, "alpha_pattern": {"^a.*": 6}}, "a.q", 3.0),
        ({}, "a.q", 1.0),
    ],
)
def test_scale(config: dict[str, Any], module: str, scale: float) -> None:
    assert lora_scale(config, module) == scale


@pytest.mark.parametrize(
    ("trained_on", "base"),
    [("meta-llama/Llama-3.2-1B", "meta-llama/llama-3.2-1b"), ("gpt2", "openai-community/gpt2")],
)
def test_the_same_base_is_recognised(trained_on: str, base: str) -> None:
    assert check_base({"base_model_name_or_path": trained_on}, base, "main", "adapter") is None


@pytest.mark.parametrize(
    ("config", "base", "note"),
    [
        ({}, "a/b", "does not say"),
        ({"base_model_name_or_path": "/home/me/model"}, "a/b", "/home/me/model"),
        ({"base_model_name_or_path": "./out"}, "a/b", "./out"),
        ({"base_model_name_or_path": "a/b"}, "/models/b", "folder"),
        ({"base_model_name_or_path": "unsloth/b-bnb-4bit"}, "a/b", "copy"),
        ({"base_model_name_or_path": "unsloth/b-unsloth-bnb-4bit"}, "a/b", "copy"),
        ({"base_model_name_or_path": "TheBloke/B-GPTQ"}, "a/b", "copy"),
        ({"base_model_name_or_path": "mirror/b"}, "a/b", "copy"),
        ({"base_model_name_or_path": "a/b", "revision": "v1"}, "a/b", "revision v1"),
    ],
)
def test_a_base_that_cannot_be_compared_is_noted(config: dict[str, Any], base: str, note: str) -> None:
    found = check_base(config, base, "v2", "adapter")
    assert found is not None
    assert found.startswith("adapter: ")
    assert note in found


@pytest.mark.parametrize("trained_on", ["mistralai/Mistral-7B-v0.1", "a/b-instruct", "a/bb"])
def test_an_adapter_of_another_base_is_an_error(trained_on: str) -> None:
    with pytest.raises(SourceError, match="adapter of another base") as caught:
        check_base({"base_model_name_or_path": trained_on}, "a/b", None, "adapter")
    assert trained_on in caught.value.message
    assert trained_on in str(caught.value.hint)
