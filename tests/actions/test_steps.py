"""The parts of a step: what inputs may say, who gets which flag, what machines have left, what a summary holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hubmerge.cli.workflow import _options_of
from hubmerge.errors import AccessError, HubMergeError, PlanError, UsageError
from hubmerge.workflows import identity
from hubmerge.workflows.flags import DECIDED, for_command
from hubmerge.workflows.inputs import PREFIX, Inputs
from hubmerge.workflows.runner import Runner, _available_bytes, _unused_bytes
from hubmerge.workflows.step import check_approved
from hubmerge.workflows.summary import MAX_ROWS, SUMMARY_BYTES, Story, render
from tests.actions.github import outputs_of

LAWS = settings(deadline=None, derandomize=True, max_examples=25)
KNOWN = {name: _options_of(name) for name in ("plan", "merge", "push")}
ASKING = {"ACTIONS_ID_TOKEN_REQUEST_URL": "http://127.0.0.1:9/token"}


def inputs(**given: str) -> Inputs:
    texts = {"recipe": "merge.yaml", "mode": "push", "repo_id": "me/merged", **given}
    return Inputs.of({PREFIX + name.upper(): value for name, value in texts.items()})


# --- inputs -----------------------------------------------------------------------------------------------------


def test_inputs_have_defaults() -> None:
    assert Inputs.of({f"{PREFIX}RECIPE": " merge.yaml "}) == Inputs(recipe="merge.yaml", mode="plan")
    whole = inputs(create_pr="True", private="true", flags="--license\r\nmit\n\n", plan="a" * 64, read_as="me")
    assert whole == Inputs("merge.yaml", "push", "me/merged", True, True, ("--license", "mit"), "a" * 64, "me")


@LAWS
@given(st.sampled_from(["mode", "repo_id", "create_pr", "private", "plan", "read_as"]), st.text(min_size=1))
def test_an_input_is_what_it_can_be_or_refused(name: str, value: str) -> None:
    try:
        found = inputs(**{name: value})
    except UsageError as error:
        refused: str | None = error.message
    else:
        refused = None
    if refused is not None:
        assert f"the input {name}" in refused
        return
    for text in (found.repo, found.expected_plan, found.read_as):
        assert text is None or (text.isascii() and not set(text) & set(" \n\t\"'`$(){};|&<>:\\"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("repo_id", "me/merged; x"), ("repo_id", "me/merged\nme/other"), ("repo_id", "me/a/b"), ("repo_id", "-/x"),
     ("plan", "a" * 65), ("plan", "A" * 64), ("read_as", "me you"), ("read_as", "me/you"), ("mode", "plans")],
)  # fmt: skip
def test_an_input_that_only_begins_well_is_refused(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"the input {name} cannot be"):
        inputs(**{name: value})


# --- flags ------------------------------------------------------------------------------------------------------


def test_each_command_gets_the_flags_that_are_its_own() -> None:
    flags = ["--license", "mit", "--tag=v1", "--max-memory=2GB", "--no-resume", "--accept-license-risk", "-v"]
    assert for_command(flags, KNOWN["push"], [KNOWN["push"]]) == flags
    assert for_command(flags, KNOWN["plan"], [KNOWN["push"]]) == ["--license", "mit", "--max-memory=2GB", "-v"]
    assert for_command(["--tag", "--json"], KNOWN["plan"], [KNOWN["push"]]) == []  # a value, whatever it looks like


@pytest.mark.parametrize("name", DECIDED)
def test_what_an_input_stands_for_is_no_flag(name: str) -> None:
    for flags in ([name, "x"], [f"{name}=x"], ["--license=mit", name]):
        with pytest.raises(UsageError, match=f"cannot hold {name}"):
            for_command(flags, KNOWN["push"], [])


@pytest.mark.parametrize("flag", ["--licence=mit", "--license mit", "merge.yaml", "--", "--help", "-vv", "; rm -rf /"])
def test_what_is_no_flag_is_refused(flag: str) -> None:
    with pytest.raises(UsageError, match="no option of hubmerge's"):
        for_command([flag], KNOWN["push"], [])


def test_a_flag_without_its_value_is_refused() -> None:
    with pytest.raises(UsageError, match="ends with --license"):
        for_command(["--license"], KNOWN["push"], [])


# --- identity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "environment", "reading", "publishing"),
    [
        ({}, ASKING, {}, {"HF_OIDC_RESOURCE": "me/merged"}),
        ({"read_as": "me"}, ASKING, {"HF_OIDC_RESOURCE": "me"},
         {"HF_OIDC_RESOURCE": "me/merged", "HUBMERGE_READ_AS": "me"}),
        ({"read_as": "me"}, {**ASKING, "HUBMERGE_INPUT_HF_READ_TOKEN": "r"}, {"HF_TOKEN": "r"},
         {"HF_OIDC_RESOURCE": "me/merged", "HUBMERGE_READ_TOKEN": "r"}),
        ({}, {**ASKING, "HUBMERGE_INPUT_HF_TOKEN": "w"}, {"HF_TOKEN": "w"}, {"HF_TOKEN": "w"}),
        ({}, {"HF_TOKEN": "w", "HUBMERGE_INPUT_HF_TOKEN": " "}, {"HF_TOKEN": "w"}, {"HF_TOKEN": "w"}),
        ({}, {"HF_TOKEN": "w", "HUBMERGE_READ_TOKEN": "r"}, {"HF_TOKEN": "r"},
         {"HF_TOKEN": "w", "HUBMERGE_READ_TOKEN": "r"}),
    ],
)  # fmt: skip
def test_who_reads_and_who_publishes(
    given: dict[str, str], environment: dict[str, str], reading: dict[str, str], publishing: dict[str, str]
) -> None:
    asked = inputs(**given)
    assert identity.for_reading(asked, environment) == reading
    assert identity.for_publishing(asked, environment) == publishing
    assert not identity.without_identity(environment).keys() - ASKING.keys()


def test_nobody_can_publish_without_an_identity_or_a_token() -> None:
    with pytest.raises(AccessError, match="cannot publish to me/merged"):
        identity.for_publishing(inputs(), {})
    with pytest.raises(AccessError, match="cannot read as me"):
        identity.for_reading(inputs(read_as="me"), {})
    assert identity.for_reading(inputs(), {}) == {}


# --- the machine ------------------------------------------------------------------------------------------------


def runner_in(folder: Path) -> Runner:
    return Runner(folder, folder / "output", folder / "summary")


@LAWS
@given(st.dictionaries(st.sampled_from(["url", "commit", "path"]), st.text(st.characters(exclude_categories=("Cs",)))))
def test_outputs_come_out_as_they_went_in(tmp_path_factory: pytest.TempPathFactory, values: dict[str, str]) -> None:
    runner = runner_in(tmp_path_factory.mktemp("out"))
    values = {name: "".join(c for c in value if c != "\r") for name, value in values.items()}
    for name, value in values.items():
        runner.set_output(name, value)
    assert outputs_of(runner.output) == values


def test_no_output_can_end_itself_and_begin_another(tmp_path: Path) -> None:
    runner = runner_in(tmp_path)
    runner.set_output("path", "first")
    end = runner.output.read_text().splitlines()[-1]
    values = {"url": f"a\n{end}\ncommit<<{end}\nevil\n{end}", "lock": "a\nEOF\ncommit=evil"}
    for name, value in values.items():
        runner.set_output(name, value)
    assert outputs_of(runner.output) == {"path": "first", **values}


def test_budgets_leave_something_to_the_rest_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  16000000 kB\nMemAvailable:  10000000 kB\n")
    assert _available_bytes(tmp_path / "meminfo") == 10_000_000 * 1024
    assert _available_bytes(tmp_path / "none") > 1 << 28
    assert _unused_bytes(tmp_path) == float("inf")
    for name, text in {
        "max": "4000000000\n",
        "current": "3500000000\n",
        "stat": "anon 1\ninactive_file 500000000\n",
    }.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert _unused_bytes(tmp_path) == 1_000_000_000
    monkeypatch.setattr("hubmerge.workflows.runner._MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr("hubmerge.workflows.runner._CGROUP", tmp_path)
    assert runner_in(tmp_path).memory_bytes() == 500_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert runner_in(tmp_path).memory_bytes() == 9_216_000_000
    for free, allowed in ((100_000_000_000, 90_000_000_000), (14_000_000_000, 12_600_000_000),
                          (5_000_000_000, 4_000_000_000), (10, 0)):  # fmt: skip
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: type("Usage", (), {"free": free}))
        assert runner_in(tmp_path).disk_bytes() == allowed


def test_what_is_no_step_of_a_workflow_is_told_so() -> None:
    with pytest.raises(UsageError, match="RUNNER_TEMP, GITHUB_OUTPUT, GITHUB_STEP_SUMMARY not set"):
        Runner.of({})


# --- the summary ------------------------------------------------------------------------------------------------


def plan(**changes: Any) -> Mapping[str, Any]:
    source = {"role": "base", "name": "base", "repo": "org/base", "commit": "a" * 40, "adapter": False}
    return {
        "method": "ties", "plan_sha256": "b" * 64, "sources": [source, source | {"role": "model", "name": "math"}],
        "outputs": [{"path": "model.safetensors", "size_bytes": 1000}], "merged_tensors": 3, "copied_tensors": 1,
        "read_bytes": 3000, "write_bytes": 1000, "memory_bytes": 2_000_000, "problems": [],
        "license_check": {"verdict": "allowed", "license": "mit", "reasons": [], "duties": [], "notes": []},
    } | changes  # fmt: skip


def story(tmp_path: Path, **parts: Any) -> Story:
    page = {"page": "https://git.example/me/recipes/actions/runs/1", "source": "https://git.example/me/recipes/blob/c"}
    runner = replace(runner_in(tmp_path), **page)
    return Story(inputs(), runner, "https://hub.example", **{"plan": plan(), "code": 0, **parts})


def test_a_summary_says_what_there_is_to_know(tmp_path: Path) -> None:
    timings = {"plan_s": 1.25, "merge_s": 2.0, "publish_s": 3.0, "total_s": 6.25}
    result = {
        "url": "https://hub.example/me/merged", "commit": "c" * 40, "timings": timings,
        "peak_rss_bytes": 500_000_000, "peak_disk_bytes": 1000,
    }  # fmt: skip
    budgets = {"memory": 8_000_000_000, "disk": 12_000_000_000}
    duties = [{"text": "keep the notice", "of": ["org/base"], "done": None}]
    check = {"verdict": "unknown", "license": None, "reasons": ["org/x says nothing"], "duties": duties, "notes": []}
    problems = [
        {"severity": "note", "message": "it is small", "hint": None},
        {"severity": "warning", "message": "it is odd", "hint": "look"},
    ]
    text = render(
        story(
            tmp_path, plan=plan(license_check=check, problems=problems), result=result, budgets=budgets,
            lock_sha256="d" * 64,
        )
    )  # fmt: skip
    for part in (
        "## hubmerge push: `me/merged` published", "[hub.example/me/merged](https://hub.example/me/merged)",
        "`cccccccccccc`", "`" + "d" * 64 + "`", "[org/base](https://hub.example/org/base/tree/" + "a" * 40 + ")",
        "| total | 6.2 s | – |", "| most memory held | 500 MB | 8 GB |", "### Licence: unknown, none stated",
        "- org/x says nothing", "keep the notice (org/base): left to you", "`hubmerge verify me/merged`",
        "- **warning:** it is odd look\n- **note:** it is small",
        "[merge.yaml](https://git.example/me/recipes/blob/c/merge.yaml)",
    ):  # fmt: skip
        assert part in text, (part, text)
    assert "end of the log" not in text


def test_a_summary_stays_under_githubs_limit_and_says_what_is_missing(tmp_path: Path) -> None:
    source = {"role": "model", "name": "n" * 900, "repo": "ö" * 900, "commit": "a" * 40, "adapter": True}
    problems = [{"severity": "warning", "message": "x" * 1000, "hint": "y" * 1000}] * 3000
    big = plan(sources=[source] * 3000, problems=problems)
    text = render(story(tmp_path, plan=big, code=1, log=["z" * 100_000] * 100))
    assert len(text.encode()) <= SUMMARY_BYTES
    assert f"… and {3000 - MAX_ROWS} more" in text
    cut = render(story(tmp_path, plan=big, code=1), limit_bytes=2000)
    assert len(cut.encode()) <= 2000
    assert "Cut here" in cut
    assert "failed with exit code 1" in cut


@LAWS
@given(
    st.one_of(
        st.text(st.characters(exclude_categories=("Cs",)), min_size=1),
        st.sampled_from(
            [
                "<script>x</script>",
                "a|b",
                "``` \n```",
                "[x](javascript:y)",
                "\u202eevil",
                "${{ x }}",
                "::error::",
                "# h",
            ]
        ),
    )
)
def test_no_text_of_a_repository_becomes_markup(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("s")
    source = {"role": "model", "name": text, "repo": text, "commit": None, "adapter": False}
    check = {"verdict": "blocked", "license": text, "reasons": [text], "notes": [],
             "duties": [{"text": text, "of": [text], "done": text}]}  # fmt: skip
    shown = render(
        story(
            folder, plan=plan(sources=[source], method=text, license_check=check,
                              problems=[{"severity": "error", "message": text, "hint": text}]),
            code=1, log=[text, "last"],
        )
    )  # fmt: skip
    parsed = MarkdownIt("commonmark").enable("table").parse(shown)
    kinds = [t.type for t in parsed] + [c.type for t in parsed for c in t.children or ()]
    assert not {"html_block", "html_inline", "image"} & set(kinds)
    headings = [t for t in parsed if t.type == "heading_open"]
    assert len(headings) == 5
    links = [c.attrs["href"] for t in parsed for c in t.children or () if c.type == "link_open"]
    assert all(str(link).startswith("https://git.example/") for link in links)


def test_only_the_plan_that_was_approved_is_run() -> None:
    check_approved(None, "a" * 64)
    check_approved("a" * 64, "a" * 64)
    with pytest.raises(PlanError, match=f"is now {'b' * 64}, approved was {'a' * 64}"):
        check_approved("a" * 64, "b" * 64)


def test_errors_of_a_step_have_a_next_step() -> None:
    with pytest.raises(HubMergeError) as caught:
        inputs(mode="everything")
    assert json.dumps("plan, merge, push")[1:-1] in str(caught.value)
