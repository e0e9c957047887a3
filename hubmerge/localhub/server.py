"""Running the hub: embedded in a thread, or blocking until a signal."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import uvicorn

from hubmerge.listening import QuietServer, listen
from hubmerge.localhub.admin import AdminMiddleware
from hubmerge.localhub.api_oidc import PROVIDER_PATH
from hubmerge.localhub.auth import DEFAULT_TOKEN, LOCAL_USER, Identity, User
from hubmerge.localhub.core import LFS_THRESHOLD_BYTES, PAGE_SIZE, PART_SIZE_BYTES, URL_TTL_S, Core, HubConfig
from hubmerge.localhub.faults import FaultBook, FaultMiddleware
from hubmerge.localhub.http import Application
from hubmerge.localhub.oauth import OAuthApp
from hubmerge.localhub.protocol import HubProtocol
from hubmerge.localhub.repos import Repo
from hubmerge.localhub.routes import build_routes
from hubmerge.localhub.wire import Limits, RequestLog, WireMiddleware

KEEP_ALIVE_S = 75
GRACE_S = 2


class LocalHub:
    """A Hub-compatible server on this machine.

    Use it as a context manager; it answers from ``__enter__`` on. One process at a time may have ``root`` open, and a
    later hub on the same folder serves what an earlier one stored.

    Args:
        root: Folder with all state; created when absent.
        host: Address to listen on.
        port: Port; 0 picks a free one.
        users: Everyone with a token. Default: ``local`` with the write token ``hf_local``.
        apps: Applications that people may sign in to.
        lfs_threshold_bytes: Files of at least this size are large files.
        part_size_bytes: Large files above this size are uploaded in parts.
        url_ttl_s: Lifetime of signed addresses.
        page_size: Entries per page of listings.
        separate_cdn: Serve large files from a second port: like the real Hub's CDN, another origin, to which clients
            must not send tokens.
        faults: Answer ``/_admin`` over HTTP; in this process :attr:`faults` always works.
        jobs: Accept jobs: everyone with a write token may run commands on this machine.
        xet: Have xet storage, for clients in this process only.
        read_limit_bytes_s: Bandwidth of all downloads together.
        write_limit_bytes_s: Bandwidth of all uploads together.

    Attributes:
        faults: Fault rules.
        requests: Log of requests.
        limits: Bandwidth, changeable at any time.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        users: Sequence[User] = (),
        apps: Sequence[OAuthApp] = (),
        lfs_threshold_bytes: int = LFS_THRESHOLD_BYTES,
        part_size_bytes: int = PART_SIZE_BYTES,
        url_ttl_s: float = URL_TTL_S,
        page_size: int = PAGE_SIZE,
        separate_cdn: bool = False,
        faults: bool = False,
        jobs: bool = False,
        xet: bool = False,
        read_limit_bytes_s: float | None = None,
        write_limit_bytes_s: float | None = None,
    ) -> None:
        self.faults = FaultBook()
        self.requests = RequestLog()
        self.limits = Limits(read_limit_bytes_s, write_limit_bytes_s)
        self._users = tuple(users) or (LOCAL_USER,)
        self._sockets = [listen(host, port)]
        if separate_cdn:
            self._sockets.append(listen(host, 0))
        config = HubConfig(
            lfs_threshold_bytes=lfs_threshold_bytes,
            part_size_bytes=part_size_bytes,
            url_ttl_s=url_ttl_s,
            page_size=page_size,
            cdn_port=self._sockets[1].getsockname()[1] if separate_cdn else None,
            admin=faults,
            jobs=jobs,
            xet=xet,
        )
        try:
            self.core = Core(Path(root), self._users, config, apps)
        except BaseException:
            self._close_sockets()
            raise
        shown = f"[{host}]" if ":" in host else host
        self.endpoint = f"http://{shown}:{self.port}"
        self._server = QuietServer(self._uvicorn_config())
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """Port of the API."""
        return int(self._sockets[0].getsockname()[1])

    @property
    def cdn_port(self) -> int | None:
        """Port of the large files, if it is another one."""
        return self.core.config.cdn_port

    @property
    def token(self) -> str:
        """A write token: the first user's that has one."""
        return next((user.token for user in self._users if user.role == "write"), DEFAULT_TOKEN)

    def _uvicorn_config(self) -> uvicorn.Config:
        app: Any = Application(self.core, build_routes())
        app = FaultMiddleware(app, self.faults)
        app = WireMiddleware(app, self.requests, self.limits)
        if self.core.config.admin:
            app = AdminMiddleware(app, self.faults, self.requests, self.limits)
        return uvicorn.Config(
            app,
            http=HubProtocol,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=GRACE_S,
        )

    def run(self, ready: Callable[[], None] | None = None) -> None:
        """Serve until a signal (in the main thread) or :meth:`stop`; then release everything.

        Args:
            ready: Called once the sockets accept connections.
        """
        try:
            if ready is not None:
                ready()
            asyncio.run(self._server.serve(sockets=self._sockets))
        finally:
            self._release()

    def start(self) -> Self:
        """Serve in a thread."""
        # The sockets listen already: a request that comes before the thread is up waits in the backlog.
        self._thread = threading.Thread(target=self.run, name="localhub", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread, giving running requests a moment to finish, and release the folder and the port."""
        self._server.should_exit = True
        if self._thread is None:
            self._release()
        else:
            self._thread.join()
            self._thread = None

    def _release(self) -> None:
        self._close_sockets()
        self.core.close()

    def _close_sockets(self) -> None:
        for sock in self._sockets:
            sock.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def create_repo(self, repo_id: str, *, repo_type: str = "model", private: bool = False) -> None:
        """Create a repository without going through HTTP."""
        namespace = repo_id.partition("/")[0]
        self.core.create_repo(repo_type, repo_id, Identity(namespace, "write", ()), private=private)

    def set_gated(self, repo_id: str, gated: bool | str, *, repo_type: str = "model") -> None:
        """Require accepted access requests for downloads: ``True`` or ``"auto"``, ``"manual"``, ``False``."""
        value = gated if isinstance(gated, str) else ("auto" if gated else "")
        self.core.repos.configure(self._repo(repo_id, repo_type), gated=value)

    def grant_access(self, repo_id: str, user: str, *, repo_type: str = "model") -> None:
        """Accept a user's access to a gated repository."""
        self.core.repos.grant(self._repo(repo_id, repo_type), user)

    def set_private(self, repo_id: str, private: bool, *, repo_type: str = "model") -> None:
        """Change visibility."""
        self.core.repos.configure(self._repo(repo_id, repo_type), private=private)

    def set_disabled(self, repo_id: str, disabled: bool, *, repo_type: str = "model") -> None:
        """Switch a repository off, as the Hub's moderators do."""
        self.core.repos.configure(self._repo(repo_id, repo_type), disabled=disabled)

    def register_app(self, app: OAuthApp) -> None:
        """Let people sign in to an application, or change one."""
        self.core.oauth.register(app)

    def trust(self, resource: str, **claims: str) -> None:
        """Add a trusted publisher: jobs with these claims may write to a repository, or read as a user.

        Args:
            resource: A repository, or a user's name.
            claims: What must be true of the job, such as ``repository="me/recipes", branch="main"``.
        """
        self.core.publishers.trust(resource, claims)

    def job_environment(
        self, repository: str, *, ref: str = "refs/heads/main", workflow: str = "merge.yml"
    ) -> dict[str, str]:
        """The variables by which a job on GitHub with ``id-token: write`` asks for its identity, here of this hub."""
        claims = {
            "sub": f"repo:{repository}:ref:{ref}",
            "repository": repository,
            "ref": ref,
            "workflow_ref": f"{repository}/.github/workflows/{workflow}@{ref}",
        }
        return {
            "GITHUB_ACTIONS": "true",
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"{self.endpoint}{PROVIDER_PATH}?api-version=2.0",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": self.core.publishers.request_token(claims),
        }

    def _repo(self, repo_id: str, repo_type: str) -> Repo:
        repo = self.core.repos.find(repo_type, repo_id)
        if repo is None:
            raise KeyError(f"{repo_type} {repo_id}")
        return repo


def serve(
    root: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    users: Sequence[User] = (),
    ready: Callable[[LocalHub], None] | None = None,
    **options: Any,
) -> None:
    """Serve a hub from the main thread until SIGINT or SIGTERM.

    Args:
        root: Folder with all state.
        host: Address to listen on.
        port: Port; 0 picks a free one.
        users: Everyone with a token.
        ready: Called with the hub once it accepts connections, for example to print its address.
        options: Further arguments of :class:`LocalHub`.

    Raises:
        OSError: The address cannot be listened on.
        RootInUseError: Another server has the folder open.
    """
    hub = LocalHub(root, host=host, port=port, users=users, **options)
    hub.run(ready=None if ready is None else lambda: ready(hub))
