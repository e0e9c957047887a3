"""What the tests of the form share: a Hub with small models and three people, and a runner for their jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubmerge.localhub import LocalHub, User
from hubmerge.space.jobs import UNFINISHED, Job, JobTable
from hubmerge.space.runner import Runner
from hubmerge.space.safety import Limits
from hubmerge.space.visitors import Visitor
from tests.end_to_end import support
from tests.end_to_end.support import Town, save, tensors

ANN = User("ann", "hf_" + "aNN0123456789" * 3)
BOB = User("bob", "hf_" + "bOB9876543210" * 3)
PUBLISHER = User("local", "hf_" + "lOCAL45678901" * 3)
USERS = (PUBLISHER, ANN, BOB)
SMALL = Limits(min_shard_bytes=1)
RECIPE = """\
method: task_arithmetic
base: local/base
models: [local/a, local/b]
parameters: {scale: 0.5}
output: {shard_size: 600B}
"""
"""Seven tensors in six shards."""


@dataclass
class Scene:
    """The Hub, and where this server keeps its things."""

    town: Town
    tmp: Path

    @property
    def table_path(self) -> Path:
        return self.tmp / "server" / "jobs.db"

    @property
    def log_path(self) -> Path:
        return self.tmp / "workers.log"

    def visitor(self, user: User) -> Visitor:
        return Visitor(user.name, user.token, self.town.hub.endpoint)

    @contextmanager
    def server(self, limits: Limits = SMALL) -> Iterator[Runner]:
        """A server, whose table is in the same file every time."""
        table = JobTable(self.table_path)
        with self.log_path.open("ab") as log, Runner(table, self.tmp / "server", limits, stderr=log) as runner:
            yield runner
        table.close()


def open_scene(start_hub: Callable[..., LocalHub], tmp: Path, **options: Any) -> Scene:
    """Start the Hub, with a base, two models of it, and an adapter."""
    hub = start_hub(users=USERS, **options)
    town = Town(hub)
    town.api.token = PUBLISHER.token
    for i, name in enumerate(("base", "a", "b")):
        town.publish(f"local/{name}", save(tmp / "in" / name, tensors(i)))
    town.publish("local/adapter", support.save_adapter(tmp / "in" / "adapter", base="local/base"))
    return Scene(town, tmp)


def wait_for(runner: Runner, owner: str, key: str, *, until: Callable[[Job], bool] | None = None) -> Job:
    """The job, when it is over, or when something holds of it; it has minutes, for machines that are busy."""
    ends_at = time.monotonic() + 120
    while time.monotonic() < ends_at:
        job = runner.table.get(owner, key)
        if (until or (lambda j: j.state not in UNFINISHED))(job):
            return job
        time.sleep(0.05)
    raise AssertionError(f"still {job.state} ({job.stage}): {job.message}")
