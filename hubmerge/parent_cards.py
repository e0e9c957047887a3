"""A parent's own card: its front matter, and what may be quoted of its text.

Quotations are plain text: of links only the words are taken over, of images and HTML nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hubmerge.spec import Quotes

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

LEFT_OUT = "[…]"
"""Stands where a quotation leaves out a table, code or HTML."""
MAX_QUOTED_CHARS = 1000
MAX_BIBTEX_CHARS = 3000
_MAX_CARD_CHARS = 100_000
_MAX_PARAGRAPH_CHARS = 4000
_ABOUT_LIMITS = re.compile(r"\blimit(s|ations?)\b", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"more information needed", re.IGNORECASE)
_BIBTEX = re.compile(r"\s*@[A-Za-z]{2,20}\s*[{(]")
_COMMENT = re.compile(r"\s*<!--.*?-->\s*", re.DOTALL)


def read_card(text: str) -> tuple[Mapping[str, Any], Quotes]:
    """The front matter of a card, and what may be quoted of it; of an unreadable card, nothing."""
    if not text.startswith("---"):
        return {}, quotes(text)
    front, _, body = text[3:].partition("\n---")
    return _mapping(front), quotes(body)


def quotes(body: str) -> Quotes:
    """What may be quoted of a card's text."""
    if not (_ABOUT_LIMITS.search(body) or "@" in body):
        return Quotes()
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").enable("table")
    # Blocks alone: the words in them are parsed only where they are quoted, so that a hostile card costs little.
    tokens = parser.disable("inline").parse(body[:_MAX_CARD_CHARS])
    return Quotes(_limitations(tokens, parser.enable("inline")), _bibtex(tokens))


def _mapping(front: str) -> Mapping[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        data = YAML(typ="safe", pure=True).load(front)
    except (YAMLError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _bibtex(tokens: list[Token]) -> str:
    """The entries in blocks of code, as many as fit; a part of one is of no use."""
    found = ""
    for token in tokens:
        if token.type in ("fence", "code_block") and _BIBTEX.match(token.content):
            entry = token.content.strip()
            if len(found) + len(entry) <= MAX_BIBTEX_CHARS:
                found = f"{found}\n\n{entry}".strip()
    return found


def _limitations(tokens: list[Token], parser: MarkdownIt) -> tuple[str, ...]:
    """The paragraphs of all sections about limitations, up to the length that is quoted."""
    found: list[str] = []
    room = MAX_QUOTED_CHARS
    for paragraph in _paragraphs(_about_limits(tokens), parser):
        if paragraph == LEFT_OUT and found[-1:] == [LEFT_OUT]:
            continue
        if len(paragraph) > room:
            start = paragraph[:room].rpartition(" ")[0]
            return (*found, f"{start} {LEFT_OUT}" if start.strip("- ") else LEFT_OUT)
        found.append(paragraph)
        room -= len(paragraph)
    return tuple(found) if any(p != LEFT_OUT for p in found) else ()


def _about_limits(tokens: list[Token]) -> Iterator[Token]:
    """What stands under headings about limitations, and under the headings below these."""
    depth = 0
    for i, token in enumerate(tokens):
        if token.type == "heading_open" and token.level == 0:
            rank = int(token.tag[1])
            if depth and rank <= depth:
                depth = 0
            if not depth and _ABOUT_LIMITS.search(tokens[i + 1].content):
                depth = rank
        elif depth and not (token.type == "inline" and tokens[i - 1].type == "heading_open"):
            yield token


def _paragraphs(tokens: Iterator[Token], parser: MarkdownIt) -> Iterator[str]:
    """The text of paragraphs and of items; a mark for everything else but comments and placeholders."""
    mark, in_table = "", False
    for token in tokens:
        if token.type in ("table_open", "table_close"):
            in_table = token.type == "table_open"
            if in_table:
                yield LEFT_OUT
        elif token.type in ("fence", "code_block") or (
            token.type == "html_block" and not _COMMENT.fullmatch(token.content)
        ):
            yield LEFT_OUT
        elif token.type == "list_item_open":
            mark = "- "
        elif token.type == "inline" and not in_table:
            text = _plain(token.content, parser)
            if text and not _PLACEHOLDER.search(text):
                yield mark + text
            mark = ""


def _plain(markdown: str, parser: MarkdownIt) -> str:
    """The words of a paragraph."""
    shown = []
    for token in parser.parseInline(markdown[:_MAX_PARAGRAPH_CHARS])[0].children or ():
        if token.type in ("text", "text_special", "code_inline"):
            shown.append(token.content)
        elif token.type in ("softbreak", "hardbreak", "html_inline"):
            shown.append(" ")
    return " ".join("".join(shown).split())
