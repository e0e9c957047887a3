"""The `hf` command against the local Hub, as a separate process that knows only its environment."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi

Hf = Callable[..., subprocess.CompletedProcess[str]]


def test_upload_and_download(hf: Hf, api: HfApi, tmp_path: Path):
    source = tmp_path / "src"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "a.txt").write_text("a")
    (source / "w.safetensors").write_bytes(b"w" * 100_000)
    hf("upload", "local/m", str(source), "up", "--commit-message", "from the shell")
    assert api.list_repo_commits("local/m")[0].title == "from the shell"
    hf("download", "local/m", "--local-dir", str(tmp_path / "out"))
    assert (tmp_path / "out" / "up" / "sub" / "a.txt").read_text() == "a"
    assert (tmp_path / "out" / "up" / "w.safetensors").read_bytes() == b"w" * 100_000
    cached = hf("download", "local/m", "up/w.safetensors", "-q").stdout.strip()
    assert Path(cached).read_bytes() == b"w" * 100_000


def test_upload_creates_the_repository_and_opens_pull_requests(hf: Hf, api: HfApi, tmp_path: Path):
    (tmp_path / "a.txt").write_text("a")
    hf("upload", "local/fresh", str(tmp_path / "a.txt"), "a.txt", "--private")
    assert api.model_info("local/fresh").private
    (tmp_path / "a.txt").write_text("b")
    hf("upload", "local/fresh", str(tmp_path / "a.txt"), "a.txt", "--create-pr")
    target = tmp_path / "pr"
    hf("download", "local/fresh", "a.txt", "--revision", "refs/pr/1", "--local-dir", str(target))
    assert (target / "a.txt").read_text() == "b"


def test_repos_tags_settings_and_listing(hf: Hf, api: HfApi):
    hf("repos", "create", "local/new", "--private")
    hf("repos", "tag", "create", "local/new", "v1")
    assert [tag.name for tag in api.list_repo_refs("local/new").tags] == ["v1"]
    hf("repos", "settings", "local/new", "--gated", "auto", "--public")
    info = api.model_info("local/new")
    assert (info.private, info.gated) == (False, "auto")
    listed = json.loads(hf("models", "ls", "--author", "local", "--format", "json").stdout)
    assert {item["id"] for item in listed} == {"local/m", "local/new"}
    hf("repos", "delete", "local/new", "-y")
    assert not api.repo_exists("local/new")


@pytest.mark.slow
def test_the_other_repository_commands(hf: Hf, api: HfApi):
    hf("repos", "branch", "create", "local/m", "dev")
    hf("repos", "branch", "delete", "local/m", "dev")
    hf("repos", "tag", "create", "local/m", "v1")
    assert "v1" in hf("repos", "tag", "list", "local/m").stdout
    hf("repos", "tag", "delete", "local/m", "v1", "-y")
    hf("repos", "move", "local/m", "local/moved")
    assert api.repo_exists("local/moved")


def test_who_am_i_and_failure(hf: Hf, api: HfApi):
    assert "local" in hf("auth", "whoami").stdout
    failed = hf("download", "local/none", check=False)
    assert failed.returncode != 0
    assert "not found" in (failed.stdout + failed.stderr).lower()
