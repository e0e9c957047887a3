"""Step 1: find models, choose a base, and list what is merged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from hubmerge.errors import HubMergeError
from hubmerge.space.form import WEIGHT
from hubmerge.space.page import text
from hubmerge.space.page.common import DRAWN, FORM, HUB, QUIET, edits, heading, live, visitor_of, widget
from hubmerge.space.page.draft import Draft, form_for, repo_named, with_base, with_model, with_models, without_model
from hubmerge.space.search import MAX_CHARS, MIN_CHARS, search

if TYPE_CHECKING:
    from hubmerge.space.app import Service

MOST = 20
"""Models that are shown of those that were found."""


def found_text(found: dict[str, Any], asked: str) -> str:
    """How many models were found, in words."""
    if not found["ok"]:
        return text.note(found["error"], found["hint"], kind="problem")
    if len(asked.strip()) < MIN_CHARS:
        return text.note(f"Write at least {MIN_CHARS} letters of a model's name.")
    n = len(found["models"])
    more = "The most used ones; more letters find others." if n == MOST else ""
    return text.note(f"{n or 'No'} model{'' if n == 1 else 's'} found.", more)


class ModelsStep:
    """The layout and its handlers.

    Args:
        service: What the page works with.
        draft: What the form is set to.
        shape: Counts up whenever the list of models must be drawn anew.
    """

    def __init__(self, service: Service, draft: gr.State, shape: gr.State) -> None:
        self._service, self._draft, self._shape = service, draft, shape
        heading("1. Models", "Fine-tunes of one base, or adapters for it. Search, or type owner/name.")
        with gr.Row(equal_height=True, elem_classes="hm-line"):
            self._query = gr.Textbox(
                label="Find models on the Hub", placeholder="a few letters, or owner/name", max_lines=1,
                max_length=MAX_CHARS, scale=4,
            )  # fmt: skip
            self._search = gr.Button("Search", scale=1, min_width=100)
        self._found = gr.Radio([], label="Found", visible=False, elem_classes="hm-found")
        self._said = live()
        with gr.Row(elem_classes="hm-buttons"):
            self._as_base = gr.Button("Use as base", size="md")
            self._add = gr.Button("Add to the merge", size="md", elem_id="hm-add")
        self._base = gr.Textbox(label="Base model", placeholder="owner/name", max_lines=1)
        self._listen()

    def _listen(self) -> None:
        gr.on([self._search.click, self._query.submit], self.find, [self._query], [self._found, self._said], **HUB)
        self._query.input(None, None, [self._found], js="() => null", **QUIET)
        chosen = [self._found, self._query, self._draft]
        self._as_base.click(self.use_as_base, chosen, [self._base, self._draft, self._said], **FORM)
        self._add.click(self.add, [*chosen, self._shape], [self._draft, self._shape, self._said], **FORM)
        gr.on(edits([self._base]), with_base, [self._draft, self._base], [self._draft], **FORM)

    def listed(self, blocks: gr.Blocks) -> None:
        """Lay out the list of models, which is drawn anew when one comes or goes."""
        gr.render([self._draft], [self._shape.change, blocks.load], **DRAWN)(self._rows)

    def find(self, asked: str | None, request: gr.Request) -> tuple[Any, str]:
        """Search; what is found, and how much it is."""
        try:
            visitor = visitor_of(self._service, request)
        except HubMergeError as error:
            return gr.update(choices=[], value=None, visible=False), text.problem(error)
        asked = str(asked or "")
        found = search(visitor, asked, MOST)
        choices = [(text.plain(m["label"]), m["repo"]) for m in found.get("models", ())]
        shown = gr.update(choices=choices, value=None, visible=bool(choices))
        return shown, found_text(found, asked)

    def use_as_base(self, chosen: Any, typed: Any, draft: Draft) -> tuple[Any, Any, str]:
        """The base is what was chosen or typed."""
        try:
            repo = repo_named(chosen, typed)
        except HubMergeError as error:
            return gr.skip(), gr.skip(), text.problem(error)
        return repo, with_base(draft, repo), text.note(f"{repo} is the base.", kind="done")

    def add(self, chosen: Any, typed: Any, draft: Draft, shape: int) -> tuple[Any, Any, str]:
        """One more model."""
        try:
            repo = repo_named(chosen, typed)
            draft = with_model(draft, repo, self._service.limits.models)
        except HubMergeError as error:
            return gr.skip(), gr.skip(), text.problem(error)
        said = text.note(f"{repo} is model {len(draft['models'])} of the merge.", kind="done")
        return draft, shape + 1, said

    # --- the list

    def _rows(self, draft: Draft) -> None:
        if not draft["models"]:
            gr.HTML(text.html("lines", words="No model is chosen yet."))
            return
        fields: list[tuple[int, str]] = []
        components: list[Any] = []
        for number, model in enumerate(draft["models"], 1):
            with gr.Group(elem_classes="hm-model"):
                made = self._row(draft, model, number)
            fields += [(model["key"], name) for name in made]
            components += made.values()

        def save(before: Draft, *values: Any) -> Draft:
            return with_models(before, fields, values)

        gr.on(edits(components), save, [self._draft, *components], [self._draft], **FORM)

    def _row(self, draft: Draft, model: dict[str, Any], number: int) -> dict[str, Any]:
        """One model's controls, by what they set."""
        own = form_for(draft).per_model
        made: dict[str, Any] = {}
        with gr.Row(elem_classes="hm-line"):
            made["repo"] = gr.Textbox(model["repo"], label=f"Model {number}", max_lines=1, scale=4, interactive=True)
            made["name"] = gr.Textbox(
                model["name"], label=f"Name of model {number}", max_lines=1, scale=2, interactive=True,
                placeholder="as its repository",
            )  # fmt: skip
            if WEIGHT in own:
                made[WEIGHT.name] = widget(WEIGHT, model["values"].get(WEIGHT.name), number)
            remove = gr.Button(f"Remove model {number}", size="sm", scale=1, min_width=120)
        if rest := [c for c in own if c is not WEIGHT]:
            with gr.Accordion(f"Settings of model {number}", open=False), gr.Row():
                for control in rest:
                    made[control.name] = widget(control, model["values"].get(control.name), number)

        def removed(before: Draft, shape: int) -> tuple[Draft, int]:
            return without_model(before, model["key"]), shape + 1

        remove.click(removed, [self._draft, self._shape], [self._draft, self._shape], **FORM)
        return made
