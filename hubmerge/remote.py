"""A push that runs on Hugging Face Jobs: the same command on a machine of the Hub, paid by the minute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hubmerge import __version__
from hubmerge.errors import AccessError, PublishError, UsageError
from hubmerge.hub import Hub
from hubmerge.hub.jobs import Flavor, Job, Jobs
from hubmerge.recipe import Recipe

FLAVOR = "cpu-upgrade"
"""More cores than the cheapest machine's two."""
IMAGE = "python:3.12"
TIMEOUT_S = 2 * 3600
_RECIPE = "HUBMERGE_RECIPE"
# An image may bring hubmerge along. The recipe comes as text, so that nothing has to be uploaded for it.
_SCRIPT = f"""\
set -e
command -v hubmerge > /dev/null || python -m pip install --quiet --root-user-action=ignore hubmerge=={__version__}
printf '%s' "${_RECIPE}" > recipe.yaml
exec hubmerge push recipe.yaml "$@"
"""


@dataclass(frozen=True, slots=True)
class Submission:
    """A job that could be started."""

    recipe: str
    """YAML."""
    arguments: tuple[str, ...]
    """Options of ``hubmerge push``."""
    flavor: Flavor
    timeout_s: int
    image: str
    namespace: str
    """Who pays."""

    @property
    def highest_cost_usd(self) -> float:
        """What it costs if it runs until it is ended, in whole cents."""
        return math.ceil(self.flavor.usd_per_minute * self.timeout_s / 60 * 100 - 1e-6) / 100

    @property
    def command(self) -> tuple[str, ...]:
        """What the machine runs."""
        return ("sh", "-c", _SCRIPT, "hubmerge", *self.arguments)

    def facts(self) -> dict[str, str]:
        """What to know before saying yes."""
        rate = self.flavor.usd_per_minute
        return {
            "machine": f"{self.flavor.name} ({self.flavor.hardware})",
            "image": self.image,
            "paid by": self.namespace,
            "timeout": duration(self.timeout_s),
            "cost": f"at most ${self.highest_cost_usd:.2f} (${rate * 60:.2f} per hour, by the time it runs)",
            "command": " ".join(["hubmerge push recipe.yaml", *self.arguments]),
        }


def prepare(
    recipe: Recipe, arguments: Sequence[str], hub: Hub, *, flavor: str = FLAVOR, timeout_s: int = TIMEOUT_S,
    image: str = IMAGE, namespace: str | None = None,
) -> Submission:  # fmt: skip
    """Everything that is to be known before a job is started; costs nothing.

    Args:
        recipe: What to merge; repositories only.
        arguments: Options of ``hubmerge push``, ``--to`` among them.
        hub: Where the job runs and publishes.
        flavor: Name of the machine.
        timeout_s: After so many seconds it is ended; what it has staged stays.
        image: Container image with Python; it may have hubmerge installed.
        namespace: Who pays; the token's own by default.

    Raises:
        UsageError: A local folder, or no such machine.
        AccessError: No token.
    """
    for ref in (recipe.base, *(m.ref for m in recipe.models)):
        if ref is not None and ref.is_local:
            raise UsageError(
                f"{ref} is a folder on this machine, which a job does not see",
                hint=f"upload it first: hf upload NAMESPACE/NAME {ref}",
            )
    if recipe.card.template is not None:
        raise UsageError(
            f"the card's template {recipe.card.template} is a file on this machine, which a job does not see",
            hint="leave out card.template, or run the push here",
        )
    jobs = Jobs(hub)
    flavors = jobs.flavors()
    if flavor not in flavors:
        offered = ", ".join(f"{f.name} (${f.usd_per_minute * 60:.2f}/h)" for f in flavors.values())
        raise UsageError(f"no machine is called {flavor!r}", hint=f"there are {offered}")
    if hub.token() is None:
        raise AccessError("cannot start a job: there is no token", hint="Log in with `hf auth login`, or set HF_TOKEN.")
    payer = namespace or jobs.namespace()
    return Submission(recipe.to_yaml(), tuple(arguments), flavors[flavor], timeout_s, image, payer)


def submit(submission: Submission, hub: Hub) -> Job:
    """Start it. The token goes along as a secret, and it stands nowhere else.

    Raises:
        AccessError, PublishError, TransportError: As ``Jobs.start``.
    """
    token = hub.token()
    assert token is not None
    return Jobs(hub).start(
        submission.command, image=submission.image, environment={_RECIPE: submission.recipe},
        secrets={"HF_TOKEN": token}, flavor=submission.flavor.name, timeout_s=submission.timeout_s,
        namespace=submission.namespace,
    )  # fmt: skip


def follow(job: Job, hub: Hub) -> Iterator[str]:
    """The lines it prints, until it ends.

    Raises:
        PublishError: It failed, was cancelled, or ran out of time.
    """
    jobs = Jobs(hub)
    yield from jobs.logs(job)
    end = jobs.wait(job)
    if not end.succeeded:
        raise PublishError(
            f"the job {job.url} ended as {end.stage}" + (f": {end.message}" if end.message else ""),
            hint="its output above says why; the same command continues with the files it has staged",
        )


def parse_duration(text: str) -> int:
    """Seconds from ``90s``, ``45m``, ``2h``, ``1d``, or a number of seconds.

    Raises:
        ValueError: It is none of these, or not longer than nothing.
    """
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, factor = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    try:
        found = float(number) * factor
    except ValueError:
        found = 0.0
    if not 1 <= found < 1e9:
        raise ValueError(f"{text!r} is no time; write for example 45m or 2h")
    return int(found)


def duration(seconds: int) -> str:
    """As people say it: ``2 h``, ``1 h 30 min``, ``90 s``."""
    if seconds % 60:
        return f"{seconds} s"
    hours, minutes = divmod(seconds // 60, 60)
    return " ".join(f"{n} {unit}" for n, unit in ((hours, "h"), (minutes, "min")) if n)
