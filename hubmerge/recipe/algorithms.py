"""What a recipe's ``method`` may name: a merge method, or a bundle codec."""

from __future__ import annotations

from hubmerge.errors import UnknownMethodError
from hubmerge.spec import Algorithm


def get_algorithm(name: str) -> Algorithm:
    """The merge method or codec of that name.

    Raises:
        UnknownMethodError: There is neither.
    """
    from hubmerge.codecs import all_codecs
    from hubmerge.methods import get_method

    codecs = {codec.name: codec for codec in all_codecs()}
    if name in codecs:
        return codecs[name]
    try:
        return get_method(name)
    except UnknownMethodError as e:
        hint = f"{e.hint}; codecs of bundles: {', '.join(codecs)}"
        raise UnknownMethodError(e.message, hint=hint) from None
