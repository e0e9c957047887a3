"""Create a bundle, add a task to it, remove one: each result appears all at once, in a folder or as one commit."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hubmerge
from hubmerge.bundles.card import bundle_card
from hubmerge.bundles.lock import bundle_lock
from hubmerge.bundles.manifest import FORMAT_VERSION, MANIFEST_NAME, FileEntry, Manifest, Origin, TargetEntry, TaskEntry
from hubmerge.bundles.planning import BundlePlan, plan_addition, plan_bundle
from hubmerge.bundles.store import Bundle
from hubmerge.bundles.stream import Encoder, Findings, StoredParts
from hubmerge.errors import SourceError, UsageError
from hubmerge.hub import Hub
from hubmerge.inputs import Fetch, Inputs, read_small
from hubmerge.lock import LOCK_NAME, dumps
from hubmerge.output import FolderSink, Written
from hubmerge.publish import Publisher, PublishOptions, ShardByShard
from hubmerge.resolve import pin_model, pin_recipe
from hubmerge.spec import OutputFile, PinnedModel

if TYPE_CHECKING:
    from hubmerge.recipe import Recipe

CARD_NAME = "README.md"
RECIPE_NAME = "hubmerge.yaml"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Running:
    """How to run; none of it changes a bit of the result."""

    workers: int = 2
    fetch: Fetch = "auto"
    max_disk_bytes: int | None = None
    progress: Progress = lambda *_: None


@dataclass(frozen=True, slots=True)
class Made:
    """A bundle that was written."""

    manifest: Manifest
    files: tuple[Written, ...]
    """What was written; files that stayed as they were are not among them."""
    path: Path | None = None
    url: str | None = None
    commit: str | None = None
    plain_bytes: int | None = None
    """What the tasks' own weight files take, where that is known."""

    @property
    def size_bytes(self) -> int:
        """Of all weight files of the bundle."""
        return sum(f.size_bytes for f in self.manifest.files)


# --- where it goes ----------------------------------------------------------------------------------------------


class Destination:
    """Where a bundle is written: a folder, or a repository. Nothing is seen there before ``finish``."""

    def __init__(self, folder: Path | None, publisher: Publisher | None, sink: Any, old: Bundle | None) -> None:
        self.sink = sink
        self._folder, self._publisher, self._old = folder, publisher, old

    @property
    def repo(self) -> str | None:
        """The repository."""
        return self._publisher.repo if self._publisher is not None else None

    def finish(self, manifest: Manifest, small: Mapping[str, bytes], plain_bytes: int | None = None) -> Made:
        """Make everything visible."""
        written: tuple[Written, ...] = tuple(self.sink.written)
        if self._publisher is not None:
            published = self._publisher.finish(small)
            return Made(manifest, written, url=published.url, commit=published.commit, plain_bytes=plain_bytes)
        if self._old is not None:
            _take_over(self._old, self.sink.folder, {f.path for f in manifest.files} - {w.path for w in written})
        self.sink.commit(small)
        return Made(manifest, written, path=self._folder, plain_bytes=plain_bytes)


def _take_over(old: Bundle, folder: Path, kept: set[str]) -> None:
    """Bring the files that stay into the new folder: as links where the disk allows it, for they never change."""
    for name in sorted(kept):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(old.path(name), target)
        except OSError:
            shutil.copyfile(old.path(name), target)


@contextmanager
def into_folder(
    out: Path, outputs: Sequence[OutputFile], digest: str, *, overwrite: bool = False, old: Bundle | None = None
) -> Iterator[Destination]:
    """A local folder."""
    needed_bytes = sum(o.size_bytes for o in outputs)
    with FolderSink(out, digest[:12], needed_bytes, overwrite=overwrite or old is not None) as sink:
        yield Destination(sink.out, None, sink, old)


@contextmanager
def into_repo(
    hub: Hub, repo: str, outputs: Sequence[OutputFile], options: PublishOptions, max_disk_bytes: int | None
) -> Iterator[Destination]:
    """A repository. Files that are filled side by side are on the disk at the same time."""
    with (
        tempfile.TemporaryDirectory(prefix="hubmerge-") as folder,
        Publisher(hub, repo, options) as publisher,
    ):
        sink = ShardByShard(Path(folder), publisher, outputs, max_disk_bytes, at_once=max(len(outputs), 1))
        yield Destination(None, publisher, sink, None)


Open = Callable[[Sequence[OutputFile], str, PublishOptions], Any]
"""From what will be written, the plan's digest and what is demanded of a repository to a Destination."""


# --- create -----------------------------------------------------------------------------------------------------


def create(recipe: Recipe, hub: Hub, destination: Open, running: Running) -> Made:
    """Encode a recipe's models as a new bundle.

    Raises:
        HubMergeError: What went wrong; nothing is left behind.
    """
    base, models = pin_recipe(recipe, hub)
    plan = plan_bundle(recipe, base, models)
    with destination(plan.outputs, plan.digest, PublishOptions()) as place:
        findings = _encode(plan, hub, place, running)
        tasks = tuple(_entry(plan, i, findings) for i in range(len(plan.tasks)))
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            hubmerge_version=hubmerge.__version__,
            codec=plan.codec.name,
            parameters=plan.params.model_dump(mode="json"),
            seed=plan.seed,
            base=Origin.of(base),
            targets=tuple(TargetEntry.of(t) for t in plan.targets),
            tasks=tasks,
            next_id=len(tasks),
            factors=plan.factors,
            files=_file_entries(place.sink.written),
        )
        plain = sum(_weights_bytes(m) for m in models)
        return _finish(place, manifest, _small(plan, hub), base, plan.digest, plain)


def _encode(
    plan: BundlePlan, hub: Hub, place: Destination, running: Running, before: StoredParts | None = None,
    *, remove: bool = False,
) -> Findings:  # fmt: skip
    with Inputs(plan, hub, running.fetch, running.max_disk_bytes) as inputs:
        encoder = Encoder(
            plan, inputs, place.sink, running.workers, before=before, remove=remove, progress=running.progress
        )
        return encoder.run()


def _entry(plan: BundlePlan, i: int, found: Findings) -> TaskEntry:
    task = plan.tasks[i]
    return TaskEntry(
        id=task.identity.id,
        name=task.model.name,
        source=Origin.of(task.model),
        adapter=task.model.adapter is not None,
        prefix=task.prefix,
        config=any(f.path == f"heads/{task.model.name}.config.json" for f in plan.files),
        absent=task.absent,
        ranks=dict(task.ranks),
        modules=task.modules if plan.factors else {},
        facts=dict(found.facts[i]),
        norm=found.norms[i],
        error=found.errors[i] if found.errors is not None else None,
    )


def _file_entries(written: Sequence[Written]) -> tuple[FileEntry, ...]:
    entries = [FileEntry(path=w.path, size_bytes=w.size_bytes, sha256=w.sha256) for w in written]
    return tuple(sorted(entries, key=lambda f: f.path))


def _small(plan: BundlePlan, hub: Hub) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for f in plan.files:
        source = plan.base if f.source is None else plan.pinned(f.source)
        found[f.path] = f.content if f.content is not None else read_small(source, hub, f.path)
    return found


def _finish(
    place: Destination,
    manifest: Manifest,
    small: dict[str, bytes],
    base: PinnedModel,
    digest: str,
    plain_bytes: int | None = None,
) -> Made:
    recipe = recipe_of(manifest)
    small[RECIPE_NAME] = recipe.to_yaml().encode()
    small[MANIFEST_NAME] = manifest.dumps().encode()
    small[CARD_NAME] = bundle_card(manifest, base, place.repo, plain_bytes).encode()
    files = [Written(f.path, f.size_bytes, f.sha256) for f in manifest.files]
    files += [Written(path, len(c), hashlib.sha256(c).hexdigest()) for path, c in small.items()]
    small[LOCK_NAME] = dumps(bundle_lock(manifest, recipe.normalized(), files, digest)).encode()
    return place.finish(manifest, small, plain_bytes)


def recipe_of(manifest: Manifest) -> Recipe:
    """The recipe that makes such a bundle; a local folder stands in it as ``./NAME``."""
    from hubmerge.recipe import Recipe as RecipeClass

    def place(origin: Origin) -> str:
        return f"{origin.repo}@{origin.commit}" if origin.repo else f"./{origin.name}"

    return RecipeClass.from_data(
        {
            "method": manifest.codec,
            "base": place(manifest.base),
            "models": [{"repo": place(t.source), "name": t.name} for t in manifest.tasks],
            "parameters": dict(manifest.parameters),
            "seed": manifest.seed,
            "output": {"format": "bundle"},
        }
    )


def _weights_bytes(model: PinnedModel) -> int:
    return sum(model.files[path].size_bytes for path in {t.file for t in model.tensors.values()})


# --- add and remove ---------------------------------------------------------------------------------------------


def add(
    bundle: Bundle, repo: str, revision: str | None, name: str | None, hub: Hub, destination: Open, running: Running
) -> Made:
    """Add one task to a bundle.

    Raises:
        UsageError: The name is taken, or the codec cannot add a task to others.
        HubMergeError: What else went wrong; the bundle stays as it is.
    """
    from hubmerge.recipe.refs import default_name

    manifest = bundle.manifest
    codec, params = manifest.codec_of()
    _check_incremental(bundle, "added")
    task = name or default_name(repo)
    if task in {t.name for t in manifest.tasks}:
        raise UsageError(f"{bundle.label} has a task {task!r} already", hint="give the new one another --name")
    base = bundle.base()
    model = pin_model(hub, repo, revision, "model", task)
    recipe = _recipe_of(bundle, base, model)
    plan = plan_addition(manifest, recipe, base, _on_base(model, base))
    shared = {f for f in bundle.files() if f.startswith("bundle-")}
    bundle.check(shared)
    keep = frozenset(f.path for f in manifest.files) - {o.path for o in plan.outputs} - shared
    with destination(plan.outputs, plan.digest, _continuing(bundle, keep)) as place:
        findings = _encode(plan, hub, place, running, bundle.parts())
        entry = _entry(plan, 0, findings)
        tasks = _with_errors((*manifest.tasks, entry), codec.name, params)
        changed = manifest.model_copy(
            update={"tasks": tasks, "next_id": manifest.next_id + 1, "files": _merged_files(manifest, keep, place)}
        )
        return _finish(place, changed, bundle.small_files() | _small(plan, hub), base, plan.digest)


def remove(bundle: Bundle, name: str, hub: Hub, destination: Open, running: Running) -> Made:
    """Take one task out of a bundle; its number is never given again.

    Raises:
        UsageError: No such task, or the codec cannot do without the other tasks' models.
        SourceError: The model that was added is gone or has changed, and its deltas are part of a sum.
        HubMergeError: What else went wrong; the bundle stays as it is.
    """
    manifest = bundle.manifest
    task = manifest.task(name)
    codec, params = manifest.codec_of()
    _check_incremental(bundle, "removed")
    if len(manifest.tasks) == 1:
        raise UsageError(f"{name!r} is the only task of {bundle.label}", hint="delete the bundle instead")
    base = bundle.base()
    own = {task.parts_path, task.head_path}
    shared = {f for f in bundle.files() if f.startswith("bundle-")}
    bundle.check(shared)
    rest = tuple(t for t in manifest.tasks if t.name != name)
    if not shared:
        return _without_sum(bundle, rest, task, base, destination)
    model = _source_of(bundle, task, hub)
    recipe = _recipe_of(bundle, base, model)
    plan = plan_addition(manifest.model_copy(update={"next_id": task.id}), recipe, base, _on_base(model, base))
    written = tuple(o for o in plan.outputs if o.path.startswith("bundle-"))
    plan = replace(plan, outputs=written, jobs=tuple(j for j in plan.jobs if j.action == "encode"))
    keep = frozenset(f.path for f in manifest.files) - shared - own
    with destination(plan.outputs, plan.digest, _continuing(bundle, keep)) as place:
        _encode(plan, hub, place, running, bundle.parts(), remove=True)
        tasks = _with_errors(rest, codec.name, params)
        changed = manifest.model_copy(update={"tasks": tasks, "files": _merged_files(manifest, keep, place)})
        return _finish(place, changed, _small_without(bundle, task), base, plan.digest)


def _small_without(bundle: Bundle, task: TaskEntry) -> dict[str, bytes]:
    return {path: content for path, content in bundle.small_files().items() if path != task.config_path}


def _without_sum(
    bundle: Bundle, rest: tuple[TaskEntry, ...], task: TaskEntry, base: PinnedModel, destination: Open
) -> Made:
    """A bundle that shares nothing loses a task by losing its files."""
    own = {task.parts_path, task.head_path}
    keep = frozenset(f.path for f in bundle.manifest.files) - own
    digest = hashlib.sha256(repr(sorted(keep)).encode()).hexdigest()
    with destination((), digest, _continuing(bundle, keep)) as place:
        files = tuple(f for f in bundle.manifest.files if f.path in keep)
        changed = bundle.manifest.model_copy(update={"tasks": rest, "files": files})
        return _finish(place, changed, _small_without(bundle, task), base, digest)


def _source_of(bundle: Bundle, task: TaskEntry, hub: Hub) -> PinnedModel:
    """The model that was added, at its commit: the sum contains its deltas, and only the same bits take them out."""
    origin = task.source
    if origin.repo is None:
        raise SourceError(
            f"{bundle.label}: task {task.name!r} was a local folder, which is not recorded; its deltas cannot be "
            "taken out of the sum",
            hint="create the bundle anew without it",
        )
    try:
        model = pin_model(hub, origin.repo, origin.commit, "model", task.name)
    except hubmerge.HubMergeError as e:
        raise SourceError(
            f"{bundle.label}: the model that was added as {task.name!r}, {origin.label}, is gone ({e.message}); its "
            "deltas cannot be taken out of the sum",
            hint="create the bundle anew without it",
        ) from e
    if model.header_sha256 != origin.header_sha256:
        raise SourceError(f"{origin.label} is not the model that was added as {task.name!r}: its tensors differ")
    return model


def _check_incremental(bundle: Bundle, what: str) -> None:
    codec, _ = bundle.manifest.codec_of()
    if not codec.incremental:
        raise UsageError(
            f"{bundle.label}: {codec.name} keeps what depends on all tasks at once; none can be {what} alone",
            hint="create the bundle anew with the tasks it shall have",
        )


def _on_base(model: PinnedModel, base: PinnedModel) -> PinnedModel:
    from hubmerge.renaming import under_base_names

    return under_base_names(model, base)


def _recipe_of(bundle: Bundle, base: PinnedModel, model: PinnedModel) -> Recipe:
    """How the bundle's recipe treats one model."""
    from hubmerge.recipe import Recipe as RecipeClass

    covered = {t.name for t in bundle.manifest.targets}
    data = {
        "method": bundle.manifest.codec,
        "base": base.repo,
        "models": [{"repo": model.repo, "name": model.name}],
        "exclude": [name for name, spec in base.tensors.items() if spec.dtype.mergeable and name not in covered],
        "output": {"format": "bundle"},
    }
    return RecipeClass.from_data(data)


def _continuing(bundle: Bundle, keep: frozenset[str]) -> PublishOptions:
    return PublishOptions(parent=bundle.commit, keep=keep)


def _merged_files(manifest: Manifest, keep: frozenset[str], place: Destination) -> tuple[FileEntry, ...]:
    kept = [f for f in manifest.files if f.path in keep]
    return tuple(sorted([*kept, *_file_entries(place.sink.written)], key=lambda f: f.path))


def _with_errors(tasks: tuple[TaskEntry, ...], codec: str, params: Any) -> tuple[TaskEntry, ...]:
    """The expected errors after the set of tasks has changed: of signed sums, the other tasks' energies."""
    if codec != "superposition" or any(t.error is None for t in tasks):
        return tasks
    if not params.signs or params.targets != "all" or params.skip_rate != 1:
        return tuple(t.model_copy(update={"error": None}) for t in tasks)
    total = math.fsum(t.norm**2 for t in tasks)
    return tuple(t.model_copy(update={"error": math.sqrt(max(total - t.norm**2, 0.0))}) for t in tasks)
