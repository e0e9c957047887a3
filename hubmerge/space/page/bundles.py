"""The tab of bundles: what one holds, and adding, removing and retrieving tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gradio as gr

from hubmerge.errors import HubMergeError, UsageError
from hubmerge.space.bundle import bundle_facts
from hubmerge.space.orders import Order
from hubmerge.space.page import text
from hubmerge.space.page.common import HUB, TABLE, heading, live, visitor_of
from hubmerge.space.page.planning import target_of

if TYPE_CHECKING:
    from hubmerge.space.app import Service

Facts = dict[str, Any]
_NONE_OPEN = "Open a bundle first."


def facts_text(facts: Facts) -> str:
    """A bundle's tables; empty where none is open."""
    return text.html("bundle", bundle=facts) if facts.get("ok") else ""


def task_names(facts: Facts) -> list[str]:
    """The names of a bundle's tasks."""
    return [t["name"] for t in facts["tasks"]] if facts.get("ok") else []


def order_to_add(facts: Facts, model: Any, name: Any, *, risk: bool) -> Order:
    """Add a model to the open bundle."""
    model = _filled(model, "which model is added is not said", "Fill in “Model to add”: owner/name.")
    return Order(
        "bundle add", _open(facts), model=model, task=str(name or "").strip(), accept_license_risk=risk
    )  # fmt: skip


def order_to_remove(facts: Facts, task: Any) -> Order:
    """Take a task out of the open bundle."""
    return Order("bundle remove", _open(facts), task=_filled(task, "no task is chosen", "Choose one of its tasks."))


def order_to_retrieve(facts: Facts, task: Any, target: Any) -> Order:
    """Publish the model of one of the open bundle's tasks."""
    place = _open(facts, whole=True)
    task = _filled(task, "no task is chosen", "Choose one of its tasks.")
    goes_to = target_of(target)
    if not goes_to:
        raise UsageError("where the model goes is not said", hint="Fill in “Publish the model to”: owner/name.")
    return Order("bundle retrieve", goes_to, bundle=place, task=task)


def _open(facts: Facts, *, whole: bool = False) -> str:
    if not facts.get("ok"):
        raise UsageError("no bundle is open", hint=_NONE_OPEN)
    return str(facts["place"] if whole else facts["repo"])


def _filled(value: Any, missing: str, hint: str) -> str:
    found = str(value or "").strip()
    if not found:
        raise UsageError(missing, hint=hint)
    return found


class BundlesTab:
    """The layout and its handlers.

    Args:
        service: What the page works with.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._facts = gr.State({})
        """The bundle that is open."""
        self.started = gr.State("")
        """The job that was started last."""
        heading(
            "Bundles",
            "A bundle keeps many fine-tunes of one base in the space of a few. Make a new one on the tab “Merge”, with "
            "one of the methods that are marked as bundles; here are those that you have.",
        )
        with gr.Row(equal_height=True, elem_classes="hm-line"):
            self._place = gr.Textbox(label="Bundle", placeholder="owner/name", max_lines=1, scale=4)
            self._open = gr.Button("Open", scale=1, min_width=100)
        self._said = live()
        self._shown = gr.HTML("")
        with gr.Row(elem_classes="hm-ways"):
            self._lay_out_adding()
            self._lay_out_removing()
            self._lay_out_retrieving()
        self._listen()

    def _lay_out_adding(self) -> None:
        with gr.Column(elem_classes="hm-way", min_width=260):
            heading("Add a task", level=3)
            self._model = gr.Textbox(label="Model to add", placeholder="owner/name", max_lines=1)
            self._name = gr.Textbox(label="Name of the task", placeholder="as the model's", max_lines=1)
            self._risk = gr.Checkbox(False, label="I accept the licence risk of adding it")
            self._add = gr.Button("Add task")
            self._added = live()

    def _lay_out_removing(self) -> None:
        with gr.Column(elem_classes="hm-way", min_width=260):
            heading("Remove a task", level=3)
            self._to_remove = gr.Dropdown([], value=None, label="Task to remove")
            self._remove = gr.Button("Remove task", variant="stop")
            self._removed = live()

    def _lay_out_retrieving(self) -> None:
        with gr.Column(elem_classes="hm-way", min_width=260):
            heading("Retrieve a task", level=3)
            self._to_retrieve = gr.Dropdown([], value=None, label="Task to retrieve")
            self.target = gr.Textbox(label="Publish the model to", placeholder="your-name/name", max_lines=1)
            self._retrieve = gr.Button("Retrieve task")
            self._retrieved = live()

    def _listen(self) -> None:
        opened = [self._facts, self._shown, self._said, self._to_remove, self._to_retrieve]
        gr.on([self._open.click, self._place.submit], self.open, [self._place], opened, **HUB)
        for button, order, inputs, shown in (
            (self._add, lambda f, m, n, r: order_to_add(f, m, n, risk=bool(r)),
             [self._model, self._name, self._risk], self._added),
            (self._remove, order_to_remove, [self._to_remove], self._removed),
            (self._retrieve, order_to_retrieve, [self._to_retrieve, self.target], self._retrieved),
        ):  # fmt: skip
            button.click(self._starting(order), [self._facts, *inputs], [shown, self.started], **TABLE)

    def open(self, place: Any, request: gr.Request) -> tuple[Any, ...]:
        """Look into a bundle."""
        try:
            visitor = visitor_of(self._service, request)
        except HubMergeError as error:
            return {}, "", text.problem(error), gr.skip(), gr.skip()
        facts = bundle_facts(visitor, str(place or "").strip())
        said = (
            text.note(f"Opened: {facts['place']}, {len(facts['tasks'])} tasks.", kind="done")
            if facts["ok"]
            else text.note(facts["error"], facts["hint"], kind="problem")
        )
        names = task_names(facts)
        # One for each: gradio changes what it is given.
        choose = [gr.update(choices=names, value=names[0] if names else None) for _ in range(2)]
        return facts, facts_text(facts), said, *choose

    def _starting(self, order: Callable[..., Order]) -> Callable[..., tuple[str, Any]]:
        """The handler of a button that starts a job."""

        def start(request: gr.Request, facts: Facts, *values: Any) -> tuple[str, Any]:
            token = ""
            try:
                visitor = visitor_of(self._service, request)
                token = visitor.token
                job = self._service.runner.submit(visitor, order(facts, *values))
            except HubMergeError as error:
                return text.problem(error, token), gr.skip()
            return text.note("Started. The tab “Jobs” shows how far it is.", kind="done"), job.id

        return start
