"""Jobs on the local Hub, with the client library: processes with their logs, states and ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from hubmerge.localhub import LocalHub, User

OWNER = User("local", "hf_tokenOfTheOwner")
OTHER = User("mallory", "hf_tokenOfSomebodyElse")


@pytest.fixture
def hub(start_hub: Callable[..., LocalHub]) -> LocalHub:
    return start_hub(users=(OWNER, OTHER), jobs=True)


@pytest.fixture
def api(hub: LocalHub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=OWNER.token)


def run(api: HfApi, program: str, **options: object) -> str:
    return str(api.run_job(image="python:3.12", command=[sys.executable, "-c", program], **options).id)  # type: ignore[arg-type]


def test_a_job_runs_with_its_environment_and_secrets(api: HfApi, hub: LocalHub) -> None:
    program = "import os; [print(os.environ[k]) for k in ('A', 'HF_TOKEN', 'HF_ENDPOINT')]"
    job = run(api, program, env={"A": "one"}, secrets={"HF_TOKEN": "hf_secret"}, flavor="cpu-basic")
    assert list(api.fetch_job_logs(job_id=job, follow=True)) == ["one", "hf_secret", hub.endpoint]
    found = api.wait_for_job(job)
    assert not isinstance(found, list)
    assert found.status.stage == "COMPLETED"
    assert (found.flavor, found.docker_image, found.environment) == ("cpu-basic", "python:3.12", {"A": "one"})
    assert found.owner.name == "local"
    assert "hf_secret" not in repr(found)
    assert found.finished_at is not None
    assert found.started_at is not None
    assert found.finished_at >= found.started_at


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        ("raise SystemExit(3)", {}, "exit code: 3"),
        ("import time; time.sleep(60)", {"timeout": 1}, "timeout"),
    ],
)
def test_jobs_that_fail(program: str, options: dict[str, object], message: str, api: HfApi) -> None:
    found = api.wait_for_job(run(api, program, **options), timeout=30)
    assert not isinstance(found, list)
    assert found.status.stage == "ERROR"
    assert message in str(found.status.message)


def test_a_cancelled_job_ends_at_once(api: HfApi) -> None:
    job = run(api, "import time; print('begun', flush=True); time.sleep(60)")
    for line in api.fetch_job_logs(job_id=job, follow=True):
        assert line == "begun"
        began = time.monotonic()
        api.cancel_job(job_id=job)
    found = api.inspect_job(job_id=job)
    assert found.status.stage == "CANCELED"
    assert time.monotonic() - began < 20


def test_what_is_refused(api: HfApi, hub: LocalHub) -> None:
    job = run(api, "print(1)")
    stranger = HfApi(endpoint=hub.endpoint, token=OTHER.token)
    for status, refused in (
        (400, lambda: run(api, "print(1)", flavor="no-such-machine")),
        (400, lambda: api.run_job(image="x", command=[])),
        (404, lambda: api.inspect_job(job_id="0" * 24)),
        (403, lambda: stranger.inspect_job(job_id=job, namespace="local")),
        (403, lambda: stranger.cancel_job(job_id=job, namespace="local")),
        (403, lambda: run(stranger, "print(1)", namespace="local")),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            refused()
        assert caught.value.response.status_code == status


def test_a_hub_runs_nothing_unless_it_was_told_to(start_hub: Callable[..., LocalHub]) -> None:
    plain = start_hub(users=(OWNER,))
    with pytest.raises(HfHubHTTPError, match="not enabled"):
        run(HfApi(endpoint=plain.endpoint, token=OWNER.token), "print(1)")
