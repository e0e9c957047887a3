"""Owns the steps of the demo: train, push, merge, load back, measure. The Hub's address must be in the environment."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, ViTForImageClassification, ViTModel
from transformers.utils import logging

from examples.demo import train
from examples.demo.data import TASKS, Images, Split, Task

BASE = "local/vit-digits-base"
LORA_TASK = "tilted"
METHODS = ("task_arithmetic", "ties", "dare_ties")
RECIPES = Path(__file__).parents[2] / "recipes"
CREDITS = (
    "Digits: the UCI ML hand-written digits test set as shipped with scikit-learn. Photographs: china.jpg by "
    "danielbuechele and flower.jpg by vultilion, Flickr, CC BY 2.0, as shipped with scikit-learn."
)

Scores = dict[str, dict[str, float]]
Say = Callable[[str], None]


def repo_of(task: Task) -> str:
    """Where a task's fine-tune is pushed."""
    return f"local/vit-digits-{task.name}"


def merged_repo(method: str) -> str:
    """Where a merge is pushed."""
    return f"local/merged-{method}"


def train_and_push(images: Images, split: Split, say: Say) -> Scores:
    """Train base and fine-tunes and push them; task -> accuracy of the base with a linear probe."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # PEFT 0.21 asks transformers 5.23 for a property that is about to be renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    train.make_deterministic()
    say("pretraining the base: clean digits, from scratch")
    base = train.pretrain(images)
    base.push_to_hub(BASE)
    _push_card(BASE, "A small vision transformer, pretrained on clean handwritten digits.", "image-feature-extraction")
    scores: Scores = {}
    for task in TASKS:
        kind = "LoRA adapter" if task.name == LORA_TASK else "all weights"
        say(f"fine-tuning {task.name} ({kind}): {task.question}")
        head = train.probe(base, task, images)
        probed = train.assemble(base, head, task.label_names)
        scores[task.name] = {"base": train.accuracy(probed, task, images, split)}
        model = _tuned(base, head, task, images)
        model.push_to_hub(repo_of(task))
        _push_card(repo_of(task), task.question, "image-classification", adapter=task.name == LORA_TASK, parent=BASE)
    return scores


def _tuned(base: ViTModel, head: nn.Linear, task: Task, images: Images) -> ViTForImageClassification | PeftModel:
    if task.name == LORA_TASK:
        return train.fine_tune_lora(base, head, task, images, base_id=BASE)
    return train.fine_tune(base, head, task, images)


def _push_card(repo: str, text: str, pipeline: str, *, adapter: bool = False, parent: str | None = None) -> None:
    data = ModelCardData(
        license="apache-2.0",
        library_name="peft" if adapter else "transformers",
        pipeline_tag=pipeline,
        base_model=parent,
        tags=["hubmerge-demo"],
    )
    title = repo.partition("/")[2]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text}\n\n{CREDITS}\n").push_to_hub(repo)


def merge_and_push(method: str, folder: Path) -> Path:
    """Run `hubmerge push` on a copy of the repository's example recipe, as a user would; returns the copy."""
    recipe = folder / f"demo-{method}.yaml"
    recipe.write_text((RECIPES / recipe.name).read_text())
    hubmerge(["push", str(recipe), "--to", merged_repo(method), "--public", "-q"])
    return recipe


def hubmerge(arguments: list[str]) -> None:
    """Run the command line of this environment's hubmerge; its warnings and errors stay visible."""
    subprocess.run([sys.executable, "-m", "hubmerge", *arguments], check=True)


def load_tuned(task: Task) -> nn.Module:
    """A task's own fine-tune, read back from the Hub."""
    if task.name != LORA_TASK:
        return ViTForImageClassification.from_pretrained(repo_of(task))
    base = ViTForImageClassification.from_pretrained(BASE, num_labels=len(task.label_names))
    return PeftModel.from_pretrained(base, repo_of(task))


def load_merged(method: str, task: Task) -> nn.Module:
    """The merged encoder with one task's head, both read back from the Hub."""
    repo = merged_repo(method)
    encoder = AutoModel.from_pretrained(repo, add_pooling_layer=False)
    kept = load_file(hf_hub_download(repo, f"heads/{task.name}.safetensors"))
    head = nn.Linear(encoder.config.hidden_size, len(task.label_names))
    head.load_state_dict({name.removeprefix("classifier."): tensor for name, tensor in kept.items()})
    return train.assemble(encoder, head, task.label_names)


def measure(images: Images, split: Split, scores: Scores) -> None:
    """Add to `scores` what the fine-tunes and the merges reach, as anyone who downloads them would find."""
    for task in TASKS:
        row = scores[task.name]
        row["own fine-tune"] = train.accuracy(load_tuned(task), task, images, split)
        for method in METHODS:
            row[method] = train.accuracy(load_merged(method, task), task, images, split)


def publish_results(scores: Scores, split: Split, folder: Path) -> None:
    """Push the merges once more, with what was measured of them and of their parents; no weights are sent again."""
    folder.mkdir()
    parents = {BASE: {task: row["base"] for task, row in scores.items()}}
    parents |= {repo_of(task): {task.name: scores[task.name]["own fine-tune"]} for task in TASKS}
    for method in METHODS:
        merged = {merged_repo(method): {task: row[method] for task, row in scores.items()}}
        files = [_write_results(folder, repo, found, split) for repo, found in (parents | merged).items()]
        given = [argument for file in files for argument in ("--eval", str(file))]
        recipe = str(folder.parent / "recipes" / f"demo-{method}.yaml")
        hubmerge(["push", recipe, "--to", merged_repo(method), "--diagnostics", "-q", *given])


def _write_results(folder: Path, repo: str, found: dict[str, float], split: Split) -> Path:
    """A file that ``hubmerge push --eval`` reads (docs/evaluation.md)."""
    settings = {"images": split}
    results = [
        {
            "task": task,
            "task_type": "image-classification",
            "metric": "accuracy",
            "value": value,
            "higher_is_better": True,
            "settings": settings,
        }
        for task, value in found.items()
    ]
    path = folder / f"{repo.replace('/', '__')}.json"
    path.write_text(json.dumps({"program": "hubmerge's demo", "model": repo, "results": results}, indent=2) + "\n")
    return path


def fetch_cards(folder: Path) -> dict[str, Path]:
    """Download the model cards; method -> file."""
    return {m: Path(hf_hub_download(merged_repo(m), "README.md", local_dir=folder / m)) for m in METHODS}
