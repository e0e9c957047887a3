"""Registry of merge methods: every module of this package, and every ``hubmerge.methods`` entry point, contributes one.

A built-in method is one file with one subclass of ``Method``; dropping the file here is all it takes.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from hubmerge.errors import HubMergeError, UnknownMethodError
from hubmerge.spec import Method


def _from_module(module: object, where: str) -> Method:
    classes = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, Method) and c.__module__ == getattr(module, "__name__", None)
    ]
    if len(classes) != 1:
        raise HubMergeError(f"{where}: expected exactly one Method subclass, found {len(classes)}")
    method: Method = classes[0]()
    return method


@cache
def _registry() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda i: i.name):
        method = _from_module(importlib.import_module(f"{__name__}.{info.name}"), f"hubmerge/methods/{info.name}.py")
        found[method.name] = method
    for point in sorted(entry_points(group="hubmerge.methods"), key=lambda e: e.name):
        cls = point.load()
        if not (inspect.isclass(cls) and issubclass(cls, Method)):
            raise HubMergeError(f"entry point {point.value}: not a subclass of hubmerge.spec.Method")
        if cls.name in found:
            raise HubMergeError(f"entry point {point.value}: the method name {cls.name!r} is taken")
        found[cls.name] = cls()
    return found


def all_methods() -> tuple[Method, ...]:
    """Every known method, by name."""
    return tuple(m for _, m in sorted(_registry().items()))


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UnknownMethodError: No such method; the message suggests the nearest name.
    """
    registry = _registry()
    if name not in registry:
        near = difflib.get_close_matches(name, registry, n=1)
        suggestion = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownMethodError(
            f"unknown method {name!r}{suggestion}", hint=f"known methods: {', '.join(sorted(registry))}"
        )
    return registry[name]
