"""Commands that several processes run together: started as a launcher starts them, or by torchrun itself."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil

Arguments = Sequence[Any]


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    code: int
    """Exit code; minus the signal's number if that ended it."""
    text: str
    begun: tuple[str, ...]
    """The output files it began to write."""


class Group:
    """Ranks of one run, each in a folder of its own, forked from a process that has everything imported.

    Args:
        root: Where those folders are made.
        arguments: The command of each rank.
        environments: What each needs to know beside this process's environment.
    """

    def __init__(self, root: Path, arguments: Sequence[Arguments], environments: Sequence[Mapping[str, str]]) -> None:
        context = multiprocessing.get_context("forkserver")
        # What a preloaded module imports is there in every rank: importing torch takes seconds, a run less than one.
        context.set_forkserver_preload(["tests.end_to_end.ranked_preloaded"])
        self.folders = [root / f"rank-{rank}" for rank in range(len(arguments))]
        size = str(len(arguments))
        common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        self._ranks: list[ForkServerProcess] = []
        each = zip(self.folders, arguments, environments, strict=True)
        for rank, (folder, command, environment) in enumerate(each):
            folder.mkdir(parents=True)
            own = {**environment, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "TMPDIR": str(folder)}
            process = context.Process(target=_run, args=(folder, [str(a) for a in command], own))
            process.start()
            self._ranks.append(process)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a rank a signal."""
        pid = self._ranks[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def begun(self, rank: int) -> tuple[str, ...]:
        """The output files that a rank has begun to write."""
        log = self.folders[rank] / "begun.txt"
        return tuple(log.read_text().splitlines()) if log.exists() else ()

    def end(self, timeout_s: float = 200) -> list[Ended]:
        """Wait for all of them."""
        deadline = time.monotonic() + timeout_s
        try:
            for process in self._ranks:
                process.join(max(deadline - time.monotonic(), 0))
            codes = [process.exitcode for process in self._ranks]
        finally:
            for process in self._ranks:
                process.kill()
                process.join()
        texts = [(folder / "output.txt").read_text() for folder in self.folders]
        assert None not in codes, texts
        return [Ended(int(c), t, self.begun(r)) for r, (c, t) in enumerate(zip(codes, texts, strict=True))]  # type: ignore[arg-type]


def _run(folder: Path, arguments: list[str], environment: Mapping[str, str]) -> None:
    """One rank: what it begins to write is noted outside, for whoever kills it."""
    import hubmerge.cli
    import hubmerge.shipping

    os.chdir(folder)
    os.environ.update(environment)
    tempfile.tempdir = None
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    made = hubmerge.shipping.ShardWriter.__init__

    def noted(self: Any, path: Path, size_bytes: int, header: bytes) -> None:
        with open("begun.txt", "a") as log:
            log.write(os.path.basename(path) + "\n")
        made(self, path, size_bytes, header)

    hubmerge.shipping.ShardWriter.__init__ = noted  # type: ignore[method-assign]
    hubmerge.cli.main(arguments)


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@contextlib.contextmanager
def torchrun(
    folder: Path, arguments: Arguments, environment: Mapping[str, str], count: int = 2
) -> Iterator[subprocess.Popen[str]]:
    """The command under torchrun, in a fresh folder; output and errors come together."""
    folder.mkdir(parents=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    command = [*launcher, "--master-port", free_port(), "-m", "hubmerge", *map(str, arguments)]
    # Where this process imports hubmerge from, its children do.
    own = {"TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **environment, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as started:
        try:
            yield started
        finally:
            started.terminate()  # and it ends its children


def rank_of(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process that is this rank; 0 if it is not there yet."""
    for child in psutil.Process(launcher.pid).children():
        with contextlib.suppress(psutil.Error):
            if child.environ().get("RANK") == str(rank):
                return child.pid
    return 0
