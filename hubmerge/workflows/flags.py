"""Further arguments of hubmerge in a workflow: which of them each command gets, and which the step decides itself."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from hubmerge.errors import UsageError

Options = Mapping[str, bool]
"""A command's options, and whether each takes a value."""
DECIDED = {
    "--to": "repo_id",
    "--out": "mode",
    "--pr": "create_pr",
    "--private": "private",
    "--json": "mode",
    "--on": "mode",
    "--dry-run": "mode",
    "--cleanup": "mode",
}
"""Options, and the inputs that stand for them."""


def for_command(flags: Sequence[str], known: Options, others: Sequence[Options]) -> list[str]:
    """The arguments that are a command's own; those of the others are left out, so that all steps can have the same.

    Args:
        flags: Options, each with its value after an equals sign or as the next argument.
        known: Options of the command.
        others: Options of the further commands that the arguments may be meant for.

    Raises:
        UsageError: An option of none of them, or one that an input stands for.
    """
    kept: list[str] = []
    rest = list(flags)
    everything = {name: takes for options in (*others, known) for name, takes in options.items()}
    while rest:
        flag = rest.pop(0)
        name, equals, _ = flag.partition("=")
        if name in DECIDED:
            raise UsageError(f"the input flags cannot hold {name}", hint=f"use the input {DECIDED[name]}")
        if name not in everything:
            close = difflib.get_close_matches(name, everything, 1)
            raise UsageError(
                f"the input flags holds {flag!r}, which is no option of hubmerge's"
                + (f"; did you mean {close[0]}?" if close else ""),
                hint="write one argument to a line: --license=mit, or --license and mit on two lines",
            )
        words = [flag]
        if everything[name] and not equals:
            if not rest:
                raise UsageError(f"the input flags ends with {name}, which takes a value", hint=f"write {name}=VALUE")
            words.append(rest.pop(0))
        kept += words if name in known else []
    return kept
