"""Merged adapters: PEFT loads them, base + adapter is the full result, and no weight of the base is read."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import hubmerge
from hubmerge import adapters
from hubmerge.errors import PlanError
from hubmerge.methods import all_methods
from hubmerge.quantities import percent
from tests.merge.models import _gpt2, _llama, _save, stored
from tests.merge.test_adapters import make_adapter, reload

METHODS = [m.name for m in all_methods() if m.rank_problem(m.parameters(), [1.0, 1.0]) is None]
OTHERS = [m.name for m in all_methods() if m.name not in METHODS]
WEIGHTS = [1.0, 0.5, 1.5]
LORAS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    {"r": 2, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    {"r": 3, "target_modules": ["q_proj", "o_proj", "down_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 5}},
]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama and three adapters of different ranks, scales and targets."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    _save(tf.LlamaForCausalLM(_llama()), folder / "base")
    for i, options in enumerate(LORAS):
        config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
        make_adapter(config, reload(folder / "base"), folder / f"lora{i}", seed=i + 1)
    return folder


def recipe(method: str, folder: Path, names: list[str], *params: str, **output: Any) -> hubmerge.Recipe:
    models = [f"{folder / name}:{w}" for name, w in zip(names, WEIGHTS, strict=False)]
    return hubmerge.Recipe.from_flags(method, str(folder / "base"), models, list(params), output=output or None)


def applied(base: Any, adapter: Path) -> dict[str, torch.Tensor]:
    """PEFT's own merge of an adapter into a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        state: dict[str, torch.Tensor] = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    return state


ALL = ["lora0", "lora1", "lora2"]


@pytest.mark.parametrize("method", METHODS)
def test_base_and_merged_adapter_are_the_full_result(method: str, scene: Path, tmp_path: Path) -> None:
    hubmerge.merge(recipe(method, scene, ALL), tmp_path / "full")
    hubmerge.merge(recipe(method, scene, ALL, format="adapter"), tmp_path / "adapter")
    full, base, found = (
        stored(tmp_path / "full"),
        stored(scene / "base"),
        applied(reload(scene / "base"), tmp_path / "adapter"),
    )
    changed = {n for n in full if not torch.equal(full[n], base[n])}
    assert len(changed) == 8  # q, v, o and down in two layers
    for name, value in full.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)


def test_neither_base_weights_nor_dense_deltas_are_touched(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = scene / "base" / "model.safetensors"
    whole = weights.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    hubmerge.merge(recipe("tsv_merge", scene, ALL, format="adapter"), tmp_path / "expected")

    def dense(*_: Any, **__: Any) -> None:
        raise AssertionError("a dense delta was formed")

    monkeypatch.setattr(adapters, "delta", dense)
    try:
        weights.write_bytes(whole[:header] + b"\xff" * (len(whole) - header))  # every weight is NaN
        hubmerge.merge(recipe("tsv_merge", scene, ALL, format="adapter"), tmp_path / "blind")
    finally:
        weights.write_bytes(whole)
    expected, found = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("expected", "blind"))
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_a_full_result_from_adapters_forms_no_dense_delta_either(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "delta", lambda *_, **__: pytest.fail("a dense delta was formed"))
    hubmerge.merge(recipe("drm", scene, ALL), tmp_path / "out")
    with pytest.raises(pytest.fail.Exception, match="a dense delta was formed"):
        hubmerge.merge(recipe("ties", scene, ALL), tmp_path / "other")


def test_the_result_is_an_ordinary_adapter(scene: Path, tmp_path: Path) -> None:
    result = hubmerge.merge(recipe("drm", scene, ALL, format="adapter"), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "aibom.cdx.json", "hubmerge.lock.json",
        "hubmerge.yaml",
    ]  # fmt: skip
    assert result.truncation is None
    config = peft.PeftConfig.from_pretrained(tmp_path / "out")
    assert config.peft_type == peft.PeftType.LORA
    assert config.task_type == "CAUSAL_LM"
    assert config.r == 11 == config.lora_alpha
    assert set(config.target_modules) == {"q_proj", "v_proj", "down_proj", "o_proj"}
    assert config.base_model_name_or_path is None  # the adapters name a folder of this machine
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    shapes = {k: tuple(v.shape) for k, v in tensors.items() if "layers.1.self_attn.q_proj" in k}
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    size = _llama().hidden_size
    assert shapes == {f"{prefix}.lora_A.weight": (11, size), f"{prefix}.lora_B.weight": (size, 11)}
    assert hubmerge.verify(str(tmp_path / "out")).ok


def test_a_merged_adapter_can_be_merged_again(scene: Path, tmp_path: Path) -> None:
    hubmerge.merge(recipe("task_arithmetic", scene, ALL[:2], "scale=1.0", format="adapter"), tmp_path / "first")
    second = hubmerge.Recipe.from_flags(
        "task_arithmetic",
        str(scene / "base"),
        [str(tmp_path / "first"), f"{scene / 'lora2'}:1.5"],
        ["scale=1.0"],
        output={"format": "adapter"},
    )
    hubmerge.merge(second, tmp_path / "second")
    hubmerge.merge(recipe("task_arithmetic", scene, ALL, "scale=1.0"), tmp_path / "full")
    found = applied(reload(scene / "base"), tmp_path / "second")
    for name, value in stored(tmp_path / "full").items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_a_smaller_rank_is_the_best_of_that_rank_and_its_price_is_told(scene: Path, tmp_path: Path) -> None:
    exact = hubmerge.merge(recipe("task_arithmetic", scene, ALL, format="adapter"), tmp_path / "exact")
    cut = hubmerge.merge(recipe("task_arithmetic", scene, ALL, format="adapter", rank=3), tmp_path / "cut")
    base = stored(scene / "base")
    assert exact.truncation is None
    assert cut.truncation is not None
    whole, found = (applied(reload(scene / "base"), tmp_path / n) for n in ("exact", "cut"))
    squares, errors = {}, {}
    for name in base:
        if name.endswith("proj.weight"):
            delta = (whole[name] - base[name]).double()
            squares[name] = float(delta.square().sum())
            errors[name] = float(torch.linalg.svdvals(delta)[3:].square().sum())
            measured = float((found[name] - whole[name]).double().square().sum())
            assert measured == pytest.approx(errors[name], rel=1e-3, abs=1e-10)
    assert cut.truncation.error == pytest.approx((sum(errors.values()) / sum(squares.values())) ** 0.5, rel=1e-3)
    assert errors[cut.truncation.worst] / squares[cut.truncation.worst] == max(
        errors[n] / squares[n] for n in squares if squares[n]
    )
    card = (tmp_path / "cut" / "README.md").read_text()
    assert f"leaves out {percent(cut.truncation.error)} of the merged deltas' norm" in card
    assert "nothing of the merge is left out" in (tmp_path / "exact" / "README.md").read_text()
    assert str(cut.truncation) in cut.summary()


def test_half_precision_factors_stay_so_unless_asked_otherwise(scene: Path, tmp_path: Path) -> None:
    for i, dtype in enumerate((torch.bfloat16, torch.bfloat16)):
        model = make_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), reload(scene / "base"), tmp_path / str(i))
        model.to(dtype).save_pretrained(tmp_path / str(i))
    models = [str(tmp_path / "0"), str(tmp_path / "1")]
    for asked, expected in ((None, torch.bfloat16), ("float32", torch.float32)):
        made = hubmerge.Recipe.from_flags(
            "tsv_merge", str(scene / "base"), models, [], output={"format": "adapter"}, dtype=asked
        )
        hubmerge.merge(made, tmp_path / f"out-{asked}")
        tensors = load_file(tmp_path / f"out-{asked}" / "adapter_model.safetensors")
        assert {v.dtype for v in tensors.values()} == {expected}


def test_conv1d_embeddings_and_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _save(tf.GPT2LMHeadModel(_gpt2()), tmp_path / "base")
    for i in range(2):
        task = tf.GPT2ForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        config = peft.LoraConfig(
            r=2 + i,
            target_modules=["c_attn", "wte"],
            fan_in_fan_out=True,
            modules_to_save=["score"],
            task_type="SEQ_CLS",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make_adapter(config, task, tmp_path / f"lora{i}", seed=i)
    names = ["lora0", "lora1"]
    hubmerge.merge(recipe("tsv_merge", tmp_path, names), tmp_path / "full")
    hubmerge.merge(recipe("tsv_merge", tmp_path, names, format="adapter"), tmp_path / "out")
    base = tf.GPT2ForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    found = applied(base, tmp_path / "out")
    for name, value in stored(tmp_path / "full").items():
        torch.testing.assert_close(found[f"transformer.{name.removeprefix('transformer.')}"], value, rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    head = load_file(tmp_path / "out" / "heads" / "lora1.safetensors")
    assert head["score.weight"].shape == (3, _gpt2().n_embd)


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in OTHERS if m != "slerp"])
def test_methods_of_full_rank_are_refused(method: str, scene: Path, tmp_path: Path) -> None:
    weights = [f"{scene / name}" for name in ALL[:2]]
    made = hubmerge.Recipe.from_flags(method, str(scene / "base"), weights, [], output={"format": "adapter"})
    with pytest.raises(PlanError, match=f"{method} decides entry by entry") as caught:
        hubmerge.merge(made, tmp_path / "out")
    assert "tsv_merge" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]), "depends on the base"),
        (lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "replaces the whole"),
        (lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "depends on the base"),
    ],
)
def test_what_factors_cannot_express_is_named(config: Any, says: str, scene: Path, tmp_path: Path) -> None:
    make_adapter(config(), reload(scene / "base"), tmp_path / "odd")
    made = hubmerge.Recipe.from_flags(
        "tsv_merge",
        str(scene / "base"),
        [str(scene / "lora0"), str(tmp_path / "odd")],
        [],
        output={"format": "adapter"},
    )
    with pytest.raises(PlanError, match=says):
        hubmerge.merge(made, tmp_path / "out")


def test_full_checkpoints_are_refused(scene: Path, tmp_path: Path) -> None:
    _save(reload(scene / "base"), tmp_path / "full")
    made = hubmerge.Recipe.from_flags(
        "tsv_merge",
        str(scene / "base"),
        [str(scene / "lora0"), str(tmp_path / "full")],
        [],
        output={"format": "adapter"},
    )
    with pytest.raises(PlanError, match="this is a full checkpoint"):
        hubmerge.merge(made, tmp_path / "out")


def test_an_average_that_scales_the_base_is_refused(scene: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="scale the base"):
        hubmerge.merge(recipe("linear", scene, ALL, "normalize=false", format="adapter"), tmp_path / "out")
