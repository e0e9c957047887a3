"""The hub's SQLite file: schema, one connection per thread, and write transactions that survive kill -9."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS tokens (
    digest TEXT PRIMARY KEY, user TEXT NOT NULL, role TEXT NOT NULL, orgs TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS issued (
    digest TEXT PRIMARY KEY, user TEXT NOT NULL, role TEXT NOT NULL, scope TEXT NOT NULL, expires_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS apps (
    client_id TEXT PRIMARY KEY, client_secret TEXT NOT NULL, redirect_uris TEXT NOT NULL, name TEXT NOT NULL,
    ttl_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS codes (digest TEXT PRIMARY KEY, granted TEXT NOT NULL, expires_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS publishers (resource TEXT NOT NULL, claims TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS repos (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    type TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL,
    private INTEGER NOT NULL, gated TEXT NOT NULL DEFAULT '', disabled INTEGER NOT NULL DEFAULT 0,
    sdk TEXT, created_at TEXT NOT NULL,
    UNIQUE (type, namespace, name));
CREATE TABLE IF NOT EXISTS access (
    repo_id INTEGER NOT NULL REFERENCES repos (id) ON DELETE CASCADE, user TEXT NOT NULL,
    PRIMARY KEY (repo_id, user)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS hardware (
    repo_id INTEGER PRIMARY KEY REFERENCES repos (id) ON DELETE CASCADE, flavor TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS commits (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    repo_id INTEGER NOT NULL REFERENCES repos (id) ON DELETE CASCADE, oid TEXT NOT NULL,
    parent TEXT, tree_id INTEGER NOT NULL, tree_oid TEXT NOT NULL,
    title TEXT NOT NULL, message TEXT NOT NULL, author TEXT NOT NULL, date TEXT NOT NULL,
    UNIQUE (repo_id, oid));
CREATE TABLE IF NOT EXISTS trees (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    repo_id INTEGER NOT NULL REFERENCES repos (id) ON DELETE CASCADE);
CREATE TABLE IF NOT EXISTS entries (
    tree_id INTEGER NOT NULL REFERENCES trees (id) ON DELETE CASCADE, path TEXT NOT NULL,
    oid TEXT NOT NULL, sha256 TEXT NOT NULL, size INTEGER NOT NULL, lfs INTEGER NOT NULL, changed_in TEXT NOT NULL,
    PRIMARY KEY (tree_id, path)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS refs (
    repo_id INTEGER NOT NULL REFERENCES repos (id) ON DELETE CASCADE, name TEXT NOT NULL, oid TEXT NOT NULL,
    PRIMARY KEY (repo_id, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS repo_objects (
    repo_id INTEGER NOT NULL REFERENCES repos (id) ON DELETE CASCADE, sha256 TEXT NOT NULL,
    PRIMARY KEY (repo_id, sha256)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS discussions (
    repo_id INTEGER NOT NULL REFERENCES repos (id) ON DELETE CASCADE, num INTEGER NOT NULL,
    title TEXT NOT NULL, author TEXT NOT NULL, status TEXT NOT NULL, is_pull_request INTEGER NOT NULL,
    base TEXT, merge_commit TEXT, created_at TEXT NOT NULL,
    PRIMARY KEY (repo_id, num)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    repo_id INTEGER NOT NULL REFERENCES repos (id) ON DELETE CASCADE, num INTEGER NOT NULL,
    type TEXT NOT NULL, author TEXT NOT NULL, created_at TEXT NOT NULL, data TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS trees_by_repo ON trees (repo_id);
CREATE INDEX IF NOT EXISTS events_by_discussion ON events (repo_id, num);
"""

BUSY_TIMEOUT_S = 60.0


class Database:
    """Connections to one SQLite file in WAL mode.

    Readers never wait; writers take turns through ``BEGIN IMMEDIATE``.

    Args:
        path: The file; created with the schema when absent.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()
        self._lock = threading.Lock()
        self._connections: list[sqlite3.Connection] = []
        self.connection().executescript(SCHEMA)

    def connection(self) -> sqlite3.Connection:
        """This thread's connection, in autocommit mode, rows accessible by column name."""
        existing: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if existing is not None:
            return existing
        connection = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA foreign_keys=ON")
        self._local.connection = connection
        with self._lock:
            self._connections.append(connection)
        return connection

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A write transaction: all of it happens, or none."""
        connection = self.connection()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    def close(self) -> None:
        """Close every thread's connection; no request may be running."""
        with self._lock:
            for connection in self._connections:
                connection.close()
            self._connections.clear()
        self._local = threading.local()
