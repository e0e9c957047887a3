"""Fixtures and helpers for the tests of the local Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hubmerge.localhub import LocalHub


@pytest.fixture
def api(hub: LocalHub) -> HfApi:
    """The client as the hub's one user, with an empty model repository ``local/m``."""
    client = HfApi(endpoint=hub.endpoint, token=hub.token)
    client.create_repo("local/m")
    hub.requests.clear()
    return client


@pytest.fixture
def hf(hub: LocalHub) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The ``hf`` command, as users run it."""
    program = Path(sys.executable).with_name("hf")

    def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(program), *arguments], env=dict(os.environ), capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run
