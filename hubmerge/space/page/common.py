"""What the page's sections share: who asks, how events are run, and small pieces of layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from hubmerge.errors import AccessError
from hubmerge.space.form import WEIGHT, Control
from hubmerge.space.page import text
from hubmerge.space.page.draft import label_of

if TYPE_CHECKING:
    from hubmerge.space.app import Service
    from hubmerge.space.visitors import Visitor

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of every event: it is the page's own, and says in words what it does."""
FORM: dict[str, Any] = {**QUIET, "concurrency_id": "form", "concurrency_limit": 1}
"""Changes of the form are made one after the other, in the order in which they came: none is lost. They are quick."""
DRAWN: dict[str, Any] = {"show_progress": "hidden", "concurrency_id": "form", "concurrency_limit": 1}
"""Of what is drawn anew, likewise: gradio cannot draw two parts of one page at a time."""
PLANNING: dict[str, Any] = {**QUIET, "concurrency_id": "planning", "concurrency_limit": 4}
"""Plans of all visitors that are made at a time."""
HUB: dict[str, Any] = {**QUIET, "concurrency_id": "hub", "concurrency_limit": 8}
"""What waits for the Hub."""
TABLE: dict[str, Any] = {**QUIET, "concurrency_id": "table", "concurrency_limit": 8}
"""What looks into the job table only."""


def visitor_of(service: Service, request: gr.Request) -> Visitor:
    """Who asks.

    Raises:
        AccessError: Nobody is signed in.
    """
    visitor = service.sessions.visitor_of(request)
    if visitor is None:
        raise AccessError("Sign in first", hint="The link is at the top of this page.")
    return visitor


def heading(words: str, lines: str = "", level: int = 2) -> gr.HTML:
    """A heading of the page, with a sentence or two beneath it."""
    return gr.HTML(text.html("heading", words=words, lines=lines, level=level))


def live(first: str = "") -> gr.HTML:
    """Where messages appear; screen readers read them out."""
    return gr.HTML(first, elem_classes="hm-live")


def widget(control: Control, value: Any, number: int | None = None) -> Any:
    """The gradio component of a control; of one model, it may be left empty."""
    own = number is not None and control is not WEIGHT
    shown = control.default if value is None and not own else value
    words: dict[str, Any] = {
        "label": label_of(control, number), "info": control.help if number is None else None, "interactive": True,
    }  # fmt: skip
    if control.widget == "choice":
        choices = [("as for all models", "")] if own else []
        choices += [(c, c) for c in control.choices]
        return gr.Dropdown(choices, value=choices[0][1] if shown is None else shown, **words)
    if control.widget == "switch":
        return gr.Checkbox(bool(shown), **words)
    if control.widget == "text" or own or control.default is None:
        # gradio's field of a number cannot be empty: it says that 0 was set. Text is read as a number all the same.
        empty = "as for all models" if own else "left to the method"
        return gr.Textbox("" if shown is None else str(shown), placeholder=empty, max_lines=1, **words)
    if control.widget == "slider":
        return gr.Slider(control.minimum or 0.0, control.maximum or 1.0, value=shown, step=control.step, **words)
    return gr.Number(value=shown, step=control.step or 0.1, precision=0 if control.whole else None, **words)


def edits(components: Sequence[Any]) -> list[Any]:
    """The events by which a visitor has set something: text when it is left, or after a pause (see ``page.js``)."""
    found: list[Any] = []
    for one in components:
        if isinstance(one, gr.Textbox | gr.Number):
            found += [one.blur, one.submit]
        elif isinstance(one, gr.Slider):
            found.append(one.change)
        else:
            found.append(one.input)
    return found
