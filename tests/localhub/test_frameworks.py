"""transformers and peft push to the local Hub and load from it again."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hubmerge.localhub import LocalHub


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def same_weights(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_survives_push_and_pull_in_shards(api: HfApi):
    model = tiny_llama()
    model.push_to_hub("local/tiny", max_shard_size="40KB")
    files = api.list_repo_files("local/tiny")
    assert "model.safetensors.index.json" in files
    assert sum(name.endswith(".safetensors") for name in files) > 1
    assert same_weights(model, AutoModelForCausalLM.from_pretrained("local/tiny"))
    assert AutoConfig.from_pretrained("local/tiny").hidden_size == 32


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_can_be_loaded_from_a_pull_request(api: HfApi):
    model = tiny_llama()
    model.push_to_hub("local/tiny", create_pr=True)
    assert "model.safetensors" not in api.list_repo_files("local/tiny")
    assert same_weights(model, AutoModelForCausalLM.from_pretrained("local/tiny", revision="refs/pr/1"))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_an_adapter_survives_push_and_pull(api: HfApi):
    tiny_llama().push_to_hub("local/tiny")
    base = AutoModelForCausalLM.from_pretrained("local/tiny")
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    tuned.push_to_hub("local/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(api.list_repo_files("local/adapter"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("local/tiny"), "local/adapter")
    ids = torch.arange(8)[None]
    assert torch.equal(tuned(ids).logits, loaded(ids).logits)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_private_models_need_the_token(api: HfApi, hub: LocalHub, monkeypatch: pytest.MonkeyPatch):
    tiny_llama().push_to_hub("local/secret", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="local/secret"):
        AutoConfig.from_pretrained("local/secret")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert AutoConfig.from_pretrained("local/secret").hidden_size == 32
