"""Where a checkpoint's tensors ended up in the model that transformers made of them.

Most became parameters as they are, and are recognised by their memory. The others (experts that were stacked,
projections that were fused or split) are found by letting transformers undo its conversion on tensors that hold
positions instead of weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from hubmerge.adapters.quiet import quiet
from hubmerge.errors import UsageError

_LAYER = re.compile(r".*?\.\d+\.")


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a stored tensor, and the parameter or buffer that they are, or are a part of."""

    name: str
    """In the model."""
    part: Part | None = None
    """None if all rows are the whole of it."""

    def memory(self, owned: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Its values in the model, for writing.

        Args:
            owned: ``tensors_of`` the model.

        Raises:
            UsageError: The model was changed so that they cannot be written.
        """
        found = owned.get(self.name)
        if found is None or (self.part is not None and not found.is_contiguous()):
            what = "is gone" if found is None else "is not contiguous any more"
            raise UsageError(f"the model's {self.name!r} {what}", hint="make a new one with bundle.model")
        if self.part is None:
            return found
        return found.as_strided(self.part.shape, self.part.strides, found.storage_offset() + self.part.offset)


@dataclass(frozen=True, slots=True)
class Part:
    """Which rows of the stored tensor, and where they lie in the contiguous parameter."""

    rows: slice
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


Places = Mapping[str, tuple[Piece, ...]]
"""By the stored tensor's name; without those that the model has no use for."""


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """All parameters and buffers of the model, as data."""
    found: dict[str, torch.Tensor] = {}
    for members in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        found |= {name: tensor.data for name, tensor in members}
    return found


def locate(model: Any, given: Mapping[str, torch.Tensor], missing: Collection[str]) -> tuple[Places, list[str]]:
    """Find the tensors that a model was made of.

    Args:
        model: What transformers made.
        given: The state dict that it got.
        missing: Names of the model for which it found nothing there.

    Returns:
        The places, and the model's tensors that are in none of them although something was given for them.
    """
    owned = _owned(model)
    found = _by_memory(owned, given)
    taken = {p.name for pieces in found.values() for p in pieces}
    rest = {name: t for name, t in owned.items() if name not in taken and name not in missing}
    found |= _by_position(model, rest, {name: t for name, t in given.items() if name not in found})
    covered: defaultdict[str, int] = defaultdict(int)
    for pieces in found.values():
        for piece in (p for p in pieces if p.name in rest):
            covered[piece.name] += piece.memory(rest).numel()
    return found, [name for name in rest if covered[name] < rest[name].numel()]


def _owned(model: Any) -> dict[str, torch.Tensor]:
    """Everything of the model that a checkpoint keeps; what is tied once."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if tensor.numel():
            found.setdefault(tensor.data_ptr(), (name, tensor))
    return dict(found.values())


def _by_memory(owned: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> dict[str, tuple[Piece, ...]]:
    names = {t.data_ptr(): name for name, t in owned.items()}
    found: dict[str, tuple[Piece, ...]] = {}
    for stored, tensor in given.items():
        name = names.get(tensor.data_ptr()) if tensor.numel() else None
        if name is not None and owned[name].shape == tensor.shape:
            found[stored] = (Piece(name),)
    return found


def _by_position(
    model: Any, rest: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]
) -> dict[str, tuple[Piece, ...]]:
    """The converted tensors; positions take eight bytes per element, so this goes layer by layer."""
    layers: defaultdict[str, list[str]] = defaultdict(list)
    for name in rest:
        layer = _LAYER.match(name)
        layers[layer.group() if layer else ""].append(name)
    found: dict[str, tuple[Piece, ...]] = {}
    for names in layers.values():
        starts, positions, total = [], {}, 0
        for name in names:
            starts.append(total)
            total += rest[name].numel()
            positions[name] = torch.arange(starts[-1], total).view(rest[name].shape)
        for stored, position in _undone(model, positions).items():
            if stored in given and given[stored].shape == position.shape:
                pieces = _pieces(position, names, starts, rest)
                if pieces and all(_holds(p.memory(rest), p, given[stored]) for p in pieces):
                    found[stored] = pieces
    return found


def _undone(model: Any, positions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict as a checkpoint has it."""
    from transformers.core_model_loading import revert_weight_conversion

    with quiet():
        try:
            found: dict[str, torch.Tensor] = revert_weight_conversion(model, positions)
        except (ValueError, RuntimeError, KeyError, AttributeError, TypeError):
            return {}  # a conversion that cannot be undone: what is not found is reported
    return found


def _pieces(
    position: torch.Tensor, names: Sequence[str], starts: Sequence[int], owned: Mapping[str, torch.Tensor]
) -> tuple[Piece, ...]:
    """Runs of rows that lie in one parameter each; none if they are strewn."""
    rows = position.view(1) if position.ndim == 0 else position
    owner = torch.bucketize(
        rows.flatten(1)[:, 0].contiguous() if rows.ndim > 1 else rows, torch.tensor(starts), right=True
    )
    ends = [0, *(torch.nonzero(owner.diff())[:, 0] + 1).tolist(), len(rows)]
    found = []
    for a, b in pairwise(ends):
        i = int(owner[a]) - 1
        own = owned[names[i]]
        part = _part(rows[a:b] - starts[i], slice(a, b), own.numel())
        if part is None:
            return ()
        whole = position.shape == own.shape and part.offset == 0 and part.strides == own.stride()
        found.append(Piece(names[i], None if whole else part))
    return tuple(found)


def _part(position: torch.Tensor, rows: slice, limit: int) -> Part | None:
    """Strides and offset that describe these positions, if any do."""
    offset = int(position.flatten()[0])
    strides, described = [], torch.tensor(offset)
    for dim, size in enumerate(position.shape):
        at = [0] * position.ndim
        at[dim] = min(1, size - 1)
        strides.append(int(position[tuple(at)]) - offset)
        ones = [size if d == dim else 1 for d in range(position.ndim)]
        described = described + (torch.arange(size) * strides[-1]).view(ones)
    if min(strides) < 0 or int(position.max()) >= limit or not torch.equal(position, described):
        return None
    return Part(rows, tuple(position.shape), tuple(strides), offset)


def _holds(memory: torch.Tensor, piece: Piece, given: torch.Tensor) -> bool:
    """Whether the model's values there are what was given: not so if a conversion changes values."""
    expected = given if piece.part is None else given.view(-1, *given.shape[1:])[piece.part.rows]
    return torch.equal(memory, expected.reshape(memory.shape).to(memory.dtype))
