"""Where the jobs' processes come from: one process that has imported everything once, and is forked for each.

To import PyTorch and the rest takes seconds of a processor, to fork takes milliseconds, and what is imported is in
memory once. The forge never sees a token: a job reads its own from a pipe whose other end the server has, and the forge
only hands that pipe on. It computes nothing and has no threads, so that it can be forked safely; it has none of the
server's secrets in its environment; it ends when the server does.

``multiprocessing``'s forkserver would do much of this, but takes over the server's whole environment, which every job
could then read, is one for a whole program whoever uses it, and imports the program's main module into each job.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

from hubmerge.licenses.table import spdx_spelling
from hubmerge.recipe import Recipe

PATIENCE_S = 120.0
"""For an answer of the forge, which may be importing on a busy machine."""
_NEEDED = (
    "hubmerge.adapters.plain", "hubmerge.api", "hubmerge.bundles.api", "hubmerge.space.plan", "hubmerge.space.worker",
    "anyio._backends._asyncio", "httpcore2", "huggingface_hub.hf_api", "license_expression", "tqdm.auto",
)  # fmt: skip
"""What jobs import, if only some of them."""
_ANY_RECIPE = "{method: linear, models: [owner/a, owner/b]}"


class Child:
    """A job's process.

    Attributes:
        pid: Its number.
        stdin: What it reads from.
        stdout: What it tells.
    """

    def __init__(self, pid: int, stdin: TextIO, stdout: TextIO, line: socket.socket) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self._line = line

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal if it has not ended: its parent does, who knows whose number this is."""
        try:
            self._line.send(bytes([number]))
        except OSError:  # there is no parent any more
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self) -> int | None:
        """After the end of ``stdout``: its exit code, or minus the signal that ended it; None if unknown."""
        try:
            said = _read_line(self._line)
        except OSError:
            return None
        return int(said) if said else None

    def close(self) -> None:
        """Let go of it; no signal may be sent from now on."""
        self.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self._line.close()


class Forge:
    """Makes processes for jobs; it is started for the first one, and anew should it have died.

    Args:
        folder: Its working directory.
        environment: Its environment, and that of all jobs.
        stderr: Where it and the jobs write warnings; by default to the server's own.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], stderr: IO[Any] | int | None = None) -> None:
        self._folder, self._environment, self._stderr = folder, dict(environment), stderr
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False

    def begin(self, folder: Path) -> Child:
        """A new process for a job, in a session of its own and with this working directory.

        Raises:
            OSError: The forge has died twice, or does not answer.
        """
        used = self._started()
        try:
            return self._begin(folder)
        except OSError:
            self._end(used)
            self._started()
            return self._begin(folder)

    def _begin(self, folder: Path) -> Child:
        with contextlib.ExitStack() as ours:
            with contextlib.ExitStack() as theirs:
                line, their_line = socket.socketpair()
                ours.enter_context(line).settimeout(PATIENCE_S)
                theirs.enter_context(their_line)
                given = [their_line.fileno(), os.open(folder, os.O_RDONLY | os.O_DIRECTORY)]
                theirs.callback(os.close, given[1])
                their_stdin, our_stdin = os.pipe()
                our_stdout, their_stdout = os.pipe()
                for descriptor in (their_stdin, their_stdout):
                    theirs.callback(os.close, descriptor)
                stdin = ours.enter_context(os.fdopen(our_stdin, "w", encoding="utf-8"))
                stdout = ours.enter_context(os.fdopen(our_stdout, encoding="utf-8"))
                with self._lock:
                    assert self._control is not None
                    socket.send_fds(self._control, [b"+"], [*given, their_stdin, their_stdout])
            said = _read_line(line)
            if not said:
                raise ConnectionResetError("the process that forks jobs has ended")
            ours.pop_all()
        return Child(int(said), stdin, stdout, line)

    def _started(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise ConnectionAbortedError("no more processes are made")
            if self._process is None or self._process.poll() is not None:
                self._hang_up()
                self._control, theirs = socket.socketpair()
                with theirs:
                    self._process = subprocess.Popen(
                        [sys.executable, "-P", "-m", "hubmerge.space.forge"],
                        stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=self._stderr,
                        cwd=self._folder, env=self._environment, start_new_session=True,
                    )  # fmt: skip
            return self._process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """End this one, unless there is another one already."""
        with self._lock:
            if self._process is process:
                process.kill()  # it has nothing to finish
                process.wait()
                self._process = None

    def close(self) -> None:
        """End the forge for good; jobs that run would go on."""
        with self._lock:
            self._closed = True
        if self._process is not None:
            self._end(self._process)
        self._hang_up()

    def _hang_up(self) -> None:
        if self._control is not None:
            self._control.close()


def _read_line(line: socket.socket) -> str:
    """A line of text, without its end; empty when the other side has gone."""
    read = bytearray()
    while not read.endswith(b"\n"):
        if not (byte := line.recv(1)):
            return ""
        read += byte
    return read.decode("ascii").strip()


# --- the process itself


def main() -> None:
    """Fork whenever the server asks for it, until it is gone."""
    control = socket.socket(fileno=0)
    for name in _NEEDED:
        importlib.import_module(name)
    Recipe.loads(_ANY_RECIPE).to_yaml()  # imports all methods and codecs, and what reads and writes YAML
    spdx_spelling("mit")  # reads the list of licences
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, what all of them share
    _Forging(control).run()


class _Forging:
    """The children by number, each with the line on which is talked about it: its number, signals for it, its end."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._lines: dict[int, socket.socket] = {}
        self._woken, self._waker = socket.socketpair()
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        self._waker.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler nobody is woken
        for source in (self._control, self._woken):
            self._selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._control:
                    _, given, _, _ = socket.recv_fds(self._control, 1, 4)
                    if not given:
                        return
                    self._fork(given)
                elif key.fileobj is self._woken:
                    self._woken.recv(4096)
                    self._tell_ends()
                else:
                    self._signal(key.data)

    def _fork(self, given: Sequence[int]) -> None:
        pid = os.fork()
        if pid == 0:
            self._become_job(given)
        line = self._lines[pid] = socket.socket(fileno=given[0])
        for descriptor in given[1:]:
            os.close(descriptor)
        self._selector.register(line, selectors.EVENT_READ, pid)
        self._say(line, pid)

    def _become_job(self, given: Sequence[int]) -> None:
        """What the child does instead of going on."""
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.detach()  # whose number becomes that of the standard input
            line, folder, stdin, stdout = given
            os.dup2(stdin, 0)
            os.dup2(stdout, 1)
            os.fchdir(folder)
            for descriptor in (line, folder, stdin, stdout):
                os.close(descriptor)
            self._selector.close()
            for other in (*self._lines.values(), self._woken, self._waker):
                other.close()
            tempfile.tempdir = None  # it is the job's folder
            importlib.import_module("hubmerge.space.worker").main()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(1)

    def _signal(self, pid: int) -> None:
        line = self._lines.get(pid)
        if line is None:  # it has ended meanwhile
            return
        numbers = line.recv(16)
        if not numbers:
            self._selector.unregister(line)
        for number in numbers:
            os.kill(pid, number)

    def _tell_ends(self) -> None:
        for pid, code in _ended():
            line = self._lines.pop(pid)
            with contextlib.suppress(KeyError):  # the server has closed it already
                self._selector.unregister(line)
            self._say(line, code)
            line.close()

    @staticmethod
    def _say(line: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):
            line.send(b"%d\n" % number)


def _ended() -> Iterator[tuple[int, int]]:
    """The children that have ended, with their exit codes."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found[0], os.waitstatus_to_exitcode(found[1])


if __name__ == "__main__":
    main()
