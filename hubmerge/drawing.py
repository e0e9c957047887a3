"""Drawings as SVG text: a few elements, colours that follow the reader's light or dark theme, and nothing that moves.

Every drawing has a background of its own, so that it can be read on any page, and a title and a description.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

FONT = 13
CHAR = 0.58
"""Mean width of a character, in font sizes: what room words need."""
MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M-3.6 -3.6h7.2v7.2h-7.2z",
    "M0 -5l4.8 8.4h-9.6z",
    "M0 -5.2l5.2 5.2l-5.2 5.2l-5.2 -5.2z",
    "M0 5l4.8 -8.4h-9.6z",
    "M-5 -1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z",
    "M-5.5 -2h11v4h-11z",
    "M-2 -5.5h4v11h-4z",
)
"""Series differ in shape as well as in colour."""
_NAMES = ("surface", "ink", "muted", "grid", "plus", "minus", *(f"s{i}" for i in range(len(MARKERS))))
_LIGHT = ("#fcfcfb", "#16161d", "#5a5955", "#dedcd5", "#2a78d6", "#d9542b",
          "#2a78d6", "#d9542b", "#14805c", "#a86f00", "#c2417f", "#6b58c9", "#5b6b16", "#8a4a2f")  # fmt: skip
_DARK = ("#16171b", "#f1f0ec", "#b3b1a9", "#3a3b40", "#3a80d2", "#c9592f",
         "#5ba0f2", "#f08a66", "#3cc296", "#e0aa3e", "#ec7fb3", "#a99af5", "#b4c455", "#d99a7c")  # fmt: skip


@dataclass(slots=True)
class Drawing:
    """SVG elements, and the document that they make."""

    width: int
    height: int
    _parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, text: str, style: str = "") -> None:
        """Words; y is that of their baseline."""
        self._parts.append(f'<text x="{_at(x)}" y="{_at(y)}"{_class(style)}>{escape(text)}</text>')

    def slanted(self, x: float, y: float, text: str) -> None:
        """Words that rise to the right and end here."""
        at = f"{_at(x)} {_at(y)}"
        self._parts.append(f'<text class="end" transform="translate({at}) rotate(-45)">{escape(text)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        """A straight one."""
        self._parts.append(f'<path d="M{_at(x1)} {_at(y1)}L{_at(x2)} {_at(y2)}"{_class(style)}/>')

    def rect(self, x: float, y: float, width: float, height: float, style: str, opacity: float = 1.0) -> None:
        """A cell with rounded corners."""
        size = f'width="{_at(width)}" height="{_at(height)}" rx="3"'
        self._parts.append(f'<rect x="{_at(x)}" y="{_at(y)}" {size}{_class(style)} fill-opacity="{opacity:.3f}"/>')

    def path(self, points: Sequence[tuple[float, float]], number: int) -> None:
        """A series' line, and a marker at each point."""
        steps = "L".join(f"{_at(x)} {_at(y)}" for x, y in points)
        if len(points) > 1:
            self._parts.append(f'<path d="M{steps}" class="curve k{number}"/>')
        for x, y in points:
            self.marker(x, y, number)

    def marker(self, x: float, y: float, number: int) -> None:
        """A series' marker."""
        at = f"{_at(x)} {_at(y)}"
        self._parts.append(f'<path d="{MARKERS[number]}" transform="translate({at})" class="f{number}"/>')

    def svg(self, title: str, description: str) -> str:
        """The whole document."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" aria-labelledby="title desc">'
        )
        body = [
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="desc">{escape(description)}</desc>',
            f"<style>{_style()}</style>",
            f'<rect width="{self.width}" height="{self.height}" rx="6" class="surface"/>',
            *self._parts,
        ]
        return "\n".join([head, *body, "</svg>"]) + "\n"


def _style() -> str:
    fixed = (
        f"text{{font:{FONT}px system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif}}"
        ".title{font-weight:600;font-size:15px}.strong{font-weight:600}.end{text-anchor:end}.middle{text-anchor:middle}"
        ".cell{font-size:12px}.gridline{stroke-width:1;fill:none}.curve{fill:none;stroke-width:2;stroke-linejoin:round}"
    )
    return f"{fixed}{_colours(_LIGHT)}@media (prefers-color-scheme:dark){{{_colours(_DARK)}}}"


def _colours(values: Sequence[str]) -> str:
    found = dict(zip(_NAMES, values, strict=True))
    rules = [
        f".surface{{fill:{found['surface']}}}text{{fill:{found['ink']}}}.muted{{fill:{found['muted']}}}"
        f".gridline{{stroke:{found['grid']}}}.blank{{fill:{found['grid']}}}"
        f".plus{{fill:{found['plus']}}}.minus{{fill:{found['minus']}}}"
    ]
    rules += [f".k{i}{{stroke:{found[f's{i}']}}}.f{i}{{fill:{found[f's{i}']}}}" for i in range(len(MARKERS))]
    return "".join(rules)


def _class(style: str) -> str:
    return f' class="{style}"' if style else ""


def _at(value: float) -> str:
    """A coordinate, to a hundredth."""
    return f"{round(value, 2) + 0.0:.2f}".rstrip("0").rstrip(".")
