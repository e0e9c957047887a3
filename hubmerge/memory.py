"""Merging tensors that are in memory: the methods' contract without files, plan or engine."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from pydantic import ValidationError

from hubmerge.errors import UsageError
from hubmerge.methods import get_method
from hubmerge.spec import Algorithm, Kind, LowRank, Method, Params, TensorGroup

CHUNK = 8 * 32768
"""Elements per chunk of an element-wise method: three chunks fit the processor's cache."""
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class MemoryGroup(TensorGroup):
    """Elements [start, stop) of tensors in memory.

    A model is its own tensor, or the factors of its delta in the orientation of a linear layer, (out, in).
    A tensor counts as one of a layer unless ``layer`` says otherwise.
    """

    def __init__(
        self,
        base: torch.Tensor | None,
        models: Sequence[torch.Tensor | LowRank],
        *,
        tasks: Sequence[str],
        weights: Sequence[float],
        params: Sequence[Any],
        name: str = "tensor",
        index: int = 0,
        kind: Kind = "linear",
        layer: int | None = 0,
        seed: int = 0,
    ) -> None:
        self.name, self.index, self.kind, self.layer, self.seed = name, index, kind, layer, seed
        self.tasks, self.weights, self.params = tuple(tasks), tuple(weights), tuple(params)
        self.shape = tuple(models[0].shape)
        self.start = 0
        self._range: tuple[int, int] | None = None
        self._base, self._models = base, tuple(models)
        dtypes = [m.up.dtype if isinstance(m, LowRank) else m.dtype for m in models]
        dtypes += [] if base is None else [base.dtype]
        self.compute = torch.float64 if torch.float64 in dtypes else torch.float32

    def chunk(self, start: int, stop: int) -> Self:
        """The same tensor's flat elements [start, stop)."""
        part = copy.copy(self)
        part.start, part._range = start, (start, stop)
        return part

    def _values(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._range is not None:
            tensor = tensor.reshape(-1)[self._range[0] : self._range[1]]
        return tensor.to(self.compute, copy=True, memory_format=torch.contiguous_format)

    def base(self) -> torch.Tensor:
        """The base's values; zeros without a base."""
        if self._base is not None:
            return self._values(self._base)
        return self._values(torch.zeros(self.shape, dtype=self.compute))

    def model(self, i: int) -> torch.Tensor:
        """A copy of model i's values."""
        one = self._models[i]
        return self._values(one.dense()).add_(self.base()) if isinstance(one, LowRank) else self._values(one)

    def delta(self, i: int) -> torch.Tensor:
        """Model i minus base, in a new buffer."""
        one = self._models[i]
        return self._values(one.dense()) if isinstance(one, LowRank) else self._values(one).sub_(self.base())

    def factors(self, i: int) -> LowRank | None:
        """Model i's delta as factors, if it was given so and the group is whole."""
        one = self._models[i]
        return one if isinstance(one, LowRank) and self._range is None else None


def chunks(method: Algorithm, p: Any, group: MemoryGroup, size: int = CHUNK) -> Iterable[MemoryGroup]:
    """The group as the method, or codec, wants to see it: whole, or cut into flat chunks."""
    if method.whole(p):
        return [group]
    return [group.chunk(a, min(a + size, group.numel)) for a in range(0, max(group.numel, 1), size)]


def gather(method: Algorithm, p: Any, groups: Sequence[TensorGroup]) -> Any | None:
    """Run the observing passes over the chunks of one scope; None for a method without statistics."""
    stats = method.begin(p)
    while stats is not None and not stats.done:
        total = None
        for group in groups:
            if stats.wants(group.name):
                part = method.observe(group, p, stats)
                total = part if total is None else total + part
        stats = method.settle(stats, total, p)
    return stats


def merge_group(method: Method, p: Any, group: MemoryGroup, *, chunk_size: int = CHUNK) -> torch.Tensor:
    """Merge one tensor that is a scope of its own; the result has the compute dtype and the group's shape."""
    parts = list(chunks(method, p, group, chunk_size))
    stats = gather(method, p, parts)
    return join(method, p, group, parts, stats)


def join(method: Method, p: Any, group: MemoryGroup, parts: Iterable[MemoryGroup], stats: Any | None) -> torch.Tensor:
    """Merge the chunks and put them together, (*group.shape)."""
    merged = []
    for part in parts:
        out = method.merge(part, p, stats)
        merged.append(out.onto(part.base()) if isinstance(out, LowRank) else out)
    return (merged[0] if len(merged) == 1 else torch.cat(merged)).reshape(group.shape)


def merge_tensors(
    method: str,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    *,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    kind: Kind = "linear",
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Merge one tensor held in memory; the inputs stay as they are.

    Args:
        method: Name of a merge method.
        base: The base's tensor in its stored orientation; may be None for a method that does not use it.
        models: The models' tensors, of the base's shape.
        weights: One coefficient per model; 1 by default.
        parameters: The method's parameters; one that may differ between models may be a list with an entry per model.
        kind: What the tensor is; matrix methods treat only ``linear`` as a matrix.
        names: The models' names, which random methods key their bits by; "0", "1", … by default.
        seed: Seed of random methods.

    Returns:
        The merged tensor in the base's dtype (without a base, the first model's); float64 if any input is float64.

    Raises:
        UsageError: Arguments that do not fit together.
    """
    chosen = get_method(method)
    names = [str(i) for i in range(len(models))] if names is None else list(names)
    weights = [1.0] * len(models) if weights is None else [float(w) for w in weights]
    _check_tensors(chosen, base, models)
    _check_lengths(len(models), weights=weights, names=names)
    p, per_model = model_params(chosen, dict(parameters or {}), len(models))
    if (problem := chosen.problem(p, weights)) is not None:
        raise UsageError(f"{method}: {problem}")
    group = MemoryGroup(base, models, tasks=names, weights=weights, params=per_model, kind=kind, seed=seed)
    with torch.no_grad():
        merged = merge_group(chosen, p, group)
    result = (models[0] if base is None else base).dtype
    return merged.to(torch.float64 if group.compute == torch.float64 else result)


def model_params(method: Algorithm, values: dict[str, Any], count: int) -> tuple[Params, tuple[Params, ...]]:
    """The method's parameters, and as they hold for each of ``count`` models.

    Raises:
        UsageError: An unknown name, a value out of range, or a list whose length is not the number of models.
    """
    fields = method.parameters.model_fields
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            suggestion = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(
                f"{method.name}: unknown parameter {key!r}{suggestion}", hint=f"its parameters: {', '.join(fields)}"
            )
    lists = {k: v for k, v in values.items() if isinstance(v, list | tuple) and _is_per_model(fields[k])}
    _check_lengths(count, **lists)
    shared = {k: v for k, v in values.items() if k not in lists}
    each = [_parsed(method, {**shared, **{k: v[i] for k, v in lists.items()}}) for i in range(count)]
    return _parsed(method, shared), tuple(each)


def _is_per_model(info: Any) -> bool:
    extra = info.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("per_model"))


def _parsed(method: Algorithm, values: dict[str, Any]) -> Params:
    try:
        return method.parameters(**values)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "parameters"
        raise UsageError(f"{method.name}: {where} = {first['input']!r}: {first['msg']}") from e


def _check_lengths(count: int, **lists: Sequence[Any]) -> None:
    for what, values in lists.items():
        if len(values) != count:
            raise UsageError(f"{what} has {len(values)} entries for {count} models", hint="give one entry per model")


def _check_tensors(method: Method, base: torch.Tensor | None, models: Sequence[torch.Tensor]) -> None:
    most = method.max_models
    if len(models) < method.min_models or (most is not None and len(models) > most):
        wanted = f"at least {method.min_models}" if most is None else f"{method.min_models} to {most}"
        raise UsageError(f"{method.name} takes {wanted} models, not {len(models)}")
    if base is None and method.uses_base:
        raise UsageError(f"{method.name} needs the base's tensor, not None")
    reference = models[0] if base is None else base
    label: Callable[[int], str] = lambda i: f"models[{i}]" if i >= 0 else "base"  # noqa: E731
    for i, tensor in enumerate(models if base is None else [base, *models], start=0 if base is None else -1):
        if tensor.dtype not in FLOATS:
            raise UsageError(f"{label(i)} has dtype {tensor.dtype}", hint="convert it to a floating-point dtype first")
        if tensor.shape != reference.shape:
            raise UsageError(f"{label(i)} has shape {tuple(tensor.shape)}, not {tuple(reference.shape)}")
