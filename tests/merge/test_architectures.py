"""Every architecture: a base and two fine-tunes of other dtypes, shard layouts and head sizes, merged and loaded
back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf

import hubmerge
from tests.merge import naive
from tests.merge.models import FAMILIES, LABELS, build, stored, unknown_architecture


def merged(base: Path, tunes: list[Path], out: Path) -> Path:
    recipe = hubmerge.Recipe.from_flags("task_arithmetic", str(base), [str(t) for t in tunes], ["scale=0.5"])
    hubmerge.merge(recipe, out)
    return out


def assert_equal_to_naive(base: Path, tunes: list[Path], out: Path) -> None:
    expected = naive.task_arithmetic(stored(base), [stored(t) for t in tunes], 0.5)
    found = stored(out)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=3e-7, atol=1e-8, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_equals_naive_loop_and_loads_in_transformers(family: str, tmp_path: Path) -> None:
    base, tunes = build(family, tmp_path)
    out = merged(base, tunes, tmp_path / "out")
    assert_equal_to_naive(base, tunes, out)
    model, report = type(FAMILIES[family].base()).from_pretrained(
        out, output_loading_info=True, **FAMILIES[family].load
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    with torch.no_grad():
        output = model(**FAMILIES[family].inputs)
    assert all(torch.isfinite(t).all() for t in output.to_tuple() if isinstance(t, torch.Tensor))


@pytest.mark.parametrize(
    "family", ["vit", "bert", "bert-mlm", "roberta", "deberta-v2", "gpt2", "gpt2-lm", "llama-classification"]
)
def test_heads_of_single_tasks_are_kept_and_fit_their_task(family: str, tmp_path: Path) -> None:
    base, tunes = build(family, tmp_path)
    out = merged(base, tunes, tmp_path / "out")
    for i, labels in enumerate(LABELS):
        head = stored_head(out, i)
        config = json.loads((out / "heads" / f"task{i}.config.json").read_text())
        task = FAMILIES[family].tune(labels)
        unexpected = task.load_state_dict(head, strict=False).unexpected_keys
        assert not unexpected
        assert len(config["id2label"]) == labels
        own = stored(tunes[i])
        for name, value in head.items():
            assert torch.equal(value, own[name])
            assert value.dtype == own[name].dtype


def stored_head(out: Path, task: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "heads" / f"task{task}.safetensors")


def test_task_model_is_assembled_from_merged_encoder_and_its_head(tmp_path: Path) -> None:
    base, tunes = build("vit", tmp_path)
    out = merged(base, tunes, tmp_path / "out")
    config = tf.AutoConfig.from_pretrained(tunes[1])
    model = tf.ViTForImageClassification.from_pretrained(out, config=config)
    model.load_state_dict(stored_head(out, 1), strict=False)
    with torch.no_grad():
        logits = model(**FAMILIES["vit"].inputs).logits
    assert logits.shape == (2, LABELS[1])
    assert torch.isfinite(logits).all()


def test_unknown_architecture(tmp_path: Path) -> None:
    base, tunes = unknown_architecture(tmp_path)
    out = merged(base, tunes, tmp_path / "out")
    assert_equal_to_naive(base, tunes, out)


def test_untied_fine_tune_of_a_tied_base_gets_its_own_output_embedding(tmp_path: Path) -> None:
    from tests.merge.models import _llama, _near, _save

    torch.manual_seed(0)
    base = tf.LlamaForCausalLM(_llama(tie_word_embeddings=True))
    _save(base, tmp_path / "base")
    tied = tf.LlamaForCausalLM(_llama(tie_word_embeddings=True))
    _near(tied, base.state_dict())
    _save(tied, tmp_path / "tied")
    untied = tf.LlamaForCausalLM(_llama())
    _near(untied, base.state_dict())
    _save(untied, tmp_path / "untied")
    out = merged(tmp_path / "base", [tmp_path / "tied", tmp_path / "untied"], tmp_path / "out")
    found = stored(out)
    embed = stored(tmp_path / "base")["model.embed_tokens.weight"].double()
    expected = embed + 0.5 * (
        stored(tmp_path / "tied")["model.embed_tokens.weight"].double()
        - embed
        + stored(tmp_path / "untied")["lm_head.weight"].double()
        - embed
    )
    torch.testing.assert_close(found["lm_head.weight"], expected.float(), rtol=3e-7, atol=1e-8)
    model = tf.LlamaForCausalLM.from_pretrained(out)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, found["lm_head.weight"])


@pytest.mark.parametrize("vocab", ["base", "union"])
def test_vocabulary_policy(vocab: str, tmp_path: Path) -> None:
    from tests.merge.models import _near, _qwen3, _save

    torch.manual_seed(0)
    base = tf.Qwen3ForCausalLM(_qwen3())
    _save(base, tmp_path / "base")
    for i, rows in enumerate((100, 90)):
        model = tf.Qwen3ForCausalLM(_qwen3())
        _near(model, base.state_dict())
        model.resize_token_embeddings(rows, mean_resizing=False)
        _save(model, tmp_path / f"task{i}")
    recipe = hubmerge.Recipe.from_flags(
        "task_arithmetic",
        str(tmp_path / "base"),
        [str(tmp_path / "task0"), str(tmp_path / "task1")],
        ["scale=0.5"],
        vocab=vocab,
    )
    hubmerge.merge(recipe, tmp_path / "out")
    found = stored(tmp_path / "out")["model.embed_tokens.weight"]
    own = [stored(tmp_path / n)["model.embed_tokens.weight"].double() for n in ("base", "task0", "task1")]
    expected = own[0].clone()
    expected += 0.5 * (own[1][:96] - own[0])
    expected[:90] += 0.5 * (own[2] - own[0][:90])
    if vocab == "union":
        expected = torch.cat([expected, own[1][96:]])
    torch.testing.assert_close(found, expected.float(), rtol=3e-7, atol=1e-8)
    model = tf.Qwen3ForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(expected)
