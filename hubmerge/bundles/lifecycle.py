"""Create a bundle, add a task to it, remove one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hubmerge
from hubmerge.bundles.card import check_card
from hubmerge.bundles.companions import Companions, companions
from hubmerge.bundles.destination import Destination, Open
from hubmerge.bundles.finishing import MADE_ANEW, Made, finish
from hubmerge.bundles.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, Origin, TargetEntry, TaskEntry
from hubmerge.bundles.planning import BundlePlan, plan_addition, plan_bundle
from hubmerge.bundles.recipes import recipe_for
from hubmerge.bundles.store import DAMAGED, Bundle, digest_of, pinned_again
from hubmerge.bundles.stream import Encoder, Findings
from hubmerge.bundles.terms import LOCAL, Publication
from hubmerge.engine import Progress
from hubmerge.errors import AccessError, IntegrityError, SourceError, TransportError, UsageError
from hubmerge.hub import Hub
from hubmerge.inputs import Fetch, Inputs, read_small
from hubmerge.licenses import FOLDER, NOTICE_NAME, kept_files
from hubmerge.lock import LOCK_NAME, OutputDigest
from hubmerge.output import Written
from hubmerge.recipe.refs import ModelRef, default_name, name_problem
from hubmerge.resolve import on_base, pin_model, pin_recipe
from hubmerge.signing import Signer
from hubmerge.spec import PinnedModel
from hubmerge.tuning import threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from hubmerge.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Running:
    """How to run; none of it changes a bit of the result."""

    workers: int | None = None
    """Threads; default: the number of cores this process may use, and at least 4 when inputs are streamed."""
    fetch: Fetch = "auto"
    max_disk_bytes: int | None = None
    progress: Callable[[Progress], None] = lambda _: None
    chunk_elements: int | None = None
    """Elements handled at once; a multiple of 32768."""


# --- create -----------------------------------------------------------------------------------------------------


def create(recipe: Recipe, hub: Hub, destination: Open, running: Running, publication: Publication = LOCAL) -> Made:
    """Encode a recipe's models as a new bundle.

    Raises:
        LicenseError: The models' licences forbid publishing it; nothing was created.
        HubMergeError: What went wrong; nothing is left behind.
    """
    base, models = pin_recipe(recipe, hub)
    plan = plan_bundle(recipe, base, models)
    words = publication.words(recipe.card)
    origins = [Origin.of(m) for m in (base, *models)]
    publication.check(origins[0], origins[1:], words)
    check_card(hub, plan.codec.name, origins, words, publication.repo)
    with destination(plan.outputs, plan.digest, frozenset()) as place:
        findings = _encode(plan, hub, place, running)
        small, kept = _base_files(plan, hub), [companions(base, m, hub) for m in models]
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            hubmerge_version=hubmerge.__version__,
            codec=plan.codec.name,
            parameters=plan.params.model_dump(mode="json"),
            seed=plan.seed,
            base=_origin(base),
            targets=tuple(TargetEntry.of(t) for t in plan.targets),
            tasks=tuple(_entry(plan, i, findings, kept[i]) for i in range(len(models))),
            next_id=len(models),
            factors=plan.factors,
            include=recipe.include,
            exclude=recipe.exclude,
            heads=recipe.heads,
            shard_size=recipe.output.shard_size,
            card=words,
            files=_listed(place.written),
        )
        for task, own in zip(manifest.tasks, kept, strict=True):
            small |= _task_files(plan, task, own)
        small |= _adapter_notices(plan)
        return finish(place, hub, publication, manifest, plan, small)


def _encode(
    plan: BundlePlan, hub: Hub, place: Destination, running: Running, old: Bundle | None = None, *, remove: bool = False
) -> Findings:
    """Write the weight files, of new tasks or of an old bundle with or without some."""
    before = old.parts() if old is not None else None
    chunks = {} if running.chunk_elements is None else {"chunk_elements": running.chunk_elements}
    with Inputs(plan, hub, running.fetch, running.max_disk_bytes) as inputs:
        remote = any(inputs.is_remote(i) for i in range(-1, len(plan.tasks)))
        workers = threads(running.workers, remote=remote)
        return Encoder(
            plan, inputs, place.sink, workers, before=before, remove=remove, progress=running.progress, **chunks
        ).run()


def _origin(model: PinnedModel) -> Origin:
    """Where a model is. A folder has no commit: its files' digests tell it from others."""
    origin = Origin.of(model)
    if model.root is None:
        return origin
    files = [f.model_copy(update={"sha256": digest_of(Path(model.root) / f.path)}) for f in origin.files]
    return origin.model_copy(update={"files": tuple(files)})


def _entry(plan: BundlePlan, i: int, found: Findings, kept: Companions) -> TaskEntry:
    task = plan.tasks[i]
    shared, own = plan.params.model_dump(mode="json"), plan.each[i].model_dump(mode="json")
    return TaskEntry(
        id=task.identity.id,
        name=task.model.name,
        source=_origin(task.model),
        adapter=task.model.adapter is not None,
        settings={key: value for key, value in own.items() if value != shared[key]},
        prefix=task.naming.prefix,
        names=dict(task.naming.names),
        absent=task.naming.absent,
        config=any(f.path == f"heads/{task.model.name}.config.json" for f in plan.files),
        files=kept.files,
        ranks=dict(task.ranks),
        modules=task.modules if plan.factors else {},
        facts=dict(found.facts[i]),
        norm=found.norms[i],
        error=found.errors[i] if found.errors is not None else None,
    )


def _listed(written: Sequence[Written | OutputDigest]) -> tuple[OutputDigest, ...]:
    entries = [OutputDigest(path=w.path, size_bytes=w.size_bytes, sha256=w.sha256) for w in written]
    return tuple(sorted(entries, key=lambda f: f.path))


def _base_files(plan: BundlePlan, hub: Hub) -> dict[str, bytes]:
    """The base's config and licences."""
    return {f.path: read_small(plan.base, hub, f.path) for f in plan.files if f.source == -1}


def _task_files(plan: BundlePlan, task: TaskEntry, kept: Companions) -> dict[str, bytes]:
    """The small files that are kept for a new task."""
    configs = {f.path: f.content for f in plan.files if f.content is not None and f.path in task.small_paths}
    return configs | {task.file_path(path): content for path, content in kept.kept.items()}


def _adapter_notices(plan: BundlePlan) -> dict[str, bytes]:
    """Licence files of adapters; those of other models are among the files that are kept for their task."""
    return kept_files(plan.base, [m for m in plan.models if m.adapter is not None])


def _notice_of(bundle: Bundle) -> bytes:
    """What stands in the bundle's file NOTICE."""
    return bundle.read(NOTICE_NAME) if any(f.path == NOTICE_NAME for f in bundle.lock().outputs) else b""


# --- add and remove ---------------------------------------------------------------------------------------------


def add(
    bundle: Bundle, model: ModelRef, name: str | None, hub: Hub, destination: Open, running: Running,
    publication: Publication = LOCAL,
) -> Made:  # fmt: skip
    """Add one task to a bundle.

    Raises:
        LicenseError: The models' licences forbid publishing it; nothing was changed.
        UsageError: The name is taken, or the codec cannot add a task to others.
        HubMergeError: What else went wrong; the bundle stays as it is.
    """
    manifest = bundle.manifest
    _check_incremental(bundle, "added")
    task = name or default_name(model.repo)
    if problem := name_problem(task):
        raise UsageError(f"the task's name: {problem}", hint="give the task a --name")
    if task.lower() in {t.name.lower() for t in manifest.tasks}:
        raise UsageError(f"{bundle.label} has a task {task!r} already", hint="give the new one another --name")
    base = bundle.base()
    pinned = on_base(pin_model(hub, model.repo, model.revision, "model", task), base)
    plan = plan_addition(manifest, recipe_for(manifest, base, pinned), base, pinned)
    words = publication.words(manifest.card)
    sources = [*(t.source for t in manifest.tasks), Origin.of(pinned)]
    publication.check(manifest.base, sources, words)
    check_card(hub, manifest.codec, [manifest.base, *sources], words, publication.repo)
    shared = bundle.shared_files()
    bundle.check(shared)
    kept = _kept(bundle, shared)
    with destination(plan.outputs, plan.digest, frozenset(f.path for f in kept)) as place:
        findings = _encode(plan, hub, place, running, bundle)
        own = companions(base, pinned, hub)
        entry = _entry(plan, 0, findings, own)
        tasks = (*manifest.tasks, entry)
        changed = _changed(manifest, tasks, kept, place, next_id=manifest.next_id + 1, card=words)
        small = _task_files(plan, entry, own) | _adapter_notices(plan)
        return finish(place, hub, publication, changed, plan, small, kept, _notice_of(bundle))


def remove(
    bundle: Bundle, name: str, folder: str | None, hub: Hub, destination: Open, running: Running,
    signer: Signer | None = None,
) -> Made:  # fmt: skip
    """Take one task out of a bundle; its number is never given again.

    Args:
        bundle: The bundle.
        name: The task's.
        folder: Where the model is that was added, if not where the manifest says.
        hub: Where repositories are.
        destination: Where the bundle is.
        running: How to run.
        signer: Who signs it, if anybody does.

    Raises:
        UsageError: No such task, or the codec cannot do without the other tasks' models.
        SourceError: The model that was added is gone or has changed, and its deltas are part of a sum.
        AccessError: It is not accessible, or no longer there.
        HubMergeError: What else went wrong; the bundle stays as it is.
    """
    manifest = bundle.manifest
    task = manifest.task(name)
    _check_incremental(bundle, "removed")
    if len(manifest.tasks) == 1:
        raise UsageError(f"{name!r} is the only task of {bundle.label}", hint="delete the bundle instead")
    shared = bundle.shared_files()
    rest = tuple(t for t in manifest.tasks if t.id != task.id)
    notices = [f.path for f in bundle.lock().outputs if f.path.startswith(f"{FOLDER}/{task.name}/")]
    kept = _kept(bundle, [*shared, task.parts_path, task.head_path, *task.small_paths, *notices])
    plan = _removal(bundle, task, folder, hub) if shared else None
    outputs, digest = (plan.outputs, plan.digest) if plan is not None else ((), task.source.header_sha256)
    with destination(outputs, digest, frozenset(f.path for f in kept)) as place:
        if plan is not None:
            _encode(plan, hub, place, running, bundle, remove=True)
        changed, before = _changed(manifest, rest, kept, place), bundle.lock().license
        risk = before is not None and before.accepted_risk
        publication = Publication(bundle.repo, accept_license_risk=risk, signer=signer)
        return finish(place, hub, publication, changed, plan, {}, kept, _notice_of(bundle))


def _removal(bundle: Bundle, task: TaskEntry, folder: str | None, hub: Hub) -> BundlePlan:
    """The plan by which a task was added, with the shared files alone: the same bits are subtracted."""
    manifest = bundle.manifest
    base = bundle.base()
    model = on_base(_source_of(bundle, task, folder, hub), base)
    before = manifest.model_copy(update={"next_id": task.id})
    plan = plan_addition(before, recipe_for(manifest, base, model), base, model)
    bundle.check(bundle.shared_files())
    written = tuple(o for o in plan.outputs if o.path.startswith("bundle-"))
    return replace(plan, outputs=written, jobs=tuple(j for j in plan.jobs if j.action == "encode"), problems=())


def _source_of(bundle: Bundle, task: TaskEntry, folder: str | None, hub: Hub) -> PinnedModel:
    """The model that was added, as it was then."""
    why = f"{bundle.label}: the sum holds the deltas of {task.name!r}, and only the model that was added takes them out"
    if task.source.repo is None and folder is None:
        raise SourceError(f"{why}; it was {task.source.label}", hint="say where it is: --model FOLDER")
    try:
        return pinned_again(hub, task.source, folder, "model", f"the model of task {task.name!r}")
    except TransportError:
        raise
    except (AccessError, SourceError) as e:
        raise type(e)(
            f"{why}; it is gone or has changed: {e.message}", hint="or create the bundle anew without this task"
        ) from e


def _check_incremental(bundle: Bundle, what: str) -> None:
    codec, _ = bundle.manifest.codec_of()
    if not codec.incremental:
        raise UsageError(
            f"{bundle.label}: {codec.name} keeps what depends on all tasks at once; none can be {what} alone",
            hint="create the bundle anew with the tasks it shall have",
        )


def _kept(bundle: Bundle, gone: Sequence[str]) -> list[OutputDigest]:
    """What stays of a bundle that changes: what is not gone, nor made anew every time.

    Raises:
        IntegrityError: The lock contradicts the manifest.
    """
    locked = bundle.lock().outputs
    for file in bundle.manifest.files:
        if file not in locked:
            raise IntegrityError(
                f"{bundle.label}: {LOCK_NAME} and {MANIFEST_NAME} contradict each other about {file.path}", hint=DAMAGED
            )
    return [f for f in locked if f.path not in MADE_ANEW.union(gone)]


def _changed(
    manifest: Manifest, tasks: tuple[TaskEntry, ...], kept: Sequence[OutputDigest], place: Destination, **changes: Any
) -> Manifest:
    """The manifest with other tasks, files that stay and files that were written."""
    codec, params = manifest.codec_of()
    if not manifest.factors:
        errors = codec.errors_after(params, [t.norm for t in tasks], [t.error for t in tasks])
        tasks = tuple(t.model_copy(update={"error": e}) for t, e in zip(tasks, errors, strict=True))
    stay = {f.path for f in kept}
    files = _listed([*(f for f in manifest.files if f.path in stay), *place.written])
    version = {"hubmerge_version": hubmerge.__version__}
    return manifest.model_copy(update={"tasks": tasks, "files": files, **version, **changes})
