"""The merged model's scores beside its parents': what can be compared, how it differs, and what cannot be, and why."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hubmerge.errors import UsageError
from hubmerge.evaluation.matching import Model, assigned, other_commit, parent
from hubmerge.evaluation.scores import Evaluation, Score
from hubmerge.spec import PinnedModel

log = logging.getLogger(__name__)
_OPTIONAL = frozenset({"samples"})
"""Settings that one side need not state."""


@dataclass(frozen=True, slots=True)
class Row:
    """One metric of one task, of all models that have it by the same settings."""

    scores: tuple[Score | None, ...]
    """Of the parents, in the comparison's order."""
    merged: Score | None

    @property
    def reference(self) -> Score:
        """The score whose settings the others share."""
        return self.merged or next(s for s in self.scores if s is not None)

    @property
    def best(self) -> int | None:
        """The parent with the best value, the first of several; None if that cannot be said."""
        higher = self.reference.higher_is_better
        values = {i: s.value if higher else -s.value for i, s in enumerate(self.scores) if s is not None}
        return max(values, key=lambda i: values[i]) if values and higher is not None else None

    @property
    def delta(self) -> float | None:
        """The merged model's value minus the best parent's."""
        before = self.scores[self.best] if self.best is not None else None
        return self.merged.value - before.value if self.merged is not None and before is not None else None


@dataclass(frozen=True, slots=True)
class Mean:
    """A metric's mean over those tasks for which all models in the table have it."""

    measure: str
    higher_is_better: bool | None
    tasks: int
    values: tuple[float, ...]
    """Of the parents."""
    merged: float | None

    @property
    def delta(self) -> float | None:
        """The merged model's mean minus the best parent's."""
        if self.merged is None or self.higher_is_better is None or not self.values:
            return None
        return self.merged - (max if self.higher_is_better else min)(self.values)


@dataclass(frozen=True, slots=True)
class Regression:
    """Where the merged model is worst beside the best parent."""

    row: Row
    parent: str
    before: Score
    after: Score

    @property
    def loss(self) -> float:
        """How much worse, as a positive number in the metric's unit."""
        return abs(self.after.value - self.before.value)

    @property
    def relative(self) -> float:
        """As a fraction of the parent's value; infinite if that is zero."""
        return self.loss / abs(self.before.value) if self.before.value else math.inf

    @property
    def standard_errors(self) -> float | None:
        """The loss in standard errors of a difference of independent values; None where they are not known."""
        errors = (self.before.stderr, self.after.stderr)
        if None in errors or not any(errors):
            return None
        return self.loss / math.hypot(*(e for e in errors if e is not None))


@dataclass(frozen=True, slots=True)
class Omission:
    """Scores that were not compared."""

    model: str
    reason: str
    what: tuple[str, ...]
    """Tasks and metrics."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What evaluations of a merged model and of its parents say."""

    parents: tuple[str, ...]
    """Those with results, in the recipe's order."""
    rows: tuple[Row, ...]
    means: tuple[Mean, ...]
    omissions: tuple[Omission, ...]
    merged: tuple[Evaluation, ...]
    """The merged model's own; empty if only parents were evaluated."""
    programs: tuple[str, ...]
    """What evaluated them, with versions."""

    @property
    def regression(self) -> Regression | None:
        """The worst one, as a fraction of the parent's value, for metrics differ in scale; None without any."""
        return max(self._regressions(), key=lambda r: r.relative, default=None)

    @property
    def compared(self) -> int:
        """How many rows have a difference."""
        return sum(r.delta is not None for r in self.rows)

    def _regressions(self) -> Iterator[Regression]:
        for row in self.rows:
            if row.best is None or row.merged is None or row.delta is None:
                continue
            before = row.scores[row.best]
            if before is not None and (row.delta < 0) == row.reference.higher_is_better and row.delta:
                yield Regression(row, self.parents[row.best], before, row.merged)


def compare(given: Sequence[str], names: Sequence[str], models: Sequence[PinnedModel]) -> Comparison | None:
    """Read the files of ``--eval`` and compare what they say; None without any.

    Args:
        given: ``FILE`` or ``NAME=FILE`` each.
        names: The merged model's: its repository, or its folder.
        models: The parents.

    Raises:
        UsageError: A file that cannot be used, that belongs to no model, or that contradicts another one.
    """
    if not given:
        return None
    merged, parents = Model(names[0], tuple(names)), [parent(m) for m in models]
    found = assigned(given, merged, parents)
    own = tuple(e for m, e in found if m is merged)
    refused = {id(e): c for m, e in found if (c := other_commit(m, e)) is not None}
    columns = [m for m in parents if any(o is m and id(e) not in refused for o, e in found)]
    scores = [_once(m.label, [e for o, e in found if o is m and id(e) not in refused]) for m in columns]
    rows, missed = _rows(_once(merged.label, own), scores, [m.label for m in columns])
    for model, evaluation in found:
        if commit := refused.get(id(evaluation)):
            reason = f"evaluated at commit {commit[:7]}; {str(model.commit)[:7]} was merged"
            missed += [(model.label, reason, _named(s)) for s in _top(evaluation.scores)]
    result = Comparison(
        parents=tuple(m.label for m in columns),
        rows=tuple(rows),
        means=tuple(_means(rows, bool(own))),
        omissions=_grouped(missed),
        merged=own,
        programs=tuple(dict.fromkeys(e.made_with for _, e in found)),
    )
    for omission in result.omissions:
        log.warning("not compared: %s: %s: %s", omission.model, ", ".join(omission.what), omission.reason)
    return result


def _once(label: str, evaluations: Iterable[Evaluation]) -> list[Score]:
    """All scores of a model.

    Raises:
        UsageError: One of them has two values.
    """
    found: dict[tuple[object, ...], tuple[Score, str]] = {}
    for evaluation in evaluations:
        for score in _top(evaluation.scores):
            key = (*score.key, tuple(sorted(score.task.settings.items())))
            before, where = found.setdefault(key, (score, evaluation.label))
            if before.value != score.value:
                values = f"{before.value:g} by {where} and {score.value:g} by {evaluation.label}"
                raise UsageError(f"{label}: {_named(score)} is {values}", hint="give one of these files")
    return [score for score, _ in found.values()]


def _top(scores: Sequence[Score]) -> list[Score]:
    """Without the parts of what a group's own score sums up."""
    inside = {(part, s.metric, s.filter) for s in scores for part in s.task.parts}
    return [s for s in scores if (s.task.name, s.metric, s.filter) not in inside]


def _rows(
    own: Sequence[Score], parents: Sequence[Sequence[Score]], labels: Sequence[str]
) -> tuple[list[Row], list[tuple[str, str, str]]]:
    """The table, and what is not in it: model, reason, score."""
    rows, missed = [], []
    used: set[int] = set()
    known = [_by_key(scores) for scores in parents]
    for reference in own or [s for scores in parents for s in scores]:
        if id(reference) in used:
            continue
        cells: list[Score | None] = []
        for label, scores_of in zip(labels, known, strict=True):
            same = scores_of.get(reference.key, [])
            fitting = next((s for s in same if not differences(reference, s)), None)
            cells.append(fitting)
            if fitting is not None:
                used.add(id(fitting))
            elif same and own:
                used |= {id(s) for s in same}
                missed.append((label, "; ".join(differences(reference, same[0])), _named(reference)))
        rows.append(Row(tuple(cells), reference if own else None))
    if own:
        for label, scores in zip(labels, parents, strict=True):
            unused = (s for s in scores if id(s) not in used)
            missed += [(label, "the merged model was not evaluated on it", _named(s)) for s in unused]
    return rows, missed


def _by_key(scores: Iterable[Score]) -> dict[tuple[object, ...], list[Score]]:
    found: dict[tuple[object, ...], list[Score]] = {}
    for score in scores:
        found.setdefault(score.key, []).append(score)
    return found


def differences(reference: Score, other: Score) -> list[str]:
    """In which settings two scores do not agree, in words."""
    ours, theirs = reference.task.settings, other.task.settings
    return [
        f"{name} {theirs.get(name, 'not stated')} instead of {ours.get(name, 'not stated')}"
        for name in dict.fromkeys((*ours, *theirs))
        if ours.get(name) != theirs.get(name) and not (name in _OPTIONAL and (name not in ours or name not in theirs))
    ]


def _named(score: Score) -> str:
    return f"{score.task.name} {score.measure}"


def _means(rows: Sequence[Row], evaluated: bool) -> Iterator[Mean]:
    """Metrics that at least two tasks have; different metrics have no common mean."""
    groups: dict[tuple[str, str, bool | None], list[Row]] = {}
    for row in rows:
        score = row.reference
        if None not in row.scores:
            groups.setdefault((score.program, score.measure, score.higher_is_better), []).append(row)
    for (_, measure, higher), members in groups.items():
        if len({r.reference.task.name for r in members}) < 2:
            continue
        columns = zip(*(r.scores for r in members), strict=True)
        values = tuple(_mean(s.value for s in column if s is not None) for column in columns)
        merged = _mean(r.merged.value for r in members if r.merged is not None) if evaluated else None
        yield Mean(measure, higher, len(members), values, merged)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


def _grouped(missed: Iterable[tuple[str, str, str]]) -> tuple[Omission, ...]:
    """One for each model and reason."""
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for model, reason, what in missed:
        groups.setdefault((model, reason), {})[what] = None
    return tuple(Omission(model, reason, tuple(what)) for (model, reason), what in groups.items())


__all__ = ["Comparison", "Mean", "Omission", "Regression", "Row", "compare", "differences"]
