"""Every error hubmerge raises on purpose, and the exit code each one ends a command with.

    HubMergeError                1   something failed
    ├── UsageError               2   the command or its arguments
    │   └── RecipeError          2   the recipe: file:line:column
    │       └── UnknownMethodError
    ├── PlanError                1   inputs that cannot be merged as asked
    ├── BudgetError              1   it does not fit the memory or disk given
    ├── SourceError              1   an input cannot be used
    │   ├── IntegrityError       1   an input's bytes are not what they should be
    │   ├── UnsupportedAdapterError 1   an adapter that cannot be merged faithfully
    │   └── TransportError       1   the connection failed for good
    ├── AccessError              4   missing, private, gated or disabled; no or insufficient token
    ├── PublishError             1   the result could not be published
    │   ├── TargetNotEmptyError  1
    │   └── TargetMovedError     1   somebody else committed meanwhile
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

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(HubMergeError):
    """The command line, or a combination of arguments, cannot be used."""

    exit_code = 2


class RecipeError(UsageError):
    """The recipe is wrong; the message starts with ``file:line:column:`` where they are known."""


class UnknownMethodError(RecipeError):
    """No such merge method."""


class PlanError(HubMergeError):
    """The inputs cannot be merged as the recipe asks."""


class BudgetError(HubMergeError):
    """The run does not fit the memory or disk it may use."""


class SourceError(HubMergeError):
    """An input model cannot be used."""


class IntegrityError(SourceError):
    """Bytes of an input, or of a finished file, are not what they should be."""


class UnsupportedAdapterError(SourceError):
    """An adapter kind, or an option of one, that cannot be merged faithfully."""


class TransportError(SourceError):
    """The connection to the Hub failed and retries did not help."""


class AccessError(HubMergeError):
    """A repository is missing or not accessible with the token at hand."""

    exit_code = 4


class PublishError(HubMergeError):
    """The result could not be published; the target was left as it was."""


class TargetNotEmptyError(PublishError):
    """The output folder or repository already holds something else."""


class TargetMovedError(PublishError):
    """The target got another commit while this run was working."""


class VerificationError(HubMergeError):
    """An artifact differs from its lock."""

    exit_code = 3


class LicenseError(HubMergeError):
    """The licences of the parents do not allow what was asked."""

    exit_code = 5


class CancelledError(HubMergeError):
    """The run was interrupted; nothing half-written stays under a final name."""

    exit_code = 130
