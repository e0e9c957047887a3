"""The job table: what every visitor has asked for and how far it is, in a file that outlives the server.

There is no token in it, and a job is read, cancelled or continued by its owner only: to everybody else it is missing.
"""

from __future__ import annotations

import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from hubmerge.errors import UsageError
from hubmerge.space.orders import Order

State = Literal["queued", "planning", "running", "publishing", "done", "failed", "cancelled", "interrupted"]
QUEUED: tuple[State, ...] = ("queued",)
ACTIVE: tuple[State, ...] = ("planning", "running", "publishing")
"""A process is at work."""
UNFINISHED: tuple[State, ...] = ("queued", *ACTIVE, "interrupted")
RESUMABLE: tuple[State, ...] = ("interrupted", "failed", "cancelled")
MAX_MESSAGE = 2000
"""Characters of a message that are kept."""
_TOKEN = re.compile(r"\bhf_(?:oauth_|jwt_)?(?:[A-Za-z0-9]{30,}|eyJ[\w.-]+)|\beyJ[\w-]+\.[\w-]+\.[\w-]+")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, kind TEXT NOT NULL, target TEXT NOT NULL, recipe TEXT NOT NULL,
    asked TEXT NOT NULL, state TEXT NOT NULL DEFAULT 'queued', stage TEXT NOT NULL DEFAULT '',
    shards_done INTEGER NOT NULL DEFAULT 0, shards_total INTEGER NOT NULL DEFAULT 0,
    bytes_done INTEGER NOT NULL DEFAULT 0, bytes_total INTEGER NOT NULL DEFAULT 0,
    message TEXT NOT NULL DEFAULT '', url TEXT NOT NULL DEFAULT '', commit_id TEXT NOT NULL DEFAULT '',
    created REAL NOT NULL, started REAL, ended REAL, hidden INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX IF NOT EXISTS jobs_of_owner ON jobs (owner, created);
CREATE INDEX IF NOT EXISTS jobs_in_state ON jobs (state, created);
"""


@dataclass(frozen=True, slots=True)
class Job:
    """A row of the table."""

    id: str
    owner: str
    """Name of a user of the Hub."""
    kind: str
    target: str
    recipe: str
    asked: str
    """The whole order, as JSON."""
    state: State
    stage: str
    """What is going on, in words."""
    shards_done: int
    shards_total: int
    bytes_done: int
    bytes_total: int
    message: str
    """Why it failed, or what to do next."""
    url: str
    commit_id: str
    created: float
    """Seconds since 1970, as are the others."""
    started: float | None
    ended: float | None

    @property
    def order(self) -> Order:
        """What was asked for."""
        return Order.loads(self.asked)

    @property
    def fraction(self) -> float:
        """How much of the work is done, from 0 to 1."""
        return 1.0 if self.state == "done" else self.bytes_done / max(self.bytes_total, 1)


_COLUMNS = ", ".join(f.name for f in fields(Job))
_CHANGEABLE = {f.name for f in fields(Job)} - {"id", "owner", "kind", "target", "recipe", "asked", "created"}


class JobTable:
    """The table in a file; safe to use from several threads.

    Args:
        path: The file; its folder is made if need be.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _rows(self, where: str, values: Collection[Any]) -> tuple[Job, ...]:
        with self._lock:
            found = self._db.execute(f"SELECT {_COLUMNS} FROM jobs {where}", tuple(values)).fetchall()  # noqa: S608
        return tuple(Job(**dict(row)) for row in found)

    # --- of one visitor

    def add(self, owner: str, order: Order) -> Job:
        """Write down a new job, which waits."""
        key = secrets.token_urlsafe(12)
        values = (key, owner, order.kind, order.target, order.recipe, order.dumps(), time.time())
        with self._writing() as db:
            db.execute(
                "INSERT INTO jobs (id, owner, kind, target, recipe, asked, created) VALUES (?, ?, ?, ?, ?, ?, ?)",
                values,
            )
        return self.get(owner, key)

    def get(self, owner: str, key: str) -> Job:
        """A job of this visitor's.

        Raises:
            UsageError: There is none of that name, whoever else may have one.
        """
        found = self._rows("WHERE id = ? AND owner = ? AND NOT hidden", (key, owner))
        if not found:
            raise UsageError(f"you have no job {key[:40]!r}", hint="Choose one from the list of your jobs.")
        return found[0]

    def of(self, owner: str, limit: int = 50) -> tuple[Job, ...]:
        """This visitor's jobs, the newest first."""
        return self._rows("WHERE owner = ? AND NOT hidden ORDER BY created DESC, rowid DESC LIMIT ?", (owner, limit))

    def forget(self, owner: str, key: str) -> None:
        """Take a finished job out of the visitor's history.

        Raises:
            UsageError: There is none, or it is not finished.
        """
        job = self.get(owner, key)
        if job.state in UNFINISHED:
            raise UsageError(f"this job is {job.state}", hint="Cancel it first.")
        with self._writing() as db:
            # The row still counts for the limits of an hour; what was asked for is gone.
            db.execute("UPDATE jobs SET hidden = 1, recipe = '', asked = '{}' WHERE id = ? AND owner = ?", (key, owner))

    # --- of all visitors, for what runs the jobs

    def in_state(self, *states: State) -> tuple[Job, ...]:
        """Everybody's jobs in these states, the oldest first."""
        marks = ", ".join("?" * len(states))
        return self._rows(f"WHERE state IN ({marks}) ORDER BY created, rowid", states)

    def created_since(self, owner: str, since: float) -> int:
        """How many jobs a visitor has asked for since a time."""
        return len(self._rows("WHERE owner = ? AND created >= ?", (owner, since)))

    def last_started(self, owner: str) -> float:
        """When a job of this visitor was started last; 0 if never."""
        with self._lock:
            (found,) = self._db.execute("SELECT MAX(started) FROM jobs WHERE owner = ?", (owner,)).fetchone()
        return found or 0.0

    def move(self, key: str, states: Collection[State], to: State, **facts: Any) -> bool:
        """Bring a job from one of some states to another; False if it is in none of them any more."""
        return self._change(key, states, {"state": to, **facts})

    def mark(self, key: str, **facts: Any) -> bool:
        """Write down how far a job is whose process is at work; False if it is none such any more."""
        return self._change(key, ACTIVE, facts)

    def _change(self, key: str, states: Collection[State], facts: Mapping[str, Any]) -> bool:
        changes = checked(facts)
        marks = ", ".join("?" * len(states))
        named = ", ".join(f"{name} = ?" for name in changes)
        with self._writing() as db:
            sql = f"UPDATE jobs SET {named} WHERE id = ? AND state IN ({marks})"  # noqa: S608 - names of columns
            return db.execute(sql, (*changes.values(), key, *states)).rowcount == 1

    def interrupt(self) -> int:
        """After a restart: what was at work is no more. Returns how many jobs that were."""
        message = "The server was restarted. The job continues where it was when you are signed in again."
        found = self.in_state(*ACTIVE)
        return sum(self.move(job.id, ACTIVE, "interrupted", stage="interrupted", message=message) for job in found)


def checked(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts for the table: known columns, messages of a bounded length, nothing that looks like a token.

    Raises:
        KeyError: Something that a job does not have, or that never changes.
    """
    if unknown := facts.keys() - _CHANGEABLE:
        raise KeyError(f"not to be changed: {', '.join(sorted(unknown))}")
    return {k: without_tokens(v)[:MAX_MESSAGE] if isinstance(v, str) else v for k, v in facts.items()}


def without_tokens(text: str) -> str:
    """The text with stars for whatever looks like a token."""
    return _TOKEN.sub("***", text)
