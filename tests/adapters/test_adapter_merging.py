"""Precision, threads, imports and damaged files: what holds for merged values besides parity."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import adapter_zoo as zoo
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.adapters import AdapterPart, check_config, delta, factors, inventory, merged
from hubmerge.errors import SourceError, UnsupportedAdapterError
from hubmerge.spec import TensorSpec

Q = "base_model.model.q_proj"
LORA: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


class Memory(dict[str, torch.Tensor]):
    """An adapter's tensors in memory."""

    def load(self, spec: TensorSpec) -> torch.Tensor:
        return self[spec.name]

    def parts(self, config: dict[str, Any]) -> list[AdapterPart]:
        specs = zoo.specs({name: tuple(value.shape) for name, value in self.items()})
        return list(inventory(config, specs, "adapter"))


def _lora(out: int = 6, inp: int = 5, rank: int = 4, seed: int = 0) -> Memory:
    generator = torch.Generator().manual_seed(seed)
    return Memory(
        {
            f"{Q}.lora_A.weight": torch.randn(rank, inp, generator=generator),
            f"{Q}.lora_B.weight": torch.randn(out, rank, generator=generator),
        }
    )


@settings(deadline=None, max_examples=60)
@given(
    out=st.integers(1, 40), inp=st.integers(1, 40), rank=st.integers(1, 9), alpha=st.floats(0.1, 99),
    rslora=st.booleans(), transposed=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_factors_delta_and_merged_agree(
    out: int, inp: int, rank: int, alpha: float, rslora: bool, transposed: bool, seed: int
) -> None:
    adapter = _lora(out, inp, rank, seed)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": rslora}
    (part,) = adapter.parts(config)
    base = torch.randn((inp, out) if transposed else (out, inp), generator=torch.Generator().manual_seed(seed + 1))
    difference = delta(part, config, adapter.load, base, transposed=transposed)
    low_rank = factors(part, config, adapter.load)
    assert low_rank is not None
    assert (low_rank.up.shape, low_rank.down.shape) == ((out, rank), (rank, inp))
    assert torch.equal(low_rank.dense(), difference.T if transposed else difference)
    assert difference.is_contiguous()
    assert torch.equal(merged(part, config, adapter.load, base, transposed=transposed), base + difference)


def test_factors_of_an_embedding_have_its_stored_orientation(tmp_path: Path) -> None:
    adapter = Memory({f"{Q}.lora_embedding_A": torch.randn(4, 20), f"{Q}.lora_embedding_B": torch.randn(8, 4)})
    (part,) = adapter.parts(LORA)
    low_rank = factors(part, LORA, adapter.load)
    assert low_rank is not None
    torch.testing.assert_close(low_rank.dense(), delta(part, LORA, adapter.load, torch.zeros(20, 8)))


def test_only_plain_matrices_have_factors(tmp_path: Path) -> None:
    from peft import LoraConfig

    for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}):
        config = LoraConfig(r=4, target_modules=["q_proj"], **options)
        saved = zoo.save(lambda: zoo.llama(layers=1), config, tmp_path / next(iter(options)))
        for part in inventory(saved.config, saved.tensors, "adapter"):
            expected = "lora_bias" in options and part.parameter == "weight"
            assert (factors(part, saved.config, saved.load) is not None) == expected


def test_a_float64_base_is_computed_in_float64(tmp_path: Path) -> None:
    from peft import LoraConfig

    saved = zoo.save(lambda: zoo.llama(layers=1).double(), LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    (part,) = inventory(saved.config, saved.tensors, "adapter")
    ours = merged(part, saved.config, saved.load, saved.base[part.name])
    assert ours.dtype == torch.float64
    assert torch.equal(ours, saved.expected[part.name])
    assert delta(part, saved.config, saved.load, saved.base[part.name]).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_is_rounded_once_as_peft_does(dtype: torch.dtype, tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    saved = zoo.save(lambda: zoo.llama(layers=1).to(dtype), config, tmp_path)
    for part in inventory(saved.config, saved.tensors, "adapter"):
        base = saved.base[part.name]
        ours = merged(part, saved.config, saved.load, base)
        assert ours.dtype == torch.float32
        assert torch.equal(ours.to(dtype), saved.expected[part.name])
        assert torch.equal((base + delta(part, saved.config, saved.load, base)).to(dtype), saved.expected[part.name])


def test_adalora_with_its_final_ranks(tmp_path: Path) -> None:
    from peft import AdaLoraConfig, PeftModel, get_peft_model

    with zoo.quiet():
        model = get_peft_model(
            zoo.llama(), AdaLoraConfig(init_r=6, target_r=3, total_step=10, target_modules=["q_proj", "v_proj"])
        )
        zoo.randomise(model)
        names = [f"model.layers.{i}.self_attn.{m}.lora_E.default" for i in range(2) for m in ("q_proj", "v_proj")]
        model.peft_config["default"].rank_pattern = {
            name: [i > 0 and j % (i + 1) == 0 for j in range(6)] for i, name in enumerate(names)
        }  # the first module has lost all its ranks
        model.save_pretrained(tmp_path)
        base = zoo.llama()
        before = {name: value.clone() for name, value in base.state_dict().items()}
        expected = PeftModel.from_pretrained(base, tmp_path).merge_and_unload().state_dict()
    config, tensors = zoo.read_config(tmp_path), zoo.headers(tmp_path)
    check_config(config, "adapter")
    parts = inventory(config, tensors, "adapter")
    assert len(parts) == 4
    for part in parts:
        ours = merged(part, config, zoo.loader(tmp_path), before[part.name])
        assert torch.equal(ours, expected[part.name])
        assert torch.equal(ours, before[part.name]) == (part.name == parts[0].name)


def test_per_expert_adapters_merge_in_the_checkpoints_own_layout(tmp_path: Path) -> None:
    """Adapters of single experts fit the experts as they are stored; PEFT fuses both while it loads them."""
    import json

    from peft import PeftModel
    from safetensors.torch import load_file, save_file
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    tiny = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=20, num_local_experts=3,
    )  # fmt: skip
    tensors = {}
    for expert in range(3):
        for name, (out, inp) in {"w1": (24, 16), "w2": (16, 24), "w3": (24, 16)}.items():
            module = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, inp)
            tensors[f"{module}.lora_B.weight"] = torch.randn(out, 4)
    adapter, checkpoint, result = tmp_path / "adapter", tmp_path / "base", tmp_path / "result"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(LORA | {"target_modules": ["w1", "w2", "w3"]}))
    with zoo.quiet():
        model = MixtralForCausalLM(tiny)
        model.save_pretrained(checkpoint)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(result)
    base, expected = load_file(checkpoint / "model.safetensors"), load_file(result / "model.safetensors")
    parts = inventory(LORA, zoo.headers(adapter), "adapter")
    assert len(parts) == 9
    for part in parts:
        ours = merged(part, LORA, zoo.loader(adapter), base[part.name])
        torch.testing.assert_close(ours, expected[part.name])
        assert not torch.equal(ours, base[part.name])


def test_a_resized_vocabulary_is_stored_whole(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    with zoo.quiet():
        model = zoo.llama(layers=1)
        model.resize_token_embeddings(44)
        get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(
            tmp_path, save_embedding_layers=True
        )
    config = zoo.read_config(tmp_path)
    parts = {part.name: part for part in inventory(config, zoo.headers(tmp_path), "adapter")}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert parts[name].kind == "replace"
        assert merged(parts[name], config, zoo.loader(tmp_path), None).shape == (44, 32)
        with pytest.raises(SourceError, match="44, 32"):
            delta(parts[name], config, zoo.loader(tmp_path), torch.zeros(40, 32))


def test_threads_get_the_same_bits_and_leave_the_generator_alone(tmp_path: Path) -> None:
    from peft import LoraConfig

    options = {"r": 4, "use_dora": True, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]}
    saved = zoo.save(zoo.llama, LoraConfig(**options), tmp_path)
    parts = inventory(saved.config, saved.tensors, "adapter") * 4

    def work(part: AdapterPart) -> bool:
        with torch.inference_mode():
            ours = merged(part, saved.config, saved.load, saved.base[part.name])
        return torch.equal(ours, saved.expected[part.name])

    state = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, parts))
    assert torch.equal(torch.get_rng_state(), state)


def test_plain_lora_imports_neither_peft_nor_transformers() -> None:
    code = """
import sys
from hubmerge import adapters
from hubmerge.spec import DTYPES, TensorSpec
assert not {"torch", "peft", "transformers"} & sys.modules.keys()
config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "init_lora_weights": True}
specs = {n: TensorSpec(n, DTYPES["F32"], s, "f", 0, 0) for n, s in
         {"base_model.model.q.lora_A.weight": (2, 3), "base_model.model.q.lora_B.weight": (4, 2)}.items()}
adapters.check_config(config, "a")
(part,) = adapters.inventory(config, specs, "a")
assert not {"torch", "peft", "transformers"} & sys.modules.keys()
import torch
load = lambda spec: torch.ones(spec.shape)
assert adapters.merged(part, config, load, torch.zeros(4, 3)).eq(4).all()
assert adapters.factors(part, config, load) is not None
assert not {"peft", "transformers"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_errors(options: dict[str, Any], bad: float) -> None:
    adapter = _lora()
    if "use_dora" in options:
        adapter[f"{Q}.lora_magnitude_vector"] = torch.ones(6)
    adapter[f"{Q}.lora_B.weight"][2, 1] = bad
    (part,) = adapter.parts(LORA | options)
    with pytest.raises(SourceError, match="NaN or infinity"):
        merged(part, LORA | options, adapter.load, torch.ones(6, 5))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_a_base_of_another_shape_is_an_error(options: dict[str, Any]) -> None:
    adapter = _lora()
    if "use_dora" in options:
        adapter[f"{Q}.lora_magnitude_vector"] = torch.ones(6)
    (part,) = adapter.parts(LORA | options)
    with pytest.raises(SourceError, match="shape") as caught:
        merged(part, LORA | options, adapter.load, torch.randn(8, 5))
    assert caught.value.hint


def test_a_generic_adapter_that_lacks_a_tensor_is_an_error() -> None:
    config = {"peft_type": "LOKR", "r": 2, "alpha": 2, "target_modules": ["q_proj"], "decompose_factor": 2}
    adapter = Memory({f"{Q}.lokr_w1": torch.ones(2, 2), f"{Q}.lokr_w2_a": torch.ones(4, 2)})
    (part,) = adapter.parts(config)
    with pytest.raises(SourceError, match="not the ones PEFT needs"):
        merged(part, config, adapter.load, torch.ones(8, 8))


def test_a_kind_that_peft_does_not_have_for_the_module_is_refused() -> None:
    config = {"peft_type": "HRA", "r": 2, "target_modules": ["q_proj"]}
    adapter = Memory({f"{Q}.hra_u": torch.ones(8, 2)})
    (part,) = adapter.parts(config)
    with pytest.raises(UnsupportedAdapterError, match="q_proj"):
        merged(part, config, adapter.load, torch.ones(8, 8), transposed=True)


@pytest.mark.parametrize("rows", [[0, 9], [0], [0, -1]])
def test_token_rows_must_fit(rows: list[int]) -> None:
    config = LORA | {"trainable_token_indices": {"q_proj": rows}}
    adapter = Memory({f"{Q}.token_adapter.trainable_tokens_delta": torch.ones(2, 5)})
    (part,) = adapter.parts(config)
    with pytest.raises(SourceError, match="token rows"):
        merged(part, config, adapter.load, torch.zeros(9, 5))
    with pytest.raises(UnsupportedAdapterError, match="which tokens"):
        merged(part, LORA, adapter.load, torch.zeros(9, 5))
