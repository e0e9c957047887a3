"""Text of any origin made into Markdown that shows it and does nothing else; what is safe is marked so."""

from __future__ import annotations

import math
import re
import shlex
import unicodedata
from collections.abc import Sequence
from urllib.parse import quote

from markupsafe import Markup

MAX_LINE_CHARS = 1000
# Joiners are part of how some languages and emoji are written; the other format characters only serve to deceive.
_JOINERS = "\u200c\u200d"
_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_BLOCK_START = re.compile(r"([#+=-]|\d{1,9}(?=[.)](\s|$)))")
_HEADING_END = re.compile(r"(?<=\s)(#+)$")
_TAG_START = re.compile(r"<(?=[A-Za-z/!?])")
_FENCE = re.compile(r"(`{3,}|~{3,})([^`]*)")
_LONG_RUN = re.compile(r"`{3,}|~{3,}")


def clean(text: str, keep: str = "") -> str:
    """Without control, format (direction marks, zero-width) and unassigned characters, but for those in ``keep``."""
    return "".join(
        " " if c.isspace() and c not in keep else c for c in text if c in keep or c.isspace() or _is_plain(c)
    )


def _is_plain(char: str) -> bool:
    return not unicodedata.category(char).startswith("C")


def one_line(text: str) -> str:
    """The text on one line, without what cannot be seen, cut to a length that fits a card."""
    line = " ".join(clean(text).split())
    return line if len(line) <= MAX_LINE_CHARS else line[: MAX_LINE_CHARS - 1] + "…"


def escape(text: str) -> Markup:
    """One line of plain text, such that Markdown and HTML show just these characters."""
    line = _SPECIAL.sub(lambda m: "\\" + m[0], one_line(text))
    line = re.sub("[&<>]", lambda m: _HTML[m[0]], line)
    line = _HEADING_END.sub(r"\\\1", line)
    start = _BLOCK_START.match(line)
    if start:
        at = 0 if len(start[0]) == 1 and not start[0].isdigit() else start.end()
        line = line[:at] + "\\" + line[at:]
    return Markup(line)  # noqa: S704


def code(text: object) -> Markup:
    """An inline code span."""
    line = one_line(str(text))
    if not line:
        return Markup("(empty)")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line[0] == "`" or line[-1] == "`" else ""
    return Markup(f"{fence}{pad}{line}{pad}{fence}")  # noqa: S704


def code_cell(text: object) -> Markup:
    """An inline code span in a table, where a bar would end the cell."""
    return Markup(code(text).replace("|", "\\|"))  # noqa: S704


def block(text: str, language: str = "") -> Markup:
    """A fenced code block that the text cannot close."""
    lines = clean(text, keep="\n\t" + _JOINERS).strip("\n")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", lines)), default=0))
    return Markup(f"{fence}{language}\n{lines}\n{fence}")  # noqa: S704


def link(text: str, *parts: str) -> Markup:
    """A link; the first part is an address of our own, the others are path segments and get quoted."""
    address = "/".join([parts[0], *(quote(one_line(p), safe="/") for p in parts[1:])])
    return Markup(f"[{escape(text)}]({address})")  # noqa: S704


def quoted(paragraphs: Sequence[str]) -> Markup:
    """A block quotation of plain paragraphs; those that begin with ``- `` are items of a list."""
    shown: list[str] = []
    before = ""
    for paragraph in paragraphs:
        mark = "- " if paragraph.startswith("- ") else ""
        text = escape(paragraph.removeprefix(mark))
        if text:
            shown += [">"] * bool(shown and not (mark and before)) + [f"> {mark}{text}"]
            before = mark
    return Markup("\n".join(shown))  # noqa: S704


def prose(text: str) -> Markup:
    """Markdown that the recipe's author wrote: kept as such, but without HTML and unable to swallow what follows it.

    A fence counts only at the start of a line, where it cannot belong to a list or quotation that ends before it does.
    """
    out: list[str] = []
    fence = ""
    for line in clean(text, keep="\n\t" + _JOINERS).split("\n"):
        opening = _FENCE.fullmatch(line)
        if fence:
            closing = line.strip(" \t")
            if closing.startswith(fence) and set(closing) == {fence[0]} and len(line) - len(line.lstrip(" ")) < 4:
                fence = ""
            out.append(line)
        elif opening:
            fence = opening[1]
            out.append(line)
        else:
            line = _LONG_RUN.sub(lambda m: "".join("\\" + c for c in m[0]), line)
            out.append(_TAG_START.sub("&lt;", line))
    if fence:
        out.append(fence)
    return Markup("\n".join(out).strip("\n"))  # noqa: S704


def python_literal(text: str) -> Markup:
    """A Python string literal, in double quotes where possible."""
    literal = ascii(one_line(text))
    return Markup(f'"{literal[1:-1]}"' if literal[0] == "'" and '"' not in literal else literal)  # noqa: S704


def figure(value: float) -> Markup:
    """A number in three digits; a dash for one that is none."""
    return Markup(f"{value:.3g}".replace("-", "−", 1) if math.isfinite(value) else "–")  # noqa: S704


def shell_word(text: str) -> Markup:
    """A word of a shell command."""
    return Markup(shlex.quote(one_line(text)))  # noqa: S704
