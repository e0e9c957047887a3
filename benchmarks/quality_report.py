"""Turns the studies of all seeds into tables, for a terminal and for a page."""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise

from quality_bundles import EXACT, PACKINGS
from quality_models import KINDS, Scale
from quality_study import Outcome, Recovery, Scores, Study, normalised
from quality_tasks import TASKS
from report import machine_facts
from rich.console import Console
from rich.table import Table

KIND_TITLES = {"full": "Full fine-tunes", "lora": "LoRA fine-tunes"}
KIND_NOUNS = {"full": "full fine-tunes", "lora": "LoRA adapters"}
GUESSING = {task.name: 1 / len(task.label_names) for task in TASKS}
EXPECTED = ("linear", "task_arithmetic", "ties", "drm", "tsv_merge")
"""By their papers, each of these is better than the one before it, at the defaults."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """A titled table of text; the first column is a name, the others are figures."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def to_markdown(self) -> str:
        """A section of a page."""
        rule = f"|---|{'--:|' * (len(self.headings) - 1)}"
        lines = [f"### {self.title}", "", _line(self.headings), rule, *map(_line, self.rows)]
        return "\n".join(lines) + "\n"

    def to_rich(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title)
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number else "left", no_wrap=not number)
        for row in self.rows:
            table.add_row(*row)
        return table


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def sheets(studies: Sequence[Study]) -> list[Sheet]:
    """All tables, for one or more seeds of the same setup."""
    found = [tasks_sheet(studies), geometry_sheet(studies)]
    for kind in KINDS:
        found += [methods_sheet(studies, kind), accuracy_sheet(studies, kind), order_sheet(studies, kind)]
    for kind in KINDS:
        found += [bundles_sheet(studies, kind), storage_sheet(studies, kind)]
    return found


def tasks_sheet(studies: Sequence[Study]) -> Sheet:
    """What is asked, and what base and fine-tunes reach."""
    rows = []
    for task in TASKS:
        figures = [_percent(study.base[task.name] for study in studies)]
        figures += [_percent(study.fields[kind].ceiling[task.name] for study in studies) for kind in KINDS]
        rows.append((task.name, task.question, str(len(task.label_names)), *figures))
    return Sheet("Tasks: accuracy on test images, %", ("task", "question", "classes", "base", *KINDS), rows)


def geometry_sheet(studies: Sequence[Study]) -> Sheet:
    """How the task vectors lie."""
    rows = []
    for kind in KINDS:
        columns = zip(*(astuple(study.fields[kind].geometry) for study in studies), strict=True)
        rows.append((kind, *(f"{statistics.mean(c):.4g} ({min(c):.4g}–{max(c):.4g})" for c in columns)))
    headings = ("fine-tunes", "‖Δ‖ / ‖base‖", "cosine", "STI", "STI / Σσ")
    return Sheet("Task vectors: mean over seeds (lowest–highest)", headings, rows)


def methods_sheet(studies: Sequence[Study], kind: str) -> Sheet:
    """Every method's normalised accuracy, at its defaults and at its best scale, the best defaults first."""
    rows = [("the base itself", *_with_spread([_base(study, kind) for study in studies]), "", "", "", "")]
    for label in _ranked(studies, kind):
        outcomes = [study.fields[kind].outcomes[label] for study in studies]
        default, best = (
            _with_spread([_score(study, kind, label, which) for study in studies]) for which in (_default, _best)
        )
        rows.append((label, *default, *best, _scales(outcomes), f"{statistics.mean(o.length for o in outcomes):.2f}"))
    headings = ("method", "at defaults, %", "±", "at best scale, %", "±", "best scales", "‖merged Δ‖ / ‖Δ‖")
    return Sheet(f"{KIND_TITLES[kind]}: normalised accuracy, mean and standard deviation over seeds", headings, rows)


def accuracy_sheet(studies: Sequence[Study], kind: str) -> Sheet:
    """Every method's accuracy per task at its defaults."""
    rows: list[tuple[str, ...]] = []

    def add(label: str, scores: Sequence[Scores]) -> None:
        means = [statistics.mean(s[task.name] for s in scores) for task in TASKS]
        rows.append((label, *(f"{100 * mean:.1f}" for mean in (*means, statistics.mean(means)))))

    add("base", [study.base for study in studies])
    for label in _ranked(studies, kind):
        add(label, [study.fields[kind].outcomes[label].default for study in studies])
    add("own fine-tune", [study.fields[kind].ceiling for study in studies])
    headings = ("method", *(task.name for task in TASKS), "mean")
    return Sheet(f"{KIND_TITLES[kind]}: accuracy at defaults, %", headings, rows)


def order_sheet(studies: Sequence[Study], kind: str) -> Sheet:
    """Whether the order that the papers report is found here."""
    rows = []
    for low, high in (*pairwise(EXPECTED), ("drm, not renormalised", "drm")):
        cells: list[str] = []
        for which in (_default, _best):
            gaps = [_score(study, kind, high, which) - _score(study, kind, low, which) for study in studies]
            cells += (f"{100 * statistics.mean(gaps):+.1f}", f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}")
        rows.append((f"{low} < {high}", *cells))
    headings = ("expected", "at defaults, points", "seeds", "at best scales, points", "seeds")
    return Sheet(f"{KIND_TITLES[kind]}: is the second better than the first?", headings, rows)


def bundles_sheet(studies: Sequence[Study], kind: str) -> Sheet:
    """Every bundle in float32: how good the models out of it are, how large it is, and how far off its deltas are."""
    guesses = [normalised(GUESSING, study.fields[kind].ceiling) for study in studies]
    bases = [_base(study, kind) for study in studies]
    rows = [(label, *_with_spread(found), *[""] * 7) for label, found in (("guessing", guesses), ("base", bases))]
    for label in _bundles(studies, kind):
        found = [study.fields[kind].bundles[label][EXACT] for study in studies]
        default, best = (
            _with_spread([_recovered(study, kind, label, EXACT, which) for study in studies])
            for which in (_default, _best)
        )
        theories = [r.fidelity.theory for r in found if r.fidelity.theory is not None]
        expected = f"{statistics.mean(theories):.3g}" if theories else "–"
        rows.append((label, *default, *best, _scales(found), *_sizes(found), f"{_error(found):.3g}", expected))
    headings = (
        *("bundle", "at λ = 1, %", "±", "at best λ, %", "±", "best λ", "bytes / base's", "bytes / all models'"),
        *("‖Δ̂ - Δ‖² / ‖Δ‖²", "expected"),
    )
    return Sheet(f"Bundles of {KIND_NOUNS[kind]}, in float32: normalised accuracy of the retrieved", headings, rows)


def storage_sheet(studies: Sequence[Study], kind: str) -> Sheet:
    """What storing numbers in fewer bits costs, in points of normalised accuracy, at the same λ."""
    rows = []
    for label in _bundles(studies, kind):
        forms = studies[0].fields[kind].bundles[label]
        for storage in [form for form in forms if form != EXACT]:
            cells: list[str] = []
            for which in (_default, _best):
                gaps = [
                    100 * (_recovered(s, kind, label, storage, which) - _recovered(s, kind, label, EXACT, which))
                    for s in studies
                ]
                cells.append(f"{statistics.mean(gaps):+.2f} ({min(gaps):+.2f} to {max(gaps):+.2f})")
            found = [study.fields[kind].bundles[label][storage] for study in studies]
            rows.append((label, storage, *cells, *_sizes(found), f"{_error(found):.3g}"))
    headings = (
        *("bundle", "stored as", "at λ = 1", "at best λ", "bytes / base's", "bytes / all models'"),
        "‖Δ̂ - Δ‖² / ‖Δ‖²",
    )
    return Sheet(f"Bundles of {KIND_NOUNS[kind]}: difference to float32, points (over seeds)", headings, rows)


def _bundles(studies: Sequence[Study], kind: str) -> list[str]:
    known = studies[0].fields[kind].bundles
    return [packing.label for packing in PACKINGS if packing.label in known]


def _sizes(found: Sequence[Recovery]) -> tuple[str, str]:
    per_base, per_models = ([getattr(r.fidelity, name) for r in found] for name in ("per_base", "per_models"))
    return f"{statistics.mean(per_base):.2f}", f"{statistics.mean(per_models):.2f}"


def _error(found: Sequence[Recovery]) -> float:
    return statistics.mean(r.fidelity.error for r in found)


def _scales(outcomes: Sequence[Outcome | Recovery]) -> str:
    return ", ".join("–" if o.best_scale is None else f"{o.best_scale:g}" for o in outcomes)


def _default(outcome: Outcome | Recovery) -> Scores:
    return outcome.default


def _best(outcome: Outcome | Recovery) -> Scores:
    return outcome.best


def _recovered(study: Study, kind: str, label: str, storage: str, which: Callable[[Recovery], Scores]) -> float:
    field = study.fields[kind]
    return normalised(which(field.bundles[label][storage]), field.ceiling)


def _score(study: Study, kind: str, label: str, which: Callable[[Outcome], Scores]) -> float:
    field = study.fields[kind]
    return normalised(which(field.outcomes[label]), field.ceiling)


def _base(study: Study, kind: str) -> float:
    return normalised(study.base, study.fields[kind].ceiling)


def _ranked(studies: Sequence[Study], kind: str) -> list[str]:
    def mean(label: str) -> float:
        return statistics.mean(_score(study, kind, label, _default) for study in studies)

    return sorted(studies[0].fields[kind].outcomes, key=mean, reverse=True)


def _percent(values: Iterable[float]) -> str:
    return f"{100 * statistics.mean(values):.1f}"


def _with_spread(values: Sequence[float]) -> tuple[str, str]:
    spread = f"{100 * statistics.stdev(values):.1f}" if len(values) > 1 else "–"
    return _percent(values), spread


def facts(scale_name: str, scale: Scale, studies: Sequence[Study], wall_s: float) -> dict[str, str]:
    """What the figures hold for."""
    training = (
        f"{scale.pretrain_steps} steps of pretraining, {scale.fine_tune_steps} of full fine-tuning at a rate of "
        f"{scale.fine_tune_rate:g}, {scale.lora_steps} of LoRA at {scale.lora_rate:g}"
    )
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "peft", "scikit-learn")]
    return machine_facts() | {
        "libraries": ", ".join(versions),
        "scale": f"{scale_name}: {training}",
        "seeds": ", ".join(str(study.seed) for study in studies),
        "time": f"{wall_s:.0f} s; {sum(study.cpu_s for study in studies):.0f} s of processor time",
    }


def to_markdown(known: dict[str, str], found: Sequence[Sheet]) -> str:
    """A section of a page."""
    lines = ["## Results", "", *(f"- {name}: {value}" for name, value in known.items()), ""]
    return "\n".join(lines) + "\n" + "\n".join(sheet.to_markdown() for sheet in found)


def show(console: Console, known: dict[str, str], found: Sequence[Sheet]) -> None:
    """On a terminal."""
    for name, value in known.items():
        console.print(f"{name}: {value}", soft_wrap=True)
    for sheet in found:
        console.print(sheet.to_rich())
