"""Merge, evaluate, push again with ``--eval``: the weights stay as they are, and the card shows what was found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard, snapshot_download
from ruamel.yaml import YAML

from hubmerge.localhub import LocalHub
from tests.end_to_end import support
from tests.end_to_end.support import Town, folder_state

TARGET = "local/merged"
BENCHMARK = "local/sums"
EVAL_YAML = "name: Sums\ntasks:\n  - {id: sums_all, config: default, split: test}\n"


@pytest.fixture
def town(start_hub: Callable[..., LocalHub], tmp_path: Path) -> Town:
    """Three models, and a dataset that the Hub lists as a benchmark."""
    town = support.open_town(start_hub)
    for seed, name in enumerate(("base", "a", "b")):
        town.publish(f"local/{name}", support.save(tmp_path / name, support.tensors(seed)))
    town.api.create_repo(BENCHMARK, repo_type="dataset")
    files = {"README.md": "---\ntags: ['benchmark:official']\n---\n", "eval.yaml": EVAL_YAML}
    for path, text in files.items():
        town.api.upload_file(path_or_fileobj=text.encode(), path_in_repo=path, repo_id=BENCHMARK, repo_type="dataset")
    return town


def results(folder: Path, model: str, value: float) -> Path:
    """A file as lm-evaluation-harness writes it."""
    data = {
        "results": {"sums": {"alias": "sums", "exact_match,none": value, "exact_match_stderr,none": 0.01}},
        "configs": {"sums": {"task": "sums", "dataset_path": BENCHMARK, "test_split": "test", "num_fewshot": 5}},
        "versions": {"sums": 1.0},
        "n-shot": {"sums": 5},
        "higher_is_better": {"sums": {"exact_match": True}},
        "n-samples": {"sums": {"original": 2000, "effective": 2000}},
        "config": {"model": "hf", "model_args": f"pretrained={model}", "limit": None},
        "date": 1789000000.0,
        "lm_eval_version": "0.4.9.1",
        "model_name": model,
    }
    path = folder / f"results-{model.replace('/', '-')}.json"
    path.write_text(json.dumps(data))
    return path


def test_push_evaluate_push_again(town: Town, tmp_path: Path) -> None:
    merge = ("--method", "task_arithmetic", "--base", "local/base", "--model", "local/a", "--model", "local/b")
    push = ("push", *merge, "--to", TARGET)
    assert support.hubmerge(*push).code == 0
    before = folder_state(Path(snapshot_download(TARGET)))
    assert before is not None
    town.hub.requests.clear()
    evaluations = [
        part
        for model, value in (("local/a", 0.5), (TARGET, 0.4375))
        for part in ("--eval", str(results(tmp_path, model, value)))
    ]
    done = support.hubmerge(*push, *evaluations)
    assert done.code == 0, done.text
    assert not town.hub.requests.find("PUT", "^/_")  # no weights were sent again
    folder = Path(snapshot_download(TARGET))
    after = folder_state(folder)
    assert after is not None
    new = {"README.md", "hubmerge.lock.json", ".eval_results/local--sums.yaml"}
    assert {p for p in after if after[p] != before.get(p)} == new

    card = ModelCard.load(TARGET)
    card.validate()
    assert card.data.eval_results == [
        EvalResult(
            task_type="text-generation", task_name="sums (5-shot)", dataset_type=BENCHMARK, dataset_name="sums",
            dataset_split="test", dataset_args={"num_few_shot": 5}, metric_type="exact_match",
            metric_name="exact_match", metric_value=0.4375,
        )
    ]  # fmt: skip
    assert "| sums | 5 | exact_match ↑ | 0.500 ± 0.010 | 0.438 ± 0.010 | −0.062 |" in card.text
    listed = YAML(typ="safe", pure=True).load((folder / ".eval_results/local--sums.yaml").read_text())
    assert listed == [
        {
            "dataset": {"id": BENCHMARK, "task_id": "sums_all"},
            "value": 0.4375,
            "date": "2026-09-10",
            "notes": "5-shot, exact_match, lm-evaluation-harness 0.4.9.1",
        }
    ]
    assert support.hubmerge("verify", TARGET).code == 0
    assert support.hubmerge("reproduce", TARGET).code == 0

    # Without the results, nothing of them stays.
    assert support.hubmerge(*push).code == 0
    assert not [p for p in town.api.list_repo_files(TARGET) if p.startswith(".eval_results")]
    assert "model-index" not in ModelCard.load(TARGET).content


def test_what_cannot_be_used_is_refused_before_anything_is_made(town: Town, tmp_path: Path) -> None:
    merge = ("--method", "linear", "--model", "local/a", "--model", "local/b")
    stranger = results(tmp_path, "else/where", 0.5)
    done = support.hubmerge("push", *merge, "--to", TARGET, "--eval", stranger)
    assert (done.code, town.state(TARGET)) == (2, None)
    assert "its model is 'else/where', which is neither the merged model (local/merged) nor a parent" in done.err
    done = support.hubmerge("merge", *merge, "--out", tmp_path / "out", "--eval", tmp_path / "none.json")
    assert (done.code, (tmp_path / "out").exists()) == (2, False)
    done = support.hubmerge("merge", *merge, "--out", tmp_path / "out", "--eval", f"merged={stranger}")
    assert done.code == 0, done.text
    assert "exact_match ↑ | 0.500 ± 0.010 |" in (tmp_path / "out/README.md").read_text()
    assert not (tmp_path / "out/.eval_results").exists()
    done = support.hubmerge("push", *merge, "--to", TARGET, "--on", "jobs", "--eval", stranger)
    assert done.code == 2
    assert "does not see this machine's files" in done.err
