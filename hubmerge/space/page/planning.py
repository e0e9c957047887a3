"""Step 4, first half: the plan, live and on demand, before anything costs."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from hubmerge.errors import HubMergeError
from hubmerge.hub.translate import scrub_chain
from hubmerge.space.page import text
from hubmerge.space.page.common import PLANNING, edits, heading, live, visitor_of
from hubmerge.space.page.result import ResultStep
from hubmerge.space.plan import live_plan
from hubmerge.space.safety import check_target

if TYPE_CHECKING:
    from hubmerge.space.app import Service
    from hubmerge.space.visitors import Visitor

log = logging.getLogger(__name__)

Planned = dict[str, Any]
NOTHING: Planned = {}
_FAULT = "this could not be planned, by a fault of the page's own"
_HEADING = re.compile(r"^(#{1,6}) ")


def target_of(typed: Any) -> str:
    """The repository to publish to; empty as long as only its owner is written.

    Raises:
        UsageError: It is none.
    """
    target = str(typed or "").strip()
    if not target or target.endswith("/"):
        return ""
    check_target(target)
    return target


def status_of(plan: Planned) -> str:
    """The plan's outcome in a sentence."""
    if "error" in plan:
        return text.note(f"cannot run: {plan['error']}", plan["hint"], kind="problem")
    if not plan["ok"]:
        first = next(p for p in plan["problems"] if p["severity"] == "error")
        return text.note(f"cannot run: {first['message']}", first["hint"] or "", kind="problem")
    if not plan["fits_here"]:
        return text.note(f"Planned: does not fit here: {plan['why_not']}.", "There are two other ways below.")
    blocked = plan["verdict"] == "blocked"
    warning = "But the models' licences do not allow the result to be published; see below." if blocked else ""
    return text.note(f"Planned: fits here, {plan['time']}.", warning, kind="problem" if blocked else "done")


def facts_of(plan: Planned) -> str:
    """The plan's tables; empty where there is no plan."""
    return "" if not plan or "error" in plan else text.html("plan", plan=plan)


def preview_of(plan: Planned) -> str:
    """The card as Markdown that stands in this page: its headings lower, its images as links."""
    card = plan.get("card", "")
    if not card:
        return "*There is a preview of the card when a merge is planned.*"
    _, front, body = card.split("---\n", 2) if card.startswith("---\n") else ("", "", card)
    body = "\n".join(_lowered(body.split("\n")))
    return f"```yaml\n{front}```\n\n{body}" if front else body


def _lowered(lines: Iterable[str]) -> Iterator[str]:
    in_code = False
    for line in lines:
        if line.lstrip().startswith(("```", "~~~")):
            in_code = not in_code
        elif not in_code:
            line = _HEADING.sub(lambda m: "#" * min(6, len(m[1]) + 3) + " ", line).replace("![", "[")
        yield line


class PlanStep:
    """The layout and its handlers.

    Args:
        service: What the page works with.
        result: Where recipe and target stand.
    """

    def __init__(self, service: Service, result: ResultStep) -> None:
        self._service, self._result = service, result
        self.planned = gr.State(NOTHING)
        """The plan that is shown, with what it is of."""
        heading("4. Plan and start", "A plan reads headers only and costs nothing. It follows what you change above.")
        with gr.Row(elem_classes="hm-buttons"):
            self._button = gr.Button("Plan", variant="primary", size="md")
        self._status = live()
        self._facts = gr.HTML("")
        with gr.Accordion("Preview of the model card", open=False):
            self._card = gr.Markdown(preview_of(NOTHING), elem_classes="hm-card", latex_delimiters=[], max_height=520)
        self._listen()

    def _listen(self) -> None:
        result = self._result
        asked = [result.recipe, result.target, self.planned]
        shown = [self._status, self._facts, self._card, self.planned]
        edited = edits([result.recipe, result.target])
        self.live = gr.on(edited, self.replan, asked, shown, trigger_mode="always_last", **PLANNING)
        self.after_form = result.composed.then(self.replan, asked, shown, trigger_mode="always_last", **PLANNING)
        self.on_demand = result.compose_first(self._button.click).then(self.plan, asked, shown, **PLANNING)

    @property
    def done(self) -> tuple[Any, ...]:
        """The events after which another plan may be shown."""
        return (self.live, self.after_form, self.on_demand)

    def replan(self, recipe: Any, target: Any, before: Planned, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Plan, if it is about something else than before and somebody is signed in."""
        if before.get("of") == _of(recipe, target):
            yield (gr.skip(),) * 4
        elif not str(recipe or "").strip():
            yield "", "", preview_of(NOTHING), NOTHING
        elif self._service.sessions.visitor_of(request) is None:
            yield text.note("Sign in first: then there is a plan here."), "", preview_of(NOTHING), NOTHING
        else:
            yield from self.plan(recipe, target, before, request)

    def plan(self, recipe: Any, target: Any, before: Planned, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Plan; what it costs and whether it fits, or why there is no plan."""
        if not str(recipe or "").strip():
            yield text.note("There is nothing to plan yet.", "Add a model to the merge."), "", gr.skip(), NOTHING
            return
        try:
            visitor = visitor_of(self._service, request)
            goes_to = target_of(target)
        except HubMergeError as error:
            yield text.problem(error), "", preview_of(NOTHING), NOTHING
            return
        yield text.note("Planning …"), gr.skip(), gr.skip(), gr.skip()
        found = {**self._planned(visitor, str(recipe), goes_to), "of": _of(recipe, target)}
        yield status_of(found), facts_of(found), preview_of(found), found

    def _planned(self, visitor: Visitor, recipe: str, target: str) -> Planned:
        try:
            return live_plan(visitor, recipe, target, self._service.limits)
        except Exception as error:  # a fault of ours; the page must not be left with a plan that is on its way
            scrub_chain(error, visitor.token)
            log.exception("a plan could not be made")
            return {"ok": False, "error": _FAULT, "hint": "Try again; if it stays so, tell whoever runs this page."}


def _of(recipe: Any, target: Any) -> list[str]:
    return [str(recipe or ""), str(target or "").strip()]


def is_of(plan: Planned, recipe: Any) -> bool:
    """Whether a plan is of this recipe. Where the result goes changes nothing of what is read, made, or allowed."""
    return bool(plan) and plan["of"][0] == str(recipe or "")
