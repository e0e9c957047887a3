"""Owns the quality benchmark's models: a base, heads that stay fixed, eight fine-tunes of two kinds, and their exams.

The architecture and the training loop are the demo's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from quality_pretraining import pretrain
from quality_tasks import TASKS, Pictures
from torch import Tensor, nn
from transformers import ViTForImageClassification, ViTModel

from examples.demo.data import Split, Task
from examples.demo.train import LORA_RANK, _train_task, assemble, build_config

KINDS = ("full", "lora")
HEAD_DRAWS, HEAD_SHARPNESS = 2, 0.1
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much to train and to measure."""

    seeds: int
    pretrain_steps: int
    fine_tune_steps: int
    fine_tune_rate: float
    lora_steps: int
    lora_rate: float
    validation_images: int
    """Per task."""
    test_images: int
    """Per task; more than there are show the same images under several disturbances."""
    grid_step: int
    """1 tries every scale of a grid, 2 every other, and so on."""


SCALES = {
    "small": Scale(1, 400, 40, 2e-4, 40, 2e-3, validation_images=40, test_images=200, grid_step=8),
    "full": Scale(3, 1500, 400, 5e-5, 300, 5e-4, validation_images=150, test_images=1000, grid_step=1),
}


@dataclass(frozen=True, slots=True)
class Suite:
    """What one seed has trained: a base and its fine-tunes as saved folders, the heads, and the deltas by kind."""

    folder: Path
    base: State
    heads: Mapping[str, nn.Linear]
    deltas: Mapping[str, list[State]]
    """Kind -> the task vector of every task: encoder of the fine-tune minus base."""

    @property
    def base_folder(self) -> Path:
        """Where the base is saved."""
        return self.folder / "base"

    def tuned_folder(self, kind: str, task: Task) -> Path:
        """Where a fine-tune or an adapter is saved."""
        return self.folder / kind / task.name


def suite_of(pictures: Pictures, scale: Scale, folder: Path, seed: int) -> Suite:
    """What an earlier run has trained there, or else what is trained now."""
    ready = folder / "ready"
    if ready.exists():
        return read_suite(folder)
    suite = train_suite(pictures, scale, folder, seed)
    ready.touch()
    return suite


def read_suite(folder: Path) -> Suite:
    """A suite that was saved."""
    suite = Suite(folder, state_of(ViTModel.from_pretrained(folder / "base", add_pooling_layer=False)), {}, {})
    heads, deltas = {}, {kind: [] for kind in KINDS}
    for task in TASKS:
        tuned = ViTForImageClassification.from_pretrained(suite.tuned_folder("full", task))
        heads[task.name] = tuned.classifier.requires_grad_(False)
        deltas["full"].append(difference(state_of(tuned.vit), suite.base))
        tuned.vit.load_state_dict(suite.base)
        adapted = PeftModel.from_pretrained(tuned, suite.tuned_folder("lora", task))
        deltas["lora"].append(difference(state_of(adapted.merge_and_unload().vit), suite.base))
    return Suite(folder, suite.base, heads, deltas)


def train_suite(pictures: Pictures, scale: Scale, folder: Path, seed: int) -> Suite:
    """Pretrain, fit the heads, fine-tune for every task both ways, and save it all as transformers and PEFT do."""
    encoder = pretrain(pictures, scale.pretrain_steps, seed)
    base = state_of(encoder)
    heads = {task.name: fit_head(encoder, task, pictures, seed) for task in TASKS}
    suite = Suite(folder, base, heads, {kind: [] for kind in KINDS})
    encoder.save_pretrained(suite.base_folder)
    for task in TASKS:
        tuned = fine_tune(suite, encoder, task, pictures, scale, seed)
        tuned.save_pretrained(suite.tuned_folder("full", task))
        suite.deltas["full"].append(difference(state_of(tuned.vit), base))
        adapted = fine_tune_lora(suite, encoder, task, pictures, scale, seed)
        adapted.save_pretrained(suite.tuned_folder("lora", task))
        suite.deltas["lora"].append(difference(state_of(adapted.merge_and_unload().vit), base))
    return suite


def fit_head(encoder: ViTModel, task: Task, pictures: Pictures, seed: int) -> nn.Linear:
    """Tell the classes apart by the nearest class mean among the base's features of the training images.

    Like the text prompts that serve as CLIP's heads, and unlike a head trained at length, it leaves a task's accuracy
    to the encoder, which is what gets merged.
    """
    index = torch.arange(len(task.examples(pictures, "train").labels)).repeat(HEAD_DRAWS)
    pixels, labels = task.batch(pictures, "train", index, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        features = encoder(pixel_values=pixels).last_hidden_state[:, 0]
    centre = features.mean(dim=0)
    means = torch.stack([features[labels == label].mean(dim=0) for label in range(len(task.label_names))])
    head = nn.Linear(features.shape[1], len(means))
    weight = HEAD_SHARPNESS * (means - centre)
    head.load_state_dict({"weight": weight, "bias": -(weight * (means + centre)).sum(dim=1) / 2})
    return head


def fine_tune(
    suite: Suite, encoder: ViTModel, task: Task, pictures: Pictures, scale: Scale, seed: int
) -> ViTForImageClassification:
    """Train every weight of the encoder for one task; the head stays as it is."""
    torch.manual_seed(seed)
    model = assemble(encoder, suite.heads[task.name], task.label_names)
    model.classifier.requires_grad_(False)
    steps, rate = scale.fine_tune_steps, scale.fine_tune_rate
    _train_task(model, model.vit.parameters(), task, pictures, steps=steps, rate=rate, seed=seed)
    return model


def fine_tune_lora(
    suite: Suite, encoder: ViTModel, task: Task, pictures: Pictures, scale: Scale, seed: int
) -> PeftModel:
    """Train a LoRA adapter on attention and MLP for one task; the head stays as it is."""
    torch.manual_seed(seed)
    model = assemble(encoder, suite.heads[task.name], task.label_names)
    model.name_or_path = str(suite.base_folder)
    adapted = get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LORA_MODULES))
    factors = [weight for name, weight in adapted.named_parameters() if "lora_" in name]
    _train_task(adapted, factors, task, pictures, steps=scale.lora_steps, rate=scale.lora_rate, seed=seed)
    return adapted


def encoder_of(state: Mapping[str, Tensor]) -> ViTModel:
    """An encoder with these weights."""
    with torch.device("meta"):  # or random weights would be drawn first
        encoder = ViTModel(build_config(), add_pooling_layer=False)
    encoder.load_state_dict(state, assign=True)
    return encoder.eval()


def linear_weights(encoder: nn.Module) -> set[str]:
    """The names of the weights of linear layers."""
    return {f"{name}.weight" for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}


def state_of(encoder: nn.Module) -> State:
    """A copy of an encoder's weights, by name."""
    return {name: tensor.detach().clone() for name, tensor in encoder.state_dict().items()}


def difference(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> State:
    """State minus base, tensor by tensor."""
    return {name: state[name] - tensor for name, tensor in base.items()}


def moved(base: Mapping[str, Tensor], delta: Mapping[str, Tensor], factor: float = 1.0) -> State:
    """Base plus a multiple of a delta."""
    return {name: tensor + factor * delta[name] for name, tensor in base.items()}


@dataclass(frozen=True, slots=True)
class Exam:
    """The same disturbed images for every model: task -> pixels (N, 3, 16, 16) and labels (N,)."""

    questions: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def draw(cls, pictures: Pictures, split: Split, images: int) -> Exam:
        """That many images of each task, from all over a split."""
        questions = {}
        for number, task in enumerate(TASKS):
            # Photo patches are sorted by label: the first ones would all be of one photograph.
            index = torch.linspace(0, len(task.examples(pictures, split).labels) - 1, images).long()
            generator = torch.Generator().manual_seed(1000 + number)
            questions[task.name] = task.batch(pictures, split, index, generator)
        return cls(questions)

    def accuracy(self, encoder: nn.Module, heads: Mapping[str, nn.Linear], task: str) -> float:
        """Fraction of a task's images that the encoder with the task's head labels rightly."""
        pixels, labels = self.questions[task]
        with torch.no_grad():
            features = encoder(pixel_values=pixels).last_hidden_state[:, 0]
            return float((heads[task](features).argmax(dim=-1) == labels).double().mean())

    def accuracies(self, state: Mapping[str, Tensor], heads: Mapping[str, nn.Linear]) -> dict[str, float]:
        """Task -> accuracy of the encoder with these weights."""
        encoder = encoder_of(state)
        return {task: self.accuracy(encoder, heads, task) for task in self.questions}
