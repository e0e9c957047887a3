"""Owns the quality benchmark's eight tasks: four of the demo's and four more, on images that ship with scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Generator, Tensor

from examples.demo.data import (
    BLOCK_SIZE,
    CROPS_PER_PHOTO,
    DIGIT_NAMES,
    IMAGE_SIZE,
    SPLITS,
    Examples,
    Images,
    Split,
    Task,
    load_images,
    noisy,
)
from examples.demo.data import TASKS as DEMO_TASKS

LOOPS = torch.tensor((1, 0, 0, 0, 0, 0, 1, 0, 2, 1))
"""Closed loops in each digit; these writers leave the 4 open."""
ORDERS = torch.tensor(list(permutations(range(3))))
"""All orders of three colour channels, (6, 3)."""
ORDER_NAMES = tuple("".join("RGB"[channel] for channel in order) for order in ORDERS.tolist())


@dataclass(frozen=True, slots=True)
class Pictures(Images):
    """The demo's images, and its patches of photographs in colour: (N, 3, 16, 16)."""

    colours: Mapping[Split, Examples]


class ColourTask(Task):
    """A task on colour patches: its view gets and returns three channels."""

    def examples(self, images: Images, split: Split) -> Examples:
        """The undisturbed colour patches of one split."""
        assert isinstance(images, Pictures)
        return images.colours[split]

    def batch(self, images: Images, split: Split, index: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Disturb and label the chosen patches: pixels (B, 3, 16, 16) in [-1, 1] and labels (B,)."""
        chosen = self.examples(images, split)
        seen, labels = self.view(chosen.images[index], chosen.labels[index], chosen.images, generator)
        return seen.clamp(0, 1) * 2 - 1, labels


def load_pictures(seed: int = 0) -> Pictures:
    """Read, cut and split all images; no download takes place."""
    images = load_images(seed)
    photographs = [torch.tensor(photo, dtype=torch.float32) for photo in load_sample_images().images]
    channels_first = [photo.permute(2, 0, 1) / 255 for photo in photographs]
    return Pictures(images.digits, images.photos, {split: _patches(channels_first, split, seed) for split in SPLITS})


def _patches(photographs: list[Tensor], split: Split, seed: int) -> Examples:
    """The very patches of each photograph (3, H, W) that the demo shows in gray.

    Of the same blocks, so that no split shows in colour what another shows in gray.
    """
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
    return Examples(torch.stack(cut), torch.tensor(labels))


def reordered(images: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Patches (N, 3, H, W) with their channels in a random order, and the number of that order (N,)."""
    order = torch.randint(len(ORDERS), (len(images),), generator=generator)
    return images[torch.arange(len(images))[:, None], ORDERS[order]], order


def _loops(images: Tensor, labels: Tensor, _: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    dark = torch.rand((len(images), 1, 1, 1), generator=generator) < 0.5
    return noisy(torch.where(dark, 1 - images, images), 0.4, generator), LOOPS[labels]


def _negative(images: Tensor, labels: Tensor, _: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    return noisy(1 - images, 0.5, generator), labels


def _overturned(images: Tensor, labels: Tensor, _: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    return noisy(images.flip(2), 0.5, generator), labels


def _channels(images: Tensor, _labels: Tensor, _photos: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    mixed, order = reordered(images, generator)
    return noisy(mixed, 0.05, generator), order


TASKS: tuple[Task, ...] = (
    *(task for task in DEMO_TASKS if task.name in ("parity", "clutter", "photo", "tilted")),
    Task("loops", "How many loops has this noisy digit, light or dark?", ("none", "one", "two"), "digits", _loops),
    Task("negative", "Which digit is this, dark on light and very noisy?", DIGIT_NAMES, "digits", _negative),
    Task("overturned", "Which digit is this, upside down and very noisy?", DIGIT_NAMES, "digits", _overturned),
    ColourTask("channels", "In which order are this patch's colours?", ORDER_NAMES, "photos", _channels),
)
