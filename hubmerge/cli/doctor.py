"""``hubmerge doctor``: is this machine, and this token, ready to merge and publish?"""

from __future__ import annotations

from typing import Any

import click

from hubmerge.cli import _options, _output
from hubmerge.errors import HubMergeError


@click.command("doctor")
@click.option("--to", "repo", help="Also check that the token may publish to this repository.")
@_options.output_options
def command(repo: str | None, as_json: bool, quiet: bool, verbose: int, debug: bool) -> None:
    """Show versions, memory, disk, the Hub's address and what the token may do."""
    from hubmerge.doctor import examine

    facts = examine(repo)
    if as_json:
        _output.json_data(facts)
    else:
        _output.data(_output.fields({k: _shown(v) for k, v in facts.items()}))
    if facts.get("problem"):
        raise HubMergeError(str(facts["problem"]), hint=facts.get("next"))


def _shown(value: Any) -> str:
    return (
        _output.size(value) if isinstance(value, int) and not isinstance(value, bool) and value > 1000 else str(value)
    )
