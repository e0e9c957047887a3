"""Runs the jobs of the table: in turn and fairly, each in a process of its own, with its visitor's token alone.

A process of its own gives its memory back, can be ended, and hurts nobody when it crashes. Tokens are in this process's
memory only as long as their owners have something to do. After a restart, what was running waits for its owner to be
signed in again, and continues from what it has staged.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from hubmerge.errors import UsageError
from hubmerge.space.forge import Child, Forge
from hubmerge.space.jobs import ACTIVE, QUEUED, RESUMABLE, UNFINISHED, Job, JobTable, State
from hubmerge.space.orders import Order
from hubmerge.space.safety import Limits, check_order
from hubmerge.space.visitors import Visitor
from hubmerge.space.worker import asked_of

log = logging.getLogger(__name__)

GRACE_S = 10.0
"""From SIGTERM to SIGKILL."""
_TICK_S = 0.5
_HOUR_S = 3600.0
_KEPT = (
    "PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY",
    "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "OMP_NUM_THREADS", "HF_HUB_DISABLE_XET",
)  # fmt: skip
"""What a job has of the server's environment: none of its secrets."""


@dataclass(slots=True)
class _Running:
    """A job at work."""

    job: Job
    process: Child | None = None
    ends_at: float = 0.0
    """Of the monotonic clock: when it is told to end, or killed if it was told."""
    why: State | None = None
    """What it becomes, if it was told to end."""
    message: str = ""

    def tell_to_end(self, why: State, message: str) -> None:
        """Ask for an orderly end; ``GRACE_S`` later it is killed."""
        if self.why is None:
            self.why, self.message, self.ends_at = why, message, time.monotonic() + GRACE_S
            self.signal(signal.SIGTERM)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the job's process, if it runs."""
        if self.process is not None:
            self.process.send_signal(number)


class Runner:
    """Takes orders, and runs them while it is open.

    Args:
        table: Where the jobs are.
        folder: For what jobs write to the disk; what is left there of an earlier server is removed.
        limits: What is given to whom.
        stderr: Where the jobs' warnings go; by default to the server's own.
    """

    def __init__(self, table: JobTable, folder: Path, limits: Limits | None = None, stderr: IO[Any] | None = None):
        self.table, self.limits = table, limits or Limits()
        self._folder = folder / "running"
        self._forge = Forge(self._folder, environment(), stderr)
        self._visitors: dict[str, Visitor] = {}
        self._running: dict[str, _Running] = {}
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._closing = False
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self.table.interrupt()
        self._start_thread(self._schedule, "schedule jobs")
        return self

    def __exit__(self, *_: object) -> None:
        """End everything; what was running can be continued by the next server."""
        with self._lock:
            self._closing = True
            for one in self._running.values():
                one.tell_to_end(
                    "interrupted", "The server was stopped. Sign in when it is back, and the job continues."
                )
        self._wake.set()
        for thread in self._threads:
            thread.join(GRACE_S + 5)
        self._forge.close()

    def _start_thread(self, target: Any, name: str, *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    # --- what visitors ask for

    def submit(self, visitor: Visitor, order: Order) -> Job:
        """Take an order, which is run when its turn has come.

        Raises:
            RecipeError, UsageError: It cannot be done here, or there is no room for more of this visitor's.
        """
        order = check_order(order, self.limits)
        with self._lock:
            self._check_room(visitor)
            begun = self.table.created_since(visitor.name, time.time() - _HOUR_S)
            if begun >= self.limits.per_hour:
                raise UsageError(f"you have begun {begun} jobs in an hour, and no more can be", hint="Come back later.")
            job = self.table.add(visitor.name, order)
            self._visitors[visitor.name] = visitor
        self._wake.set()
        return job

    def _check_room(self, visitor: Visitor) -> None:
        waiting = self.table.in_state(*UNFINISHED)
        mine = sum(j.owner == visitor.name for j in waiting)
        if mine >= self.limits.waiting:
            raise UsageError(
                f"{mine} of your jobs are not finished, and no more can wait", hint="Wait for them, or cancel one."
            )
        if len(waiting) >= self.limits.queue:
            raise UsageError(
                f"{len(waiting)} jobs are waiting here, and no more can",
                hint="Come back later, or run yours on Hugging Face Jobs.",
            )

    def signed_in(self, visitor: Visitor) -> int:
        """Let the jobs go on that wait for this visitor; returns how many were interrupted by a restart."""
        with self._lock:
            mine = [j for j in self.table.in_state(*UNFINISHED) if j.owner == visitor.name]
            if not mine:
                return 0
            self._visitors[visitor.name] = visitor
            message = "Continues from what is staged."
            waiting: tuple[State, ...] = ("interrupted",)
            found = sum(self.table.move(j.id, waiting, "queued", stage="", message=message) for j in mine)
        self._wake.set()
        return found

    def cancel(self, visitor: Visitor, key: str) -> Job:
        """End a job of this visitor's; what it has staged stays.

        Raises:
            UsageError: There is no such job of theirs.
        """
        self.table.get(visitor.name, key)
        with self._lock:
            running = self._running.get(key)
            if running is not None:
                running.tell_to_end(
                    "cancelled", "Cancelled. What is finished stays staged; resume continues from there."
                )
                self.table.mark(key, stage="cancelling")
            else:
                self.table.move(key, ("queued", "interrupted"), "cancelled", stage="", ended=time.time(), message="")
                self._forget_if_idle(visitor.name)
        return self.table.get(visitor.name, key)

    def resume(self, visitor: Visitor, key: str) -> Job:
        """Run a job again that was cancelled, failed, or was interrupted; it continues from what it has staged.

        Raises:
            UsageError: There is no such job of theirs, it is not over, or there is no room for it.
        """
        job = self.table.get(visitor.name, key)
        with self._lock:
            if job.state != "interrupted":
                self._check_room(visitor)
            if not self.table.move(key, RESUMABLE, "queued", stage="", message="", ended=None):
                raise UsageError(f"this job is {self.table.get(visitor.name, key).state}", hint="Start a new one.")
            self._visitors[visitor.name] = visitor
        self._wake.set()
        return self.table.get(visitor.name, key)

    def place_in_queue(self, visitor: Visitor, key: str) -> int:
        """How many jobs, whoever's, were asked for before this one and wait, too."""
        self.table.get(visitor.name, key)
        return next((i for i, j in enumerate(self.table.in_state("queued")) if j.id == key), 0)

    # --- whose turn it is

    def _schedule(self) -> None:
        while not self._closing:
            self._wake.wait(_TICK_S)
            self._wake.clear()
            with self._lock:
                self._end_overdue()
                while (
                    not self._closing and len(self._running) < self.limits.workers and (job := self._next()) is not None
                ):
                    self._begin(job)
        while self._running:  # being ended
            with self._lock:
                self._end_overdue()
            time.sleep(0.05)

    def _next(self) -> Job | None:
        ready = [j for j in self.table.in_state("queued") if j.owner in self._visitors]
        busy = Counter(r.job.owner for r in self._running.values())
        last = {owner: self.table.last_started(owner) for owner in {j.owner for j in ready}}
        return whose_turn(ready, busy, last, self.limits.parallel)

    def _begin(self, job: Job) -> None:
        facts = {"stage": "starting", "message": "", "started": time.time(), "ended": None, "url": "", "commit_id": ""}
        if self.table.move(job.id, QUEUED, "planning", **facts):
            one = self._running[job.id] = _Running(job, ends_at=time.monotonic() + self.limits.run_s)
            self._start_thread(self._run, f"job {job.id}", one, self._visitors[job.owner])

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for one in self._running.values():
            if now < one.ends_at:
                continue
            if one.why is None:
                hours = self.limits.run_s / _HOUR_S
                one.tell_to_end("failed", f"It took longer than {hours:g} h. Resume continues from what is staged.")
            else:
                one.signal(signal.SIGKILL)

    def _forget_if_idle(self, owner: str) -> None:
        if not any(j.owner == owner for j in self.table.in_state(*UNFINISHED)):
            self._visitors.pop(owner, None)

    # --- one job

    def _run(self, one: _Running, visitor: Visitor) -> None:
        end: dict[str, Any] = {}
        folder = Path(tempfile.mkdtemp(prefix="job-", dir=self._folder))
        try:
            end = self._watch(one, visitor, folder)
        except Exception as error:
            log.exception("job %s could not be run", one.job.id)
            end = {"end": "failed", "message": f"It could not be run here: {type(error).__name__}."}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with self._lock:
                self._finish(one, end)
                del self._running[one.job.id]
                self._forget_if_idle(one.job.owner)
            self._wake.set()

    def _watch(self, one: _Running, visitor: Visitor, folder: Path) -> dict[str, Any]:
        """Start the process, write down what it tells, and return its last word."""
        process = self._forge.begin(folder)
        end: dict[str, Any] = {}
        try:
            with self._lock:
                one.process = process
                if one.why is not None:
                    process.send_signal(signal.SIGTERM)
            process.stdin.write(asked_of(one.job.order, visitor, self.limits))
            process.stdin.flush()  # and left open: its end tells the job that the server is gone
            for line in process.stdout:
                try:
                    told = json.loads(line)
                except ValueError:  # it was interrupted in the middle of it
                    continue
                if "end" in told:
                    end = told
                else:
                    self._write_down(one, told)
        except BrokenPipeError:
            log.warning("job %s ended before it had begun", one.job.id)
        finally:
            end.setdefault("code", process.wait())
            with self._lock:
                one.process = None
                process.close()
        return end

    def _write_down(self, one: _Running, told: dict[str, Any]) -> None:
        if one.why is None:
            self.table.mark(one.job.id, **told)

    def _finish(self, one: _Running, end: dict[str, Any]) -> None:
        """Write down how a job ended: as it says itself if it is done, else as it was told to, else as it says."""
        state: State = end.get("end", "failed")
        message = end.get("message", "")
        facts = {k: v for k, v in end.items() if k not in ("end", "message", "code")}
        if state != "done" and one.why is not None:
            state, message = one.why, one.message
        elif "end" not in end:
            message = (
                f"Its process ended by itself (code {end.get('code')}), perhaps because memory ran out. "
                "Resume continues from what is staged."
            )
        elif state == "cancelled":  # by whoever can send signals here, and no visitor
            state, message = "interrupted", "It was stopped. Resume continues from what is staged."
        self.table.move(one.job.id, ACTIVE, state, stage="", message=message, ended=time.time(), **facts)


def whose_turn(
    queued: Sequence[Job], busy: Mapping[str, int], last_started: Mapping[str, float], parallel: int
) -> Job | None:
    """The oldest job of whoever has least running, and of those has waited longest since their last turn.

    Args:
        queued: Jobs that could be begun, the oldest first.
        busy: How many jobs of each visitor run.
        last_started: When each visitor's last one was begun; 0 if never.
        parallel: How many of one visitor's may run at a time.
    """
    first: dict[str, Job] = {}
    for job in queued:
        if busy.get(job.owner, 0) < parallel:
            first.setdefault(job.owner, job)
    return min(
        first.values(), key=lambda j: (busy.get(j.owner, 0), last_started.get(j.owner, 0.0), j.created), default=None
    )


def environment() -> dict[str, str]:
    """Of the forge and all jobs; their folders are relative on purpose: each job has a working directory of its own."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    places = dict.fromkeys(("HOME", "TMPDIR", "HF_HOME"), ".")
    return {
        **kept, **places, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
