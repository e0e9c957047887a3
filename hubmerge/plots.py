"""The three plots of a merge's figures: the same figures give the same bytes."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from hubmerge.analysis import Diagnostics, kind_of
from hubmerge.drawing import CHAR, FONT, MARKERS, Drawing
from hubmerge.markdown import one_line

FIGURES_NAME = "diagnostics.json"
WIDTH = 760
MAX_SERIES = len(MARKERS)
_MAX_LABEL = 26


@dataclass(frozen=True, slots=True)
class Plot:
    """A finished plot."""

    path: str
    """Where it lies in a published model."""
    title: str
    alt: str
    """What it shows, for those who do not see it."""
    svg: str


def as_files(found: Diagnostics) -> dict[str, bytes]:
    """The figures and their plots as they lie in a published model."""
    files = {FIGURES_NAME: (json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n").encode()}
    return files | {plot.path: plot.svg.encode() for plot in plots(found)}


def plots(found: Diagnostics) -> tuple[Plot, ...]:
    """Those plots for which there are figures."""
    made = (cosine_plot(found), interference_plot(found), spectrum_plot(found))
    return tuple(plot for plot in made if plot is not None)


# --- the three plots --------------------------------------------------------------------------------------------


def cosine_plot(found: Diagnostics) -> Plot | None:
    """Cosines of all pairs of task vectors, and of each with the merged delta, as a heat map; None for one task."""
    names, count = [_short(name) for name in found.tasks], len(found.tasks)
    if count < 2:
        return None
    table, merged = found.model.cosines, found.model.merged_cosines
    apart = np.where(np.eye(count, dtype=bool), math.nan, table)
    title = "Cosines of the task vectors"
    alt = f"{_extremes(found)} With the merged delta: {_range(merged)}."
    left = max(_width(name) for name in (*names, "merged")) + 30
    cell = max(min((WIDTH - left - 24) / count, 56.0), 16.0)
    width, top = max(left + cell * count + 24, 320.0), 44.0
    drawing = Drawing(
        math.ceil(width), math.ceil(top + cell * (count + 1) + 10 + _width(max(names, key=len)) * 0.75 + 30)
    )
    drawing.text(16, 26, title, "title")
    for i, name in enumerate(names):
        y = top + cell * i
        drawing.text(left - 8, y + cell / 2 + 4, name, "end")
        _heat_row(drawing, left, y, cell, apart[i], _largest(apart))
        drawing.slanted(left + cell * (i + 0.5), top + cell * (count + 1) + 22, name)
    y = top + cell * count + 8
    drawing.text(left - 8, y + cell / 2 + 4, "merged", "end strong")
    _heat_row(drawing, left, y, cell, merged, _largest(merged))
    return Plot("assets/cosines.svg", title, alt, drawing.svg(title, alt))


def interference_plot(found: Diagnostics) -> Plot | None:
    """Relative singular task interference by layer, a line for each kind of weight; None where none was measured."""
    kinds: defaultdict[str, defaultdict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for tensor in found.decomposed:
        value = tensor.spectra.relative_interference if tensor.spectra is not None else math.nan
        if tensor.layer is not None and math.isfinite(value):
            kinds[kind_of(tensor.name)][tensor.layer].append(value)
    if not kinds or len(found.tasks) < 2:
        return None
    labels = _kind_labels(list(kinds))
    series = [
        Series(label, [(float(layer), sum(v) / len(v)) for layer, v in sorted(layers.items())])
        for label, layers in zip(labels, kinds.values(), strict=True)
    ]
    series.sort(key=lambda s: (-s.mean, s.label))
    last = max(layer for layer in found.blocks if layer is not None)
    title = "Singular task interference by depth"
    means = ", ".join(f"{s.label} {s.mean:.2g}" for s in series[:MAX_SERIES])
    alt = f"By kind of weight, the means over layers: {means}. {_sampled(found)}"
    chart = Chart(
        title, "layer", "interference ÷ sum of singular values",
        x_ticks=[(float(i), str(i)) for i in _whole_ticks(last)],
        y_ticks=_nice_ticks(max(y for s in series for _, y in s.points)),
    )  # fmt: skip
    return Plot("assets/interference.svg", title, alt, chart.svg(series, alt))


def spectrum_plot(found: Diagnostics) -> Plot | None:
    """What share of each task vector's energy its best approximation of each rank holds; None where not measured."""
    spectra = [t.spectra for t in found.decomposed if t.spectra is not None]
    if not spectra:
        return None
    ranks = sorted({rank for s in spectra for rank in s.ranks if rank & (rank - 1) == 0 or rank == s.ranks[-1]})
    squares = sum(s.squares[:, [max(i for i, r in enumerate(s.ranks) if r <= rank) for rank in ranks]] for s in spectra)
    assert not isinstance(squares, int)
    with np.errstate(invalid="ignore"):
        energy = squares / squares[:, -1:]
    series = [
        Series(_short(name), [(math.log2(rank), float(e)) for rank, e in zip(ranks, row, strict=True)])
        for name, row in zip(found.tasks, energy, strict=True)
        if np.isfinite(row).all()
    ]
    if not series:
        return None
    series.sort(key=lambda s: (-s.mean, s.label))
    half = [2 ** next(x for x, y in s.points if y >= 0.5) for s in series]
    title = "Energy of the task vectors by rank"
    alt = (
        f"Half of a task vector's energy is held by rank {min(half):.0f}"
        f"{f' to {max(half):.0f}' if max(half) > min(half) else ''}, of {ranks[-1]} at most. {_sampled(found)}"
    )
    doublings = range(0, math.floor(math.log2(ranks[-1])) + 1, 1 if ranks[-1] <= 1024 else 2)
    chart = Chart(
        title, "rank", "share of the squared length",
        x_ticks=[(float(i), str(1 << i)) for i in doublings],
        y_ticks=[(i / 4, f"{25 * i} %") for i in range(5)],
    )  # fmt: skip
    return Plot("assets/spectrum.svg", title, alt, chart.svg(series, alt))


def _extremes(found: Diagnostics) -> str:
    """The most and the least similar pair, in words."""
    table, names = found.model.cosines, [_short(n) for n in found.tasks]
    known = [(table[i, j], i, j) for i, j in combinations(range(len(names)), 2) if math.isfinite(table[i, j])]
    if not known:
        return "No two tasks change anything."
    high, low = max(known, key=lambda k: k[0]), min(known, key=lambda k: k[0])
    said = f"Most alike are {names[high[1]]} and {names[high[2]]} ({_signed(high[0])})"
    if len(known) == 1:
        return f"{names[high[1]]} and {names[high[2]]}: {_signed(high[0])}."
    return f"{said}, least alike {names[low[1]]} and {names[low[2]]} ({_signed(low[0])})."


def _range(values: Iterable[float]) -> str:
    known = [v for v in values if math.isfinite(v)]
    return f"{_signed(min(known))} to {_signed(max(known))}" if known else "none"


def _sampled(found: Diagnostics) -> str:
    """Of how many weights the singular values were computed."""
    done = len(found.decomposed)
    return f"All {done} weights." if done == found.matrices else f"A sample: {done} of {found.matrices} weights."


# --- lines ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Series:
    """One line: points in the order of x."""

    label: str
    points: Sequence[tuple[float, float]]

    @property
    def mean(self) -> float:
        """Of the heights."""
        return sum(y for _, y in self.points) / len(self.points)


@dataclass(frozen=True, slots=True)
class Chart:
    """Axes with lines between them, and their names beside them; y begins at 0."""

    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]

    def svg(self, series: Sequence[Series], alt: str) -> str:
        """The drawing; of more lines than there are colours, the first and the last."""
        shown = series if len(series) <= MAX_SERIES else [*series[: MAX_SERIES - 1], series[-1]]
        legend = max(_width(s.label) for s in shown) + 44
        left, top, right, bottom = 64.0, 74.0, WIDTH - legend - 16, 340.0
        drawing = Drawing(WIDTH, 396)
        low = min(0.0, *(x for s in shown for x, _ in s.points), self.x_ticks[0][0])
        high = max(*(x for s in shown for x, _ in s.points), self.x_ticks[-1][0], low + 1e-9)
        tallest = max(self.y_ticks[-1][0], 1e-9)

        def place(x: float, y: float) -> tuple[float, float]:
            across = (x - low) / (high - low) if high - low > 1e-6 else 0.5
            return left + across * (right - left), bottom - y / tallest * (bottom - top)

        drawing.text(16, 26, self.title, "title")
        drawing.text(16, 50, self.y_label, "muted")
        for y, label in self.y_ticks:
            _, at = place(low, y)
            drawing.line(left, at, right, at, "gridline")
            drawing.text(left - 8, at + 4, label, "end muted")
        for x, label in self.x_ticks:
            drawing.text(place(x, 0.0)[0], bottom + 20, label, "middle muted")
        drawing.text((left + right) / 2, bottom + 42, self.x_label, "middle muted")
        for number, one in enumerate(shown):
            drawing.path([place(x, y) for x, y in one.points], number)
            drawing.marker(right + 26, top + 8 + 24 * number, number)
            drawing.text(right + 38, top + 12 + 24 * number, one.label)
        if len(shown) < len(series):
            drawing.text(right + 20, top + 12 + 24 * len(shown), f"({len(shown)} of {len(series)} shown)", "muted")
        return drawing.svg(self.title, alt)


def _nice_ticks(largest: float) -> list[tuple[float, str]]:
    """Four to six round numbers from 0 to at least ``largest``."""
    if largest <= 0:
        return [(0.0, "0"), (1.0, "1")]
    rough = largest / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(s * unit for s in (1, 2, 2.5, 5, 10) if s * unit >= rough * 0.999999)
    return [(i * step, f"{i * step:.4g}") for i in range(math.ceil(largest / step - 1e-6) + 1)]


def _whole_ticks(last: int) -> list[int]:
    step = next(s for s in (1, 2, 4, 5, 10, 20, 25, 50, 100, 1000) if last / s <= 12)
    return list(range(0, last + 1, step))


def _kind_labels(kinds: Sequence[str]) -> list[str]:
    """Kinds of weights without the name of the stack of layers, unless there are several."""
    plain = [kind.removesuffix(".weight") for kind in kinds]
    within = [kind.partition("*.")[2] or kind for kind in plain]
    return [_short(kind) for kind in (within if len(set(within)) == len(within) else plain)]


# --- heat -------------------------------------------------------------------------------------------------------


def _heat_row(drawing: Drawing, left: float, y: float, cell: float, values: Iterable[float], largest: float) -> None:
    for j, value in enumerate(values):
        x = left + cell * j
        if not math.isfinite(value):
            drawing.rect(x + 1, y + 1, cell - 2, cell - 2, "blank")
            continue
        strength = 0.04 + 0.76 * abs(value) / largest if largest else 0.04
        drawing.rect(x + 1, y + 1, cell - 2, cell - 2, "minus" if value < 0 else "plus", strength)
        if cell >= 34:
            drawing.text(x + cell / 2, y + cell / 2 + 4, _signed(value), "middle cell")


def _largest(values: Iterable[object]) -> float:
    found = np.abs(np.asarray(values, dtype=np.float64))
    found = found[np.isfinite(found)]
    return float(found.max()) if len(found) else 0.0


def _signed(value: float) -> str:
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", "−")


def _short(name: str) -> str:
    line = one_line(name)
    return line if len(line) <= _MAX_LABEL else line[: _MAX_LABEL - 1] + "…"


def _width(text: str) -> float:
    return len(text) * FONT * CHAR
