"""The order of steps for bundles, in a folder or on the Hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubmerge.bundles import lifecycle
from hubmerge.bundles.lifecycle import Made, Running
from hubmerge.bundles.lora import retrieve_adapter
from hubmerge.bundles.retrieve import Retrieval
from hubmerge.bundles.store import Bundle, open_bundle
from hubmerge.errors import UsageError
from hubmerge.hub import Hub
from hubmerge.output import Written
from hubmerge.publish import PublishOptions

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
    hub: Hub | None = None,
) -> Made:
    """Make a bundle of a recipe's models, in a folder (``out``) or in a repository (``to``).

    Raises:
        UsageError: Neither or both of ``out`` and ``to``.
        HubMergeError: What else went wrong; nothing is left behind.
    """
    if (out is None) == (to is None):
        raise UsageError("a bundle goes either into a folder or into a repository", hint="give --out or --to")
    if recipe.output.format != "bundle":
        raise UsageError(f"the recipe makes a merged model by {recipe.method}", hint="set output: {format: bundle}")
    hub, running = hub or Hub(), running or Running()
    wanted = publish or PublishOptions(message="Publish a bundle made with hubmerge")

    def destination(outputs: Any, digest: str, _: PublishOptions) -> Any:
        if out is not None:
            return lifecycle.into_folder(Path(out), outputs, digest, overwrite=overwrite)
        return lifecycle.into_repo(hub, to or "", outputs, wanted, running.max_disk_bytes)

    return lifecycle.create(recipe, hub, destination, running)


def add_task(
    place: str,
    repo: str,
    *,
    revision: str | None = None,
    name: str | None = None,
    base: str | None = None,
    running: Running | None = None,
    hub: Hub | None = None,
) -> Made:
    """Add a model to a bundle, in its folder or as one commit to its repository; see ``lifecycle.add``."""
    hub, running = hub or Hub(), running or Running()
    bundle = open_bundle(place, hub, base=base)
    try:
        destination = _same_place(bundle, hub, running, f"Add {name or repo}")
        return lifecycle.add(bundle, repo, revision, name, hub, destination, running)
    finally:
        bundle.close()


def remove_task(
    place: str, task: str, *, base: str | None = None, running: Running | None = None, hub: Hub | None = None
) -> Made:
    """Take a task out of a bundle, in its folder or as one commit to its repository; see ``lifecycle.remove``."""
    hub, running = hub or Hub(), running or Running()
    bundle = open_bundle(place, hub, base=base)
    try:
        return lifecycle.remove(bundle, task, hub, _same_place(bundle, hub, running, f"Remove {task}"), running)
    finally:
        bundle.close()


def retrieve_task(
    place: str,
    task: str,
    out: str | Path,
    *,
    scale: float | None = None,
    base: str | None = None,
    running: Running | None = None,
    overwrite: bool = False,
    hub: Hub | None = None,
) -> tuple[Written, ...]:
    """Write a task's model as an ordinary folder; see ``Retrieval.run``."""
    hub, running = hub or Hub(), running or Running()
    bundle = open_bundle(place, hub, base=base)
    try:
        if bundle.manifest.factors:
            return retrieve_adapter(bundle, bundle.manifest.task(task), Path(out), scale=scale, overwrite=overwrite)
        found = Retrieval(bundle, task, scale=scale, workers=running.workers)
        return found.run(Path(out), fetch=running.fetch, overwrite=overwrite, progress=running.progress)
    finally:
        bundle.close()


def _same_place(bundle: Bundle, hub: Hub, running: Running, message: str) -> Any:
    if bundle.root is not None:
        folder = bundle.root
        return lambda outputs, digest, _: lifecycle.into_folder(folder, outputs, digest, old=bundle)
    assert bundle.repo is not None
    repo = bundle.repo
    return lambda outputs, _, options: lifecycle.into_repo(
        hub, repo, outputs, replace(options, message=message), running.max_disk_bytes
    )


__all__ = ["Made", "Running", "add_task", "create_bundle", "remove_task", "retrieve_task"]
