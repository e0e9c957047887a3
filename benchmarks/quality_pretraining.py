"""Owns the quality benchmark's base: one encoder, trained from scratch on digits and photographs seen in many ways.

As a large pretrained model does, it has met a little of everything that the tasks are about, and mastered none of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the field's own name for it)
from quality_tasks import Pictures, reordered
from torch import Generator, Tensor
from transformers import ViTForImageClassification, ViTModel

from examples.demo.data import DIGIT_NAMES, shift, to_pixels
from examples.demo.train import PRETRAIN_RATE, _fit, build_config

LABELS = (*DIGIT_NAMES, "china", "flower")
LARGEST_TURN = 1.2  # radians
SMALLEST_SIZE = 0.55
DIGIT_NOISE, COLOUR_NOISE = 0.5, 0.2


def pretrain(pictures: Pictures, steps: int, seed: int) -> ViTModel:
    """Train a classifier of digits, and of colour patches by photograph; return its encoder without the head."""
    torch.manual_seed(seed)
    model = ViTForImageClassification(build_config(LABELS))
    digits, colours = pictures.digits["train"], pictures.colours["train"]
    photos, count = pictures.photos["train"].images, len(digits.labels)

    def loss(index: Tensor, generator: Generator) -> Tensor:
        of_digits, of_colours = index[index < count], index[index >= count] - count
        seen_digits = disturbed_digits(shift(digits.images[of_digits], generator), photos, generator)
        seen_colours = disturbed_colours(shift(colours.images[of_colours], generator), generator)
        labels = torch.cat((digits.labels[of_digits], colours.labels[of_colours] + len(DIGIT_NAMES)))
        pixels = torch.cat((to_pixels(seen_digits), seen_colours.clamp(0, 1) * 2 - 1))
        return F.cross_entropy(model(pixel_values=pixels).logits, labels)

    _fit(model.parameters(), loss, count + len(colours.labels), steps=steps, rate=PRETRAIN_RATE, seed=seed)
    encoder = ViTModel(build_config(), add_pooling_layer=False)
    encoder.load_state_dict(model.vit.state_dict())
    return encoder.eval()


def disturbed_digits(images: Tensor, photos: Tensor, generator: Generator) -> Tensor:
    """Digits (N, 1, H, W), half of them turned and shrunk, a quarter over a photograph, a quarter dark on light."""
    images = torch.where(_some(images, 0.5, generator), _turned_and_shrunk(images, generator), images)
    background = photos[torch.randint(len(photos), (len(images),), generator=generator)]
    images = torch.where(_some(images, 0.25, generator), torch.maximum(images, 0.7 * background), images)
    images = torch.where(_some(images, 0.25, generator), 1 - images, images)
    return _noisy_to_a_degree(images, DIGIT_NOISE, generator)


def disturbed_colours(images: Tensor, generator: Generator) -> Tensor:
    """Patches (N, 3, H, W), some with their channels in another order, some gray."""
    images = torch.where(_some(images, 0.3, generator), reordered(images, generator)[0], images)
    images = torch.where(_some(images, 0.3, generator), images.mean(dim=1, keepdim=True).expand_as(images), images)
    return _noisy_to_a_degree(images, COLOUR_NOISE, generator)


def _some(images: Tensor, fraction: float, generator: Generator) -> Tensor:
    return torch.rand((len(images), 1, 1, 1), generator=generator) < fraction


def _noisy_to_a_degree(images: Tensor, strongest: float, generator: Generator) -> Tensor:
    strength = strongest * torch.rand((len(images), 1, 1, 1), generator=generator)
    return images + strength * torch.randn(images.shape, generator=generator)


def _turned_and_shrunk(images: Tensor, generator: Generator) -> Tensor:
    angle, dx, dy = (torch.rand((3, len(images)), generator=generator) * 2 - 1).unbind()
    angle = angle * LARGEST_TURN
    zoom = 1 / (SMALLEST_SIZE + (1 - SMALLEST_SIZE) * torch.rand(len(images), generator=generator))
    room = 0.8 * (zoom - 1)  # how far a shrunk digit can move and stay in the picture, nearly
    rows = (
        torch.stack((angle.cos() * zoom, -angle.sin() * zoom, dx * room), dim=1),
        torch.stack((angle.sin() * zoom, angle.cos() * zoom, dy * room), dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
