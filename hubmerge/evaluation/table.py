"""A comparison as the card shows it: numbers in as many digits as they are worth, and one sentence on the worst."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hubmerge.evaluation.comparison import Comparison, Mean, Omission, Regression, Row
from hubmerge.evaluation.scores import Score
from hubmerge.quantities import percent

_MAX_DECIMALS = 6
_DIGITS = 4
NONE = "–"


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table."""

    task: str
    shots: str
    measure: str
    values: tuple[str, ...]
    """Of the parents, then of the merged model if it was evaluated."""
    delta: str


@dataclass(frozen=True, slots=True)
class Table:
    """What a comparison's section on the card says."""

    parents: tuple[str, ...]
    evaluated: bool
    """Whether the merged model was; the last value of each line is then its own."""
    lines: tuple[Line, ...]
    worst: str | None
    """A sentence on the worst regression; None if nothing was compared."""
    omissions: tuple[Omission, ...]
    programs: tuple[str, ...]

    @property
    def few_shot(self) -> bool:
        """Whether the number of examples is known of any task."""
        return any(line.shots != NONE for line in self.lines)


def table(found: Comparison) -> Table:
    """A comparison as the card shows it, means last."""
    lines = (*(_line(row, found) for row in found.rows), *(_mean_line(mean, found) for mean in found.means))
    return Table(found.parents, bool(found.merged), lines, _worst(found), found.omissions, found.programs)


def _worst(found: Comparison) -> str | None:
    if not found.compared:
        return None
    worst = found.regression
    if worst is None:
        return "In none of the compared results is the merged model worse than its best parent."
    after, before = worst.after, worst.before
    loss = _rounded(worst.loss, min(_decimals(after.value, after.stderr), _decimals(before.value, before.stderr)))
    share = f", {percent(worst.relative)} of that" if math.isfinite(worst.relative) else ""
    return (
        f"Worst regression: in {_task(after)}, {after.measure} is {_shown(after)}, against {_shown(before)} of "
        f"{worst.parent}: worse by {loss}{share}.{_certainty(worst)}"
    )


def _certainty(worst: Regression) -> str:
    errors = worst.standard_errors
    if errors is None:
        return ""
    return f" That is {errors:.1f} standard errors of the difference, taking the two as independent."


def _line(row: Row, found: Comparison) -> Line:
    reference = row.reference
    shots = reference.task.few_shot
    merged = (row.merged,) if found.merged else ()
    return Line(
        task=_task(reference),
        shots=NONE if shots is None else str(shots),
        measure=reference.measure + _arrow(reference.higher_is_better),
        values=tuple(_shown(s) if s is not None else NONE for s in (*row.scores, *merged)),
        delta=_delta(row),
    )


def _mean_line(mean: Mean, found: Comparison) -> Line:
    values = (*mean.values, *((mean.merged,) if mean.merged is not None else ()))
    decimals = min(_decimals(v, None) for v in values)
    return Line(
        task=f"Mean of {mean.tasks} tasks",
        shots=NONE,
        measure=mean.measure + _arrow(mean.higher_is_better),
        values=tuple(_rounded(v, decimals) for v in values),
        delta=_signed(mean.delta, decimals),
    )


def _delta(row: Row) -> str:
    before = row.scores[row.best] if row.best is not None else None
    if row.merged is None or before is None:
        return NONE
    return _signed(row.delta, min(_decimals(s.value, s.stderr) for s in (row.merged, before)))


def _task(score: Score) -> str:
    return f"{score.task.name} ({score.task.limit})" if score.task.limit else score.task.name


def _arrow(higher: bool | None) -> str:
    return "" if higher is None else " ↑" if higher else " ↓"


def _shown(score: Score) -> str:
    """``0.789 ± 0.011``: the error in two digits, the value in as many decimals."""
    decimals = _decimals(score.value, score.stderr)
    error = f" ± {_rounded(score.stderr, decimals)}" if score.stderr else ""
    return _rounded(score.value, decimals) + error


def _decimals(value: float, stderr: float | None) -> int:
    """Decimals that are worth showing: two digits of the error; four digits of a value without one."""
    size, digits = (stderr, 2) if stderr else (abs(value), _DIGITS)
    if not size:
        return _DIGITS
    return min(max(digits - 1 - math.floor(math.log10(size)), 0), _MAX_DECIMALS)


def _rounded(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    return text if float(text) else text.lstrip("-")


def _signed(value: float | None, decimals: int) -> str:
    if value is None:
        return NONE
    text = _rounded(abs(value), decimals)
    return text if not float(text) else f"{'+' if value > 0 else '−'}{text}"
