"""A hub in its own process: for benchmarks that must not share an interpreter with it, and for killing it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hubmerge.localhub.auth import LOCAL_USER, User
from hubmerge.localhub.oauth import OAuthApp

STOP_TIMEOUT_S = 30.0

_CHILD = """
import json, sys
from hubmerge.localhub import OAuthApp, User, serve
options = json.load(sys.stdin)
options["users"] = [User(u["name"], u["token"], u["role"], tuple(u["orgs"])) for u in options["users"]]
options["apps"] = [OAuthApp(**{**a, "redirect_uris": tuple(a["redirect_uris"])}) for a in options["apps"]]
def ready(hub):
    sys.stdout.write(hub.endpoint + "\\n")
    sys.stdout.flush()
serve(options.pop("root"), ready=ready, **options)
"""


class HubProcess:
    """A :class:`~hubmerge.localhub.server.LocalHub` in a child process, with its admin endpoint on.

    Args:
        root: Folder of the hub.
        port: Port; 0 picks a free one. Give the old one to restart a killed hub under the same address.
        users: As for ``LocalHub``.
        apps: Likewise.
        options: Further arguments of ``LocalHub``.
    """

    def __init__(
        self, root: str | Path, *, port: int = 0, users: Sequence[User] = (), apps: Sequence[OAuthApp] = (),
        **options: Any,
    ) -> None:  # fmt: skip
        self._users = tuple(users) or (LOCAL_USER,)
        settings = {
            "root": str(root),
            "port": port,
            "users": [asdict(user) for user in self._users],
            "apps": [asdict(app) for app in apps],
            "faults": True,
            **options,
        }
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, a constant program
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._process.stdin as settings_pipe:  # not in the arguments, which everyone on the machine can read
            json.dump(settings, settings_pipe)
        self.endpoint = self._process.stdout.readline().strip()
        if not self.endpoint:
            self._process.stdout.close()
            raise RuntimeError(f"the hub on {root} did not start (exit code {self._process.wait()})")

    @property
    def port(self) -> int:
        """Port of the API."""
        return int(self.endpoint.rpartition(":")[2])

    @property
    def token(self) -> str:
        """The first user's token."""
        return self._users[0].token

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def kill(self) -> None:
        """End it at once, as a power cut would: SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """End it cleanly (SIGTERM) and return its exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int:
        if self._process.poll() is None:
            self._process.send_signal(number)
        code = self._process.wait(STOP_TIMEOUT_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
