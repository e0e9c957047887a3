"""``hubmerge bundle``: many fine-tunes of one base kept together, and each of them got back by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hubmerge.cli import _options, _output
from hubmerge.errors import UsageError
from hubmerge.quantities import percent

if TYPE_CHECKING:
    from hubmerge.bundles.finishing import Made
    from hubmerge.bundles.lifecycle import Running
    from hubmerge.bundles.manifest import Manifest

_FOLDER = click.Path(path_type=Path, file_okay=False)
_bundle = click.argument("bundle", metavar="BUNDLE")
_task = click.option("--task", required=True, help="Name of the task; `hubmerge bundle ls` lists them.")
_base = click.option("--base", type=_FOLDER, help="Folder of the base, if it is not where the bundle says.")


@click.group("bundle")
def command() -> None:
    """Keep many fine-tunes of one base in the space of a few, and get each of them back by name.

    A BUNDLE is a folder, or a repository: repo or repo@revision.
    """


@command.command("create")
@_options.bundle_recipe_options
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the bundle; must not exist or be empty.")
@click.option("--to", "repo", help="Repository to publish it to: namespace/name.")
@click.option("--private", is_flag=True, help="Make the repository private (a new one is private by default).")
@click.option("--public", is_flag=True, help="Make the repository public when all is there.")
@click.option("--overwrite", is_flag=True, help="Replace what the folder or the repository holds.")
@_options.license_option
@_options.risk_option
@_options.sign_options
@_options.reading_options
def create(
    out: Path | None, repo: str | None, private: bool, public: bool, overwrite: bool,
    license_: str | None, accept_license_risk: bool, sign_key: str | None, certificate: Path | None,
    workers: int | None, max_disk: str | None, fetch: str,
    as_json: bool, quiet: bool, verbose: int, debug: bool, **recipe: Any,
) -> None:  # fmt: skip
    """Make a bundle of models, in the folder --out or the repository --to.

    RECIPE is a YAML file whose method is a codec, with output: {format: bundle}; without it, give --method, --base and
    --model.
    """
    from hubmerge.bundles import api
    from hubmerge.publish import PublishOptions

    if (private or public) and repo is None:
        raise UsageError("--private and --public are about a repository", hint="give --to, or leave them out")
    if private and public:
        raise UsageError("--private and --public exclude each other", hint="give one of them")
    _output.configure_logging(verbose)
    sign = _options.signing(sign_key, certificate)
    loaded = _options.load_bundle_recipe(**recipe)
    publish = PublishOptions(
        message="Publish a bundle made with hubmerge", public=False if private else True if public else None
    )
    made = _run(
        lambda running: api.create_bundle(
            loaded, out=out, to=repo, publish=publish, running=running, overwrite=overwrite,
            license=license_, accept_license_risk=accept_license_risk, sign=sign,
        ),
        "bundling", workers, max_disk, fetch, quiet or as_json,
    )  # fmt: skip
    _show_made(made, as_json=as_json, quiet=quiet)


@command.command("ls")
@_bundle
@_options.output_options
def ls(bundle: str, as_json: bool, quiet: bool, verbose: int, debug: bool) -> None:
    """List a bundle's tasks: where each comes from, how well it comes back, what it takes."""
    from hubmerge.bundles.api import opened
    from hubmerge.bundles.report import describe
    from hubmerge.bundles.terms import bundle_license
    from hubmerge.hub import Hub

    _output.configure_logging(verbose)
    with opened(bundle, Hub()) as found:
        if as_json:
            check = {"license_check": bundle_license(found.manifest, found.repo).to_json()}
            _output.json_data({"bundle": bundle, "commit": found.commit, **describe(found.manifest), **check})
        elif quiet:
            _output.data("\n".join(t.name for t in found.manifest.tasks))
        else:
            _output.data(_listing(found.manifest))


@command.command("add")
@_bundle
@click.option("--model", required=True, help="Model to add: repo[@revision] or folder; full checkpoint or adapter.")
@click.option("--name", help="Name of the task; default: the last part of the model's.")
@_base
@_options.license_option
@_options.risk_option
@_options.sign_options
@_options.reading_options
def add(
    bundle: str, model: str, name: str | None, base: Path | None, license_: str | None, accept_license_risk: bool,
    sign_key: str | None, certificate: Path | None,
    workers: int | None, max_disk: str | None, fetch: str,
    as_json: bool, quiet: bool, verbose: int, debug: bool,
) -> None:  # fmt: skip
    """Add a model to a bundle, as a task of its own; no other task's model is needed.

    In a repository this is one commit. If somebody else changed the bundle meanwhile, nothing happens.
    """
    from hubmerge.bundles import api

    _output.configure_logging(verbose)
    sign = _options.signing(sign_key, certificate)
    made = _run(
        lambda running: api.add_task(
            bundle, model, name=name, base=base, running=running,
            license=license_, accept_license_risk=accept_license_risk, sign=sign,
        ),
        "adding", workers, max_disk, fetch, quiet or as_json,
    )  # fmt: skip
    _show_made(made, as_json=as_json, quiet=quiet)


@command.command("remove")
@_bundle
@_task
@click.option("--model", type=_FOLDER, help="Folder of the model that was added, if it is not where the bundle says.")
@_base
@_options.sign_options
@_options.reading_options
def remove(
    bundle: str, task: str, model: Path | None, base: Path | None, sign_key: str | None, certificate: Path | None,
    workers: int | None, max_disk: str | None, fetch: str,
    as_json: bool, quiet: bool, verbose: int, debug: bool,
) -> None:  # fmt: skip
    """Take a task out of a bundle.

    Where all tasks are in one sum, the model that was added is read once more, from where it was, to subtract it.
    """
    from hubmerge.bundles import api

    _output.configure_logging(verbose)
    sign = _options.signing(sign_key, certificate)
    made = _run(
        lambda running: api.remove_task(bundle, task, model=model, base=base, running=running, sign=sign),
        "removing", workers, max_disk, fetch, quiet or as_json,
    )  # fmt: skip
    _show_made(made, as_json=as_json, quiet=quiet)


@command.command("retrieve")
@_bundle
@_task
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the model.")
@click.option("--scale", type=float, help="Multiplies the task's change of the base; default: the bundle's own.")
@_base
@click.option("--overwrite", is_flag=True, help="Replace what the folder holds.")
@_options.reading_options
def retrieve(
    bundle: str, task: str, out: Path, scale: float | None, base: Path | None, overwrite: bool,
    workers: int | None, max_disk: str | None, fetch: str,
    as_json: bool, quiet: bool, verbose: int, debug: bool,
) -> None:  # fmt: skip
    """Write a task's model as an ordinary folder that from_pretrained loads."""
    from hubmerge.bundles import api

    _output.configure_logging(verbose)
    written = _run(
        lambda running: api.retrieve_task(
            bundle, task, out, scale=scale, base=base, running=running, overwrite=overwrite
        ),
        "retrieving", workers, max_disk, fetch, quiet or as_json,
    )  # fmt: skip
    if as_json:
        files = [{"path": w.path, "size_bytes": w.size_bytes, "sha256": w.sha256} for w in written]
        _output.json_data({"path": str(out), "task": task, "files": files})
    elif not quiet:
        _output.data(f"{out}: {task}, {_output.size(sum(w.size_bytes for w in written))}")


def _run(
    step: Callable[[Running], Any], doing: str, workers: int | None, max_disk: str | None, fetch: str, silent: bool
) -> Any:
    """Do a step under the options given, and show how it gets on."""
    from hubmerge.bundles.lifecycle import Running

    settings = _options.reading_settings(workers, max_disk, fetch)
    with _output.progress(quiet=silent, doing=doing) as progress:
        return step(Running(**settings, progress=progress))


def _show_made(made: Made, *, as_json: bool, quiet: bool) -> None:
    """A bundle that was created or changed."""
    from hubmerge.bundles.report import Sizes, describe

    _output.problems(made.problems, quiet=quiet)
    if made.license is not None and not as_json:
        _output.license_check(made.license, quiet=quiet)
    place = made.url or str(made.path)
    if as_json:
        written = [{"path": w.path, "size_bytes": w.size_bytes, "sha256": w.sha256} for w in made.written]
        where = {"path": str(made.path) if made.path else None, "url": made.url, "commit": made.commit}
        check = {"license_check": made.license.to_json() if made.license else None}
        _output.json_data({**where, "written": written, **describe(made.manifest), **check})
    elif not quiet:
        count = len(made.manifest.tasks)
        commit = f" (commit {made.commit[:12]})" if made.commit else ""
        tasks = f"{count} task{'s' * (count != 1)}"
        _output.data(f"{place}{commit}: {tasks}, {_output.size(made.manifest.size_bytes)}")
        _output.data(Sizes.of(made.manifest).verdict)


def _listing(manifest: Manifest) -> str:
    """The tasks, and the whole."""
    from hubmerge.bundles.report import Sizes

    rows = [
        [
            t.name,
            t.source.label if t.source.repo else f"{t.source.name} (local folder)",
            "adapter" if t.adapter else "full",
            f"{t.norm:.4g}",
            "unknown" if t.error is None else percent(t.relative_error or 0),
            _output.size(manifest.own_bytes(t)),
            _output.size(t.source.size_bytes),
        ]
        for t in manifest.tasks
    ]
    sizes = Sizes.of(manifest)
    _, params = manifest.codec_of()
    facts = {
        "codec": f"{manifest.codec}, {params.storage}",
        "base": f"{manifest.base.label}, {_output.size(sizes.base_bytes)}",
        "size": f"{_output.size(sizes.bundle_bytes)}, {_times(sizes.bundle_bytes, sizes.base_bytes)} the base; "
        f"the tasks' own files {_output.size(sizes.plain_bytes)}",
    }
    headers = ["task", "model", "kind", "norm", "expected error", "own", "plain"]
    return f"{_output.table(headers, rows)}\n\n{_output.fields(facts)}\n{sizes.verdict}"


def _times(part: int, whole: int) -> str:
    return f"{part / whole:.3g} times" if whole else "beside"
