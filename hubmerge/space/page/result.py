"""Step 3: where the result goes and what is said of it; and the recipe, as text that can be edited."""

from __future__ import annotations

from typing import Any

import gradio as gr

from hubmerge.errors import HubMergeError
from hubmerge.space.form import form_of
from hubmerge.space.page import text
from hubmerge.space.page.common import FORM, QUIET, edits, heading, live
from hubmerge.space.page.draft import DTYPES, METHOD, Draft, recipe_text, with_result

PRECISIONS = [("as the base", ""), *((d, d) for d in DTYPES)]
_EDITING = (
    "The form writes this recipe; paste or edit your own. What is planned and run is the text that stands here. Your "
    "edits stay until something in the form is changed."
)
RISK = "I accept the licence risk named in the plan"


class ResultStep:
    """The layout and its handlers.

    Args:
        draft: What the form is set to.
        chosen: The method's name.
    """

    def __init__(self, draft: gr.State, chosen: gr.State) -> None:
        self._draft = draft
        self._written = gr.State("")
        """What the form wrote last; what stands in the editor may have been edited since."""
        heading("3. Result")
        draws = form_of(METHOD).draws
        with gr.Row(elem_classes="hm-controls"):
            self.target = gr.Textbox(label="Publish to", placeholder="your-name/name-of-the-model", max_lines=1)
            self._title = gr.Textbox(label="Title of the card", placeholder="as the repository", max_lines=1)
        with gr.Row(elem_classes="hm-controls"):
            self._dtype = gr.Dropdown(PRECISIONS, value="", label="Precision")
            self._seed = gr.Number(value=0, label="Seed", precision=0, visible=draws)
            self._license = gr.Textbox(
                label="Licence of the result", placeholder="derived from the models'", max_lines=1,
                info="An identifier as the Hub lists them, such as apache-2.0.",
            )  # fmt: skip
        with gr.Row(elem_classes="hm-checks"):
            self.public = gr.Checkbox(False, label="Make it public")
            self.create_pr = gr.Checkbox(False, label="Open a pull request instead of committing")
            self.risk = gr.Checkbox(False, label=RISK)
        self._editor()
        self._said = live()
        self._listen(chosen)

    def _editor(self) -> None:
        with gr.Accordion("Recipe (YAML)", open=False):
            gr.HTML(text.html("lines", words=_EDITING))
            self.recipe = gr.Textbox(
                label="Recipe", lines=12, max_lines=40, elem_classes="hm-code", buttons=["copy"],
                html_attributes=gr.InputHTMLAttributes(spellcheck=False, autocapitalize="off"),
            )  # fmt: skip
            with gr.Row(elem_classes="hm-buttons"):
                save = gr.Button("Download merge.yaml", size="sm")
            save.click(None, [self.recipe], None, js="(text) => hubmerge.download('merge.yaml', text)", **QUIET)

    def _listen(self, chosen: gr.State) -> None:
        said = [self._title, self._dtype, self._seed, self._license]

        def save(draft: Draft, *values: Any) -> Draft:
            return with_result(draft, values)

        gr.on(edits(said), save, [self._draft, *said], [self._draft], **FORM)
        chosen.change(self.fit, [chosen], [self._dtype, self._seed, self.create_pr], **FORM)
        self.composed = self._draft.change(
            self.compose, [self._draft, self._written], [self.recipe, self._written, self._said], **FORM
        )
        """After the form has written its recipe."""

    def compose(self, draft: Draft, written: str) -> tuple[Any, Any, str]:
        """Write the recipe that the form stands for, if it is another one than before."""
        try:
            recipe = recipe_text(draft)
        except HubMergeError as error:
            return gr.skip(), gr.skip(), text.problem(error)
        if recipe == written:
            return gr.skip(), gr.skip(), ""
        return recipe, recipe, ""

    def compose_first(self, trigger: Any) -> Any:
        """The same, as the first step of something else; returns what follows."""
        return trigger(self.compose, [self._draft, self._written], [self.recipe, self._written, self._said], **FORM)

    def fit(self, name: str) -> tuple[Any, Any, Any]:
        """Show what means something for this method."""
        form = form_of(name)
        merges = form.kind == "method"
        return gr.update(visible=merges), gr.update(visible=form.draws), gr.update(visible=merges)
