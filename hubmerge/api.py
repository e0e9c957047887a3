"""The order of steps: pin, plan, run, publish. Everything that happens is in the modules below."""

from __future__ import annotations

import hashlib
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hubmerge
from hubmerge import staging
from hubmerge.card import HUB_URL, CardFacts, render_card
from hubmerge.devices import DeviceMap, device_map
from hubmerge.errors import PlanError, UsageError
from hubmerge.footprint import Footprint
from hubmerge.hub import Hub
from hubmerge.inputs import Fetch, Inputs, read_small
from hubmerge.journal import TAG_LENGTH, Resumable, resumable
from hubmerge.licenses import NOTICE_NAME, Decision, derive_license, kept_files, notice, own_texts, refuse
from hubmerge.lock import LOCK_NAME, build_lock, dumps, portable_recipe
from hubmerge.output import FolderSink, Written
from hubmerge.planning import build_plan
from hubmerge.plots import as_files
from hubmerge.publish import Publisher, PublishOptions, ShardByShard
from hubmerge.quantities import size as size_of
from hubmerge.ranks import ALONE, Ranks
from hubmerge.recipe import Recipe
from hubmerge.resolve import pin_recipe
from hubmerge.spec import Plan, Truncation
from hubmerge.tuning import Tuning, footprint_of, tuned

if TYPE_CHECKING:
    from hubmerge.analysis import Diagnostics
    from hubmerge.engine import Progress
    from hubmerge.measuring import Meter, Sampling
    from hubmerge.verification import Report

log = logging.getLogger(__name__)

RECIPE_NAME = "hubmerge.yaml"
CARD_NAME = "README.md"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run; none of it changes a bit of the result, but where a device decomposes matrices in its own way."""

    workers: int | None = None
    """Threads of each process; default: its share of the cores it may use, and more when inputs are streamed."""
    fetch: Fetch = "auto"
    max_memory_bytes: int | None = None
    """What all processes on this machine may hold together; likewise of the disk."""
    max_disk_bytes: int | None = None
    """Beside a folder's files. A push that may use two shards' room writes the next one while one is uploaded."""
    chunk_elements: int | None = None
    """Elements handled at once; a multiple of 32768."""
    device: str = "auto"
    """Where matrices are decomposed: the accelerators there are (auto), ``cpu``, all of a kind (``cuda``), or one
    (``cuda:1``)."""
    device_memory_bytes: Mapping[str, int] = field(default_factory=dict)
    """What may be used of an accelerator's memory, by its name or kind; by default most of what is free."""


@dataclass(frozen=True, slots=True)
class PushTarget:
    """Where and how to publish."""

    repo: str
    private: bool | None = None
    """None: a new repository is private, an existing one stays as it is."""
    create_pr: bool = False
    revision: str | None = None
    tag: str | None = None
    overwrite: bool = False
    accept_license_risk: bool = False
    """Publish although the parents' licences forbid it, under the licence that the recipe's card states."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a merge produced."""

    plan: Plan
    files: tuple[Written, ...]
    timings: Mapping[str, float]
    """Seconds: plan_s, merge_s, publish_s, total_s."""
    path: Path | None = None
    url: str | None = None
    commit: str | None = None
    truncation: Truncation | None = None
    """What a merged adapter lost to its rank."""
    license: Decision | None = None
    """What the check of the parents' licences says."""
    peaks: Mapping[str, int] = field(default_factory=dict)
    """The most that was held at a time: peak_rss_bytes, and peak_disk_bytes beside what a folder holds in the end."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "path": str(self.path) if self.path else None,
            "url": self.url,
            "commit": self.commit,
            "plan_sha256": self.plan.digest,
            "files": [asdict(f) for f in self.files],
            "timings": dict(self.timings),
            **self.peaks,
            "truncation": asdict(self.truncation) if self.truncation else None,
            "license_check": self.license.to_json() if self.license else None,
            "problems": [asdict(p) for p in self.plan.problems],
        }

    def summary(self) -> str:
        """One line for a person."""
        size = sum(f.size_bytes for f in self.files)
        where = f"{self.url} (commit {self.commit[:TAG_LENGTH]})" if self.url and self.commit else str(self.path)
        lost = f"\n{self.truncation}" if self.truncation else ""
        shown = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
        held = f"{size_of(self.peaks['peak_rss_bytes'])} of memory and {size_of(self.peaks['peak_disk_bytes'])} of disk"
        return f"{where}: {shown} in {self.timings['total_s']:.1f} s, with at most {held} at a time{lost}"


@dataclass(frozen=True, slots=True)
class PlanReport:
    """A plan and what running it takes."""

    plan: Plan
    footprint: Footprint
    license: Decision
    parameters: str
    devices: DeviceMap

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        plan = self.plan
        return {
            "method": plan.method,
            "plan_sha256": plan.digest,
            "sources": [
                {"role": m.role, "name": m.name, "repo": m.repo, "commit": m.commit, "adapter": m.adapter is not None}
                for m in (plan.base, *plan.models)
            ],
            "outputs": [{"path": o.path, "size_bytes": o.size_bytes} for o in plan.outputs],
            "merged_tensors": sum(j.action == "merge" for j in plan.jobs),
            "copied_tensors": sum(j.action == "copy" for j in plan.jobs),
            **asdict(self.footprint),
            "matrices": {d: {"tensors": n, "elements": size} for d, (n, size) in self.devices.shares(plan).items()},
            "device_notes": list(self.devices.notes),
            "license": self.license.license,
            "license_check": self.license.to_json(),
            "problems": [asdict(p) for p in plan.problems],
        }


def plan(recipe: Recipe, *, hub: Hub | None = None) -> Plan:
    """Decide everything about a merge from headers and small files; no weight is read.

    Raises:
        AccessError: A model is missing or not accessible.
        SourceError: A model cannot be merged.
    """
    if recipe.output.format == "bundle":
        raise UsageError(
            f"{recipe.method} makes a bundle, not a merged model", hint="use `hubmerge bundle create` with this recipe"
        )
    base, models = pin_recipe(recipe, hub or Hub())
    return build_plan(recipe, base, models)


def report(recipe: Recipe, *, options: RunOptions | None = None, hub: Hub | None = None) -> PlanReport:
    """The plan, what running it reads, writes and holds, and the licence it would carry."""
    found = plan(recipe, hub=hub)
    remote = any(m.commit is not None for m in (found.base, *found.models))
    options = options or RunOptions()
    devices = device_map(found, options.device, options.device_memory_bytes)
    tuning = _tuning(found, options, devices, remote=remote)
    Inputs(found, hub or Hub(), options.fetch, options.max_disk_bytes).close()  # refuses what the disk cannot hold
    return PlanReport(
        plan=found,
        footprint=footprint_of(found, tuning, devices, remote=remote),
        license=derive_license(found, recipe.card),
        parameters=", ".join(f"{k}={v}" for k, v in found.params.model_dump().items()),
        devices=devices,
    )


def merge(
    recipe: Recipe,
    out: str | Path,
    *,
    options: RunOptions | None = None,
    hub: Hub | None = None,
    overwrite: bool = False,
    resume: bool = True,
    diagnostics: bool = False,
    progress: Callable[[Progress], None] | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """Merge into a local folder, which appears under its name only when everything in it is whole.

    A run that ends early leaves its finished files beside the folder, and the next one of the same plan takes them
    over, unless ``resume`` is False. With ``diagnostics``, how the tasks lie to one another is measured and shown.
    Several processes that call this with their ``ranks`` share the work, and all get the result.

    Raises:
        HubMergeError: What went wrong; nothing stands under the folder's name.
    """
    clock = _Clock()
    hub = hub or Hub()
    options = _share(options or RunOptions(), ranks)
    planned = _runnable(plan(recipe, hub=hub))
    clock.lap("plan_s")
    needed = sum(o.size_bytes for o in planned.outputs)
    meter = _meter(planned, recipe, options) if diagnostics else None
    work = _resumable(planned, recipe, resume=resume)
    ranks.agree(_facts(planned, work, {"out": out, "overwrite": overwrite, "diagnostics": diagnostics}))
    with (
        FolderSink(Path(out), work.tag, needed, overwrite=overwrite, work=work, ranks=ranks) as sink,
        Inputs(planned, hub, options.fetch, options.max_disk_bytes, needed) as inputs,
    ):
        truncation = _run(planned, inputs, sink, options, progress, meter, ranks)
        clock.lap("merge_s")
        terms = derive_license(planned, recipe.card)
        check = terms.record(accepted_risk=False)
        files = ranks.from_first(
            lambda: _companions(recipe, planned, hub, sink.written, truncation, check, meter=meter)
        )
        sink.commit(files)
        written = _all_written(sink.written, files)
    clock.lap("publish_s")
    peaks = _peaks(inputs.stored_bytes)
    return Result(planned, written, clock.timings(), path=sink.out, truncation=truncation, license=terms, peaks=peaks)


def push(
    recipe: Recipe,
    target: PushTarget | str,
    *,
    options: RunOptions | None = None,
    hub: Hub | None = None,
    resume: bool = True,
    diagnostics: bool = False,
    progress: Callable[[Progress], None] | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """Merge and publish in one commit; if anything fails, the target stays as it was.

    Finished shards are staged in a branch of the target's repository. A run that ends early leaves them there, and
    the next one of the same plan, on any machine, takes them over, unless ``resume`` is False. With ``diagnostics``,
    how the tasks lie to one another is measured and shown. Several processes that call this with their ``ranks`` share
    the work, and all get the result.

    Raises:
        LicenseError: The parents' licences forbid it; nothing was created.
        HubMergeError: What else went wrong; nothing half-made is left in the target's branches.
    """
    clock = _Clock()
    hub = hub or Hub()
    options = _share(options or RunOptions(), ranks)
    target = PushTarget(target) if isinstance(target, str) else target
    planned = _runnable(plan(recipe, hub=hub))
    terms = derive_license(planned, recipe.card, target.repo)
    refuse(terms, accept_risk=target.accept_license_risk, name=target.repo)
    publishing = PublishOptions(
        revision=target.revision or "main",
        create_pr=target.create_pr,
        tag=target.tag,
        public=None if target.private is None else not target.private,
        overwrite=target.overwrite,
    )
    meter = _meter(planned, recipe, options) if diagnostics else None
    work = _resumable(planned, recipe, resume=resume)
    at_once, shards_bytes = _on_disk(planned, options)
    for_inputs = None if options.max_disk_bytes is None else options.max_disk_bytes - shards_bytes
    ranks.agree(_facts(planned, work, asdict(target) | {"diagnostics": diagnostics}))
    with (
        tempfile.TemporaryDirectory(prefix="hubmerge-") as folder,
        Publisher(hub, target.repo, publishing, work, ranks) as publisher,
        Inputs(planned, hub, options.fetch, for_inputs, shards_bytes) as inputs,
    ):
        clock.lap("plan_s")
        sink = ShardByShard(Path(folder), publisher, planned.outputs, options.max_disk_bytes, at_once=at_once)
        truncation = _run(planned, inputs, sink, options, progress, meter, ranks)
        clock.lap("merge_s")
        check = terms.record(accepted_risk=target.accept_license_risk)
        files = ranks.from_first(
            lambda: _companions(recipe, planned, hub, sink.written, truncation, check, publisher.repo, meter)
        )
        published = publisher.finish(files)
        clock.lap("publish_s")
    written = _all_written(sink.written, files)
    url, commit = published.url, published.commit
    peaks = _peaks(inputs.stored_bytes + sink.peak_bytes)
    return Result(planned, written, clock.timings(), None, url, commit, truncation, terms, peaks)


def analyze(
    recipe: Recipe,
    *,
    options: RunOptions | None = None,
    hub: Hub | None = None,
    sampling: Sampling = "sample",
    progress: Callable[[Progress], None] | None = None,
) -> Diagnostics:
    """Merge without writing anything, and say how the tasks lie to one another and to what would be merged.

    Args:
        recipe: What to merge.
        options: How to run.
        hub: The Hub.
        sampling: Of which weights the singular values are computed: a sample, all, or none.
        progress: Told of every finished piece.

    Raises:
        UsageError: The recipe has no base, from which task vectors are taken.
        HubMergeError: What else went wrong.
    """
    from hubmerge.measuring import Nowhere

    hub = hub or Hub()
    options = options or RunOptions()
    planned = _runnable(plan(recipe, hub=hub))
    meter = _meter(planned, recipe, options, sampling)
    with Inputs(planned, hub, options.fetch, options.max_disk_bytes) as inputs:
        _run(planned, inputs, Nowhere(planned.outputs), options, progress, meter)
    return meter.diagnostics()


def clean_up(repo: str, *, hub: Hub | None = None) -> tuple[str, ...]:
    """Remove what abandoned pushes have staged in a repository; returns the names of the branches that are gone.

    Raises:
        AccessError: The token may not write there.
    """
    return staging.clean_up(hub or Hub(), repo)


def verify(target: str, *, hub: Hub | None = None) -> Report:
    """Check a folder or a repository (``repo[@revision]``) against its lock."""
    from hubmerge.verification import verify as check

    return check(target, hub or Hub())


# --- steps ------------------------------------------------------------------------------------------------------


class _Clock:
    """Laps of a run."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End a lap."""
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now

    def timings(self) -> dict[str, float]:
        """All laps and their total."""
        return {**{k: round(v, 3) for k, v in self._laps.items()}, "total_s": round(self._last - self._start, 3)}


def _runnable(planned: Plan) -> Plan:
    errors = [p for p in planned.problems if p.severity == "error"]
    if errors:
        rest = "".join(f"\n{p.message}" for p in errors[1:6])
        more = f"\n… and {len(errors) - 6} more (hubmerge plan lists them)" if len(errors) > 6 else ""
        raise PlanError(errors[0].message + rest + more, hint=errors[0].hint)
    return planned


def _resumable(planned: Plan, recipe: Recipe, *, resume: bool) -> Resumable:
    return resumable(planned, portable_recipe(planned, recipe.normalized()), resume=resume)


def _share(options: RunOptions, ranks: Ranks) -> RunOptions:
    """The options as they hold for one of several processes on this machine."""
    memory, disk = (b and b // ranks.local_size for b in (options.max_memory_bytes, options.max_disk_bytes))
    return replace(options, max_memory_bytes=memory, max_disk_bytes=disk)


def _facts(planned: Plan, work: Resumable, asked: Mapping[str, Any]) -> dict[str, str]:
    """What all processes of a run must agree on, from what tells most to what tells that there is anything at all."""
    models = {f"commit of {m.repo}": m.commit[:TAG_LENGTH] for m in (planned.base, *planned.models) if m.commit}
    return {
        "version of hubmerge": hubmerge.__version__,
        **{f"value of {name}": str(value) for name, value in asked.items()},
        **models,
        "plan (of digest)": planned.digest[:TAG_LENGTH],
        "state of local files (of digest)": work.tag,
        "choice to resume": str(work.resume),
    }


def _tuning(planned: Plan, options: RunOptions, devices: DeviceMap, *, remote: bool, processes: int = 1) -> Tuning:
    return tuned(
        planned,
        devices,
        remote=remote,
        workers=options.workers,
        chunk_elements=options.chunk_elements,
        max_memory_bytes=options.max_memory_bytes,
        processes=processes,
    )


def _meter(planned: Plan, recipe: Recipe, options: RunOptions, sampling: Sampling = "sample") -> Meter:
    """What measures a run.

    Raises:
        UsageError: There is no base.
    """
    from hubmerge.measuring import Meter

    if not CardFacts(planned, recipe).has_base:
        raise UsageError(
            "without a base there are no task vectors to measure: they are models minus the base",
            hint="name the models' common base in the recipe (base: …), or leave out the diagnostics",
        )
    return Meter(planned, sampling, options.max_memory_bytes)


def _run(
    planned: Plan,
    inputs: Inputs,
    sink: Any,
    options: RunOptions,
    progress: Callable[[Progress], None] | None,
    meter: Meter | None = None,
    ranks: Ranks = ALONE,
) -> Truncation | None:
    """Produce the output files, the sink's list of which then is that of all processes."""
    from hubmerge.engine import Engine

    remote = any(inputs.is_remote(s) for s in range(-1, len(planned.models)))
    devices = device_map(planned, options.device, options.device_memory_bytes, ranks)
    for note in devices.notes:
        log.warning("%s", note)
    done = frozenset(w.path for w in sink.written)
    tuning = _tuning(planned, options, devices, remote=remote, processes=ranks.local_size)
    engine = Engine(planned, inputs, sink, tuning, progress, devices, done, meter, ranks)
    engine.run()
    written: dict[str, Written] = {}
    lost: dict[str, tuple[float, float]] = {}
    mine = meter.found() if meter is not None else None
    for part, squares, measured in ranks.gather((sink.written, engine.truncation, mine)):
        written |= {w.path: w for w in part}
        lost |= squares
        if meter is not None and measured is not None:
            meter.take_over(measured)
    sink.written, truncation = ranks.from_first(lambda: (list(written.values()), Truncation.of(lost)))
    return truncation


def _companions(
    recipe: Recipe,
    planned: Plan,
    hub: Hub,
    written: list[Written],
    truncation: Truncation | None,
    license_check: Mapping[str, Any],
    repo: str | None = None,
    meter: Meter | None = None,
) -> dict[str, bytes]:
    """The small files of the result: copies, licences, recipe, card, and the lock over all of them."""
    files: dict[str, bytes] = {}
    for f in planned.files:
        if f.content is not None:
            files[f.path] = f.content
        else:
            assert f.source is not None
            files[f.path] = read_small(planned.pinned(f.source), hub, f.path)
    files |= kept_files(planned.base, planned.models)
    portable = portable_recipe(planned, recipe.normalized())
    files[RECIPE_NAME] = Recipe.from_data(portable).to_yaml().encode()
    # A card that is published links to where it is published; one in a folder to the Hub that everyone knows.
    measured = meter.diagnostics() if meter is not None else None
    facts = CardFacts(planned, recipe, repo, hub.endpoint if repo else HUB_URL, truncation, measured)
    files |= as_files(measured) if measured is not None else {}
    files[CARD_NAME] = render_card(facts).encode()
    files |= own_texts(facts.license)
    if (text := notice(facts.license, files.get(NOTICE_NAME, b""))) is not None:
        files[NOTICE_NAME] = text
    lock = build_lock(planned, recipe.normalized(), _all_written(written, files), license_check)
    files[LOCK_NAME] = dumps(lock).encode()
    return files


def _all_written(written: list[Written], files: Mapping[str, bytes]) -> tuple[Written, ...]:
    small = [Written(path, len(content), hashlib.sha256(content).hexdigest()) for path, content in files.items()]
    return tuple(sorted([*written, *small], key=lambda w: w.path))


def _on_disk(planned: Plan, options: RunOptions) -> tuple[int, int]:
    """How many shards of a push are on the disk at a time, and their size.

    One, unless there is leave to use more: then the next one is written while one is uploaded, and a run that is
    killed may have to make both again.
    """
    sizes = sorted((o.size_bytes for o in planned.outputs), reverse=True)
    two = options.fetch != "cache" and options.max_disk_bytes is not None and sum(sizes[:2]) <= options.max_disk_bytes
    at_once = 2 if two else 1
    return at_once, sum(sizes[:at_once])


def _peaks(disk_bytes: int) -> dict[str, int]:
    """What ``Result`` says of memory and disk."""
    return {"peak_rss_bytes": peak_rss_bytes(), "peak_disk_bytes": disk_bytes}


def peak_rss_bytes() -> int:
    """The most memory this process has held."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
