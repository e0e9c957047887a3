"""Step 2: the method and its parameters."""

from __future__ import annotations

from typing import Any

import gradio as gr

from hubmerge.card.citing import paper_url
from hubmerge.errors import HubMergeError
from hubmerge.space.form import MethodForm, form_of, forms
from hubmerge.space.page import text
from hubmerge.space.page.common import DRAWN, FORM, edits, heading, live, widget
from hubmerge.space.page.draft import METHOD, Draft, form_for, with_method, with_values


def choices() -> list[tuple[str, str]]:
    """All methods, then all codecs, which are marked."""
    return [(f"{f.name} (bundle)" if f.kind == "codec" else f.name, f.name) for f in forms()]


def about(form: MethodForm) -> str:
    """What a method does, in its paper's words and in what it takes."""
    return text.html("method", form=form, url=paper_url(form.paper))


class MethodStep:
    """The layout and its handlers.

    Args:
        draft: What the form is set to.
        shape: Counts up whenever the list of models must be drawn anew.
    """

    def __init__(self, draft: gr.State, shape: gr.State) -> None:
        self._draft, self._shape = draft, shape
        self.chosen = gr.State(METHOD)
        """The method's name."""
        heading("2. Method")
        self._method = gr.Dropdown(choices(), value=METHOD, label="Method")
        self._about = live(about(form_of(METHOD)))
        self._method.input(
            self.choose, [self._method, self._draft, self._shape],
            [self._draft, self._shape, self.chosen, self._about], **FORM,
        )  # fmt: skip

    def choose(self, name: Any, draft: Draft, shape: int) -> tuple[Any, Any, Any, Any]:
        """Another method: its controls, and the models' own, are others."""
        try:
            changed = with_method(draft, str(name))
        except HubMergeError as error:
            return gr.skip(), gr.skip(), gr.skip(), text.problem(error)
        if changed["method"] == draft["method"]:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        return changed, shape + 1, changed["method"], about(form_for(changed))

    def listed(self, blocks: gr.Blocks) -> None:
        """Lay out the method's controls, which are drawn anew when another one is chosen."""
        gr.render([self._draft], [self.chosen.change, blocks.load], **DRAWN)(self._controls)

    def _controls(self, draft: Draft) -> None:
        shared = form_for(draft).shared
        if not shared:
            return
        with gr.Row(elem_classes="hm-controls"):
            made = [widget(c, draft["values"].get(c.name)) for c in shared]
        names = [c.name for c in shared]

        def save(before: Draft, *values: Any) -> Draft:
            return with_values(before, names, values) if before["method"] == draft["method"] else before

        gr.on(edits(made), save, [self._draft, *made], [self._draft], **FORM)
