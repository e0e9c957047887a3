"""The order of steps: pin, plan, run, publish. Everything that happens is in the modules below."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubmerge import staging
from hubmerge.card import CardFacts
from hubmerge.companions import all_written, check_card, companions
from hubmerge.devices import device_map
from hubmerge.errors import UsageError
from hubmerge.evaluation import compare
from hubmerge.hub import Hub
from hubmerge.inputs import Inputs
from hubmerge.journal import Resumable, resumable
from hubmerge.licenses import derive_license, refuse
from hubmerge.lock import portable_recipe
from hubmerge.output import FolderSink
from hubmerge.planning import build_plan
from hubmerge.publish import Publisher, PublishOptions
from hubmerge.ranks import ALONE, Ranks
from hubmerge.recipe import Recipe
from hubmerge.resolve import pin_recipe
from hubmerge.results import PlanReport, Result
from hubmerge.running import Clock, RunOptions, facts_of, meter_for, peaks_of, run, runnable, share_of, tuning_for
from hubmerge.signing import Signing, open_signer, open_verifier
from hubmerge.spec import Plan
from hubmerge.tuning import footprint_of
from hubmerge.uploading import ShardByShard

if TYPE_CHECKING:
    from hubmerge.analysis import Diagnostics
    from hubmerge.engine import Progress
    from hubmerge.measuring import Sampling
    from hubmerge.verification import Report

__all__ = [
    "PlanReport",
    "PushTarget",
    "Result",
    "RunOptions",
    "Signing",
    "analyze",
    "clean_up",
    "merge",
    "plan",
    "push",
    "report",
    "verify",
]


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
    tuning = tuning_for(found, options, devices, remote=remote)
    Inputs(found, hub or Hub(), options.fetch, options.max_disk_bytes).close()  # refuses what the disk cannot hold
    return PlanReport(
        plan=found,
        footprint=footprint_of(found, tuning, devices, remote=remote, streaming=options.upload == "stream"),
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
    evaluations: Sequence[str] = (),
    sign: Signing | None = None,
    progress: Callable[[Progress], None] | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """Merge into a local folder, which appears under its name only when everything in it is whole.

    A run that ends early leaves its finished files beside the folder, and the next one of the same plan takes them
    over, unless ``resume`` is False. With ``diagnostics``, how the tasks lie to one another is measured and shown; with
    ``sign``, the result has a signature over all of its files; ``evaluations`` are files of results for the card, as
    ``--eval`` takes them. Several processes that call this with their ``ranks`` share the work, and all get the result.

    Raises:
        HubMergeError: What went wrong; nothing stands under the folder's name.
    """
    clock = Clock()
    signer = open_signer(sign) if sign is not None and ranks.first else None
    hub = hub or Hub()
    options = share_of(options or RunOptions(), ranks)
    planned = runnable(plan(recipe, hub=hub))
    results = compare(evaluations, (str(out), str(Path(out).resolve())), CardFacts(planned, recipe).parents)
    clock.lap("plan_s")
    needed = sum(o.size_bytes for o in planned.outputs)
    meter = meter_for(planned, recipe) if diagnostics else None
    work = _resumable(planned, recipe, resume=resume)
    ranks.agree(facts_of(planned, work, {"out": out, "overwrite": overwrite, "diagnostics": diagnostics}))
    ranks.from_first(lambda: check_card(recipe, planned, hub, None, results))
    with (
        FolderSink(Path(out), work.tag, needed, overwrite=overwrite, work=work, ranks=ranks) as sink,
        Inputs(planned, hub, options.fetch, options.max_disk_bytes, needed) as inputs,
    ):
        truncation = run(planned, inputs, sink, options, progress, meter, ranks)
        clock.lap("merge_s")
        terms = derive_license(planned, recipe.card)
        check = terms.record(accepted_risk=False)
        files = ranks.from_first(
            lambda: companions(
                recipe, planned, hub, sink.written, truncation, check, meter=meter, signer=signer, results=results
            )
        )
        sink.commit(files)
        written = all_written(sink.written, files)
    clock.lap("publish_s")
    peaks = peaks_of(inputs.stored_bytes)
    return Result(planned, written, clock.timings(), path=sink.out, truncation=truncation, license=terms, peaks=peaks)


def push(
    recipe: Recipe,
    target: PushTarget | str,
    *,
    options: RunOptions | None = None,
    hub: Hub | None = None,
    resume: bool = True,
    diagnostics: bool = False,
    evaluations: Sequence[str] = (),
    sign: Signing | None = None,
    progress: Callable[[Progress], None] | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """Merge and publish in one commit; if anything fails, the target stays as it was.

    Finished shards are staged in a branch of the target's repository. A run that ends early leaves them there, and
    the next one of the same plan, on any machine, takes them over, unless ``resume`` is False. With ``diagnostics``,
    how the tasks lie to one another is measured and shown; with ``sign``, the result has a signature over all of its
    files; ``evaluations`` are files of results for the card, as ``--eval`` takes them. Several processes that call this
    with their ``ranks`` share the work, and all get the result.

    Raises:
        LicenseError: The parents' licences forbid it; nothing was created.
        HubMergeError: What else went wrong; nothing half-made is left in the target's branches.
    """
    clock = Clock()
    signer = open_signer(sign) if sign is not None and ranks.first else None
    hub = hub or Hub()
    source = hub.reader()
    options = share_of(options or RunOptions(), ranks)
    target = PushTarget(target) if isinstance(target, str) else target
    planned = runnable(plan(recipe, hub=source))
    results = compare(evaluations, (target.repo,), CardFacts(planned, recipe).parents)
    terms = derive_license(planned, recipe.card, target.repo)
    refuse(terms, accept_risk=target.accept_license_risk, name=target.repo)
    publishing = PublishOptions(
        revision=target.revision or "main",
        create_pr=target.create_pr,
        tag=target.tag,
        public=None if target.private is None else not target.private,
        overwrite=target.overwrite,
    )
    meter = meter_for(planned, recipe) if diagnostics else None
    work = _resumable(planned, recipe, resume=resume)
    ranks.agree(facts_of(planned, work, asdict(target) | {"diagnostics": diagnostics}))
    ranks.from_first(lambda: check_card(recipe, planned, source, target.repo, results))
    with (
        Publisher(hub, target.repo, publishing, work, ranks) as publisher,
        _ends(planned, source, options, publisher) as (inputs, sink),
    ):
        clock.lap("plan_s")
        truncation = run(planned, inputs, sink, options, progress, meter, ranks)
        clock.lap("merge_s")
        check = terms.record(accepted_risk=target.accept_license_risk)
        files = ranks.from_first(
            lambda: companions(
                recipe, planned, source, sink.written, truncation, check, publisher.repo, meter, signer, results
            )
        )
        published = publisher.finish(files)
        clock.lap("publish_s")
    written = all_written(sink.written, files)
    url, commit = published.url, published.commit
    peaks = peaks_of(inputs.stored_bytes + sink.peak_bytes)
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
    planned = runnable(plan(recipe, hub=hub))
    meter = meter_for(planned, recipe, sampling)
    with Inputs(planned, hub, options.fetch, options.max_disk_bytes) as inputs:
        run(planned, inputs, Nowhere(planned.outputs), options, progress, meter)
    return meter.diagnostics()


def clean_up(repo: str, *, hub: Hub | None = None) -> tuple[str, ...]:
    """Remove what abandoned pushes have staged in a repository; returns the names of the branches that are gone.

    Raises:
        AccessError: The token may not write there.
    """
    return staging.clean_up(hub or Hub(), repo)


def verify(
    target: str, *, hub: Hub | None = None, public_key: Path | None = None, certificate: Path | None = None
) -> Report:
    """Check a folder or a repository (``repo[@revision]``) against its lock, and the lock against a signature.

    Args:
        target: What to check.
        hub: The Hub.
        public_key: Of whom must have signed it (PEM) …
        certificate: … or the certificates that vouch for them. With neither, a signature is not checked.

    Raises:
        UsageError: The key or certificate cannot be used.
        VerificationError: There is no lock that can be read.
    """
    from hubmerge.verification import verify as check

    verifier = open_verifier(public_key=public_key, certificate=certificate)
    return check(target, hub or Hub(), verifier=verifier)


def _resumable(planned: Plan, recipe: Recipe, *, resume: bool) -> Resumable:
    return resumable(planned, portable_recipe(planned, recipe.normalized()), resume=resume)


@contextmanager
def _ends(planned: Plan, hub: Hub, options: RunOptions, publisher: Publisher) -> Iterator[tuple[Inputs, ShardByShard]]:
    """Where the weights of a push come from and go to; both may need room on the disk."""
    streaming = options.upload == "stream" and publisher.takes_streams()
    at_once, shards_bytes = (1, 0) if streaming else _on_disk(planned, options)
    limit = options.max_disk_bytes
    for_inputs = None if limit is None else limit - shards_bytes
    with (
        tempfile.TemporaryDirectory(prefix="hubmerge-") as folder,
        Inputs(planned, hub, options.fetch, for_inputs, shards_bytes) as inputs,
    ):
        yield (
            inputs,
            ShardByShard(Path(folder), publisher, planned.outputs, limit, at_once=at_once, streaming=streaming),
        )


def _on_disk(planned: Plan, options: RunOptions) -> tuple[int, int]:
    """How many shards of a push are on the disk at a time, and their size.

    One, unless there is leave to use more: then the next one is written while one is uploaded, and a run that is
    killed may have to make both again.
    """
    sizes = sorted((o.size_bytes for o in planned.outputs), reverse=True)
    two = options.fetch != "cache" and options.max_disk_bytes is not None and sum(sizes[:2]) <= options.max_disk_bytes
    at_once = 2 if two else 1
    return at_once, sum(sizes[:at_once])
