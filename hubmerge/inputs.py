"""The pinned models' bytes, from folders, the Hugging Face cache, or ranged requests: what the engine reads from."""

from __future__ import annotations

import logging
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from hubmerge import adapters
from hubmerge.errors import BudgetError, SourceError
from hubmerge.io.checked import Ahead, CheckedSource
from hubmerge.io.local import FileSource
from hubmerge.quantities import size
from hubmerge.spec import AdapterPart, ByteSource, LowRank, PinnedModel, TensorSpec

if TYPE_CHECKING:
    from hubmerge.hub import Hub

log = logging.getLogger(__name__)

Fetch = Literal["auto", "cache", "stream"]
_DISK_MARGIN_BYTES = 1_000_000_000


class Reads(Protocol):
    """What is read: a merge's plan, or a bundle's."""

    @property
    def models(self) -> tuple[PinnedModel, ...]:
        """The models."""

    @property
    def jobs(self) -> Sequence[Any]:
        """Each with ``action``, ``base``, ``inputs`` and ``source`` as in ``TensorJob``."""

    def pinned(self, source: int) -> PinnedModel:
        """The model with this index; -1 is the base."""


class Inputs:
    """Opens each file once and keeps it open until ``close``; safe to use from several threads.

    Args:
        plan: Which models.
        hub: How to reach those that are not folders.
        fetch: ``stream`` never stores an input; ``cache`` downloads into the Hugging Face cache; ``auto`` uses what
            the cache has, downloads if the disk has room to spare, and streams otherwise.
        max_disk_bytes: What all downloads together may take of the disk.
        output_bytes: What the output will take of the disk: room for it is left, as on one disk with the cache.

    Raises:
        BudgetError: With ``cache``, the downloads do not fit.
    """

    def __init__(
        self,
        plan: Reads,
        hub: Hub,
        fetch: Fetch = "auto",
        max_disk_bytes: int | None = None,
        output_bytes: int = 0,
    ) -> None:
        self._plan = plan
        self._hub = hub
        self._open: dict[tuple[int, str], ByteSource] = {}
        self._gates: defaultdict[tuple[int, str], threading.Lock] = defaultdict(threading.Lock)
        self._loaded: dict[tuple[int, str], torch.Tensor] = {}
        self._lock = threading.Lock()
        self._ahead = Ahead()
        self._wanted = {s: self._read_of(s) for s in range(-1, len(plan.models))}
        # The Hub's client is not loaded for folders alone.
        afar = any(plan.pinned(s).commit is not None for s in range(-1, len(plan.models)))
        free = _free_bytes(hub) - output_bytes if afar else 0
        self._room_bytes = free if max_disk_bytes is None else min(free, max_disk_bytes)
        self.stored_bytes = 0
        """What was downloaded into the cache so far."""
        self._stream = {s: self._streams(s, fetch) for s in range(-1, len(plan.models))}
        missing = {s: self._missing_bytes(s) for s in self._stream} if fetch == "cache" else {}
        if any(missing.values()) and self._room_bytes < 0:
            repos = sorted({plan.pinned(s).repo for s, size_bytes in missing.items() if size_bytes})
            raise BudgetError(
                f"{', '.join(repos)}: {size(sum(missing.values()))} to download, "
                f"{size(-self._room_bytes)} more than the disk has room for, or than may be used of it",
                hint="give --fetch stream, which stores no input; or free some space, or raise --max-disk, "
                f"by {size(-1.005 * self._room_bytes)}",
            )

    def __enter__(self) -> Inputs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        for label in self.unchecked():
            log.info("%s was not read whole, or not in its order: its digest was not compared", label)
        with self._lock:
            for source in self._open.values():
                source.close()
            self._open.clear()
            self._loaded.clear()

    def _read_of(self, source: int) -> set[TensorSpec]:
        """The tensors of a model that the plan reads."""
        model = self._plan.pinned(source)
        if model.adapter is not None:
            return set(model.tensors.values())
        found = set()
        for job in self._plan.jobs:
            if job.action == "copy" and job.source != source:
                continue
            given = job.base if source < 0 or job.action == "copy" else job.inputs[source]
            if isinstance(given, TensorSpec):
                found.add(given)
        return found

    def _missing_bytes(self, source: int) -> int:
        """What reading a model from the cache would have to download."""
        model = self._plan.pinned(source)
        if model.commit is None:
            return 0
        files = {tensor.file for tensor in self._wanted[source]}
        missing = (f for f in files if self._hub.cached_path(model.repo, model.commit, f) is None)
        return sum(model.files[f].size_bytes for f in missing)

    def _streams(self, source: int, fetch: Fetch) -> bool:
        """Whether a model is read over the network while merging; if not, what it takes of the disk is set aside."""
        model = self._plan.pinned(source)
        if model.commit is None:
            return False
        if fetch == "stream":
            return True
        needed = self._missing_bytes(source)
        if fetch == "auto" and needed > max(self._room_bytes, 0) / (len(self._plan.models) - source):
            return True  # what there is, is shared among those still to come
        self._room_bytes -= needed
        return False

    def unchecked(self) -> tuple[str, ...]:
        """Streamed files whose digest could not be compared: they were not read whole, or not in their order."""
        with self._lock:
            streamed = [s for s in self._open.values() if isinstance(s, CheckedSource)]
        return tuple(sorted(source.label for source in streamed if not source.is_checked))

    def is_remote(self, source: int) -> bool:
        """Whether small reads are dear. An adapter's file is read once, as a whole."""
        return self._stream[source] and self._plan.pinned(source).adapter is None

    def open(self, source: int, file: str) -> ByteSource:
        """A file of a model; the same object for the same file.

        Raises:
            SourceError: It cannot be opened.
            AccessError: The Hub no longer lets us.
        """
        with self._lock:
            found = self._open.get((source, file))
            gate = self._gates[source, file]
        if found is not None:
            return found
        # One lock for each file: opening may be a long download, which others must not wait for, nor ``close``.
        with gate:
            found = self._open.get((source, file)) or self._make(source, file)
            with self._lock:
                self._open[source, file] = found
            return found

    def _make(self, source: int, file: str) -> ByteSource:
        model = self._plan.pinned(source)
        spec = model.files[file]
        if model.root is not None:
            return FileSource(Path(model.root) / file, spec.size_bytes)
        assert model.commit is not None
        if self._stream[source]:
            remote = self._hub.open(model.repo, model.commit, spec)
            spans = ((t.start_byte, t.end_byte) for t in self._wanted[source] if t.file == file)
            return CheckedSource(remote, spec.sha256, remote.label, spans, self._ahead) if spec.sha256 else remote
        path = self._hub.cached_path(model.repo, model.commit, file)
        if path is None:
            log.info("downloading %s from %s", file, model.repo)
            path = self._hub.download(model.repo, model.commit, file)
            with self._lock:
                self.stored_bytes += spec.size_bytes
        return FileSource(path, spec.size_bytes)

    def read_small(self, source: int, path: str) -> bytes:
        """A small file of a model."""
        model = self._plan.pinned(source)
        return read_small(model, self._hub, path)

    def adapter_delta(self, source: int, part: AdapterPart, base: torch.Tensor, transposed: bool) -> torch.Tensor:
        """The dense delta an adapter makes of one parameter, in the stored orientation and of the base's shape."""
        config = self._plan.pinned(source).adapter or {}
        with self._named(source):
            return adapters.delta(part, config, lambda spec: self._load(source, spec), base, transposed=transposed)

    def adapter_factors(self, source: int, part: AdapterPart, dtype: torch.dtype) -> LowRank | None:
        """The same delta as factors, where it is known in that form; a linear weight's as (out, in)."""
        config = self._plan.pinned(source).adapter or {}
        with self._named(source):
            return adapters.factors(part, config, lambda spec: self._load(source, spec), dtype)

    @contextmanager
    def _named(self, source: int) -> Iterator[None]:
        """Put the adapter's name before what is wrong with a tensor of it."""
        try:
            yield
        except SourceError as e:
            model = self._plan.pinned(source)
            if model.repo in e.message:
                raise
            raise type(e)(f"{model.repo}: {e.message}", hint=e.hint) from e

    def _load(self, source: int, spec: TensorSpec) -> torch.Tensor:
        """A tensor of an adapter. They are small and some kinds share them between modules, so they are kept."""
        with self._lock:
            found = self._loaded.get((source, spec.name))
        if found is None:
            file, streamed = self.open(source, spec.file), self._stream[source]
            with self._gates[source, spec.file]:
                if (source, spec.name) not in self._loaded:
                    specs = [t for t in self._wanted[source] if t.file == spec.file] if streamed else [spec]
                    loaded = {(source, t.name): values for t, values in _read(file, specs)}
                    with self._lock:
                        self._loaded |= loaded
                found = self._loaded[source, spec.name]
        return found


def _read(file: ByteSource, specs: Sequence[TensorSpec]) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
    """Tensors that lie next to one another in a file, by one read."""
    start = min(t.start_byte for t in specs)
    raw = torch.empty(max(t.end_byte for t in specs) - start, dtype=torch.uint8)
    if len(raw):
        file.read_into(start, raw.numpy().data)
    for spec in specs:
        own = raw[spec.start_byte - start : spec.end_byte - start]
        if own.storage_offset() % spec.dtype.nbytes:
            own = own.clone()  # torch's tensors begin at multiples of their elements' size
        yield spec, own.view(spec.dtype.torch).view(spec.shape)


def read_small(model: PinnedModel, hub: Hub, path: str) -> bytes:
    """The bytes of a small file of a pinned model."""
    if model.root is not None:
        return (Path(model.root) / path).read_bytes()
    assert model.commit is not None
    return hub.read_small(model.repo, model.commit, path)


def _free_bytes(hub: Hub) -> int:
    """What downloads may take of the disk that the cache is on; some is left for others."""
    folder = Path(hub.cache_dir)
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free - _DISK_MARGIN_BYTES
