"""What a recipe's ``method`` may name: a merge method, or a bundle codec."""

from __future__ import annotations

import difflib

from hubmerge.errors import UnknownMethodError
from hubmerge.spec import Algorithm


def get_algorithm(name: str) -> Algorithm:
    """The merge method or codec of that name.

    Raises:
        UnknownMethodError: There is neither; the message suggests the nearest name.
    """
    from hubmerge.codecs import all_codecs
    from hubmerge.methods import all_methods

    methods = {method.name: method for method in all_methods()}
    codecs = {codec.name: codec for codec in all_codecs()}
    known: dict[str, Algorithm] = {**methods, **codecs}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        suggestion = f"; did you mean {near[0]!r}?" if near else ""
        hint = f"known methods: {', '.join(sorted(methods))}; codecs of bundles: {', '.join(codecs)}"
        raise UnknownMethodError(f"unknown method {name!r}{suggestion}", hint=hint)
    return known[name]
