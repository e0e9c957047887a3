"""Commands in processes of their own that can be killed: forked from one that has everything imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Importing torch takes seconds, a run takes less than one. What is measured is noted from outside: each output file
# that the engine begins is a line in the log.
_SERVER = """
import json, os, sys, tempfile
import hubmerge.api, hubmerge.engine, hubmerge.shipping, hubmerge.cli
import hubmerge.cli.merge, hubmerge.cli.push
import huggingface_hub, hubmerge.hub.translate, hubmerge.recipe.load
from hubmerge.methods import all_methods

all_methods()

def run(asked):
    os.chdir(asked["folder"])
    os.environ["TMPDIR"] = asked["folder"]
    tempfile.tempdir = None
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    made = hubmerge.shipping.ShardWriter.__init__

    def noted(self, path, size_bytes, header):
        with open(asked["log"], "a") as log:
            log.write(os.path.basename(path) + "\\n")
        made(self, path, size_bytes, header)

    hubmerge.shipping.ShardWriter.__init__ = noted
    hubmerge.cli.main(asked["arguments"])

print("ready", flush=True)
while line := sys.stdin.readline():
    pid = os.fork()
    if pid == 0:
        sys.stdin.close()
        run(json.loads(line))
    print(pid, flush=True)
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # its number stays taken until the test has seen it
    print(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status, flush=True)
    sys.stdin.readline()
    os.waitpid(pid, 0)
"""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    """Exit code; minus the signal's number if that ended it."""
    begun: tuple[str, ...]
    """The output files it began to write."""
    text: str
    took_s: float
    dying_s: float
    """From the signal to the end."""


class Runs:
    """Runs of the command line, one at a time, each from a fresh working directory.

    Args:
        root: Where those directories are made.
        environment: What the runs need to know beside this process's environment.
    """

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self._root = root
        self._count = 0
        self._pid = 0
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        assert self._told() == "ready\n"

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()

    def is_over(self) -> bool:
        """Whether the run has ended by itself; it is a zombie until this is noticed."""
        return Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def run(
        self, arguments: Sequence[Any], wait: Callable[[], object] | None = None, number: int = signal.SIGKILL
    ) -> Ended:
        """Run a command to its end, or send it a signal as soon as ``wait`` returns."""
        self._count += 1
        folder = self._root / f"run-{self._count}"
        folder.mkdir(parents=True)
        log = folder / "begun.txt"
        asked = {"arguments": [str(a) for a in arguments], "folder": str(folder), "log": str(log)}
        self._tell(json.dumps(asked))
        self._pid = pid = int(self._told())
        start = time.monotonic()
        sent = start
        if wait is not None:
            wait()
            sent = time.monotonic()
            os.kill(pid, number)  # it is there, if only as a zombie
        code = int(self._told())
        end = time.monotonic()
        self._tell("seen")
        begun = tuple(log.read_text().splitlines()) if log.exists() else ()
        return Ended(code, begun, (folder / "output.txt").read_text(), end - start, end - sent)

    def _tell(self, line: str) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()

    def _told(self) -> str:
        assert self._server.stdout is not None
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that forks runs has ended: {self._server.wait()}")
        return answer
