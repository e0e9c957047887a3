"""Every error hubmerge raises on purpose, and the exit code each one ends a command with.

HubMergeError                1   something failed
├── UsageError               2   the command or its arguments
│   └── RecipeError          2   the recipe: file:line:column
│       └── UnknownMethodError
├── PlanError                1   inputs that cannot be merged as asked
├── BudgetError              1   it does not fit the memory or disk given
├── SourceError              1   an input cannot be used
│   ├── IntegrityError       1   an input's bytes are not what they should be
│   │   └── SpoiledError     1   and that was found after they had been used
│   ├── UnsupportedAdapterError 1   an adapter that cannot be merged faithfully
│   └── TransportError       1   the connection failed for good
├── AccessError              4   missing, private, gated or disabled; no or insufficient token
├── PublishError             1   the result could not be published
│   ├── TargetNotEmptyError  1
│   └── TargetMovedError     1   somebody else committed meanwhile
├── RankError                1   another process of the run died, failed or is about something else
├── VerificationError        3   an artifact differs from its lock
├── LicenseError             5   the parents' licences forbid it
└── CancelledError           130 interrupted by the user
"""

from __future__ import annotations

from typing import ClassVar


class HubMergeError(Exception):
    """Base of all deliberate errors.

    Args:
        message: What is wrong, where, with which values; one line where possible.
        hint: The next step, as an instruction; printed on a line of its own.
    """

    exit_code: ClassVar[int] = 1
    next_step: ClassVar[str] = "run the same command again with --debug, which shows where it happened"
    """The hint of an error that was raised without one."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.next_step

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}"


class UsageError(HubMergeError):
    """The command line, or a combination of arguments, cannot be used."""

    exit_code = 2
    next_step = "`hubmerge --help`, and --help after a command, describe what it takes"


class RecipeError(UsageError):
    """The recipe is wrong; the message starts with ``file:line:column:`` where they are known."""

    next_step = "correct it and run again"


class UnknownMethodError(RecipeError):
    """No such merge method."""


class PlanError(HubMergeError):
    """The inputs cannot be merged as the recipe asks."""

    next_step = "`hubmerge plan` lists every problem"


class BudgetError(HubMergeError):
    """The run does not fit the memory or disk it may use."""

    next_step = "give more memory or disk, or merge less at once"


class SourceError(HubMergeError):
    """An input model cannot be used."""

    next_step = "use another revision of that model, or leave it out"


class IntegrityError(SourceError):
    """Bytes of an input, or of a finished file, are not what they should be."""

    next_step = "fetch or save that file again, or use another revision of the model"


class SpoiledError(IntegrityError):
    """Wrong bytes were found so when the last of a file had come: nothing that was made of them may be kept."""


class UnsupportedAdapterError(SourceError):
    """An adapter kind, or an option of one, that cannot be merged faithfully."""


class TransportError(SourceError):
    """The connection to the Hub failed and retries did not help."""

    next_step = "check the connection and run the same command again"


class AccessError(HubMergeError):
    """A repository is missing or not accessible with the token at hand."""

    exit_code = 4
    next_step = "`hubmerge doctor` shows the Hub's address and what the token may do"


class PublishError(HubMergeError):
    """The result could not be published; the target was left as it was."""

    next_step = "nothing was published: correct what it names and run the same command again"


class TargetNotEmptyError(PublishError):
    """The output folder or repository already holds something else."""


class TargetMovedError(PublishError):
    """The target got another commit while this run was working."""


class RankError(HubMergeError):
    """Of the processes of one run, another one died, failed, did not come, or is about something else."""

    next_step = "run the same command again, with any number of processes: it continues with what is finished"


class VerificationError(HubMergeError):
    """An artifact differs from its lock."""

    exit_code = 3
    next_step = "fetch it again, or find out who changed it"


class LicenseError(HubMergeError):
    """The licences of the parents do not allow what was asked."""

    exit_code = 5
    next_step = "choose models whose licences go together"


class CancelledError(HubMergeError):
    """The run was interrupted; nothing half-written stays under a final name."""

    exit_code = 130
    next_step = "run the same command to start again"
