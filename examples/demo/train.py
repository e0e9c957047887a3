"""Owns the demo's training: one small vision transformer from scratch, task heads, fine-tunes and a LoRA adapter.

The set-up is the usual one of papers on merging: a head is fitted on the frozen base (a linear probe), then stays
fixed while the encoder is fine-tuned. So one head fits the base, the fine-tune and every merge of fine-tunes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own name for it)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Generator, Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from examples.demo.data import DIGIT_NAMES, IMAGE_SIZE, Images, Split, Task, noisy, shift, to_pixels

BATCH_SIZE = 64
PRETRAIN_EPOCHS, PRETRAIN_RATE = 60, 1e-3
PROBE_EPOCHS, PROBE_RATE, PROBE_DRAWS = 20, 1e-2, 4
FINE_TUNE_STEPS, FINE_TUNE_RATE = 350, 1.5e-4
LORA_STEPS, LORA_RATE, LORA_RANK = 300, 1e-3, 8

Loss = Callable[[Tensor, Generator], Tensor]


def build_config(label_names: tuple[str, ...] = DIGIT_NAMES) -> ViTConfig:
    """Five tokens (four 8x8 patches and the class token) through three layers: about 0.4 M parameters."""
    return ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=8,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
    )


def make_deterministic() -> None:
    """Same machine, same numbers. One thread: more would change the order of sums, and gain nothing at this size."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def pretrain(images: Images, *, seed: int = 0) -> ViTModel:
    """Train the base from scratch as a classifier of clean, upright digits; return its encoder without a head."""
    torch.manual_seed(seed)
    model = ViTForImageClassification(build_config())
    digits = images.digits["train"]

    def loss(index: Tensor, generator: Generator) -> Tensor:
        moved = noisy(shift(digits.images[index], generator), 0.05, generator)
        return F.cross_entropy(model(pixel_values=to_pixels(moved)).logits, digits.labels[index])

    steps = PRETRAIN_EPOCHS * (len(digits.labels) // BATCH_SIZE)
    _fit(model.parameters(), loss, len(digits.labels), steps=steps, rate=PRETRAIN_RATE, seed=seed)
    encoder = ViTModel(build_config(), add_pooling_layer=False)
    encoder.load_state_dict(model.vit.state_dict())
    return encoder.eval()


def assemble(encoder: ViTModel, head: nn.Linear, label_names: tuple[str, ...]) -> ViTForImageClassification:
    """A classifier made of copies of an encoder and a task's head."""
    model = ViTForImageClassification(build_config(label_names))
    model.vit.load_state_dict(encoder.state_dict())
    model.classifier.load_state_dict(head.state_dict())
    return model.eval()


def probe(encoder: ViTModel, task: Task, images: Images, *, seed: int = 0) -> nn.Linear:
    """Fit the task's head on the frozen base: what the base can do without any fine-tuning."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    everything = torch.arange(len(task.examples(images, "train").labels))
    draws = [task.batch(images, "train", everything, generator) for _ in range(PROBE_DRAWS)]
    with torch.no_grad():
        features = torch.cat([encoder(pixel_values=pixels).last_hidden_state[:, 0] for pixels, _ in draws])
    labels = torch.cat([labels for _, labels in draws])
    head = nn.Linear(features.shape[1], len(task.label_names))
    steps = PROBE_EPOCHS * (len(labels) // 256)
    _fit(
        head.parameters(),
        lambda index, _: F.cross_entropy(head(features[index]), labels[index]),
        len(labels),
        steps=steps,
        rate=PROBE_RATE,
        seed=seed,
        batch_size=256,
    )
    return head


def fine_tune(
    base: ViTModel, head: nn.Linear, task: Task, images: Images, *, seed: int = 0
) -> ViTForImageClassification:
    """Train every weight of the encoder for one task; the head stays as it is."""
    torch.manual_seed(seed)
    model = assemble(base, head, task.label_names)
    model.classifier.requires_grad_(False)
    _train_task(model, model.vit.parameters(), task, images, steps=FINE_TUNE_STEPS, rate=FINE_TUNE_RATE, seed=seed)
    return model


def fine_tune_lora(
    base: ViTModel, head: nn.Linear, task: Task, images: Images, *, base_id: str, seed: int = 0
) -> PeftModel:
    """Train a LoRA adapter for one task on the base `base_id`; the head travels inside the adapter, unchanged."""
    torch.manual_seed(seed)
    model = assemble(base, head, task.label_names)
    model.name_or_path = base_id
    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_RANK,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
        modules_to_save=["classifier"],
    )
    adapted = get_peft_model(model, config)
    factors = [weight for name, weight in adapted.named_parameters() if "lora_" in name]
    _train_task(adapted, factors, task, images, steps=LORA_STEPS, rate=LORA_RATE, seed=seed)
    return adapted


def accuracy(model: nn.Module, task: Task, images: Images, split: Split = "test") -> float:
    """Fraction of a split's images that the model labels rightly."""
    pixels, labels = task.evaluation(images, split)
    model.eval()
    with torch.no_grad():
        guesses = model(pixel_values=pixels).logits.argmax(dim=-1)
    return float((guesses == labels).double().mean())


def _train_task(
    model: nn.Module, weights: Iterable[nn.Parameter], task: Task, images: Images, *, steps: int, rate: float, seed: int
) -> None:
    """Fine-tune `weights` of `model` on a task; every batch is disturbed anew."""
    model.train()

    def loss(index: Tensor, generator: Generator) -> Tensor:
        pixels, labels = task.batch(images, "train", index, generator)
        return F.cross_entropy(model(pixel_values=shift(pixels, generator)).logits, labels)

    count = len(task.examples(images, "train").labels)
    _fit(weights, loss, count, steps=steps, rate=rate, seed=seed)
    model.eval()


def _fit(
    weights: Iterable[nn.Parameter],
    loss: Loss,
    count: int,
    *,
    steps: int,
    rate: float,
    seed: int,
    batch_size: int = BATCH_SIZE,
) -> None:
    """AdamW with one learning-rate cycle over `steps` batches drawn from `count` examples."""
    optimizer = torch.optim.AdamW(list(weights), lr=rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = count // batch_size
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(count, generator=generator)
        start = step % per_epoch * batch_size
        optimizer.zero_grad()
        loss(order[start : start + batch_size], generator).backward()
        optimizer.step()
        schedule.step()
