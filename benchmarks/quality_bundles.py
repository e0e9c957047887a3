"""Owns the quality benchmark's bundles: which codecs, with which parameters; made, and taken apart again, as by a user.

PSP, the superposition of whole weights, is a bundle on a base of zeros with random signs and no shuffling.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import PeftModel
from quality_geometry import flat
from quality_merge import SUMS
from quality_models import State, Suite, difference, encoder_of, state_of
from quality_tasks import TASKS
from transformers import ViTForImageClassification

import hubmerge
from examples.demo.data import Task
from examples.demo.train import assemble
from hubmerge.bundles.manifest import Manifest

EXACT = "float32"
FORMS = (EXACT, "bfloat16", "int8", "int4")
GRIDS = {"full": SUMS, "lora": tuple(i / 10 for i in range(1, 21))}
"""The paper's values of λ, by kind of fine-tunes."""


@dataclass(frozen=True, slots=True)
class Packing:
    """One row of the table: a codec and its parameters."""

    label: str
    codec: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("full",)
    storages: tuple[str, ...] = (EXACT, "int8")
    """Forms of its numbers, ``EXACT`` first."""
    whole: bool = False
    """Of whole weights, on a base of zeros; λ means nothing then."""

    def grid(self, kind: str) -> tuple[float, ...]:
        """Values of λ to choose from."""
        return () if self.whole else GRIDS[kind]


BOTH = ("full", "lora")
PACKINGS = (
    Packing("STA", "superposition", {"shuffle": False}, BOTH),
    Packing("TA+Shuffle", "superposition", {"signs": False}, BOTH),
    Packing("STA+Shuffle", "superposition", {}, BOTH, FORMS),
    Packing("PSP", "superposition", {"shuffle": False}, storages=(EXACT,), whole=True),
    Packing("tsv_compress", "tsv_compress", {}, BOTH, FORMS),
    Packing("tall_mask", "tall_mask"),
    Packing("tall_mask, TIES", "tall_mask", {"multi_task": "ties"}),
    Packing("magnitude_mask", "magnitude_mask"),
    Packing("emr", "emr"),
)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How near a bundle's deltas are to those of the models, and at what size."""

    error: float
    """``‖Δ̂ - Δ‖² / ‖Δ‖²`` at λ = 1, mean over tasks; of whole weights, ``‖Ŵ - W‖² / ‖W‖²``."""
    theory: float | None
    """The same as the bundle's manifest expects it; None where there is no theory."""
    per_base: float
    """Size of the bundle's weight files, as a fraction of the base's."""
    per_models: float
    """The same, as a fraction of those of all fine-tunes or adapters."""


def packings(kind: str) -> list[Packing]:
    """What is tried with these fine-tunes."""
    return [packing for packing in PACKINGS if kind in packing.kinds]


def pack_and_unpack(
    packing: Packing, suite: Suite, kind: str, storage: str, *, scale: float | None = None
) -> tuple[list[State], Fidelity]:
    """Bundle the saved models in a folder, and load every task's model, retrieved from there, with transformers.

    Args:
        packing: The codec and its parameters.
        suite: The saved models.
        kind: Which fine-tunes.
        storage: How numbers are stored.
        scale: λ other than 1.

    Returns:
        Of every task, the retrieved encoder minus the base; and what there is to say about them all.
    """
    base, folder = _zeros_folder(suite) if packing.whole else suite.base_folder, suite.folder / "bundle"
    manifest = hubmerge.create_bundle(_recipe(packing, base, suite, kind, storage), out=folder).manifest
    deltas = [_retrieved(folder, base, suite, task, scale) for task in TASKS]
    shutil.rmtree(folder)
    return deltas, _fidelity(manifest, deltas, suite.deltas[kind])


def _fidelity(manifest: Manifest, deltas: Sequence[State], true: Sequence[State]) -> Fidelity:
    entries = [manifest.task(task.name) for task in TASKS]
    misses = [float(flat(difference(found, given)).norm()) for found, given in zip(deltas, true, strict=True)]
    expected = [entry.relative_error for entry in entries]
    known = [error**2 for error in expected if error is not None]
    return Fidelity(
        error=mean((miss / entry.norm) ** 2 for miss, entry in zip(misses, entries, strict=True)),
        theory=mean(known) if len(known) == len(expected) else None,
        per_base=manifest.size_bytes / manifest.base.size_bytes,
        per_models=manifest.size_bytes / manifest.plain_bytes,
    )


def _recipe(packing: Packing, base: Path, suite: Suite, kind: str, storage: str) -> hubmerge.Recipe:
    return hubmerge.Recipe.from_data(
        {
            "method": packing.codec,
            "base": str(base),
            "models": [{"repo": str(suite.tuned_folder(kind, task)), "name": task.name} for task in TASKS],
            "parameters": {**packing.parameters, "storage": storage},
            "output": {"format": "bundle"},
        }
    )


def _zeros_folder(suite: Suite) -> Path:
    folder = suite.folder / "zeros"
    if not folder.exists():
        encoder_of({name: torch.zeros_like(tensor) for name, tensor in suite.base.items()}).save_pretrained(folder)
    return folder


def _retrieved(bundle: Path, base: Path, suite: Suite, task: Task, scale: float | None) -> State:
    out = suite.folder / "retrieved"
    hubmerge.retrieve_task(bundle, task.name, out, base=base, scale=scale)
    if (out / "adapter_config.json").exists():
        model = assemble(encoder_of(suite.base), suite.heads[task.name], task.label_names)
        encoder = PeftModel.from_pretrained(model, out).merge_and_unload().vit
    else:
        encoder = ViTForImageClassification.from_pretrained(out).vit
    shutil.rmtree(out)
    return difference(state_of(encoder), suite.base)
