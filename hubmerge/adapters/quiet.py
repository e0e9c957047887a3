"""One thread at a time in PEFT or transformers while they build modules, without their warnings and side effects."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# While these libraries build a layer they draw from torch's global generator and warn through process-wide filters, so
# only one thread at a time may do that. The lock guards nothing of ours.
_BUILDING = threading.Lock()


@contextmanager
def quiet() -> Iterator[None]:
    """One thread in the library, its warnings dropped and torch's global generator left as it was."""
    import torch

    with _BUILDING, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield
