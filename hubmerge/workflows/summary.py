"""The page that a workflow's step leaves behind: plan, licence, timing, links, and what went wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from hubmerge.errors import UsageError
from hubmerge.markdown import MAX_LINE_CHARS, block, code, code_cell, escape, link
from hubmerge.quantities import size
from hubmerge.workflows.inputs import Inputs
from hubmerge.workflows.runner import SUMMARY_BYTES, Runner

MAX_ROWS = 100
MAX_LOG_LINES = 40
_DONE = {"plan": "planned", "merge": "merged", "push": "published"}
_SEVERITIES = ("error", "warning", "note")
_CUT = "\n*Cut here: the step's artifact has all of it.*\n"
_DASH = "–"


@dataclass(slots=True)
class Story:
    """What has happened in a step so far."""

    inputs: Inputs
    runner: Runner
    hub: str
    """Address of the Hub."""
    plan: Mapping[str, Any] | None = None
    """What ``hubmerge plan --json`` has printed."""
    result: Mapping[str, Any] | None = None
    """What ``hubmerge merge`` or ``push`` has printed."""
    lock_sha256: str | None = None
    budgets: Mapping[str, int] = field(default_factory=dict)
    code: int | None = None
    log: Sequence[str] = ()
    """The last lines that were shown."""


def render(story: Story, limit_bytes: int = SUMMARY_BYTES) -> str:
    """The summary as Markdown, whole sections of it, as many as GitHub shows."""
    text = ""
    for section in _sections(story):
        longer = f"{text}{section}\n\n"
        if len((longer + _CUT).encode()) > limit_bytes:
            return text + _CUT
        text = longer
    return text


def refusal(error: UsageError) -> str:
    """The summary of a step whose inputs cannot be meant."""
    return f"## hubmerge: failed with exit code {error.exit_code}\n\n{block(str(error))}\n"


def _sections(story: Story) -> Iterator[str]:
    yield from _outcome(story)
    if story.plan is not None:
        yield _sources(story.plan, story.hub)
        yield _facts(story.plan)
        yield from _licence(story.plan["license_check"])
        yield from _problems(story.plan["problems"])
    if story.result is not None:
        yield _timing(story.result, story.budgets)
    if story.code and story.log:
        last = [line[:MAX_LINE_CHARS] for line in story.log[-MAX_LOG_LINES:]]
        yield f"### The end of the log\n\n{block(chr(10).join(last))}"


def _outcome(story: Story) -> Iterator[str]:
    inputs, failed = story.inputs, story.code != 0
    done = "proposed" if inputs.create_pr and inputs.mode == "push" else _DONE[inputs.mode]
    done = f"failed with exit code {story.code}" if failed else done
    yield f"## hubmerge {inputs.mode}: {code(inputs.repo or inputs.recipe)} {done}"
    result = story.result or {}
    links = []
    if result.get("url"):
        where = f" (commit {code(str(result['commit'])[:12])})" if result.get("commit") else ""
        links.append(f"**Result:** {_address(str(result['url']))}{where}")
    if story.lock_sha256:
        links.append(f"**Lock:** sha256 {code(story.lock_sha256)}")
    recipe = code(inputs.recipe)
    links.append(f"**Recipe:** {link(inputs.recipe, story.runner.source, inputs.recipe)}" if story.runner.source
                 else f"**Recipe:** {recipe}")  # fmt: skip
    if story.runner.page:
        links.append(f"**Artifacts:** {_address(story.runner.page)}")
    if story.result is not None and inputs.mode == "push" and not inputs.create_pr:
        links.append(f"**Check it any time:** {code(f'hubmerge verify {inputs.repo}')}")
    yield "\n".join(f"- {line}" for line in links)


def _address(url: str) -> Markup:
    return link(url.partition("://")[2], url)


def _sources(plan: Mapping[str, Any], hub: str) -> str:
    rows = []
    for source in plan["sources"][:MAX_ROWS]:
        repo, commit = str(source["repo"]), source["commit"]
        where = link(repo, hub, repo, "tree", commit) if commit else code_cell(repo)
        kind = "adapter" if source["adapter"] else "full"
        name = "base" if source["role"] == "base" else escape(str(source["name"]))
        rows.append([name, where, code_cell(str(commit)[:12]) if commit else "local folder", kind])
    left = len(plan["sources"]) - MAX_ROWS
    more = f"\n\n… and {left} more" if left > 0 else ""
    return f"### Plan\n\n{_table(('', 'model', 'commit', 'kind'), rows)}{more}"


def _facts(plan: Mapping[str, Any]) -> str:
    files = len(plan["outputs"])
    facts = {
        "method": escape(str(plan["method"])),
        "tensors": f"{plan['merged_tensors']} merged, {plan['copied_tensors']} copied",
        "read": size(plan["read_bytes"]),
        "write": f"{size(plan['write_bytes'])} in {files} file{'s' * (files != 1)}",
        "memory": f"about {size(plan['memory_bytes'])} at most",
        "plan": code_cell(str(plan["plan_sha256"])),
    }
    return _table(("", ""), [[name, value] for name, value in facts.items()])


def _licence(check: Mapping[str, Any]) -> Iterator[str]:
    stated = code(check["license"]) if check["license"] else "none stated"
    lines = [f"- {escape(str(reason))}" for reason in check["reasons"]]
    lines += [
        f"- {escape(str(duty['text']))} ({escape(', '.join(duty['of']))}): {escape(str(duty['done'] or 'left to you'))}"
        for duty in check["duties"][:MAX_ROWS]
    ]
    yield f"### Licence: {escape(str(check['verdict']))}, {stated}"
    yield "\n".join([*lines, "", "*A check of what cards and licence files say; not legal advice.*"]).strip()


def _problems(problems: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    ordered = sorted(problems, key=lambda p: _SEVERITIES.index(p["severity"]))[:MAX_ROWS]
    if ordered:
        lines = (f"- **{p['severity']}:** {escape(p['message'])} {escape(p['hint'] or '')}".rstrip() for p in ordered)
        yield "### Problems\n\n" + "\n".join(lines)


def _timing(result: Mapping[str, Any], budgets: Mapping[str, int]) -> str:
    rows = [[name.removesuffix("_s"), f"{seconds:.1f} s", _DASH] for name, seconds in result["timings"].items()]
    for name, held, budget in (("memory", "peak_rss_bytes", "memory"), ("disk", "peak_disk_bytes", "disk")):
        if held in result:
            rows.append(
                [f"most {name} held", size(result[held]), size(budgets[budget]) if budget in budgets else _DASH]
            )
    return f"### Timing\n\n{_table(('', 'used', 'allowed'), rows)}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
