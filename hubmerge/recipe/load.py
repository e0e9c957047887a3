"""YAML text into a tree of values that know their line and column."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from hubmerge.errors import RecipeError
from hubmerge.recipe.nodes import Fault, Mark, Node, child_path, raise_faults

MAX_SIZE_BYTES = 1_000_000
MAX_NODES = 50_000
MAX_DEPTH = 32
MAX_DIGITS = 4000

_INT = re.compile(r"[-+]?[0-9]+")
_OCT_OR_HEX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"([-+]?)\.(inf|Inf|INF)|(\.nan|\.NaN|\.NAN)")
_YAML_1_1_BOOL = {
    **dict.fromkeys(("yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("no", "No", "NO", "off", "Off", "OFF"), False),
}


def read_file(path: str | Path, what: str = "recipe") -> str:
    """The text of a recipe file, or of another small one that messages call ``what``.

    Raises:
        RecipeError: It cannot be read, is larger than 1 MB or is not UTF-8.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SIZE_BYTES + 1)
    except OSError as e:
        raise RecipeError(f"{path}: cannot be read: {e.strerror or e}") from e
    if len(data) > MAX_SIZE_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_SIZE_BYTES:,} bytes; this is not a {what}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise RecipeError(f"{path}:{line}: not UTF-8 text (byte 0x{data[e.start]:02x})") from e


def parse(text: str, where: str) -> Node:
    """Parse one YAML document whose root is a mapping.

    Scalars follow the YAML 1.2 core schema, so ``no`` is text. A mergekit file (one with ``merge_method:``) is read as
    mergekit reads it: there ``yes``, ``no``, ``on`` and ``off`` are booleans.

    Raises:
        RecipeError: Syntax errors, tags, duplicate keys, too much nesting or expansion, an empty file or another root.
    """
    if len(text) > MAX_SIZE_BYTES:
        raise RecipeError(f"{where}: larger than {MAX_SIZE_BYTES:,} bytes; this is not a recipe")
    root, faults = _build(text, where, yaml_1_1=False)
    if root.get("merge_method") is not None:
        root, faults = _build(text, where, yaml_1_1=True)
    if faults:
        raise_faults(where, faults)
    return root


def parse_value(text: str, path: str, where: str) -> Node:
    """One value in YAML notation, as it comes from a command-line flag: a number, ``true``, ``[0, 1]``, text."""
    builder = _Builder(f"{where}: {path}", text, yaml_1_1=False)
    node = builder.document(path)
    if builder.faults:
        raise_faults(where, [Fault(path, f.message) for f in builder.faults])
    # A flag has no line numbers that would mean anything to its user.
    return _without_marks(node)


def _without_marks(node: Node) -> Node:
    value: Any = node.value
    if isinstance(value, dict):
        value = {k: _without_marks(v) for k, v in value.items()}
    elif isinstance(value, tuple):
        value = tuple(_without_marks(v) for v in value)
    return Node(value, node.path)


def _build(text: str, where: str, *, yaml_1_1: bool) -> tuple[Node, list[Fault]]:
    builder = _Builder(where, text, yaml_1_1=yaml_1_1)
    root = builder.document("")
    if root.value is None:
        raise RecipeError(f"{where}: the recipe is empty", hint="a recipe needs at least method: and models:")
    if not root.is_mapping:
        line, column = root.at or (1, 1)
        raise RecipeError(f"{where}:{line}:{column}: a recipe is a mapping of keys to values, this is not")
    return root, builder.faults


def _events(text: str, where: str) -> Iterator[Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.reader import ReaderError

    try:
        yield from YAML(typ="rt", pure=True).parse(text)
    except MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        problem = " ".join(str(e.problem or e.context or "cannot be parsed").split())
        hint = "indent with spaces, not tabs" if r"'\t'" in problem else None
        raise RecipeError(f"{place}: YAML: {problem}", hint=hint) from None
    except ReaderError as e:
        before, char = text[: e.position], text[e.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise RecipeError(f"{where}:{line}:{column}: YAML: the character {char!r} is not allowed") from None
    except YAMLError as e:
        raise RecipeError(f"{where}: YAML: {' '.join(str(e).split())}") from None


class _Builder:
    """Turns parser events into nodes; bounded in depth and in size, whatever the aliases expand to."""

    def __init__(self, where: str, text: str, *, yaml_1_1: bool) -> None:
        self.where = where
        self.yaml_1_1 = yaml_1_1
        self.faults: list[Fault] = []
        self._events = _events(text, where)
        self._anchors: dict[str, Node] = {}
        self._count = 0

    def document(self, path: str) -> Node:
        """The one document of the stream; a null node if there is none."""
        node: Node | None = None
        for event in self._events:
            kind = type(event).__name__
            if kind == "DocumentStartEvent":
                if node is not None:
                    self._stop(event, "a second YAML document starts here; a recipe is one document")
                node = self._node(next(self._events), path, 0)
        return node or Node(None, path)

    def _node(self, event: Any, path: str, depth: int) -> Node:
        self._count += 1
        at = _mark(event)
        if self._count > MAX_NODES:
            self._stop(event, f"more than {MAX_NODES:,} values after expanding aliases")
        if depth > MAX_DEPTH:
            self._stop(event, f"nested more than {MAX_DEPTH} levels deep")
        kind = type(event).__name__
        if kind == "AliasEvent":
            if event.anchor not in self._anchors:
                self._stop(event, f"the alias *{event.anchor} has no anchor &{event.anchor} before it")
            return self._copy(self._anchors[event.anchor], path, event, at, depth)
        if event.tag not in (None, "!"):
            self.faults.append(Fault(path, f"YAML tags are not allowed, found {event.tag!r}", at))
        if kind == "ScalarEvent":
            node = Node(self._scalar(event), path, at)
        elif kind == "SequenceStartEvent":
            node = Node(tuple(self._items(path, depth)), path, at)
        else:
            node = Node(self._mapping(path, depth), path, at)
        if event.anchor:
            self._anchors[event.anchor] = node
        return node

    def _items(self, path: str, depth: int) -> Iterator[Node]:
        for i, event in enumerate(self._events):
            if type(event).__name__ == "SequenceEndEvent":
                return
            yield self._node(event, child_path(path, i), depth + 1)

    def _mapping(self, path: str, depth: int) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for event in self._events:
            if type(event).__name__ == "MappingEndEvent":
                break
            if type(event).__name__ != "ScalarEvent":
                self._stop(event, "a key must be plain text")
            key, at = str(event.value), _mark(event)
            node = self._node(next(self._events), child_path(path, key), depth + 1)
            if key in found:
                line, column = found[key].key_at or (0, 0)
                self.faults.append(Fault(node.path, f"duplicate key; first given at {line}:{column}", at))
            else:
                found[key] = Node(node.value, node.path, node.at, at)
        return found

    def _copy(self, node: Node, path: str, event: Any, at: Mark, depth: int) -> Node:
        """What an alias stands for, with the position of the alias, each value counted again."""
        self._count += 1
        if self._count > MAX_NODES:
            self._stop(event, f"more than {MAX_NODES:,} values after expanding aliases")
        if depth > MAX_DEPTH:
            self._stop(event, f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(node.value, dict):
            value: Any = {
                k: Node(copy.value, copy.path, at, at)
                for k, v in node.value.items()
                for copy in (self._copy(v, child_path(path, k), event, at, depth + 1),)
            }
        elif isinstance(node.value, tuple):
            value = tuple(self._copy(v, child_path(path, i), event, at, depth + 1) for i, v in enumerate(node.value))
        else:
            value = node.value
        return Node(value, path, at)

    def _scalar(self, event: Any) -> Any:
        text = str(event.value)
        if event.style is not None:
            return text
        if self.yaml_1_1 and text in _YAML_1_1_BOOL:
            return _YAML_1_1_BOOL[text]
        return plain_scalar(text)

    def _stop(self, event: Any, message: str) -> NoReturn:
        raise_faults(self.where, [Fault("", message, _mark(event))])


def _mark(event: Any) -> Mark:
    return event.start_mark.line + 1, event.start_mark.column + 1


def plain_scalar(text: str) -> Any:
    """An unquoted YAML scalar by the 1.2 core schema: null, bool, int, float or text."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text[0] in "tT"
    if _INT.fullmatch(text) and len(text) <= MAX_DIGITS:
        return int(text)
    if _OCT_OR_HEX.fullmatch(text) and len(text) <= MAX_DIGITS:
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    special = _SPECIAL_FLOAT.fullmatch(text)
    if special:
        return math.nan if special[3] else math.copysign(math.inf, -1.0 if special[1] == "-" else 1.0)
    return text
