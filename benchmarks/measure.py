"""Runs one command as a whole process and reports what the operating system counted for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_S = 0.02
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True, slots=True)
class Run:
    """One finished process."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    """Largest resident set of the process or of any child it waited for, mapped files included."""
    peak_anonymous_bytes: int
    """Largest resident set without mapped files, sampled; 0 where /proc does not tell."""
    stdout: str


class CommandFailedError(Exception):
    """A measured command did not succeed."""


def measure(argv: list[str], *, env: dict[str, str], log: Path, cwd: Path) -> Run:
    """Run a command to its end.

    The caller has to be small itself: a child's peak counts from the moment it is forked, when it still is its parent.

    Raises:
        CommandFailedError: It exited with another status than 0; the message ends with the last lines it wrote.
    """
    out = log.with_suffix(".out")
    with log.open("wb") as stderr, out.open("wb") as stdout:
        started = time.perf_counter()
        process = subprocess.Popen(argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
        sampler = _Sampler(process.pid)
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            wall_s = time.perf_counter() - started
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            sampler.stop()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = "\n".join((out.read_text(errors="replace") + log.read_text(errors="replace")).splitlines()[-15:])
        raise CommandFailedError(f"exit status {process.returncode} from {' '.join(argv)}\n{tail}")
    return Run(
        wall_s=wall_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_rss_bytes=usage.ru_maxrss * _MAXRSS_UNIT,
        peak_anonymous_bytes=sampler.peak_bytes,
        stdout=out.read_text(errors="replace"),
    )


class _Sampler(threading.Thread):
    """Watches the anonymous part of a process's memory."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._status = Path(f"/proc/{pid}/status")
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(_SAMPLE_S):
            try:
                found = re.search(r"RssAnon:\s*(\d+) kB", self._status.read_text())
            except OSError:
                return
            if found:
                self.peak_bytes = max(self.peak_bytes, int(found[1]) * 1024)

    def stop(self) -> None:
        self._stopped.set()
        self.join()
