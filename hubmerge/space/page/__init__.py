"""The web form's page, by section. What it does is done by the modules beside this package, which know no page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from hubmerge.space.page import text
from hubmerge.space.page.bundles import BundlesTab
from hubmerge.space.page.common import QUIET, TABLE
from hubmerge.space.page.draft import new_draft
from hubmerge.space.page.jobs import JobsTab
from hubmerge.space.page.look import look
from hubmerge.space.page.method import MethodStep
from hubmerge.space.page.models import ModelsStep
from hubmerge.space.page.planning import PlanStep
from hubmerge.space.page.result import ResultStep
from hubmerge.space.page.ways import Ways

if TYPE_CHECKING:
    from collections.abc import Callable

    from hubmerge.space.app import Service

LOOK: dict[str, Any] = look()
"""Keywords for ``gr.mount_gradio_app``."""
MAX_EVENTS = 1000
"""Of all visitors, that wait at a time; further ones are refused."""
TITLE = "hubmerge: merge models on the Hub"


def build(service: Service) -> gr.Blocks:
    """The page.

    Args:
        service: What it works with.
    """
    blocks: gr.Blocks = gr.Blocks(title=TITLE, analytics_enabled=False)
    with blocks:
        header = gr.HTML(text.html("header", name=""))
        with gr.Tabs(elem_id="hm-tabs", overflow_behavior="wrap") as tabs:
            with gr.Tab("Merge", id="merge"):
                target, ways = _merge(service, blocks)
            with gr.Tab("Bundles", id="bundles"):
                bundles = BundlesTab(service)
            with gr.Tab("Jobs", id="jobs") as tab:
                jobs = JobsTab(service, tab, (ways.started, bundles.started))
        for state in (ways.started, bundles.started):
            state.change(lambda: gr.Tabs(selected="jobs"), None, [tabs], **QUIET)
        arrived = blocks.load(_arrive(service), None, [header, target, bundles.target], **TABLE)
        jobs.refresh(arrived.then)
    blocks.queue(max_size=MAX_EVENTS, default_concurrency_limit=8, api_open=False)
    return blocks


def _merge(service: Service, blocks: gr.Blocks) -> tuple[gr.Textbox, Ways]:
    """The four steps of a merge."""
    draft, shape = gr.State(new_draft()), gr.State(0)
    models = ModelsStep(service, draft, shape)
    models.listed(blocks)
    method = MethodStep(draft, shape)
    method.listed(blocks)
    result = ResultStep(draft, method.chosen)
    plan = PlanStep(service, result)
    return result.target, Ways(service, result, plan)


def _arrive(service: Service) -> Callable[..., tuple[str, Any, Any]]:
    """What happens when somebody opens the page."""

    def arrive(request: gr.Request) -> tuple[str, Any, Any]:
        visitor = service.sessions.visitor_of(request)
        if visitor is None:
            return text.html("header", name=""), gr.skip(), gr.skip()
        service.runner.signed_in(visitor)
        own = f"{visitor.name}/"
        return text.html("header", name=visitor.name), own, own

    return arrive
