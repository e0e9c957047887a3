"""``hubmerge plan``: what a merge will do, from headers alone."""

from __future__ import annotations

from typing import Any

import click

from hubmerge.cli import _options, _output
from hubmerge.errors import PlanError


@click.command("plan")
@_options.recipe_options
@_options.license_option
@_options.upload_option
@_options.run_options
def command(
    license_: str | None, upload: str,
    workers: int | None, max_memory: str | None, max_disk: str | None, fetch: str, device: str,
    as_json: bool, quiet: bool, verbose: int, debug: bool, **recipe: Any,
) -> None:  # fmt: skip
    """Show what a merge will read, write and hold, and every problem, before any weight is read."""
    from hubmerge import api

    _output.configure_logging(verbose)
    settings = _options.run_settings(workers, max_memory, max_disk, fetch, device, upload)
    report = api.report(_options.stating(_options.load_recipe(**recipe), license_), options=settings)
    if as_json:
        _output.json_data(report.to_json())
    else:
        if not quiet:
            _output.data(_render(report))
            for line in report.devices.notes:
                _output.note(line)
            _note_disk(report.footprint.push_disk_bytes, settings.max_disk_bytes)
        _output.problems(report.plan.problems, quiet=quiet)
    errors = [p for p in report.plan.problems if p.severity == "error"]
    if errors:
        count = f"{len(errors)} problem{'s' * (len(errors) > 1)}"
        raise PlanError(f"{count} to solve before this can be merged", hint="solve what is listed above and plan again")


def _note_disk(shard_bytes: int, allowed_bytes: int | None) -> None:
    """A folder does not count as disk that is used, but a push needs room for a shard."""
    if allowed_bytes is not None and shard_bytes > allowed_bytes:
        needed, allowed = _output.size(shard_bytes), _output.size(allowed_bytes)
        _output.note(f"a push needs {needed} of disk at a time: more than {allowed}; give it --shard-size {allowed}")


def _render(report: Any) -> str:
    plan = report.plan
    rows = [
        [
            m.role if m.role == "base" else m.name,
            m.repo,
            (m.commit or "local folder")[:12],
            "adapter" if m.adapter else "full",
            str(len(m.tensors)),
            _output.size(sum(t.size_bytes for t in m.tensors.values())),
        ]
        for m in (plan.base, *plan.models)
    ]
    merged = sum(j.action == "merge" for j in plan.jobs)
    f = report.footprint
    facts = {
        "method": f"{plan.method} {report.parameters}".strip(),
        "tensors": f"{merged} merged, {len(plan.jobs) - merged} copied",
        "read": _output.size(f.read_bytes),
        "write": f"{_output.size(f.write_bytes)} in {len(plan.outputs)} file{'s' * (len(plan.outputs) != 1)}",
        **_devices(report),
        "memory": f"about {_output.size(f.memory_bytes)} at most",
        "disk": f"{_output.size(f.write_bytes)} for a folder; {_output.size(f.push_disk_bytes)} at a time for a push",
        "plan": plan.digest[:12],
        "licence": report.license.headline,
    }
    table = _output.table(["", "model", "commit", "kind", "tensors", "size"], rows)
    told = [*report.license.reasons, *map(str, report.license.duties)]
    # The check stands last: it takes as many lines as the licences ask for things.
    return "\n".join([f"{table}\n\n{_output.fields(facts)}", *(f"         - {line}" for line in told)])


def _devices(report: Any) -> dict[str, str]:
    """Where matrices are computed, if not all of them on the CPU."""
    if not report.devices.lanes:
        return {}
    shares = report.devices.shares(report.plan).items()
    return {"matrices": "; ".join(f"{count} on {name} ({size / 1e6:,.0f} M values)" for name, (count, size) in shares)}
