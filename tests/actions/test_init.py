"""``hubmerge workflow init``: what it writes, and that no value of a user's is more than text in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from hubmerge import __version__
from hubmerge.errors import UsageError
from hubmerge.workflows.writing import ACTION, Choices, render
from tests.end_to_end.support import hubmerge

PINNED = "org/hubmerge@" + "a" * 40


@pytest.fixture(autouse=True)
def _in_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_writes_a_workflow_with_the_users_values() -> None:
    done = hubmerge(
        "workflow", "init", "--repo", "me/merged", "--recipe", "recipes/it's \"mine\".yaml", "--environment", "the hub",
        "--read-as", "me", "--action", PINNED,
    )  # fmt: skip
    assert done.code == 0, done.text
    assert done.out.strip() == ".github/workflows/merge.yml"
    workflow = YAML(typ="safe").load(Path(".github/workflows/merge.yml"))
    form = workflow["on"]["workflow_dispatch"]["inputs"]
    assert (form["repo_id"]["default"], form["recipe"]["default"]) == ("me/merged", 'recipes/it\'s "mine".yaml')
    push = workflow["jobs"]["push"]
    assert push["environment"]["name"] == "the hub"
    for job in workflow["jobs"].values():
        assert job["steps"][-1]["uses"] == PINNED
        assert job["steps"][-1]["with"]["read_as"] == "me"
        assert job["permissions"]["id-token"] == "write"
    for words in ("required reviewers", "me/merged", "Trusted Publishers"):
        assert words in done.err
    assert "pin the action" not in done.err


def test_without_values_the_form_asks_and_a_plan_has_no_identity() -> None:
    done = hubmerge("workflow", "init")
    assert done.code == 0, done.text
    workflow = YAML(typ="safe").load(Path(".github/workflows/merge.yml"))
    assert "default" not in workflow["on"]["workflow_dispatch"]["inputs"]["repo_id"]
    assert workflow["jobs"]["plan"]["permissions"] == {"contents": "read"}
    assert workflow["jobs"]["plan"]["steps"][-1]["uses"] == f"{ACTION}@v{__version__}"
    assert f"write the commit of v{__version__} in its place" in done.err


def test_a_file_that_is_there_is_kept() -> None:
    path = Path(".github/workflows/merge-call.yml")
    assert hubmerge("workflow", "init", "--reusable", "--action", PINNED).code == 0
    path.write_text("mine")
    refused = hubmerge("workflow", "init", "--reusable", "--action", PINNED)
    assert refused.code == 2
    assert path.read_text() == "mine"
    assert hubmerge("workflow", "init", "--reusable", "--action", PINNED, "--overwrite").code == 0
    assert "workflow_call" in path.read_text()


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.text(min_size=1), st.booleans())
def test_any_recipes_name_is_only_text(name: str, reusable: bool) -> None:
    try:
        text = render(Choices(action=PINNED, recipe=name, reusable=reusable))
    except UsageError:
        assume(not name.isprintable() or "${{" in name or len(name) > 1000)
        return
    form = YAML(typ="safe").load(text)["on"]["workflow_call" if reusable else "workflow_dispatch"]["inputs"]
    assert form["recipe"]["default"] == name
    plain = render(Choices(action=PINNED, recipe="x", reusable=reusable))
    assert text.count("${{") == plain.count("${{")
    assert len(text.splitlines()) == len(plain.splitlines())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--repo", "me/x: ${{ secrets.HF_TOKEN }}"),
        ("--repo", "me"),
        ("--repo", "me/merged\n"),
        ("--read-as", "me/you"),
        ("--recipe", "${{ github.token }}"),
        ("--recipe", "a\u2028b.yaml"),
        ("--environment", "${{ inputs.x }}"),
        ("--environment", 'x"\n'),
        ("--action", "org/hubmerge"),
        ("--action", "org/hubmerge@main\n        run: evil"),
        ("--action", "../x@y"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(option: str, value: str) -> None:
    refused = hubmerge("workflow", "init", option, value)
    assert refused.code == 2
    assert f"{option} cannot be" in refused.err
    assert not Path(".github").exists()
