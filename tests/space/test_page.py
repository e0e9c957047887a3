"""The page's parts that are plain data: drafts and their recipes, what is said of plans, jobs and bundles, HTML."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from http.cookies import SimpleCookie
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import gradio as gr
import pytest
from starlette.responses import Response

from hubmerge.errors import UsageError
from hubmerge.recipe import Recipe
from hubmerge.space.app import Service
from hubmerge.space.form import forms
from hubmerge.space.jobs import Job, JobTable
from hubmerge.space.orders import Order
from hubmerge.space.page import build, planning, text
from hubmerge.space.page.bundles import BundlesTab, facts_text, order_to_add, order_to_remove, order_to_retrieve
from hubmerge.space.page.draft import (
    new_draft,
    recipe_text,
    repo_named,
    with_base,
    with_method,
    with_model,
    with_models,
    with_result,
    with_values,
    without_model,
)
from hubmerge.space.page.jobs import JobsTab, job_title, shown_jobs, what_applies
from hubmerge.space.page.method import MethodStep
from hubmerge.space.page.models import ModelsStep
from hubmerge.space.page.planning import PlanStep, facts_of, preview_of, status_of, target_of
from hubmerge.space.page.result import ResultStep
from hubmerge.space.page.ways import Ways, check_planned, check_price, cost, flags, take_away, why_not_here
from hubmerge.space.runner import Runner
from hubmerge.space.sessions import Client, Cookies, Site
from hubmerge.space.visitors import Visitor

T = TypeVar("T")
HOSTILE = '<script>alert("x")</script>\u202eevil\'"&'
PLAN: dict[str, Any] = {
    "ok": True, "kind": "merge", "method": "linear", "parameters": "scale=1.0", "read": "1 GB", "write": "2 GB",
    "memory": "3 GB", "time": "about 2 min", "shards": 3, "staged": 1, "fits_here": True, "why_not": "",
    "verdict": "allowed", "headline": "apache-2.0; may be published, with no duties", "reasons": [], "duties": [],
    "left_to_you": [], "problems": [], "card": "---\nlicense: mit\n---\n# Title\n\n![x](y)\n",
    "sources": [
        {"role": "base", "name": "base", "repo": "org/base", "commit": "0" * 40, "adapter": False, "license": None}
    ],
    "of": ["recipe", "ann/x"],
}  # fmt: skip
ORDER = Order("merge", "ann/merged").dumps()
JOB = Job(
    id="k", owner="ann", kind="merge", target="ann/merged", recipe="", asked=ORDER, state="running", stage="merging",
    shards_done=3, shards_total=7, bytes_done=30, bytes_total=100, message="", url="", commit_id="", created=0.0,
    started=1.0, ended=None,
)  # fmt: skip


class Tags(HTMLParser):
    """The tags and the text of a piece of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


# --- drafts -----------------------------------------------------------------------------------------------------


def two_models() -> dict[str, Any]:
    draft = with_base(new_draft(), " org/base ")
    return with_model(with_model(draft, "org/a", 16), "org/b", 16)


def test_a_draft_writes_the_recipe_that_it_stands_for() -> None:
    draft = with_method(two_models(), "ties")
    draft = with_models(draft, [(1, "weight"), (1, "density"), (2, "name")], [0.7, None, "second"])
    draft = with_values(draft, ["density", "scale"], [0.4, 1.0])
    draft = with_result(draft, ["A title", "float16", 7, "mit"])
    recipe = Recipe.loads(recipe_text(draft)).normalized()
    assert (recipe["method"], recipe["base"], recipe["dtype"], recipe["seed"]) == ("ties", "org/base", "float16", 0)
    assert [(m["name"], m["parameters"]) for m in recipe["models"]] == [("a", {"weight": 0.7}), ("second", {})]
    assert recipe["parameters"]["density"] == 0.4
    assert (recipe["card"]["title"], recipe["card"]["license"]) == ("A title", "mit")


def test_an_empty_form_writes_nothing_and_an_unfinished_one_what_it_has() -> None:
    assert recipe_text(new_draft()) == ""
    unfinished = with_base(new_draft("slerp"), "org/base")
    assert recipe_text(unfinished) == "method: slerp\nbase: org/base\nmodels: []\n"


@pytest.mark.parametrize("name", [f.name for f in forms()])
def test_every_method_takes_a_draft_as_it_is(name: str) -> None:
    draft = with_method(two_models(), name)
    if name == "slerp":
        draft = without_model(draft, 2)
    written = Recipe.loads(recipe_text(with_result(draft, ["", "bfloat16", 3, ""])))
    form = next(f for f in forms() if f.name == name)
    assert written.seed == (3 if form.draws else 0)
    assert written.dtype == (None if form.kind == "codec" else "bfloat16")
    assert written.output.format == ("bundle" if form.kind == "codec" else "full")


def test_which_methods_draw() -> None:
    assert {f.name for f in forms() if f.draws} == {"dare_linear", "dare_ties", "superposition"}


def test_another_method_keeps_what_both_have() -> None:
    draft = with_values(with_method(two_models(), "dare_ties"), ["density", "trim_after", "rule"], [0.3, True, "exact"])
    draft = with_models(draft, [(1, "weight"), (1, "density")], [0.5, 0.9])
    changed = with_method(draft, "task_arithmetic")
    assert changed["values"] == {}
    assert changed["models"][0]["values"] == {"weight": 0.5}
    assert draft["values"]["density"] == 0.3


def test_models_come_and_go() -> None:
    draft = two_models()
    assert [m["repo"] for m in without_model(draft, 1)["models"]] == ["org/b"]
    assert with_model(without_model(draft, 2), "org/c", 2)["models"][1]["key"] == 3
    with pytest.raises(UsageError, match="no more"):
        with_model(draft, "org/c", 2)
    assert with_models(draft, [(9, "repo")], ["org/gone"]) == draft


@pytest.mark.parametrize(("seed", "said"), [("much", "no whole number"), ({}, "no whole number")])
def test_a_seed_is_a_whole_number(seed: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        recipe_text(with_result(with_method(two_models(), "dare_ties"), ["", "", seed, ""]))


def test_the_repository_that_is_meant() -> None:
    assert repo_named("org/a", "org/b") == "org/a"
    assert repo_named(None, " org/b@main ") == "org/b@main"
    for wrong in ("", "words", "/etc/passwd", "../x/y", "https://host/a", "org/a b", "a/b/c"):
        with pytest.raises(UsageError):
            repo_named(None, wrong)


# --- plans ------------------------------------------------------------------------------------------------------


def test_a_plan_in_words() -> None:
    assert "Planned: fits here, about 2 min." in Tags(status_of(PLAN)).text
    large = {**PLAN, "fits_here": False, "why_not": "this reads 9 TB; at most 1 TB are given here"}
    assert "does not fit here: this reads 9 TB" in Tags(status_of(large)).text
    assert "this reads 9 TB" in why_not_here(large, "two cores")
    wrong = {"ok": False, "error": "no such model", "hint": "look again"}
    assert Tags(status_of(wrong)).text == "! cannot run: no such model look again"
    assert facts_of(wrong) == ""
    shown = Tags(facts_of(PLAN))
    assert "of which 1 already staged" in shown.text
    assert "none stated" in shown.text


def test_the_card_stands_in_the_page_below_its_headings() -> None:
    assert preview_of(PLAN) == "```yaml\nlicense: mit\n```\n\n\n#### Title\n\n[x](y)\n".replace("\n\n\n", "\n\n")
    assert preview_of({"card": "## A\n```sh\n# B\n```\n# C"}) == "##### A\n```sh\n# B\n```\n#### C"
    assert "preview" in preview_of({})


def test_only_what_was_planned_is_started() -> None:
    assert check_planned(PLAN, "recipe", " ann/y ", risk=False) == "ann/y"
    blocked = {**PLAN, "verdict": "blocked"}
    assert check_planned(blocked, "recipe", "ann/x", risk=True) == "ann/x"
    for plan, recipe, target, said in (
        (PLAN, "another", "ann/x", "not planned"),
        (PLAN, "recipe", "ann/", "not said"),
        (PLAN, "recipe", "../x", "no repository"),
        ({**PLAN, "ok": False}, "recipe", "ann/x", "cannot run"),
        (blocked, "recipe", "ann/x", "licences do not allow"),
        ({}, "recipe", "ann/x", "not planned"),
    ):
        with pytest.raises(UsageError, match=said):
            check_planned(plan, recipe, target, risk=False)


def test_targets() -> None:
    assert (target_of("ann/"), target_of(None), target_of(" ann/x ")) == ("", "", "ann/x")
    with pytest.raises(UsageError):
        target_of("$(rm -rf)/x")


def test_commands_to_take_away_are_quoted() -> None:
    shown = Tags(take_away(PLAN, "ann/x", flags(public=True, create_pr=True, risk=False)))
    assert "hubmerge push merge.yaml --to ann/x --public --pr" in shown.text
    assert "-f repo_id=ann/x -f mode=push -f flags='--public --pr'" in shown.text
    hostile = Tags(take_away(PLAN, "a'; rm -rf ~; '", ()))
    assert "--to 'a'\"'\"'; rm -rf ~; '\"'\"''" in hostile.text
    bundle = Tags(take_away({**PLAN, "kind": "bundle"}, "ann/x", ("--public", "--pr"))).text
    assert "hubmerge bundle create merge.yaml --to ann/x --public" in bundle
    assert "gh workflow" not in bundle


def test_the_most_that_a_job_costs() -> None:
    offered = [{"name": "cpu", "usd_per_hour": 1.5}]
    assert "At most $2.25: 90 minutes on cpu." in Tags(cost(offered, "cpu", 90)).text
    for name, minutes in (("gpu", 90), ("cpu", 0), ("cpu", None), ("cpu", "90"), ("cpu", 1e9)):
        assert "Choose a machine" in cost(offered, name, minutes)


# --- jobs and bundles -------------------------------------------------------------------------------------------


def test_jobs_in_words() -> None:
    waiting = replace(JOB, id="w", state="queued", shards_total=0)
    done = replace(JOB, id="d", state="done", url="http://127.0.0.1/ann/merged", commit_id="c" * 40)
    shown = shown_jobs([waiting, JOB, done], {"w": 2}, "k")
    assert (shown["chosen"], shown["tab"], shown["active"]) == ("k", "Jobs (2)", True)
    assert [key for _, key in shown["choices"]] == ["w", "k", "d"]
    under_way, over = Tags(shown["under_way"]), Tags(shown["over"])
    assert "2 jobs before it" in under_way.text
    assert "3 of 7 shards, merging" in under_way.text
    progress = [attributes for tag, attributes in under_way.tags if tag == "progress"]
    assert [(p["value"], p["aria-label"]) for p in progress] == [("30", "Progress of Merge: ann/merged")]
    assert [a["href"] for tag, a in over.tags if tag == "a"] == ["http://127.0.0.1/ann/merged"]
    assert shown_jobs([done], {}, "gone")["chosen"] == "d"
    assert shown_jobs([], {}, "")["tab"] == "Jobs"


def test_what_a_job_does_is_said_in_words() -> None:
    for order, words in (
        (Order("merge", "ann/x"), "Merge: ann/x"),
        (Order("bundle create", "ann/x"), "New bundle: ann/x"),
        (Order("bundle add", "ann/x", model="org/a", task="t"), "Add a task: t to ann/x"),
        (Order("bundle add", "ann/x", model="org/a"), "Add a task: org/a to ann/x"),
        (Order("bundle remove", "ann/x", task="t"), "Remove a task: t from ann/x"),
        (Order("bundle retrieve", "ann/y", bundle="ann/x", task="t"), "Retrieve a task: ann/y, which is t of ann/x"),
    ):
        assert job_title(replace(JOB, kind=order.kind, target=order.target, asked=order.dumps())) == words


def test_what_can_be_done_with_a_job() -> None:
    assert what_applies(None) == [False, False, False]
    assert what_applies(JOB) == [True, False, False]
    assert what_applies(replace(JOB, state="interrupted")) == [True, True, False]
    assert what_applies(replace(JOB, state="failed")) == [False, True, True]
    assert what_applies(replace(JOB, state="done")) == [False, False, True]


def test_orders_about_an_open_bundle() -> None:
    facts = {"ok": True, "repo": "ann/bundle", "place": "ann/bundle@main"}
    assert order_to_add(facts, "org/a", "", risk=True) == Order(
        "bundle add", "ann/bundle", model="org/a", accept_license_risk=True
    )
    assert order_to_remove(facts, "a") == Order("bundle remove", "ann/bundle", task="a")
    assert order_to_retrieve(facts, "a", "ann/y") == Order(
        "bundle retrieve", "ann/y", bundle="ann/bundle@main", task="a"
    )
    for make in (
        lambda: order_to_add({}, "org/a", "", risk=False),
        lambda: order_to_add(facts, None, "", risk=False),
        lambda: order_to_remove(facts, None),
        lambda: order_to_retrieve(facts, "a", "ann/"),
    ):
        with pytest.raises(UsageError):
            make()


def test_whatever_comes_from_elsewhere_is_shown_as_text() -> None:
    source = {"role": HOSTILE, "name": "", "repo": HOSTILE, "commit": None, "adapter": False, "license": HOSTILE}
    hint = {"severity": "warning", "message": HOSTILE, "hint": HOSTILE}
    texts = {"headline": HOSTILE, "reasons": [HOSTILE], "duties": [HOSTILE], "left_to_you": [HOSTILE]}
    asked = Order("bundle add", "ann/x", task=HOSTILE).dumps()
    job = replace(
        JOB,
        kind="bundle add",
        asked=asked,
        target=HOSTILE,
        message=HOSTILE,
        stage=HOSTILE,
        state="done",
        url="javascript:alert(1)",
    )
    task = {"name": HOSTILE, "repo": HOSTILE, "kind": HOSTILE, "license": HOSTILE, "own": "", "plain": "", "error": ""}
    bundle = {
        "ok": True, "codec": HOSTILE, "base": {"repo": HOSTILE}, "size": "", "comparison": HOSTILE,
        "headline": HOSTILE, "incremental": True, "tasks": [task],
    }  # fmt: skip
    shown = shown_jobs([job], {}, "")
    for part in (
        text.note(HOSTILE, HOSTILE, kind="problem"),
        text.html("header", name=HOSTILE),
        facts_of({**PLAN, **texts, "sources": [source], "problems": [hint]}),
        facts_text(bundle),
        shown["over"],
        shown["said"],
        take_away({}, HOSTILE, ()),
    ):
        found = Tags(part)
        assert "script" not in {tag for tag, _ in found.tags}
        assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
        assert not any((a.get("href") or "").startswith("javascript") for _, a in found.tags)
        assert "<script>" in found.text
        assert "\u202e" not in part
    assert "\u202e" not in text.plain(HOSTILE)


# --- what the page's events do ----------------------------------------------------------------------------------


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """With a table and nobody who runs what is in it."""
    client = Client("id", "secret", "openid", "http://127.0.0.1:1")
    sessions = Cookies(client, Site.of({}, "127.0.0.1", 7860), "http://127.0.0.1:1")
    table = JobTable(tmp_path / "jobs.db")
    runner = Runner(table, tmp_path)
    yield Service(runner, runner.limits, sessions, "http://127.0.0.1:1", "two cores")
    table.close()


def request_of(service: Service, name: str) -> Any:
    """A request of somebody's who is signed in; of a stranger's without a name."""
    sent = Response()
    assert isinstance(service.sessions, Cookies)
    if name:
        service.sessions.begin(sent, Visitor(name, f"hf_{name * 10}"), time.time() + 3600)
    cookies = SimpleCookie(sent.headers.get("set-cookie", ""))
    return SimpleNamespace(cookies={key: morsel.value for key, morsel in cookies.items()})


def in_loop(make: Callable[..., T], *given: Any) -> T:
    """gradio makes an event loop for each of its locks, and closes none, unless one is running."""

    async def made() -> T:
        return make(*given)

    return asyncio.run(made())


def sections(service: Service) -> tuple[ModelsStep, PlanStep, Ways, BundlesTab, JobsTab]:
    return in_loop(_sections, service)


def _sections(service: Service) -> tuple[ModelsStep, PlanStep, Ways, BundlesTab, JobsTab]:
    with gr.Blocks(), gr.Tab("Jobs") as tab:
        draft, shape = gr.State(new_draft()), gr.State(0)
        models = ModelsStep(service, draft, shape)
        result = ResultStep(draft, MethodStep(draft, shape).chosen)
        plan = PlanStep(service, result)
        ways, bundles = Ways(service, result, plan), BundlesTab(service)
        return models, plan, ways, bundles, JobsTab(service, tab, (ways.started, bundles.started))


RECIPE = "method: linear\nmodels: [org/a, org/b]\n"
OF_RECIPE = {**PLAN, "of": [RECIPE, "ann/x"]}
OPEN = {"ok": True, "repo": "ann/bundle", "place": "ann/bundle"}


def test_every_event_is_the_pages_own(service: Service) -> None:
    functions = in_loop(build, service).fns.values()
    assert len(functions) > 30
    drawn = [f for f in functions if f.renderable is not None]
    assert len(drawn) == 2
    assert {f.api_visibility for f in functions if f not in drawn} == {"private"}
    assert {(f.concurrency_id, f.concurrency_limit) for f in drawn} == {("form", 1)}
    assert {f.concurrency_limit for f in functions if f.concurrency_id == "planning"} == {4}


def test_a_stranger_may_look_and_nothing_else(service: Service) -> None:
    models, plan, ways, bundles, jobs = sections(service)
    stranger = request_of(service, "")
    for answer in (
        models.find("org/", stranger),
        *plan.plan(RECIPE, "ann/x", {}, stranger),
        *plan.replan(RECIPE, "ann/x", {}, stranger),
        ways.start(RECIPE, "ann/x", False, False, False, OF_RECIPE, stranger),
        ways.submit(RECIPE, "ann/x", False, False, False, OF_RECIPE, "cpu", 60, True, [], stranger),
        bundles.open("ann/bundle", stranger),
        bundles._starting(order_to_remove)(stranger, OPEN, "a"),
        jobs._act("cancel")("k", stranger),
        jobs.look("k", {}, stranger),
    ):
        assert "Sign in first" in str(answer)
    assert service.runner.table.in_state("queued") == ()


def test_a_job_is_of_who_starts_it_and_of_nobody_else(service: Service) -> None:
    *_, ways, _, jobs = sections(service)
    ann, bob = request_of(service, "ann"), request_of(service, "bob")
    said, key = ways.start(RECIPE, "ann/x", True, True, False, OF_RECIPE, ann)
    assert "Started" in said
    job = service.runner.table.get("ann", key)
    assert (job.order.public, job.order.create_pr, job.order.accept_license_risk) == (True, True, False)
    for what in ("cancel", "resume", "forget"):
        assert "you have no job" in jobs._act(what)(key, bob)
    assert "ann/x" not in str(jobs.look(key, {}, bob))
    assert "ann/x" in str(jobs.look("", {}, ann))
    assert "Cancelled: ann/x" in jobs._act("cancel")(key, ann)
    assert service.runner.table.get("ann", key).state == "cancelled"
    assert "Forgotten: ann/x" in jobs._act("forget")(key, ann)


def test_what_has_not_changed_is_not_shown_again(service: Service) -> None:
    *_, ways, _, jobs = sections(service)
    ann = request_of(service, "ann")
    _, key = ways.start(RECIPE, "ann/x", False, False, False, OF_RECIPE, ann)
    _, later = ways.start(RECIPE, "ann/y", False, False, False, OF_RECIPE, ann)
    *parts, shown = jobs.look(key, {}, ann)
    assert not any(part == gr.skip() for part in parts)
    *parts, again = jobs.look(key, shown, ann)
    assert all(part == gr.skip() for part in parts)
    assert again == shown
    assert (shown["chosen"], jobs.look("", {}, ann)[-1]["chosen"]) == (key, later)


def test_a_fault_of_ours_is_said_and_logged_without_the_token(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(visitor: Visitor, *_: Any) -> dict[str, Any]:
        raise ZeroDivisionError(f"with {visitor.token}")

    monkeypatch.setattr(planning, "live_plan", fails)
    plan = sections(service)[1]
    *_, (status, facts, _, planned) = plan.plan(RECIPE, "ann/x", {}, request_of(service, "ann"))
    assert "cannot run: this could not be planned" in status
    assert (facts, planned["ok"]) == ("", False)
    assert "ZeroDivisionError: with ***" in caplog.text
    assert "hf_ann" not in caplog.text


@pytest.mark.parametrize("wrong", [None, 7, [], {"a": 1}, "\x00", "x" * 100_000, HOSTILE], ids=lambda w: repr(w)[:9])
def test_nothing_that_is_sent_breaks_the_page(service: Service, wrong: Any) -> None:
    models, plan, ways, bundles, jobs = sections(service)
    ann = request_of(service, "ann")
    for answer in (
        models.use_as_base(wrong, wrong, new_draft()),
        models.add(wrong, wrong, new_draft(), 0),
        *plan.plan(wrong, wrong, {}, ann),
        ways.start(wrong, wrong, wrong, wrong, wrong, OF_RECIPE, ann),
        ways.submit(wrong, wrong, wrong, wrong, wrong, OF_RECIPE, wrong, wrong, wrong, [], ann),
        ways.take({}, wrong, wrong, wrong, wrong),
        bundles._starting(order_to_remove)(ann, {}, wrong),
        jobs._act("cancel")(wrong, ann),
        jobs.look(str(wrong), {}, ann),
    ):
        assert "<script>" not in str(answer)
    assert service.runner.table.in_state("queued", "planning") == ()


def test_a_job_elsewhere_costs_no_more_than_was_agreed_to(service: Service) -> None:
    ways = sections(service)[2]
    ann = request_of(service, "ann")
    for agreed, minutes, plan, said in (
        (False, 60, OF_RECIPE, "this costs money"),
        ("yes", 60, OF_RECIPE, "this costs money"),
        (True, 0, OF_RECIPE, "timeout"),
        (True, True, OF_RECIPE, "timeout"),
        (True, 60, {**OF_RECIPE, "kind": "bundle"}, "not on Hugging Face Jobs"),
        (True, 60, PLAN, "not planned"),
    ):
        answer, _ = ways.submit(RECIPE, "ann/x", False, False, False, plan, "cpu", minutes, agreed, [], ann)
        assert said in answer
    with pytest.raises(UsageError, match=r"\$3\.00 per hour by now, and \$1\.50 was shown"):
        check_price(3.0, [{"name": "cpu", "usd_per_hour": 1.5}], "cpu")
    check_price(1.5, [{"name": "cpu", "usd_per_hour": 1.5}], "cpu")
