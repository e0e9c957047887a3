"""hubmerge merges models on the Hugging Face Hub: streamed, reproducible, published with a truthful card."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hubmerge.api import merge, plan, push, verify
    from hubmerge.coding import decode_tensors, encode_tensors
    from hubmerge.memory import merge_tensors
    from hubmerge.recipe import Recipe

# Resolved on first use: `import hubmerge` must stay free of torch, transformers and huggingface_hub.
_WHERE = {
    "Recipe": "hubmerge.recipe",
    "decode_tensors": "hubmerge.coding",
    "encode_tensors": "hubmerge.coding",
    "merge": "hubmerge.api",
    "merge_tensors": "hubmerge.memory",
    "plan": "hubmerge.api",
    "push": "hubmerge.api",
    "verify": "hubmerge.api",
}

__all__ = [
    "Recipe",
    "__version__",
    "decode_tensors",
    "encode_tensors",
    "merge",
    "merge_tensors",
    "plan",
    "push",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'hubmerge' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value
