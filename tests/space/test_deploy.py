"""`hubmerge space deploy` to the local Hub: the repository, and the application that it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import psutil
import pytest
from click.testing import CliRunner
from huggingface_hub import HfApi, RepoCard, snapshot_download
from ruamel.yaml import YAML

from hubmerge import __version__
from hubmerge.cli import cli
from hubmerge.errors import AccessError, HubMergeError, PublishError, UsageError
from hubmerge.hub import Hub
from hubmerge.localhub import Fault, LocalHub
from hubmerge.space.deploy import EXPIRATION_MINUTES, SCOPES, SDK_VERSION, Choices, render, requirements
from hubmerge.space.safety import Limits
from tests.space.door import hub_with_people, settings_of
from tests.space.scene import ANN

CHECKOUT = Path(__file__).parents[2]
START_S = 120


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hubmerge as this checkout has it."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, timeout=120)
    (found,) = out.glob("*.whl")
    return found


def deploy(*arguments: str) -> str:
    """Run the command; what it prints on stdout."""
    done = CliRunner().invoke(cli, ["space", "deploy", *arguments], catch_exceptions=False, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def front_matter(readme: str) -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe", pure=True).load(readme.split("---\n")[1])
    return found


def files_of(api: HfApi, repo: str) -> list[str]:
    return sorted(set(api.list_repo_files(repo, repo_type="space")) - {".gitattributes"})


def test_a_space_is_made_with_one_commit(hub: LocalHub):
    printed = deploy("--to", "local/form")
    assert printed.strip() == f"{hub.endpoint}/spaces/local/form"
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    info = api.space_info("local/form")
    assert (info.private, info.sdk) == (True, "gradio")
    assert files_of(api, "local/form") == ["README.md", "app.py", "requirements.txt"]
    commits = api.list_repo_commits("local/form", repo_type="space")
    assert [c.title for c in commits] == [f"Deploy the web form of hubmerge {__version__}", "initial commit"]
    text = Path(api.hf_hub_download("local/form", "requirements.txt", repo_type="space")).read_text()
    assert text == f"hubmerge[space]=={__version__}\n"
    RepoCard.load("local/form", repo_type="space", token=hub.token).validate(repo_type="space")


def test_the_front_matter_says_what_the_hub_is_to_do(hub: LocalHub):
    readme = render(Choices("local/form", 'A "title": {{ 1 }} # not a comment'))["README.md"].decode()
    found = front_matter(readme)
    assert found["title"] == 'A "title": {{ 1 }} # not a comment'
    assert (found["sdk"], found["sdk_version"], found["app_file"]) == ("gradio", SDK_VERSION, "app.py")
    assert isinstance(found["python_version"], str)
    assert found["hf_oauth"] is True
    assert tuple(found["hf_oauth_scopes"]) == SCOPES
    assert "manage-repos" not in readme
    assert len(found["short_description"]) <= 60
    assert RepoCard(readme).data.license == "apache-2.0"
    more = front_matter(render(Choices("local/form", scopes=("read-repos",)))["README.md"].decode())
    assert more["hf_oauth_scopes"] == [*SCOPES, "read-repos"]


def test_the_page_is_tested_with_the_gradio_that_a_space_gets():
    assert version("gradio") == SDK_VERSION


def test_a_sign_in_outlasts_a_job():
    assert 2 * Limits().run_s < EXPIRATION_MINUTES * 60


def test_deploying_again_brings_it_up_to_date(hub: LocalHub, wheel: Path, tmp_path: Path):
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    old = tmp_path / "hubmerge-0.0.1-py3-none-any.whl"
    old.write_bytes(wheel.read_bytes())
    deploy("--to", "local/form", "--wheel", str(old), "--public", "--hardware", "cpu-upgrade")
    assert api.get_space_runtime("local/form").requested_hardware == "cpu-upgrade"
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.whl.txt", repo_id="local/form", repo_type="space")
    deploy("--to", "local/form", "--wheel", str(wheel), "--title", "Another")
    assert files_of(api, "local/form") == ["README.md", "app.py", wheel.name, "notes.whl.txt", "requirements.txt"]
    info = api.space_info("local/form")
    assert (info.private, info.card_data.title) == (False, "Another")
    assert api.get_space_runtime("local/form").requested_hardware == "cpu-upgrade"
    deploy("--to", "local/form", "--private", "--hardware", "t4-small")
    assert api.space_info("local/form").private
    assert api.get_space_runtime("local/form").requested_hardware == "t4-small"
    assert files_of(api, "local/form") == ["README.md", "app.py", "notes.whl.txt", "requirements.txt"]


def test_a_dry_run_sends_nothing(hub: LocalHub, wheel: Path):
    hub.requests.clear()
    shown = deploy("--to", "local/form", "--wheel", str(wheel), "--dry-run")
    assert "hf_oauth: true" in shown
    assert f"==> {wheel.name} <==" in shown
    assert len(hub.requests) == 0


def test_a_wheel_names_what_it_needs(wheel: Path, tmp_path: Path):
    found = requirements(wheel)
    names = {line.partition(">")[0].partition("<")[0].partition("[")[0].strip() for line in found}
    assert {"torch", "gradio", "transformers", "authlib", "itsdangerous"} <= names
    assert not {"pytest", "model-signing", "scikit-learn"} & names
    broken = tmp_path / wheel.name
    broken.write_bytes(b"no wheel")
    with pytest.raises(UsageError, match="cannot be read"):
        deploy("--to", "local/form", "--wheel", str(broken), "--dry-run")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "form"), "--to cannot be 'form'"),
        (("--to", "a/b/c"), "--to cannot be"),
        (("--to", "local/form", "--title", ""), "--title cannot be"),
        (("--to", "local/form", "--title", "a\nb"), "--title cannot be"),
        (("--to", "local/form", "--wheel", __file__), "is no wheel of hubmerge"),
    ],
)
def test_what_cannot_be_meant(arguments: tuple[str, ...], words: str):
    with pytest.raises(UsageError, match=words):
        deploy(*arguments)


def test_errors_of_the_hub_are_told_of(start_hub: Callable[..., LocalHub], monkeypatch: pytest.MonkeyPatch):
    hub = start_hub(users=[ANN])
    with pytest.raises(HubMergeError) as refused:
        deploy("--to", "somebody-else/form")
    assert refused.value.exit_code in (AccessError.exit_code, PublishError.exit_code)
    assert "deploy to the Space somebody-else/form" in refused.value.message
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AccessError, match="there is no token"):
        deploy("--to", "ann/form")
    assert not HfApi(endpoint=hub.endpoint, token=False).repo_exists("ann/form", repo_type="space")


def test_who_has_no_paid_plan_is_told_so(hub: LocalHub):
    words = "Subscribe to PRO to create Spaces with gradio"
    hub.faults.add(Fault(path="^/api/repos/create", status=402, body=json.dumps({"error": words})))
    with pytest.raises(PublishError, match=f"HTTP 402: .*{words}"):
        deploy("--to", "local/form")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sdk: fortran", '"sdk" must be one of'),
        ("colorFrom: mauve", '"colorFrom" must be one of'),
        ("python_version: 3.11", '"python_version" must be a string'),
        (f"short_description: {'x' * 61}", '"short_description" must have at most 60'),
        ("hf_oauth: maybe", '"hf_oauth" must be true or false'),
        ("hf_oauth_scopes: [root]", '"hf_oauth_scopes" has unknown ones: root'),
        ("hf_oauth_expiration_minutes: 43201", '"hf_oauth_expiration_minutes" must be'),
    ],
)
def test_the_hub_refuses_other_front_matter(hub: LocalHub, line: str, words: str):
    key = line.partition(":")[0]
    readme = render(Choices("local/form"))["README.md"].decode()
    kept = [old for old in readme.splitlines(keepends=True) if not old.startswith(key + ":") and old[:2] != "- "]
    changed = "".join(kept).replace("---\n", f"---\n{line}\n", 1)
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    if not api.repo_exists("local/form", repo_type="space"):
        api.create_repo("local/form", repo_type="space", space_sdk="gradio")
    with pytest.raises(ValueError, match=words):
        api.upload_file(
            path_or_fileobj=changed.encode(), path_in_repo="README.md", repo_id="local/form", repo_type="space"
        )


def test_the_hub_refuses_spaces_without_an_sdk(hub: LocalHub):
    answer = httpx2.post(
        f"{hub.endpoint}/api/repos/create", headers={"authorization": f"Bearer {hub.token}"},
        json={"name": "form", "type": "space"},
    )  # fmt: skip
    assert answer.status_code == 400
    assert "sdk" in answer.json()["error"]


# --- what is deployed runs


@contextmanager
def started(python: Path, folder: Path, environment: dict[str, str]) -> Iterator[Running]:
    """The application as a Space starts it. It has to end well, too."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "HOME", "HF_HUB_DISABLE_XET") if name in os.environ}
    with subprocess.Popen(
        [str(python), "app.py"], cwd=folder, env=kept | {"GRADIO_SERVER_PORT": "0"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            url = process.stdout.readline().strip()
            assert url, process.stderr.read()
            (port,) = {c.laddr.port for c in psutil.Process(process.pid).net_connections() if c.status == "LISTEN"}
            yield Running(url, port)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=START_S)
            assert process.returncode == 0, err
            assert "Traceback" not in err, err
        finally:
            process.kill()


@dataclass
class Running:
    """A server that runs, as a proxy in front of it sees it."""

    url: str
    """Where visitors reach it."""
    port: int

    def client(self) -> httpx2.Client:
        scheme, _, host = self.url.partition("://")
        headers = {"host": host, "x-forwarded-proto": scheme, "x-forwarded-for": "192.0.2.1"}
        return httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=60)

    def check_page(self) -> None:
        """It is the form, reached by its address, and nobody is signed in."""
        with self.client() as client:
            page = client.get("/")
            assert page.status_code == 200
            assert "hubmerge" in page.text
            config = client.get("/config").json()
            assert (config["version"], config["root"]) == (SDK_VERSION, self.url)
            assert "Merge" in json.dumps(config)
            sent = client.get("/login")
            assert sent.status_code == 302
            asked = parse_qs(urlsplit(sent.headers["location"]).query)
            assert asked["redirect_uri"] == [f"{self.url}/login/callback"]


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with hub_with_people(tmp_path_factory.mktemp("hub")) as found:
        yield found


def deployed(town: LocalHub, wheel: Path, tmp_path: Path) -> Path:
    """A clone of a Space that was deployed."""
    from hubmerge.space.deploy import deploy as deploy_here

    deploy_here(Choices("ann/form", wheel=wheel), Hub(town.endpoint, ANN.token))
    folder = tmp_path / "app"
    snapshot_download(
        "ann/form", repo_type="space", local_dir=folder, endpoint=town.endpoint, token=ANN.token,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    return folder


def test_what_is_deployed_starts_and_ends(town: LocalHub, wheel: Path, tmp_path: Path):
    folder = deployed(town, wheel, tmp_path)
    environment = settings_of(town) | {"HF_ENDPOINT": town.endpoint, "TMPDIR": str(tmp_path)}
    environment |= {"SPACE_HOST": "ann-form.hf.space", "SPACE_ID": "ann/form", "SYSTEM": "spaces"}
    with ExitStack() as until_later, started(Path(sys.executable), folder, environment) as running:
        assert running.url == "https://ann-form.hf.space"
        running.check_page()
        client = until_later.enter_context(running.client())
        open_page = until_later.enter_context(client.stream("GET", "/gradio_api/heartbeat/page"))
        assert open_page.status_code == 200
    assert (folder / "space-data" / "jobs.db").is_file()
    (unpacked,) = tmp_path.glob("hubmerge-*")
    assert (unpacked / "hubmerge" / "templates" / "space" / "notice.html.jinja").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_is_deployed_runs_with_its_own_requirements_alone(town: LocalHub, wheel: Path, tmp_path: Path):
    folder = deployed(town, wheel, tmp_path)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pinned = CHECKOUT / "constraints.txt"
    torch = next(line for line in pinned.read_text().splitlines() if line.startswith("torch=="))
    # As in the Makefile: torch alone first, so that pip takes a build without GPU libraries where there is one.
    for wanted in ([torch], ["-r", str(folder / "requirements.txt")]):
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", pinned, *wanted], check=True, timeout=1500)
    environment = settings_of(town) | {"HF_ENDPOINT": town.endpoint, "TMPDIR": str(tmp_path)}
    with started(python, folder, environment) as running:
        running.check_page()
