"""Where everything a bundle keeps will lie: files are laid out from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hubmerge.codec import Codec, CodecParams, Part, Target
from hubmerge.io.header import build_header
from hubmerge.spec import Input, OutputFile, TensorSpec, natural_key
from hubmerge.storage import Storage, Stored


@dataclass(frozen=True, slots=True)
class Owner:
    """A task that has files of its own."""

    id: int
    name: str
    ranks: Mapping[str, int]
    """Of targets whose deltas are kept as factors."""
    heads: Mapping[str, TensorSpec]
    """What only this task has."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored tensor will lie."""

    stored: Stored
    output: int
    start_byte: int

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The bytes of the file that keep the part's values [start, stop)."""
        a, b = self.stored.span(start, stop)
        return self.start_byte + a * self.stored.dtype.nbytes, self.start_byte + b * self.stored.dtype.nbytes


@dataclass(frozen=True, slots=True)
class PlacedPart:
    """A part of a target, and where the tensors that keep it will lie."""

    part: Part
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class HeadCopy:
    """A tensor that only one task has, kept as it is."""

    source: int
    base: TensorSpec
    """The tensor; named as jobs of a merge name what they copy."""
    output: int
    start_byte: int
    inputs: tuple[Input, ...] = ()
    action: str = "copy"


class Files:
    """The weight files of the bundle that this plan writes."""

    def __init__(
        self,
        codec: Codec,
        params: CodecParams,
        targets: Sequence[Target],
        tasks: Sequence[Owner],
        shard_bytes: int,
    ) -> None:
        self.outputs: list[OutputFile] = []
        self.places: dict[tuple[int, str, str], tuple[Place, ...]] = {}
        self.heads: list[HeadCopy] = []
        storage = params.storage
        shared = [_stored(codec, params, t, None, "shared", storage) for t in targets]
        self._pack(-1, targets, shared, shard_bytes)
        for i, task in enumerate(tasks):
            own = [_stored(codec, params, t, task.ranks.get(t.name), "task", storage) for t in targets]
            self._write(i, f"tasks/{task.id}.safetensors", list(zip(targets, own, strict=True)))
            self._heads(i, task)

    def _pack(self, owner: int, targets: Sequence[Target], stored: Sequence[_Stored], shard_bytes: int) -> None:
        """Shards of the shared parts, in canonical order, greedily."""
        shards: list[list[tuple[Target, _Stored]]] = [[]]
        size = 0
        for target, parts in zip(targets, stored, strict=True):
            own = sum(_bytes(s) for _, ones in parts for _, s in ones)
            if shards[-1] and size + own > shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append((target, parts))
            size += own
        for i, shard in enumerate(shards):
            self._write(owner, f"bundle-{i + 1:05d}-of-{len(shards):05d}.safetensors", shard)

    def _write(self, owner: int, path: str, content: Sequence[tuple[Target, _Stored]]) -> None:
        """One file, the widest dtype first, so that every tensor is aligned."""
        entries = [(t.name, part.name, name, s) for t, parts in content for part, ones in parts for name, s in ones]
        if not entries:
            return
        ordered = sorted(entries, key=lambda e: -e[3].dtype.nbytes)
        header, spans = build_header((name, s.dtype, s.shape) for _, _, name, s in ordered)
        output = len(self.outputs)
        self.outputs.append(OutputFile(path, header, spans[-1][1]))
        found = {name: Place(s, output, start) for (_, _, name, s), (start, _) in zip(ordered, spans, strict=True)}
        for target, parts in content:
            for part, ones in parts:
                self.places[owner, target.name, part.name] = tuple(found[name] for name, _ in ones)

    def _heads(self, i: int, task: Owner) -> None:
        specs = sorted(task.heads.items(), key=lambda kv: natural_key(kv[0]))
        if not specs:
            return
        ordered = sorted(specs, key=lambda kv: -kv[1].dtype.nbytes)
        header, spans = build_header((name, s.dtype, s.shape) for name, s in ordered)
        output = len(self.outputs)
        self.outputs.append(OutputFile(f"heads/{task.name}.safetensors", header, spans[-1][1]))
        self.heads += [HeadCopy(i, s, output, start) for (_, s), (start, _) in zip(ordered, spans, strict=True)]

    def placed(self, owner: int, target: Target, parts: Iterable[Part]) -> tuple[PlacedPart, ...]:
        """The parts of a target with their places."""
        return tuple(PlacedPart(q, self.places[owner, target.name, q.name]) for q in parts)


_Stored = list[tuple[Part, list[tuple[str, Stored]]]]


def _stored(
    codec: Codec, params: CodecParams, target: Target, rank: int | None, owner: str, storage: Storage
) -> _Stored:
    parts = [q for q in codec.parts(params, target, rank) if q.owner == owner]
    return [(q, list(q.stored(target, storage).items())) for q in parts]


def _bytes(stored: Stored) -> int:
    n = stored.dtype.nbytes
    for s in stored.shape:
        n *= s
    return n
