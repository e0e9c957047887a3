"""Each method from the Hub to the Hub, streamed: full checkpoints, LoRA adapters, and adapters into one adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf

import hubmerge
from hubmerge.localhub import LocalHub
from hubmerge.methods import all_methods
from tests.adapters import adapter_zoo as zoo
from tests.end_to_end import support
from tests.end_to_end.support import Town
from tests.merge.models import _llama, _near, _save, stored

METHODS = [m.name for m in all_methods()]
OF_LOW_RANK = [m.name for m in all_methods() if m.rank_problem(m.parameters(), [1.0, 1.0]) is None]
PARAMETERS = {"slerp": ["--param", "t=0.5"]}
TARGET = "local/merged"
RANKS = (2, 3)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bfloat16, two fine-tunes of it, and two LoRA adapters of it."""
    root = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    base = tf.LlamaForCausalLM(_llama()).to(torch.bfloat16)
    _save(base, root / "base")
    for i, rank in enumerate(RANKS):
        torch.manual_seed(i + 1)
        full = tf.LlamaForCausalLM(_llama()).to(torch.bfloat16)
        _near(full, base.state_dict())
        _save(full, root / f"full{i}")
        with zoo.quiet():
            config = peft.LoraConfig(r=rank, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
            model = peft.get_peft_model(tf.LlamaForCausalLM.from_pretrained(root / "base"), config)
            zoo.randomise(model)
            model.save_pretrained(root / f"lora{i}")
        path = root / f"lora{i}" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "local/base"}))
    for folder in root.iterdir():
        (folder / "README.md").write_text(support.CARD)
    return root


@pytest.fixture
def town(start_hub: Callable[..., LocalHub], sources: Path) -> Town:
    found = support.open_town(start_hub)
    for folder in sources.iterdir():
        found.publish(f"local/{folder.name}", folder)
    return found


def push(method: str, *models: str, flags: tuple[str, ...] = ()) -> None:
    argv = ["push", "--method", method, "--base", "local/base", "--to", TARGET, "--fetch", "stream", *flags]
    argv += [part for m in models for part in ("--model", f"local/{m}")] + PARAMETERS.get(method, [])
    done = support.hubmerge(*argv)
    assert done.code == 0, done.text


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(12).reshape(2, 6) + 3).logits
    assert bool(torch.isfinite(found).all())
    return found


def local_merge(method: str, sources: Path, models: tuple[str, ...], out: Path) -> dict[str, torch.Tensor]:
    params = PARAMETERS.get(method, [])[1:]
    recipe = hubmerge.Recipe.from_flags(method, str(sources / "base"), [str(sources / m) for m in models], params)
    hubmerge.merge(recipe, out)
    return stored(out)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.usefixtures("town")
def test_a_full_model(method: str, kind: str, sources: Path, tmp_path: Path) -> None:
    models = (f"{kind}0", f"{kind}1")[: 1 if method == "slerp" else 2]
    push(method, *models)
    model, report = tf.LlamaForCausalLM.from_pretrained(TARGET, dtype=torch.bfloat16, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    logits(model)
    base, found = stored(sources / "base"), model.state_dict()
    expected = local_merge(method, sources, models, tmp_path / "out")
    assert any(not torch.equal(expected[n], base[n]) for n in base)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("method", OF_LOW_RANK)
@pytest.mark.usefixtures("town")
def test_a_merged_adapter(method: str, sources: Path, tmp_path: Path) -> None:
    push(method, "lora0", "lora1", flags=("--format", "adapter"))
    config = peft.PeftConfig.from_pretrained(TARGET)
    assert config.base_model_name_or_path == "local/base"
    assert config.revision
    # As its card says; AutoPeftModel finds the base by itself.
    with zoo.quiet():
        model = peft.AutoPeftModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    assert config.r == sum(RANKS)
    logits(model)
    with zoo.quiet():
        merged = model.merge_and_unload().state_dict()
    for name, value in local_merge(method, sources, ("lora0", "lora1"), tmp_path / "out").items():
        # The full result is rounded to the base's bfloat16.
        torch.testing.assert_close(merged[name], value.float(), rtol=2**-8, atol=1e-6, msg=name)
