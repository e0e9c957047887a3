"""Fixtures for the whole suite: an isolated Hugging Face home, and a running local Hub."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Before anything imports huggingface_hub, which computes its paths from the environment once.
for _name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_", "HUGGINGFACE_"))]:
    del os.environ[_name]
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hubmerge-tests-")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_UPDATE_CHECK"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from hubmerge.localhub import LocalHub  # noqa: E402

# The one address that huggingface_hub must not reach in tests that start no hub of their own: nothing listens there.
NOWHERE = "http://127.0.0.1:9"


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, but for one that huggingface_hub causes itself with every LFS upload."""
    config.addinivalue_line("filterwarnings", "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


def _move_paths(monkeypatch: pytest.MonkeyPatch, constants: ModuleType, home: Path) -> None:
    """Point every path that a loaded huggingface_hub derived from its old home into ``home``."""
    old = constants.HF_HOME
    for name, value in list(vars(constants).items()):
        if isinstance(value, str) and (value == old or value.startswith(old + os.sep)):
            monkeypatch.setattr(constants, name, str(home) + value[len(old) :])


def _point_client_at(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Make an imported huggingface_hub use ``endpoint`` wherever a caller names none."""
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    if "transformers.utils.hub" in sys.modules:
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # made anew with the new address


def _forget_clients() -> None:
    """Drop what huggingface_hub keeps between calls: connections and cached file systems."""
    if "huggingface_hub" in sys.modules:
        from huggingface_hub import close_session

        close_session()
    if "huggingface_hub.hf_file_system" in sys.modules:
        from huggingface_hub import HfFileSystem

        HfFileSystem.clear_instance_cache()


@pytest.fixture(autouse=True)
def hf_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty HF_HOME of this test's own, no token, and no Hub in reach."""
    home = tmp_path / "hf_home"
    home.mkdir()
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    if "huggingface_hub.constants" in sys.modules:
        _move_paths(monkeypatch, sys.modules["huggingface_hub.constants"], home)
    if "huggingface_hub.hf_api" in sys.modules:
        _point_client_at(monkeypatch, NOWHERE)
    yield home
    _forget_clients()


def _connect(monkeypatch: pytest.MonkeyPatch, hub: LocalHub) -> None:
    """Make this process's Hugging Face libraries, and child processes, talk to ``hub`` with its write token."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    _move_paths(monkeypatch, constants, Path(os.environ["HF_HOME"]))
    _point_client_at(monkeypatch, hub.endpoint)
    _forget_clients()


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> Iterator[None]:
    """Let child processes receive SIGINT: what a shell starts in the background inherits that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def start_hub(tmp_path: Path, hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LocalHub]]:
    """Start a local Hub with any settings of ``LocalHub``; the last one started is the libraries' default Hub."""
    with ExitStack() as stack:

        def start(**options: Any) -> LocalHub:
            root = options.pop("root", None) or tmp_path / f"hub-{uuid.uuid4().hex[:8]}"
            running = stack.enter_context(LocalHub(root, **{"separate_cdn": True, "faults": True, **options}))
            _connect(monkeypatch, running)
            return running

        yield start
        _forget_clients()


@pytest.fixture
def hub(start_hub: Callable[..., LocalHub]) -> LocalHub:
    """A running local Hub; Hugging Face libraries in this process and its children use it with the write token.

    Large files come from a second origin, like the real Hub's CDN.
    """
    return start_hub()
