"""Templates of cards, ours and users': values, loops and filters, and nothing else of Python."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, TemplateSyntaxError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from hubmerge.errors import UsageError
from hubmerge.markdown import block, code, code_cell, escape, figure, link, prose, python_literal, quoted, shell_word
from hubmerge.quantities import percent, size
from hubmerge.recipe.load import read_file

MAX_CARD_CHARS = 1_000_000
_MAX_RANGE = 1000
_HINT = "correct the template (docs/cards.md lists the blocks and what they may use), or leave out card.template"
_PACKAGE = Path(__file__).parent
_METHODS = frozenset({
    "endswith", "get", "items", "keys", "lower", "lstrip", "removeprefix", "removesuffix", "rpartition", "rstrip",
    "split", "splitlines", "startswith", "strip", "title", "upper", "values",
})  # fmt: skip
"""What may be called of texts and mappings; none of them makes much of little."""
_UNSAFE_FILTERS = ("center", "forceescape", "format", "pprint", "safe", "tojson", "urlize", "xmlattr")
"""They make text pass for Markdown, show the insides of values, or make much of little."""


@cache
def environment() -> Environment:
    """The Jinja2 environment of all templates: sandboxed, strict about names, escaping plain strings by default."""
    env = _Environment(
        loader=FileSystemLoader(template_folder()),
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # finalize escapes for Markdown and HTML at once; HTML escaping on top of it would do it twice.
        autoescape=False,
    )
    for name in _UNSAFE_FILTERS:
        del env.filters[name]
    env.filters |= {
        "block": block,
        "code": code,
        "code_cell": code_cell,
        "e": escape,
        "escape": escape,
        "figure": figure,
        "percent": percent,
        "prose": prose,
        "py": python_literal,
        "quoted": quoted,
        "sh": shell_word,
        "size": size,
    }
    env.globals = {"link": link, "range": _range}
    return env


def template_folder() -> Path:
    """Where the templates are: inside the installed package, or beside it in a source checkout."""
    packed = _PACKAGE / "templates"
    return packed if packed.is_dir() else _PACKAGE.parent / "templates"


def rendered(name: str, values: Mapping[str, Any], own: str | None = None) -> str:
    """A card's text.

    Args:
        name: The template.
        values: What it may show.
        own: A file of the user's that begins with ``{% extends name %}`` and replaces some of its blocks.

    Raises:
        UsageError: What is wrong with the user's file, and in which line.
    """
    env = environment()
    if own is None:
        return env.get_template(name).render(values)
    source = read_file(own, "template")
    try:
        return _bounded(_compiled(env, source, name, own).generate(values))
    except TemplateSyntaxError as e:
        raise UsageError(f"{own}:{e.lineno}: {e.message}", hint=_HINT) from e
    except Exception as e:  # a template can fail in as many ways as Python can
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == own]
        where = f"{own}:{lines[-1]}" if lines else own
        raise UsageError(f"{where}: {e}", hint=_HINT) from e


def _compiled(env: Environment, source: str, name: str, own: str) -> Template:
    """The user's template; one that does not extend ours would replace the whole card, the licence's duties too."""
    parent = env.parse(source, filename=own).find(nodes.Extends)
    if parent is None or parent.template != nodes.Const(name):
        raise TemplateSyntaxError(f'expected {{% extends "{name}" %}}, which its blocks are part of', 1)
    return Template.from_code(env, env.compile(source, filename=own), env.make_globals(None))


def _bounded(parts: Iterator[str]) -> str:
    found, length = [], 0
    for part in parts:
        found.append(part)
        length += len(part)
        if length > MAX_CARD_CHARS:
            raise SecurityError(f"the card has more than {MAX_CARD_CHARS:,} characters")
    return "".join(found)


def _finalize(value: object) -> Markup:
    return value if isinstance(value, Markup) else escape(str(value))


def _range(*bounds: int) -> range:
    found = range(*bounds)
    if len(found) > _MAX_RANGE:
        raise SecurityError(f"a range of {len(found)} numbers; at most {_MAX_RANGE} are allowed")
    return found


class _Block(BlockReference):
    """``super()``: a block that is rendered already, and must not be escaped again."""

    def __call__(self) -> Markup:
        return Markup(super().__call__())  # noqa: S704


class _Context(Context):
    def super(self, name: str, current: Callable[[Context], Iterator[str]]) -> BlockReference | Undefined:
        found = super().super(name, current)
        return _Block(name, self, found._stack, found._depth) if isinstance(found, BlockReference) else found


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja2's sandbox lets a template call every method of what it is given; ours lets it call next to nothing."""

    context_class = _Context
    intercepted_binops = frozenset({"*", "**", "%"})

    def is_safe_callable(self, obj: Any) -> bool:
        if obj is link or obj is _range or isinstance(obj, BlockReference | Macro | LoopContext | Undefined):
            return True
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        return isinstance(owner, LoopContext) or (isinstance(owner, str | Mapping) and name in _METHODS)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if not all(isinstance(x, int | float) and abs(x) < 1e6 for x in (left, right)):
            raise SecurityError(f"{operator} is for numbers below a million")
        return super().call_binop(context, operator, left, right)
