"""The names that transformers gives a model's parameters when it runs, for checkpoints that store others."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from hubmerge.adapters.quiet import quiet

# Options that could make transformers look for code or kernels elsewhere, and that change no name.
_DROPPED = re.compile(r"auto_map|quantization_config|.*_implementation.*")
# timm takes a model's name as an order to download its config.
_FETCHED = re.compile(r'"(hf[-_]hub|local-dir):')
_DEPTH = re.compile(r"(.*_)?n?(layers?|depth)")
_MOST_LAYERS = 1000


@dataclass(frozen=True, slots=True)
class Naming:
    """How transformers turns the stored names of one architecture into those of the running model."""

    renamings: tuple[Any, ...]
    converters: tuple[Any, ...]

    def running(self, stored: Iterable[str]) -> dict[str, str]:
        """Stored name -> the running model's; names that are the running model's already stay as they are.

        Tensors that transformers merges, splits or transposes keep what their name has after all renamings.
        """
        from transformers.core_model_loading import rename_source_key

        renamings = deepcopy(list(self.renamings))  # some remember the names they have seen
        return {name: rename_source_key(name, renamings, [])[0] for name in sorted(stored)}

    def converts(self, name: str) -> bool:
        """Whether the tensor with this name, as ``running`` gives it, is made from others, or others from it."""
        from transformers.core_model_loading import rename_source_key

        both = [*self.converters, *(converter.reverse_transform() for converter in self.converters)]
        return rename_source_key(name, [], both)[1] is not None


def naming_of(config: Mapping[str, Any]) -> Naming | None:
    """What transformers knows about the names of an architecture; nothing is fetched, no foreign code is run.

    Args:
        config: The parsed ``config.json``.

    Returns:
        The renamings; None where the installed transformers cannot build the architecture.
    """
    try:
        if _deepest(config) > _MOST_LAYERS or _FETCHED.search(json.dumps(config)):
            return None
        with quiet(), _silent():
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter

            steps = get_model_conversion_mapping(_on_meta(config))
    except Exception:
        # A config comes from outside and can break transformers anywhere; the names are then simply not known.
        return None
    return Naming(
        tuple(step for step in steps if not isinstance(step, WeightConverter)),
        tuple(step for step in steps if isinstance(step, WeightConverter)),
    )


def _on_meta(config: Mapping[str, Any]) -> Any:
    """The model without weights: of the class that the config names, or else the one without a head."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = next(iter(config.get("architectures") or ()), None)
    cls: Any = getattr(transformers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        cls = None
    parsed = (cls.config_class if cls else CONFIG_MAPPING[config["model_type"]]).from_dict(_plain(config))
    without_head: Any = transformers.AutoModel
    with torch.device("meta"):
        return cls(parsed) if cls else without_head.from_config(parsed, trust_remote_code=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if not _DROPPED.fullmatch(str(key))}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _deepest(value: Any) -> int:
    """The largest number of layers in a config or in one nested in it."""
    if not isinstance(value, Mapping):
        return 0
    return max((_deepest(v) if isinstance(v, Mapping) else _layers(str(k), v) for k, v in value.items()), default=0)


def _layers(key: str, value: Any) -> int:
    return value if isinstance(value, int) and _DEPTH.fullmatch(key) else 0


@contextmanager
def _silent() -> Iterator[None]:
    """Transformers without its log lines about configs."""
    import transformers  # noqa: F401 (its import sets the level of its logger)

    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
