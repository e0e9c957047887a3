"""Hugging Face Jobs: commands that run on the Hub's machines, for money."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubmerge.errors import PublishError
from hubmerge.hub.reading import Reader

if TYPE_CHECKING:
    from huggingface_hub import JobInfo

_MINUTES = {"second": 1 / 60, "minute": 1.0, "hour": 60.0}


@dataclass(frozen=True, slots=True)
class Flavor:
    """A kind of machine."""

    name: str
    hardware: str
    """In words: cores, memory, disk, accelerators."""
    usd_per_minute: float


@dataclass(frozen=True, slots=True)
class JobState:
    """How far a job is."""

    stage: str
    """SCHEDULING or RUNNING, then COMPLETED, ERROR, CANCELED or DELETED."""
    message: str | None

    @property
    def succeeded(self) -> bool:
        """Whether it came to its end."""
        return self.stage == "COMPLETED"


@dataclass(frozen=True, slots=True)
class Job:
    """A job that was started."""

    id: str
    namespace: str
    url: str


class Jobs:
    """The jobs that the token of a ``Hub`` may start."""

    def __init__(self, hub: Reader) -> None:
        self._hub = hub

    def flavors(self) -> Mapping[str, Flavor]:
        """The kinds of machines there are, by name, the cheapest first.

        Raises:
            AccessError, SourceError, TransportError: The Hub does not say.
        """
        found = self._hub.call("list the hardware of jobs", "jobs", self._hub.api.list_jobs_hardware)
        flavors = [
            Flavor(h.name, _in_words(h), h.unit_cost_usd / _MINUTES[h.unit_label])
            for h in found
            if h.unit_label in _MINUTES
        ]
        return {f.name: f for f in sorted(flavors, key=lambda f: f.usd_per_minute)}

    def namespace(self) -> str:
        """The token's own, which pays if nobody else is named.

        Raises:
            AccessError: No token, or a wrong one.
        """
        found: str = self._hub.call("start a job", "jobs", self._hub.api.whoami, writing=True)["name"]
        return found

    def start(
        self, command: Sequence[str], *, image: str, environment: Mapping[str, str], secrets: Mapping[str, str],
        flavor: str, timeout_s: int, namespace: str,
    ) -> Job:  # fmt: skip
        """Start a job. It is not tried again: a reply that was lost may be of a job that runs, and costs.

        Raises:
            AccessError: The token may not start jobs in that namespace.
            PublishError: The Hub refused.
            TransportError: It is not known whether the job was started.
        """
        what = f"start a job in {namespace}"
        try:
            self._hub.session()
            started = self._hub.api.run_job(
                image=image, command=list(command), env=dict(environment), secrets=dict(secrets), flavor=flavor,
                timeout=timeout_s, namespace=namespace, name="hubmerge",
            )  # fmt: skip
        except Exception as error:
            self._hub.fail(error, what, f"jobs/{namespace}", writing=True)
        return Job(started.id, namespace, started.url)

    def logs(self, job: Job) -> Iterator[str]:
        """The lines it prints, until it ends.

        Raises:
            AccessError, SourceError, TransportError: The Hub does not tell any more; the job goes on.
        """
        lines = iter(self._hub.api.fetch_job_logs(job_id=job.id, namespace=job.namespace, follow=True))
        while True:
            try:
                line = next(lines)
            except StopIteration:
                return
            except Exception as error:
                self._hub.fail(error, f"follow {job.url}", f"jobs/{job.namespace}")
            yield line

    def state(self, job: Job) -> JobState:
        """How far it is."""
        found = self._hub.call(
            f"look at {job.url}", f"jobs/{job.namespace}",
            lambda: self._hub.api.inspect_job(job_id=job.id, namespace=job.namespace),
        )  # fmt: skip
        return _state(found)

    def wait(self, job: Job) -> JobState:
        """How it ended."""
        found = self._hub.call(
            f"look at {job.url}", f"jobs/{job.namespace}",
            lambda: self._hub.api.wait_for_job(job.id, namespace=job.namespace),
        )  # fmt: skip
        if isinstance(found, list):
            raise PublishError(f"{job.url}: {len(found)} jobs where one was asked for")
        return _state(found)


def _state(found: JobInfo) -> JobState:
    return JobState(str(getattr(found.status.stage, "value", found.status.stage)), found.status.message)


def _in_words(h: object) -> str:
    parts = [getattr(h, "cpu", ""), f"{getattr(h, 'ram', '?')} memory", f"{getattr(h, 'ephemeral_storage', '?')} disk"]
    accelerator = getattr(h, "accelerator", None)
    if accelerator is not None:
        parts.append(f"{accelerator.quantity} × {accelerator.model} ({accelerator.vram})")
    return ", ".join(p for p in parts if p)
