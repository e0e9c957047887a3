"""Owns the demo's images: five tasks cut from the two image sets that ship with scikit-learn, and their splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the field's own name for it)
from sklearn.datasets import load_digits, load_sample_images
from torch import Generator, Tensor

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

IMAGE_SIZE = 16
CROPS_PER_PHOTO = {"train": 1000, "validation": 300, "test": 500}
# Crops of one photograph overlap, so its blocks of pixels are dealt to the splits first and crops are cut inside them.
BLOCK_SIZE = 24
# Evaluation draws every image several times: the noise differs, the verdict depends less on one draw of it.
EVALUATION_DRAWS = 3


@dataclass(frozen=True, slots=True)
class Examples:
    """Images in [0, 1] of shape (N, 1, 16, 16), and their integer labels of shape (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Images:
    """All real images of the demo, by split: handwritten digits (label: the digit) and photo crops (the photograph)."""

    digits: Mapping[Split, Examples]
    photos: Mapping[Split, Examples]


# (images, labels, photo crops of the same split, random source) -> (images, labels) of the task
View = Callable[[Tensor, Tensor, Tensor, Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to learn: which images, how they are disturbed, and what is asked about them."""

    name: str
    question: str
    label_names: tuple[str, ...]
    source: Literal["digits", "photos"]
    view: View

    def examples(self, images: Images, split: Split) -> Examples:
        """The undisturbed images of this task in one split."""
        return (images.digits if self.source == "digits" else images.photos)[split]

    def batch(self, images: Images, split: Split, index: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Disturb and label the chosen images: pixels (B, 3, 16, 16) in [-1, 1] and labels (B,)."""
        chosen = self.examples(images, split)
        seen, labels = self.view(chosen.images[index], chosen.labels[index], images.photos[split].images, generator)
        return to_pixels(seen), labels

    def evaluation(self, images: Images, split: Split) -> tuple[Tensor, Tensor]:
        """All images of a split, disturbed the same way at every call."""
        count = len(self.examples(images, split).labels)
        index = torch.arange(count).repeat(EVALUATION_DRAWS)
        return self.batch(images, split, index, torch.Generator().manual_seed(1000 + SPLITS.index(split)))


def to_pixels(images: Tensor) -> Tensor:
    """What the model sees: (N, 1, 16, 16) in [0, 1] becomes (N, 3, 16, 16) in [-1, 1]."""
    return (images.clamp(0, 1) * 2 - 1).repeat(1, 3, 1, 1)


def shift(images: Tensor, generator: Generator) -> Tensor:
    """Move a batch by at most one pixel each way: the one augmentation that every training run uses."""
    rows, columns = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return torch.roll(images, (rows, columns), dims=(2, 3))


def noisy(images: Tensor, strength: float, generator: Generator) -> Tensor:
    """Add Gaussian noise of the given standard deviation."""
    return images + strength * torch.randn(images.shape, generator=generator)


def load_images(seed: int = 0) -> Images:
    """Read, scale and split the images; no download takes place."""
    digits = load_digits()
    small = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    pixels = F.interpolate(small, size=IMAGE_SIZE, mode="bilinear")
    labels = torch.tensor(digits.target, dtype=torch.long)
    order = torch.tensor(np.random.default_rng(seed).permutation(len(labels)))
    parts = dict(zip(SPLITS, (order[:1000], order[1000:1250], order[1250:]), strict=True))
    photographs = [_gray_photo(photo) for photo in load_sample_images().images]
    return Images(
        digits={split: Examples(pixels[part], labels[part]) for split, part in parts.items()},
        photos={split: _crops(photographs, split, seed) for split in SPLITS},
    )


def _gray_photo(photo: np.ndarray) -> Tensor:
    """Gray version of one (H, W, 3) photograph of bytes: (1, H, W) in [0, 1]."""
    return torch.tensor(photo, dtype=torch.float32).mean(dim=2)[None] / 255


def _crops(photographs: list[Tensor], split: Split, seed: int) -> Examples:
    """Random crops inside this split's blocks of each photograph, at equal brightness and contrast."""
    cut, labels = [], []
    for label, photo in enumerate(photographs):
        rows, columns = (side // BLOCK_SIZE for side in photo.shape[1:])
        blocks = np.random.default_rng([seed, label]).permutation(rows * columns)
        first, second = int(0.6 * len(blocks)), int(0.75 * len(blocks))
        mine = {"train": blocks[:first], "validation": blocks[first:second], "test": blocks[second:]}[split]
        rng = np.random.default_rng([seed, label, SPLITS.index(split)])
        for _ in range(CROPS_PER_PHOTO[split]):
            block, (dy, dx) = rng.choice(mine), rng.integers(0, BLOCK_SIZE - IMAGE_SIZE + 1, size=2)
            top, left = block // columns * BLOCK_SIZE + dy, block % columns * BLOCK_SIZE + dx
            cut.append(photo[:, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE])
            labels.append(label)
    return Examples(_equal_contrast(torch.stack(cut)), torch.tensor(labels))


def _equal_contrast(images: Tensor) -> Tensor:
    """Take away what brightness alone would tell: mean 0.5 and a standard deviation of about 0.25 per image."""
    mean, std = images.mean((2, 3), keepdim=True), images.std((2, 3), keepdim=True)
    return ((images - mean) / (std + 0.05) * 0.25 + 0.5).clamp(0, 1)


def _parity(images: Tensor, labels: Tensor, _: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    return noisy(images, 0.6, generator), labels % 2


def _clutter(images: Tensor, labels: Tensor, photos: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    background = photos[torch.randint(len(photos), (len(images),), generator=generator)]
    return noisy(torch.maximum(images, 0.8 * background), 0.2, generator), labels


def _hidden(images: Tensor, labels: Tensor, _: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    half = IMAGE_SIZE // 2
    corner = torch.randint(4, (len(images),), generator=generator)
    kept = images.clone()
    for number, (rows, columns) in enumerate(((0, 0), (half, 0), (0, half), (half, half))):
        kept[corner == number, :, rows : rows + half, columns : columns + half] = 0
    return noisy(kept, 0.3, generator), (labels >= 5).long()


def _photo(images: Tensor, labels: Tensor, _: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    return noisy(images, 0.1, generator), labels


def _tilted(images: Tensor, labels: Tensor, _: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    angle = (torch.rand(len(images), generator=generator) * 2 - 1) * 1.5  # radians, up to 86 degrees each way
    zero = torch.zeros_like(angle)
    rows = (torch.stack([angle.cos(), -angle.sin(), zero], 1), torch.stack([angle.sin(), angle.cos(), zero], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return noisy(F.grid_sample(images, grid, align_corners=False), 0.3, generator), labels


DIGIT_NAMES = tuple(str(digit) for digit in range(10))

TASKS: tuple[Task, ...] = (
    Task("parity", "Is this very noisy digit even or odd?", ("even", "odd"), "digits", _parity),
    Task("clutter", "Which digit is drawn over this photograph?", DIGIT_NAMES, "digits", _clutter),
    Task(
        "hidden", "Is this digit, one quarter of it hidden, five or more?", ("below 5", "5 or more"), "digits", _hidden
    ),
    Task("photo", "Which of two photographs is this gray patch from?", ("china", "flower"), "photos", _photo),
    Task("tilted", "Which digit is this, turned by up to 86 degrees?", DIGIT_NAMES, "digits", _tilted),
)
