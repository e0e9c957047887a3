"""hubmerge merges models on the Hugging Face Hub: streamed, reproducible, published with a truthful card."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hubmerge.api import merge, plan, push, verify
    from hubmerge.bundles.api import add_task, create_bundle, remove_task, retrieve_task
    from hubmerge.bundles.serving import load_bundle
    from hubmerge.coding import decode_tensors, encode_tensors
    from hubmerge.memory import merge_tensors
    from hubmerge.recipe import Recipe
    from hubmerge.reproduction import reproduce

# Resolved on first use: `import hubmerge` must stay free of torch, transformers and huggingface_hub.
_WHERE = {
    "Recipe": "hubmerge.recipe",
    "add_task": "hubmerge.bundles.api",
    "create_bundle": "hubmerge.bundles.api",
    "decode_tensors": "hubmerge.coding",
    "encode_tensors": "hubmerge.coding",
    "load_bundle": "hubmerge.bundles.serving",
    "merge": "hubmerge.api",
    "merge_tensors": "hubmerge.memory",
    "plan": "hubmerge.api",
    "push": "hubmerge.api",
    "remove_task": "hubmerge.bundles.api",
    "reproduce": "hubmerge.reproduction",
    "retrieve_task": "hubmerge.bundles.api",
    "verify": "hubmerge.api",
}

__all__ = [
    "Recipe",
    "__version__",
    "add_task",
    "create_bundle",
    "decode_tensors",
    "encode_tensors",
    "load_bundle",
    "merge",
    "merge_tensors",
    "plan",
    "push",
    "remove_task",
    "reproduce",
    "retrieve_task",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'hubmerge' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value
