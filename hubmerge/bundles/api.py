"""The order of steps for bundles, in a folder or on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from hubmerge.bundles import destination, lifecycle
from hubmerge.bundles.destination import Open
from hubmerge.bundles.finishing import Made
from hubmerge.bundles.lifecycle import Running
from hubmerge.bundles.lora import retrieve_adapter
from hubmerge.bundles.retrieve import Retrieval
from hubmerge.bundles.store import Bundle, open_bundle
from hubmerge.bundles.terms import Publication
from hubmerge.errors import UsageError
from hubmerge.hub import Hub
from hubmerge.lock import explain
from hubmerge.output import Written
from hubmerge.publish import PublishOptions
from hubmerge.recipe.refs import ModelRef
from hubmerge.signing import Signer, Signing, open_signer

if TYPE_CHECKING:
    from hubmerge.recipe import Recipe


def create_bundle(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    to: str | None = None,
    publish: PublishOptions | None = None,
    running: Running | None = None,
    overwrite: bool = False,
    license: str | None = None,  # noqa: A002 - the Hub's own word
    accept_license_risk: bool = False,
    sign: Signing | None = None,
    hub: Hub | None = None,
) -> Made:
    """Make a bundle of a recipe's models, in a folder (``out``) or in a repository (``to``).

    Args:
        recipe: A recipe with a codec.
        out: The folder …
        to: … or the repository.
        publish: How to publish.
        running: How to run.
        overwrite: Replace what is there.
        license: What the card states, if not what the recipe says.
        accept_license_risk: Publish although the models' licences forbid it; the licence must be stated.
        sign: With what to sign it.
        hub: Where repositories are.

    Raises:
        UsageError: Neither or both of ``out`` and ``to``, or a recipe of a merge.
        LicenseError: The models' licences forbid publishing it; nothing was created.
        HubMergeError: What else went wrong; nothing is left behind.
    """
    if (out is None) == (to is None):
        raise UsageError("a bundle goes either into a folder or into a repository", hint="give --out or --to")
    if recipe.output.format != "bundle":
        raise UsageError(
            f"the recipe makes a merged model by {recipe.method}, not a bundle",
            hint="name a codec as its method and set output: {format: bundle}; or use `hubmerge merge`",
        )
    hub, running = hub or Hub(), running or Running()
    publication = Publication(to, accept_license_risk, license, _signer(sign))
    if out is not None:
        return lifecycle.create(recipe, hub, destination.folder(Path(out), overwrite=overwrite), running, publication)
    wanted = publish or PublishOptions(message="Publish a bundle made with hubmerge")
    wanted = replace(wanted, overwrite=wanted.overwrite or overwrite)
    place = destination.repository(hub, to or "", lambda keep: replace(wanted, keep=keep), running.max_disk_bytes)
    return lifecycle.create(recipe, hub, place, running, publication)


def add_task(
    place: str | Path,
    model: str | Path,
    *,
    name: str | None = None,
    base: str | Path | None = None,
    running: Running | None = None,
    license: str | None = None,  # noqa: A002 - the Hub's own word
    accept_license_risk: bool = False,
    sign: Signing | None = None,
    hub: Hub | None = None,
) -> Made:
    """Add a model to a bundle, in its folder or as one commit to its repository.

    Args:
        place: The bundle: a folder, or ``repo`` or ``repo@branch``.
        model: A full checkpoint or an adapter: ``repo``, ``repo@revision`` or a folder.
        name: The task's name; the last part of the model's by default.
        base: The base's folder, if it is not where the bundle says.
        running: How to run.
        license: What the card states from now on.
        accept_license_risk: Publish although the models' licences forbid it; the licence must be stated.
        sign: With what to sign it.
        hub: Where repositories are.

    Raises:
        UsageError: The name is taken, or the codec cannot add a task to others.
        LicenseError: The models' licences forbid publishing it; nothing was changed.
        TargetMovedError: Somebody else changed the bundle meanwhile; adding again adds to what they made of it.
        HubMergeError: What else went wrong; the bundle stays as it is.
    """
    try:
        ref = ModelRef.parse(str(model))
    except ValidationError as e:
        raise UsageError(f"the model: {explain(e)}", hint="give a repo id, or ./ and a folder") from e
    hub, running, signer = hub or Hub(), running or Running(), _signer(sign)
    with opened(place, hub, base) as bundle:
        target = _same_place(bundle, hub, running, f"Add {name or model} with hubmerge")
        publication = Publication(bundle.repo, accept_license_risk, license, signer)
        return lifecycle.add(bundle, ref, name, hub, target, running, publication)


def remove_task(
    place: str | Path,
    task: str,
    *,
    model: str | Path | None = None,
    base: str | Path | None = None,
    running: Running | None = None,
    sign: Signing | None = None,
    hub: Hub | None = None,
) -> Made:
    """Take a task out of a bundle, in its folder or as one commit to its repository.

    Args:
        place: The bundle: a folder, or ``repo`` or ``repo@branch``.
        task: The task's name.
        model: The folder of the model that was added, if it is not where the bundle says.
        base: The base's folder, likewise.
        running: How to run.
        sign: With what to sign what is left; otherwise it has no signature any more.
        hub: Where repositories are.

    Raises:
        UsageError: No such task, or the codec cannot do without the other tasks' models.
        SourceError: The model that was added is gone or has changed, and its deltas are part of a sum.
        TargetMovedError: Somebody else changed the bundle meanwhile.
        HubMergeError: What else went wrong; the bundle stays as it is.
    """
    hub, running, signer = hub or Hub(), running or Running(), _signer(sign)
    with opened(place, hub, base) as bundle:
        target = _same_place(bundle, hub, running, f"Remove {task} with hubmerge")
        return lifecycle.remove(bundle, task, None if model is None else str(model), hub, target, running, signer)


def retrieve_task(
    place: str | Path,
    task: str,
    out: str | Path,
    *,
    scale: float | None = None,
    base: str | Path | None = None,
    running: Running | None = None,
    overwrite: bool = False,
    hub: Hub | None = None,
) -> tuple[Written, ...]:
    """Write a task's model as an ordinary folder, which appears only when everything in it is whole.

    Args:
        place: The bundle: a folder, or ``repo`` or ``repo@revision``.
        task: The task's name.
        out: The folder; it must not exist or be empty, unless ``overwrite``.
        scale: λ, which multiplies the task's change of the base; by default the bundle's.
        base: The base's folder, if it is not where the bundle says.
        running: How to run.
        overwrite: Replace what the folder holds.
        hub: Where repositories are.

    Returns:
        The weight files.

    Raises:
        UsageError: No such task.
        SourceError: The base is not at hand, or another one.
        IntegrityError: The bundle's files are damaged.
        HubMergeError: What else went wrong; nothing is left behind.
    """
    hub, running = hub or Hub(), running or Running()
    with opened(place, hub, base) as bundle:
        if bundle.manifest.factors:
            return retrieve_adapter(bundle, bundle.manifest.task(task), Path(out), scale=scale, overwrite=overwrite)
        found = Retrieval(bundle, task, scale=scale, workers=running.workers)
        return found.run(
            Path(out),
            fetch=running.fetch,
            max_disk_bytes=running.max_disk_bytes,
            overwrite=overwrite,
            progress=running.progress,
        )


@contextmanager
def opened(place: str | Path, hub: Hub, base: str | Path | None = None) -> Iterator[Bundle]:
    """A bundle whose files are closed at the end; as ``open_bundle``."""
    bundle = open_bundle(str(place), hub, base=None if base is None else str(base))
    try:
        yield bundle
    finally:
        bundle.close()


def _signer(sign: Signing | None) -> Signer | None:
    return open_signer(sign) if sign is not None else None


def _same_place(bundle: Bundle, hub: Hub, running: Running, message: str) -> Open:
    """Where the bundle is: its folder, or its branch, which must not have moved since.

    Raises:
        UsageError: A tag or a commit, to which nothing can be added.
    """
    if bundle.root is not None:
        return destination.folder(bundle.root, old=bundle)
    assert bundle.repo is not None
    branch = bundle.revision or "main"
    if branch not in (branches := hub.refs(bundle.repo).branches):
        raise UsageError(
            f"{bundle.repo} has no branch {branch!r}, and bundles are changed on a branch",
            hint=f"its branches: {', '.join(sorted(branches)) or 'none'}",
        )
    options = PublishOptions(revision=branch, parent=bundle.commit, message=message)
    return destination.repository(hub, bundle.repo, lambda keep: replace(options, keep=keep), running.max_disk_bytes)


__all__ = ["Made", "Running", "add_task", "create_bundle", "remove_task", "retrieve_task"]
