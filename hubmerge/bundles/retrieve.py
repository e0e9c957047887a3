"""A task's model out of a bundle, as an ordinary folder: base + scale · decoded delta, tensor by tensor."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hubmerge import align, layout
from hubmerge.bundles.companions import all_files
from hubmerge.bundles.store import DAMAGED, Bundle
from hubmerge.bundles.stream import CHUNK, PIECE, StoredParts, ranges
from hubmerge.codec import Target
from hubmerge.engine import Progress
from hubmerge.errors import IntegrityError
from hubmerge.hub import Hub
from hubmerge.inputs import Fetch, Inputs, read_small
from hubmerge.output import FolderSink, Written
from hubmerge.reader import Scratch, Slot
from hubmerge.schedule import Cancelled, Schedule
from hubmerge.shipping import Outputs
from hubmerge.spec import PinnedModel, TensorJob, TensorSpec, natural_key
from hubmerge.tuning import threads

_Finished = Callable[[int, str | None], None]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is read, as ``Inputs`` wants to know it; the only model is the base."""

    base: PinnedModel
    jobs: tuple[TensorJob, ...]
    models: tuple[PinnedModel, ...] = ()

    def pinned(self, source: int) -> PinnedModel:
        """The base."""
        return self.base


class Retrieval:
    """Writes one task's model; of an adapter, the base with its changes.

    Args:
        bundle: Where from.
        task: Name of the task.
        scale: λ; by default the bundle's.
        workers: Threads.

    Raises:
        UsageError: No such task.
        SourceError: The base is not at hand, or another one.
    """

    def __init__(self, bundle: Bundle, task: str, *, scale: float | None = None, workers: int | None = None) -> None:
        self.bundle, self.workers = bundle, workers
        self.task = bundle.manifest.task(task)
        self.codec, self.params = bundle.manifest.codec_of()
        self.scale = self.params.scale if scale is None else scale
        self.base = bundle.base()
        self.targets = [t.target() for t in bundle.manifest.targets]
        sources = self.codec.sources(self.params, self.targets, bundle.manifest.identity(self.task))
        # Where each tensor's delta stands.
        self.places = {sources.get(t.name, t.name): t for t in self.targets}
        self._schedule = Schedule()

    def run(
        self,
        out: Path,
        *,
        fetch: Fetch = "auto",
        max_disk_bytes: int | None = None,
        shard_bytes: int = 5_000_000_000,
        overwrite: bool = False,
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> tuple[Written, ...]:
        """Write the folder, which appears under its name only when everything in it is whole.

        Raises:
            IntegrityError: The bundle's files are damaged.
            HubMergeError: What else went wrong; nothing is left behind.
        """
        bundle = self.bundle
        bundle.check([*bundle.files(task=self.task), *bundle.head_files(self.task)])
        jobs, outputs = layout.pack(self._jobs(), shard_bytes)
        plan = _Plan(self.base, tuple(jobs))
        total = sum(o.size_bytes for o in outputs)
        with (
            FolderSink(out, "retrieve", total, overwrite=overwrite) as sink,
            Inputs(plan, bundle.hub, fetch, max_disk_bytes) as inputs,
        ):
            files = Outputs(outputs, sink, stopped=lambda: self._schedule.error is not None)
            parts, lock, done = bundle.parts(self.task), threading.Lock(), [0]

            def finished(n: int, path: str | None) -> None:
                with lock:
                    done[0] += n
                    so_far = done[0]
                progress(Progress(so_far, total, path))

            try:
                for job in jobs:
                    self._add(job, inputs, files, parts, finished)
                files.ship_empty()
                self._schedule.run({"cpu": threads(self.workers, remote=inputs.is_remote(-1))})
            except BaseException:
                files.abort()
                raise
            index = layout.index_file(jobs, outputs)
            sink.commit(self._small_files(bundle.hub) | ({index.path: index.content or b""} if index else {}))
            return tuple(sink.written)

    def _jobs(self) -> list[TensorJob]:
        """The model's own tensors, under its own names: the base's, and those of the head."""
        jobs: list[TensorJob] = []
        for name, spec in sorted(self.base.tensors.items(), key=lambda kv: natural_key(kv[0])):
            if name not in self.task.absent:
                action = "merge" if name in self.places else "copy"
                jobs.append(_job(len(jobs), self.task.own_name(name), spec, -1, action))
        for name, spec in self.bundle.tensors(self.bundle.head_files(self.task)).items():
            jobs.append(_job(len(jobs), name, spec, 0, "copy"))
        if len({j.name for j in jobs}) < len(jobs):
            twice = next(j.name for i, j in enumerate(jobs) if j.name in {k.name for k in jobs[:i]})
            raise IntegrityError(
                f"{self.bundle.label}: task {self.task.name!r} has two tensors {twice!r}", hint=DAMAGED
            )
        return jobs

    def _add(self, job: TensorJob, inputs: Inputs, outputs: Outputs, parts: StoredParts, finished: _Finished) -> None:
        spec = job.base
        assert spec is not None
        pieces = ranges(self.codec, self.params, job.numel, PIECE) if job.action == "merge" else _pieces(job.numel)
        for a, b in pieces:
            self._schedule.add(
                (job.output, job.start_byte, a),
                lambda s, a=a, b=b: self._write(s, job, spec, a, b, inputs, outputs, parts, finished),  # type: ignore[misc]
            )

    def _write(
        self, scratch: Scratch, job: TensorJob, spec: TensorSpec, start: int, stop: int, inputs: Inputs,
        outputs: Outputs, parts: StoredParts, finished: _Finished,
    ) -> None:  # fmt: skip
        head = job.source == 0
        slot = Slot(spec, self.bundle.source(spec.file) if head else inputs.open(-1, spec.file))
        if not head and inputs.is_remote(-1):
            slot.stage(start, stop)
        writer, width = outputs.writer(job.output), job.dtype.nbytes
        whole = job.action == "merge" and self.codec.whole(self.params)
        step = max(stop - start, 1) if whole else CHUNK
        for a in range(start, max(stop, start + 1), step):
            if self._schedule.error is not None:
                raise Cancelled
            scratch.reset()
            b = min(a + step, stop)
            values = slot.read(a, b - a, scratch)
            if job.action == "merge":
                values = self.merged(values, spec.name, parts, a, b)
            writer.write(job.start_byte + a * width, values.contiguous().view(torch.uint8).numpy().data)
        is_last = outputs.written(job.output, job.start_byte + start * width, job.start_byte + stop * width)
        finished((stop - start) * width, outputs.path(job.output) if is_last else None)

    def merged(self, base: torch.Tensor, name: str, parts: StoredParts, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the task's version of a base tensor, in the base's dtype."""
        target: Target = self.places[name]
        codec, p = self.codec, self.params
        kept = codec.parts(p, target, self.task.ranks.get(target.name))
        stored = parts.load(target, kept, p.storage, start, stop, whole=codec.whole(p))
        identity = self.bundle.manifest.identity(self.task)
        delta = codec.decode(stored, target, identity, p, start=start, facts=self.task.facts)
        wide = base.to(torch.promote_types(base.dtype, torch.float32))
        return torch.add(wide, delta, alpha=self.scale).to(base.dtype)

    def _small_files(self, hub: Hub) -> dict[str, bytes]:
        """The task's config and the other small files of its model."""
        files = all_files(self.bundle, self.task, self.base, hub)
        if self.task.config:
            files["config.json"] = self.bundle.read(self.task.config_path)
        elif "config.json" in self.base.files:
            files["config.json"] = read_small(self.base, hub, "config.json")
        return files


def _pieces(numel: int) -> list[tuple[int, int]]:
    return [(a, min(a + PIECE, numel)) for a in range(0, max(numel, 1), PIECE)]


def _job(index: int, name: str, spec: TensorSpec, source: int, action: str) -> TensorJob:
    return TensorJob(
        index=index, name=name, kind=align.kind_of(name, spec.shape), shape=spec.shape, dtype=spec.dtype, output=-1,
        start_byte=0, end_byte=0, action=action, base=spec, inputs=(), source=source,  # type: ignore[arg-type]
    )  # fmt: skip
