"""Watches a running command from outside: which files it keeps in its folders or holds open, and its peak memory."""

from __future__ import annotations

import os
import stat
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

INTERVAL_S = 0.002


@dataclass(frozen=True)
class Sample:
    """All regular files at one moment, each once however many names it has: path and size."""

    files: tuple[tuple[str, int], ...]

    @property
    def size_bytes(self) -> int:
        return sum(size for _, size in self.files)


@dataclass
class Watch:
    """What was seen until the command ended."""

    samples: list[Sample] = field(default_factory=list)
    peak_rss_bytes: int = 0

    def seen(self, ending: str) -> set[str]:
        """Names of all files with this ending that were there at some moment."""
        return {os.path.basename(p) for s in self.samples for p, _ in s.files if p.endswith(ending)}


def run_watched(command: Sequence[str], folders: Sequence[Path], timeout_s: float) -> tuple[int, str, Watch]:
    """Run a command; sample the folders, and its open files that lie there or have no name any more."""
    watch = Watch()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        ended = threading.Event()

        def sample() -> None:
            while not ended.is_set():
                watch.samples.append(Sample(_files(child.pid, folders)))
                watch.peak_rss_bytes = max(watch.peak_rss_bytes, _peak_rss_bytes(child.pid))
                time.sleep(INTERVAL_S)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            output = child.communicate(timeout=timeout_s)[0]
        finally:
            child.kill()
            ended.set()
            thread.join()
    return child.returncode, output, watch


def _files(pid: int, folders: Sequence[Path]) -> tuple[tuple[str, int], ...]:
    found: dict[tuple[int, int], tuple[str, int]] = {}
    for folder in folders:
        for root, _, names in os.walk(folder):
            for name in names:
                _note(os.path.join(root, name), found)
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        descriptors = []
    for number in descriptors:
        link = f"/proc/{pid}/fd/{number}"
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.endswith(" (deleted)") or any(target.startswith(f"{folder}/") for folder in folders):
            _note(link, found, target)
    return tuple(found.values())


def _note(path: str, found: dict[tuple[int, int], tuple[str, int]], name: str | None = None) -> None:
    try:
        status = os.stat(path)
    except OSError:
        return  # gone since it was listed
    if stat.S_ISREG(status.st_mode):
        size = max(status.st_size, status.st_blocks * 512)
        found.setdefault((status.st_dev, status.st_ino), (name or path, size))


def _peak_rss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
