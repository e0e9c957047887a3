"""The machine that a workflow's step runs on: where GitHub wants results, and how much disk and memory are left."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hubmerge.errors import UsageError

SUMMARY_BYTES = 1 << 20
"""What GitHub takes of one step; of a longer summary it shows nothing."""
_RESERVED_DISK_BYTES = 1_000_000_000
_RESERVED_MEMORY_BYTES = 500_000_000
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Runner:
    """Files and facts of the machine, as GitHub describes them in the environment."""

    temp: Path
    """Emptied after the job."""
    output: Path
    summary: Path
    page: str | None = None
    """Address of the run."""
    source: str | None = None
    """Address of the files that the run has checked out."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Runner:
        """The runner that an environment describes.

        Raises:
            UsageError: It describes none.
        """
        missing = [n for n in ("RUNNER_TEMP", "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY") if not environment.get(n)]
        if missing:
            raise UsageError(
                f"not a step of a workflow: {', '.join(missing)} not set",
                hint="`hubmerge workflow init` writes a workflow; without one, use `hubmerge plan`, `merge` and `push`",
            )
        server, repository = environment.get("GITHUB_SERVER_URL"), environment.get("GITHUB_REPOSITORY")
        run, commit = environment.get("GITHUB_RUN_ID"), environment.get("GITHUB_SHA")
        here = f"{server}/{repository}" if server and repository else None
        return cls(
            temp=Path(environment["RUNNER_TEMP"]),
            output=Path(environment["GITHUB_OUTPUT"]),
            summary=Path(environment["GITHUB_STEP_SUMMARY"]),
            page=f"{here}/actions/runs/{run}" if here and run else None,
            source=f"{here}/blob/{commit}" if here and commit else None,
        )

    def set_output(self, name: str, value: str) -> None:
        """Set an output of the step, whatever characters are in it."""
        end = f"end-{secrets.token_hex(16)}"
        with self.output.open("a", encoding="utf-8") as file:
            file.write(f"{name}<<{end}\n{value}\n{end}\n")

    def add_summary(self, markdown: str) -> None:
        """Append to the step's summary."""
        with self.summary.open("a", encoding="utf-8") as file:
            file.write(markdown)

    def disk_bytes(self) -> int:
        """Disk that a run may use: what is free, less what the rest of the job needs."""
        free = shutil.disk_usage(self.temp).free
        return max(free - max(free // 10, _RESERVED_DISK_BYTES), 0)

    def memory_bytes(self) -> int:
        """Memory that a run may use, likewise."""
        free = int(min(_available_bytes(_MEMINFO), _unused_bytes(_CGROUP)))
        return max(free - max(free // 10, _RESERVED_MEMORY_BYTES), 0)


def _available_bytes(meminfo: Path) -> int:
    """What the system could give without swapping; all of it where the system does not say."""
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return int(rest.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _unused_bytes(cgroup: Path) -> float:
    """What a container's limit leaves, counting as free what only caches files; infinite without a limit."""
    try:
        limit, used, stat = ((cgroup / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
    except OSError:
        return float("inf")
    cached = sum(int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file "))
    return float("inf") if limit.strip() == "max" else int(limit) - int(used) + cached
