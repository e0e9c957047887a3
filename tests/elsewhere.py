"""A second device for machines without one: tensors that compute like the processor's, but do not mix with them.

What is wrong on a GPU is wrong here: an operation on tensors of both devices, and NumPy on a tensor of this one. The
device goes by the name of the meta device, the only other one that every build of PyTorch knows; its tensors have
values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hubmerge.devices import Lane
from hubmerge.reader import ChunkGroup

T = TypeVar("T")
ELSEWHERE = torch.device("meta")


class Elsewhere(torch.Tensor):
    """A tensor of the second device, around one of the processor's."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> Elsewhere:
        self = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, device=ELSEWHERE,
        )  # fmt: skip
        self.values = values
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Present(TorchDispatchMode):
    """While it is on, the second device is there for new tensors and for those of the processor to move to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the second device."""
    with Present():
        return tensor.to(ELSEWHERE)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    theirs = any(isinstance(x, Elsewhere) for x in tensors)
    ours = any(x.dim() for x in tensors if not isinstance(x, Elsewhere))
    # Numbers may come from the processor, and copying may cross over, as on any device.
    if theirs and ours and func is not torch.ops.aten.copy_.default:
        raise RuntimeError(f"{func}: tensors on different devices")
    target = kwargs.get("device")
    stays = theirs if target is None else torch.device(target) == ELSEWHERE
    bare = tree_map(lambda x: x.values if isinstance(x, Elsewhere) else x, (args, kwargs))
    if target is not None:
        bare[1]["device"] = torch.device("cpu")
    if func is torch.ops.aten._to_copy.default and target is not None:
        return Elsewhere(func(*bare[0], **bare[1])) if stays else func(*bare[0], **bare[1])
    found = func(*bare[0], **bare[1])
    if func._schema.is_mutable:  # in place, or into ``out``
        return kwargs.get("out", args[0])
    return tree_map(lambda x: Elsewhere(x) if stays and isinstance(x, torch.Tensor) else x, found)


class FarLane(Lane):
    """A lane whose device is the second one."""

    def compute(self, group: ChunkGroup, work: Callable[[], T]) -> T:
        """As any lane does, in the presence of the device."""
        with Present():
            return super().compute(group, work)


def far_lane(name: str, memory_bytes: int = 10**9) -> FarLane:
    """A lane of that name."""
    return FarLane(name, ELSEWHERE, memory_bytes)
