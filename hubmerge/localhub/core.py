"""The hub without HTTP: its folder, its settings, and the parts that share one database."""

from __future__ import annotations

import fcntl
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hubmerge.localhub.auth import LOCAL_USER, Accounts, Identity, User, require_writer
from hubmerge.localhub.commits import Committer
from hubmerge.localhub.database import Database
from hubmerge.localhub.discussions import Discussions
from hubmerge.localhub.errors import entry_not_found
from hubmerge.localhub.history import DEFAULT_BRANCH, History
from hubmerge.localhub.jobs import Jobs
from hubmerge.localhub.oauth import OAuth, OAuthApp
from hubmerge.localhub.objects import ObjectStore
from hubmerge.localhub.patterns import DEFAULT_GITATTRIBUTES
from hubmerge.localhub.publishers import Publishers
from hubmerge.localhub.repos import Repo, Repos, split_id
from hubmerge.localhub.signing import Signer
from hubmerge.localhub.trees import Entry, regular_entry
from hubmerge.localhub.xet import XetStore

LFS_THRESHOLD_BYTES = 10_000_000
PART_SIZE_BYTES = 1 << 30
URL_TTL_S = 3600.0
PAGE_SIZE = 1000


@dataclass(frozen=True, slots=True)
class HubConfig:
    """Settings of a hub.

    Attributes:
        lfs_threshold_bytes: Files of at least this size are uploaded as large files.
        part_size_bytes: Large files above this size are uploaded in parts of this size.
        url_ttl_s: How long signed download and upload addresses stay valid.
        page_size: Entries per page of listings.
        cdn_port: Port under which large files are served, to be another origin than the API, as on the real Hub;
            ``None`` for the same port.
        admin: Whether ``/_admin`` (fault rules, request log) answers.
        jobs: Whether jobs are accepted, which run commands on this machine.
        xet: Whether large files may come by way of xet storage, from clients in this process.
    """

    lfs_threshold_bytes: int = LFS_THRESHOLD_BYTES
    part_size_bytes: int = PART_SIZE_BYTES
    url_ttl_s: float = URL_TTL_S
    page_size: int = PAGE_SIZE
    cdn_port: int | None = None
    admin: bool = False
    jobs: bool = False
    xet: bool = False


class RootInUseError(RuntimeError):
    """Another server already works on the folder."""


class Core:
    """One hub in one folder.

    Args:
        root: Folder with all state; created when absent. One process at a time may have it open.
        users: Everyone whose token is valid from now on.
        config: Settings.
        apps: Applications that people may sign in to.

    Raises:
        RootInUseError: Another server has the folder open.
    """

    def __init__(
        self, root: Path, users: Sequence[User] = (), config: HubConfig | None = None, apps: Sequence[OAuthApp] = ()
    ) -> None:
        self.config = config or HubConfig()
        root.mkdir(parents=True, exist_ok=True)
        # The kernel drops the lock when the process dies, however it dies.
        self._lock = (root / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise RootInUseError(f"{root}: another hub server is using this folder") from error
        self.objects = ObjectStore(root)
        self._database = Database(root / "hub.sqlite")
        self.accounts = Accounts(self._database)
        self.accounts.replace(tuple(users) or (LOCAL_USER,))
        self.repos = Repos(self._database)
        self.history = History(self._database)
        self.discussions = Discussions(self._database, self.history)
        self.xet = XetStore(root / "xet") if self.config.xet else None
        self.committer = Committer(self._database, self.objects, self.history, self.discussions, self.xet)
        self.jobs = Jobs(enabled=self.config.jobs)
        secret = self._secret()
        self.signer = Signer(secret, self.config.url_ttl_s)
        self.publishers = Publishers(self._database, self.accounts, secret)
        self.oauth = OAuth(self._database, self.accounts, apps)

    def _secret(self) -> bytes:
        with self._database.write() as db:
            db.execute("INSERT OR IGNORE INTO settings VALUES ('secret', ?)", (secrets.token_hex(32),))
            row = db.execute("SELECT value FROM settings WHERE key = 'secret'").fetchone()
        return bytes.fromhex(row["value"])

    def create_repo(
        self, kind: str, repo_id: str, user: Identity, *, private: bool = False, sdk: str | None = None
    ) -> Repo:
        """Create a repository with the first commit that the Hub gives every new one.

        Raises:
            HubError: 400 for a bad name or type, 403 for someone else's namespace, 409 if it exists.
        """
        split_id(repo_id)
        require_writer(user, repo_id.partition("/")[0])
        attributes = DEFAULT_GITATTRIBUTES.encode()
        files = {".gitattributes": regular_entry(".gitattributes", attributes, self.objects.put(attributes))}
        with self._database.write() as db:
            repo = self.repos.insert(db, kind, repo_id, private=private, sdk=sdk)
            oid = self.history.append(
                db, repo, files, parent=None, title="initial commit", message="", author=user.name
            )
            self.history.set_ref(db, repo, f"refs/heads/{DEFAULT_BRANCH}", oid)
        return repo

    def duplicate_repo(self, source: Repo, repo_id: str, user: Identity, *, private: bool) -> Repo:
        """Create a repository whose first commit has another one's current files."""
        split_id(repo_id)
        require_writer(user, repo_id.partition("/")[0])
        files = self.history.snapshot(source, self.history.resolve(source, DEFAULT_BRANCH))
        with self._database.write() as db:
            repo = self.repos.insert(db, source.type, repo_id, private=private, sdk=source.sdk)
            title = f"Duplicate from {source.id}"
            oid = self.history.append(db, repo, files, parent=None, title=title, message="", author=user.name)
            self.history.set_ref(db, repo, f"refs/heads/{DEFAULT_BRANCH}", oid)
            db.executemany(
                "INSERT OR IGNORE INTO repo_objects VALUES (?, ?)",
                [(repo.key, entry.sha256) for entry in files.values() if entry.lfs],
            )
        return repo

    def text(self, repo: Repo, oid: str, path: str) -> str | None:
        """Content of a small text file at a commit; ``None`` without such a file."""
        entry = self.history.find(repo, oid, path)
        if entry is None or entry.lfs:
            return None
        return self.objects.read(entry.sha256).decode("utf-8", errors="replace")

    def blob_path(self, entry: Entry) -> Path:
        """File with an entry's content.

        Raises:
            HubError: 404 if the object was deleted from the folder by hand.
        """
        path = self.objects.path(entry.sha256)
        if not path.is_file():
            raise entry_not_found(f"The content of {entry.path} is gone from the server")
        return path

    def close(self) -> None:
        """Release the folder; no request may be running."""
        self.jobs.close()
        self._database.close()
        self._lock.close()
