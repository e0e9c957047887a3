"""Registry of bundle codecs: every module of this package contributes one.

A codec is one file with one subclass of ``Codec``; dropping the file here is all it takes.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from functools import cache

from hubmerge.codec import Codec
from hubmerge.errors import HubMergeError, UnknownMethodError


@cache
def _registry() -> dict[str, Codec]:
    found: dict[str, Codec] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda i: i.name):
        module = importlib.import_module(f"{__name__}.{info.name}")
        own = (c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__)
        classes = [c for c in own if issubclass(c, Codec)]
        if len(classes) != 1:
            raise HubMergeError(
                f"hubmerge/codecs/{info.name}.py: expected exactly one Codec subclass, found {len(classes)}"
            )
        codec: Codec = classes[0]()
        found[codec.name] = codec
    return found


def all_codecs() -> tuple[Codec, ...]:
    """Every codec, by name."""
    return tuple(c for _, c in sorted(_registry().items()))


def get_codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        UnknownMethodError: No such codec; the message suggests the nearest name.
    """
    registry = _registry()
    if name not in registry:
        near = difflib.get_close_matches(name, registry, n=1)
        suggestion = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownMethodError(
            f"unknown codec {name!r}{suggestion}", hint=f"known codecs: {', '.join(sorted(registry))}"
        )
    return registry[name]
