"""``hubmerge push``: merge and publish."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from hubmerge.cli import _jobs, _options, _output, _signals
from hubmerge.errors import UsageError


@click.command("push")
@_options.recipe_options
@click.option("--to", "repo", required=True, help="Repository to publish to: namespace/name.")
@click.option(
    "--private", is_flag=True, help="Make the repository private when all is there (a new one is private by default)."
)
@click.option("--public", is_flag=True, help="Make the repository public when all is there.")
@click.option("--pr", "create_pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--revision", help="Branch to commit to; created from main if missing.")
@click.option("--tag", help="Tag to set on the new commit.")
@click.option("--overwrite", is_flag=True, help="Replace weights that hubmerge did not write.")
@_options.license_option
@_options.risk_option
@_options.resume_option
@click.option("--cleanup", is_flag=True, help="Only remove what abandoned runs have staged in the repository.")
@_jobs.options
@_options.diagnostics_option
@_options.evaluation_option
@_options.sign_options
@_options.upload_option
@_options.run_options
def command(
    repo: str, private: bool, public: bool, create_pr: bool, revision: str | None, tag: str | None, overwrite: bool,
    license_: str | None, accept_license_risk: bool, resume: bool, cleanup: bool, diagnostics: bool,
    evaluations: tuple[str, ...],
    sign_key: str | None, certificate: Path | None, upload: str,
    on: str, flavor: str | None, timeout: str | None, image: str | None, yes: bool, dry_run: bool,
    workers: int | None, max_memory: str | None, max_disk: str | None, fetch: str, device: str,
    as_json: bool, quiet: bool, verbose: int, debug: bool, **recipe: Any,
) -> None:  # fmt: skip
    """Merge models and publish weights, card and lock in one commit.

    RECIPE is a YAML file (hubmerge's or mergekit's); without it, give --method, --base and --model.
    Nothing is visible before everything is there; if anything fails, the target stays as it was. Finished shards are
    staged in a branch hubmerge/stage-… of the repository: the same command, on any machine, continues from there.
    What the parents' licences forbid is not published; docs/licenses.md says what is checked.
    """
    from hubmerge import api

    if private and public:
        raise UsageError("--private and --public exclude each other", hint="give one of them")
    sign = _options.signing(sign_key, certificate)
    if sign is not None and on == "jobs":
        raise UsageError("a key does not leave this machine: --sign does not go with --on jobs", hint="push from here")
    if evaluations and on == "jobs":
        raise UsageError(
            "a job does not see this machine's files: --eval does not go with --on jobs",
            hint="push from here with --eval afterwards: the weights are there, and only the card is made anew",
        )
    _output.configure_logging(verbose)
    if cleanup:
        _clean_up(repo, recipe, as_json=as_json)
        return
    if on == "jobs":
        loaded = _options.stating(_options.load_recipe(**recipe), license_)
        _jobs.push(
            loaded, flavor=flavor, timeout=timeout, image=image, yes=yes, dry_run=dry_run, as_json=as_json, quiet=quiet
        )
        return
    _jobs.check_here(flavor, timeout, image, yes=yes, dry_run=dry_run)
    settings = _options.run_settings(workers, max_memory, max_disk, fetch, device, upload)
    loaded = _options.stating(_options.load_recipe(**recipe), license_)
    target = api.PushTarget(
        repo=repo, private=True if private else False if public else None, create_pr=create_pr, revision=revision,
        tag=tag,
        overwrite=overwrite,
        accept_license_risk=accept_license_risk,
    )  # fmt: skip
    with _signals.together() as ranks, _output.progress(quiet=quiet or as_json, bar=ranks.size == 1) as progress:
        result = api.push(
            loaded, target, options=settings, resume=resume, diagnostics=diagnostics, evaluations=evaluations,
            sign=sign, progress=progress, ranks=ranks,
        )  # fmt: skip
    if not ranks.first:
        return
    _output.problems(result.plan.problems, quiet=quiet)
    if result.license is not None and not as_json:
        _output.license_check(result.license, quiet=quiet)
    if as_json:
        _output.json_data(result.to_json())
    elif not quiet:
        _output.data(result.summary())
        _output.note(f"check it any time with: hubmerge verify {repo}")


def _clean_up(repo: str, recipe: Mapping[str, Any], *, as_json: bool) -> None:
    """Remove all staging branches, and say which."""
    from hubmerge import api

    if any(recipe.values()):
        raise UsageError("--cleanup merges nothing", hint=f"hubmerge push --to {repo} --cleanup")
    removed = api.clean_up(repo)
    if as_json:
        _output.json_data({"removed": list(removed)})
    else:
        _output.data("\n".join(f"removed {repo}@{name}" for name in removed) or f"{repo}: nothing is staged")
