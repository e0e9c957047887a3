"""Owns the local Hub of the demo: started as a user would start it, in its own process, and stopped in every case."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0


@contextmanager
def local_hub(root: Path, log: Path) -> Iterator[dict[str, str]]:
    """Run `hubmerge hub serve` on a free port; yields the variables that it tells its users to export."""
    command = [sys.executable, "-m", "hubmerge", "hub", "serve", "--root", str(root), "--port", "0"]
    with log.open("w") as output:
        # Its own session: a Ctrl-C meant for the demo must not end the Hub before the demo has let go of it.
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    try:
        yield _wait_for_exports(server, log)
    finally:
        _stop(server)


def _wait_for_exports(server: subprocess.Popen[bytes], log: Path) -> dict[str, str]:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and server.poll() is None:
        text = log.read_text()
        exports = _parse_exports(text)
        # The last line may be half written; the notice after the exports says that all of them are there.
        if "HF_ENDPOINT" in exports and "serving " in text:
            return exports
        time.sleep(0.1)
    raise RuntimeError(f"the local Hub did not start within {START_TIMEOUT_S:.0f} s; it said:\n{log.read_text()}")


def _parse_exports(text: str) -> dict[str, str]:
    words = [shlex.split(line) for line in text.splitlines() if line.startswith("export ")]
    return dict(word.split("=", 1) for line in words for word in line[1:] if "=" in word)


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.terminate()
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
