"""Serving the form until a signal: where it listens, whose jobs it runs, what its log says."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from hubmerge.errors import AccessError, UsageError
from hubmerge.hub import Hub
from hubmerge.listening import QuietServer, listen
from hubmerge.quantities import size
from hubmerge.space.app import Service, build_app
from hubmerge.space.jobs import JobTable
from hubmerge.space.runner import Runner
from hubmerge.space.safety import Limits
from hubmerge.space.sessions import Client, Cookies, OwnMachine, Sessions, Site, is_loopback
from hubmerge.space.visitors import sign_in

CONNECTIONS = 1000
"""At a time; further ones are told to come back later. Every open page keeps two."""
KEEP_ALIVE_S = 30
GRACE_S = 1
"""For answers that are under way when the server ends; every open page listens to one that has no end."""


def serve(
    *, host: str, port: int, data: Path, limits: Limits, ready: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Serve the form from the main thread until SIGINT or SIGTERM; then end its jobs such that they can continue.

    Args:
        host: Address to listen on.
        port: Port; 0 takes a free one.
        data: Folder of the job table and of what jobs write to the disk; one server at a time may have it.
        limits: What is given to whom.
        ready: Called with the server's address once it accepts connections.
        environment: Of this process, by default; the OAuth settings of a Space are looked for there.

    Raises:
        UsageError: It cannot listen there, the folder is taken, or nobody could sign in.
        AccessError: On one's own machine: no token, or one that the Hub does not know.
    """
    environment = os.environ if environment is None else environment
    with _locked(data), contextlib.closing(_listen(host, port)) as sock:
        site = Site.of(environment, host, sock.getsockname()[1])
        endpoint = Hub().endpoint  # jobs have another environment, and must not take another Hub
        sessions = sessions_of(environment, site, host, endpoint)
        with contextlib.closing(JobTable(data / "jobs.db")) as table, Runner(table, data, limits) as runner:
            service = Service(runner, limits, sessions, endpoint, _machine(limits))
            server = _Server(uvicorn.Config(
                build_app(service), log_config=log_config(), ws="none", server_header=False,
                # Behind the proxy of a Space, which says by what scheme visitors come.
                proxy_headers=site.secure, forwarded_allow_ips="*" if site.secure else None,
                limit_concurrency=CONNECTIONS, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=GRACE_S,
            ))  # fmt: skip
            server.when_started = lambda: ready(site.url)
            server.run(sockets=[sock])


def sessions_of(environment: Mapping[str, str], site: Site, host: str, endpoint: str) -> Sessions:
    """How visitors are known: by signing in, if that is set up; else only where no stranger can come.

    Raises:
        UsageError: Strangers could come, and would act in the name of who started the server.
        AccessError: There is no token.
    """
    client = Client.of(environment)
    if client is not None:
        return Cookies(client, site, endpoint)
    if site.secure or not is_loopback(host):
        raise UsageError(
            "nobody could sign in here, and everybody would use the token of this machine",
            hint="Set hf_oauth: true in the Space's README.md, or the OAUTH_… variables, or listen on 127.0.0.1.",
        )
    token = Hub(endpoint).token()
    if token is None:
        raise AccessError(
            "there is no token, and nothing can be merged without one",
            hint="Log in with `hf auth login`, or set HF_TOKEN.",
        )
    return OwnMachine(site, sign_in(token, endpoint))


class _Server(QuietServer):
    """A server which says when it is ready."""

    when_started: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.when_started()


@contextlib.contextmanager
def _locked(data: Path) -> Iterator[None]:
    data.mkdir(parents=True, exist_ok=True)
    # The kernel drops the lock when the process dies, however it dies.
    with (data / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"another server is using {data}", hint="Give another --data, or stop the other server."
            ) from error
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listen(host, port)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror}", hint="Give another --port; 0 takes a free one."
        ) from error


def _machine(limits: Limits) -> str:
    cores = len(os.sched_getaffinity(0))
    return f"{cores} {'core' if cores == 1 else 'cores'}, {size(limits.memory_bytes)} of memory for all merges"


class WithoutSecrets(logging.Filter):
    """Of an address in the access log, what says nothing of a visitor is kept.

    The Hub sends people back with a code in the query. Ends of gradio's paths name a page that is open somewhere, and
    whoever knows that name is told what happens there.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Shorten a record of uvicorn's, whose third argument is the address."""
        if isinstance(record.args, tuple) and len(record.args) == 5:
            client, method, address, version, status = record.args
            path = str(address).partition("?")[0]
            if path.startswith("/gradio_api/"):
                path = "/".join(path.split("/")[:3])
            record.args = (client, method, path, version, status)
        return True


def log_config() -> dict[str, Any]:
    """Uvicorn's log, on stderr."""
    config = copy.deepcopy(LOGGING_CONFIG)
    config["filters"] = {"without secrets": {"()": WithoutSecrets}}
    config["handlers"]["access"] |= {"filters": ["without secrets"], "stream": "ext://sys.stderr"}
    return config
