"""The command line: one file per command, found by itself; this file turns errors into messages and exit codes."""

from __future__ import annotations

import importlib
import os
import pkgutil
import shlex
import sys
from typing import Any

import click

from hubmerge import __version__
from hubmerge.cli import _output
from hubmerge.errors import CancelledError, HubMergeError, RankError
from hubmerge.io.threads import anybody_left


class _Commands(click.Group):
    """Loads a command's file when it is needed: each imports its heavy parts only when it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the files in this folder."""
        return [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command in the file of that name."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command = importlib.import_module(f"{__name__}.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="hubmerge")
def cli() -> None:
    """Merge models on the Hugging Face Hub: streamed, reproducible, published with a truthful card."""


def main(args: list[str] | None = None) -> None:
    """Run a command and exit with the documented code."""
    arguments = sys.argv[1:] if args is None else args
    debug = "--debug" in arguments
    try:
        code = cli.main(arguments, prog_name="hubmerge", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except (click.exceptions.Abort, KeyboardInterrupt) as e:
        _fail(_cancelled(e, arguments), debug)
    except click.ClickException as e:
        e.show()
        sys.exit(2)
    except HubMergeError as e:
        if isinstance(e, RankError) and hasattr(e, "__notes__"):
            e.add_note(f"continue with: {_command(arguments)}, by itself or under a launcher")
        _fail(e, debug)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as e:
        if debug:
            raise
        _fail(
            HubMergeError(
                f"internal error: {type(e).__name__}: {e}", hint="run again with --debug and report the traceback"
            ),
            debug,
        )


def _cancelled(error: BaseException, arguments: list[str]) -> CancelledError:
    """What an interrupt ends with: where finished files are kept, the command that continues."""
    notes = [note for e in (error, error.__cause__) for note in getattr(e, "__notes__", ())]
    cancelled = CancelledError("cancelled", hint=f"continue with: {_command(arguments)}" if notes else None)
    for note in notes:
        cancelled.add_note(note)
    return cancelled


def _command(arguments: list[str]) -> str:
    return shlex.join(["hubmerge", *arguments])


def _fail(error: HubMergeError, debug: bool) -> Any:
    _output.error(error, debug=debug)
    if isinstance(error, CancelledError | RankError) and anybody_left():
        # Threads that wait for a server cannot be stopped; everything else has been cleaned up on the way here.
        os._exit(error.exit_code)
    sys.exit(error.exit_code)
