"""Jobs: commands that run as processes of this machine, where the Hub would run them in containers of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from hubmerge.localhub.errors import HubError, bad_request, forbidden

DEFAULT_TIMEOUT_S = 30 * 60
TERMINAL = ("COMPLETED", "CANCELED", "ERROR")
_POLL_S = 0.5
_NAMES = ("USER", "LANG", "PATH", "VIRTUAL_ENV", "PYTHONPATH", "TMPDIR")
"""What a job has of the environment of the server."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A kind of machine that a job can ask for; here, a name and a price."""

    name: str
    pretty_name: str
    cpu: str
    ram: str
    storage: str
    micro_usd_per_minute: int
    accelerator: Mapping[str, str] | None = None


_T4 = {"type": "gpu", "model": "T4", "quantity": "1", "vram": "16 GB", "manufacturer": "Nvidia"}
MACHINES = (
    Machine("cpu-basic", "CPU Basic", "2 vCPU", "16 GB", "20 GB", 167),
    Machine("cpu-upgrade", "CPU Upgrade", "8 vCPU", "32 GB", "50 GB", 500),
    Machine("cpu-xl", "CPU XL", "16 vCPU", "124 GB", "1000 GB", 16667),
    Machine("t4-small", "Nvidia T4 - small", "4 vCPU", "15 GB", "50 GB", 6667, _T4),
)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass
class Job:
    """One job; ``changed`` guards everything that changes, and tells of it."""

    id: str
    namespace: str
    creator: str
    spec: Mapping[str, Any]
    stage: str = "SCHEDULING"
    message: str | None = None
    created_at: str = field(default_factory=_now)
    started_at: str | None = None
    finished_at: str | None = None
    lines: list[tuple[str, str]] = field(default_factory=list)
    """Time and text of each line it printed."""
    process: subprocess.Popen[str] | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def ended(self) -> bool:
        """Whether it will not run any further."""
        return self.stage in TERMINAL

    def set(self, stage: str, message: str | None = None) -> None:
        """Go to a stage; what has ended stays as it is."""
        with self.changed:
            if not self.ended:
                self.stage, self.message = stage, message
                if stage == "RUNNING":
                    self.started_at = _now()
                elif self.ended:
                    self.finished_at = _now()
            self.changed.notify_all()

    def log(self, text: str) -> None:
        """Add a line of output."""
        with self.changed:
            self.lines.append((_now(), text))
            self.changed.notify_all()


class Jobs:
    """All jobs of one hub, as long as it runs.

    Args:
        enabled: Whether jobs are accepted: everyone with a write token then runs commands on this machine.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._closed = False

    def start(self, namespace: str, creator: str, spec: Mapping[str, Any], endpoint: str) -> Job:
        """Run a command; its secrets are kept nowhere but in its environment.

        Raises:
            HubError: 403 if the hub accepts no jobs, 400 for a specification that makes no sense.
        """
        if not self._enabled:
            raise forbidden("Jobs are not enabled on this hub")
        command = [*spec.get("command", ()), *spec.get("arguments", ())]
        if not command or not all(isinstance(word, str) for word in command):
            raise bad_request("command: a list of words is needed")
        if spec.get("flavor") not in {m.name for m in MACHINES}:
            raise bad_request(f"Invalid flavor: {spec.get('flavor')}")
        secrets = {str(k): str(v) for k, v in (spec.get("secrets") or {}).items()}
        known = {k: v for k, v in spec.items() if k != "secrets"}
        job = Job(uuid.uuid4().hex[:24], namespace, creator, known)
        with self._lock:
            self._jobs[job.id] = job
        environment = {k: os.environ[k] for k in _NAMES if k in os.environ}
        environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "JOB_ID": job.id}
        environment |= {str(k): str(v) for k, v in (spec.get("environment") or {}).items()} | secrets
        timeout_s = float(spec.get("timeoutSeconds") or DEFAULT_TIMEOUT_S)
        threading.Thread(target=self._run, args=(job, command, environment, timeout_s), daemon=True).start()
        return job

    def _run(self, job: Job, command: list[str], environment: dict[str, str], timeout_s: float) -> None:
        with tempfile.TemporaryDirectory(prefix="localhub-job-") as folder:
            try:
                process = subprocess.Popen(  # noqa: S603 - running what users send is what jobs are for
                    command, cwd=folder, env=environment | {"HOME": folder}, text=True, errors="replace",
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                job.set("ERROR", f"Job failed to start: {error.strerror}")
                return
            with process:
                job.process = process
                job.set("RUNNING")
                if job.ended or self._closed:  # cancelled before there was anything to end
                    _kill(process)
                clock = threading.Timer(timeout_s, _time_out, (job, process))
                clock.start()
                assert process.stdout is not None
                for line in process.stdout:
                    job.log(line.rstrip("\n"))
                code = process.wait()
                clock.cancel()
        job.set(*(("COMPLETED", None) if code == 0 else ("ERROR", f"Job failed with exit code: {code}")))

    def find(self, namespace: str, number: str) -> Job:
        """A job of a namespace.

        Raises:
            HubError: 404 if there is none.
        """
        job = self._jobs.get(number)
        if job is None or job.namespace != namespace:
            raise HubError(404, "Job not found")
        return job

    def cancel(self, job: Job) -> None:
        """End a job, unless it has ended."""
        job.set("CANCELED")
        if job.process is not None:
            _kill(job.process)

    def events(self, job: Job) -> Iterator[tuple[str, str]]:
        """The lines it printed and will print, until it has ended."""
        sent = 0
        while not self._closed:
            with job.changed:
                if len(job.lines) == sent and not job.ended:
                    job.changed.wait(_POLL_S)
                new, ended = job.lines[sent:], job.ended
            yield from new
            sent += len(new)
            if ended and not new:
                return

    def close(self) -> None:
        """End all of them."""
        self._closed = True
        for job in list(self._jobs.values()):
            self.cancel(job)


def _time_out(job: Job, process: subprocess.Popen[str]) -> None:
    job.set("ERROR", "Job timeout")
    _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    """End it and what it started; its session bears its number."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
