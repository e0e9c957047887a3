"""The tab of one's own jobs: how far they are, and what can be done with one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from hubmerge.errors import HubMergeError
from hubmerge.space.jobs import RESUMABLE, UNFINISHED, Job
from hubmerge.space.page import text
from hubmerge.space.page.common import TABLE, heading, live, visitor_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from hubmerge.space.app import Service
    from hubmerge.space.visitors import Visitor

EVERY_S = 2.0
STATES = {
    "queued": "Waiting", "planning": "Planning", "running": "Running", "publishing": "Publishing", "done": "Done",
    "failed": "Failed", "cancelled": "Cancelled", "interrupted": "Interrupted",
}  # fmt: skip
_KINDS = {
    "merge": "Merge", "bundle create": "New bundle", "bundle add": "Add a task", "bundle remove": "Remove a task",
    "bundle retrieve": "Retrieve a task",
}  # fmt: skip
_ACTS = {"cancel": "Cancelled", "resume": "Resumed", "forget": "Forgotten"}
Shown = dict[str, Any]
_PARTS = ("under_way", "over", "said", "choices", "chosen", "buttons", "active", "tab")


def shown_jobs(jobs: Sequence[Job], places: dict[str, int], chosen: str) -> Shown:
    """What the tab shows of a visitor's jobs, as plain data that can be compared with what it showed before.

    Args:
        jobs: The newest first.
        places: Of those that wait, how many are before them.
        chosen: The job that the buttons are about; the newest if it is none of these.
    """
    keys = [j.id for j in jobs]
    chosen = chosen if chosen in keys else (keys[0] if keys else "")
    one = next((j for j in jobs if j.id == chosen), None)
    busy = [j for j in jobs if j.state in UNFINISHED]
    return {
        "under_way": text.html("jobs", rows=[_row(j, places) for j in busy]) if busy else "",
        "over": text.html("jobs", rows=[_row(j, places) for j in jobs if j.state not in UNFINISHED]),
        "said": said(jobs, places),
        "choices": [[job_label(j), j.id] for j in jobs],
        "chosen": chosen,
        "buttons": what_applies(one),
        "active": bool(busy),
        "tab": f"Jobs ({len(busy)})" if busy else "Jobs",
    }


def what_applies(job: Job | None) -> list[bool]:
    """Whether a job can be cancelled, resumed, forgotten."""
    if job is None:
        return [False, False, False]
    return [job.state in UNFINISHED, job.state in RESUMABLE, job.state not in UNFINISHED]


def job_label(job: Job) -> str:
    """A job in a line that does not change while it runs."""
    return text.plain(f"{job_title(job)}, {text.moment(job.created)}")


def job_title(job: Job) -> str:
    """What a job does, in words."""
    asked = json.loads(job.asked)
    about, place = asked.get("task") or asked.get("model") or "", asked.get("bundle") or job.target
    told = {
        "bundle add": f"{about} to {place}",
        "bundle remove": f"{about} from {place}",
        "bundle retrieve": f"{job.target}, which is {about} of {place}",
    }
    return f"{_KINDS[job.kind]}: {told.get(job.kind, job.target)}"


def said(jobs: Sequence[Job], places: dict[str, int]) -> str:
    """How far the newest unfinished job is, or how the newest ended: what a screen reader reads out."""
    if not jobs:
        return text.note("You have no jobs yet.")
    job = next((j for j in jobs if j.state in UNFINISHED), jobs[0])
    return text.note(f"{job.target}: {', '.join(filter(None, [STATES[job.state].lower(), how_far(job, places)]))}.")


def how_far(job: Job, places: dict[str, int]) -> str:
    """Its place in the queue, or its shards; empty where there is neither."""
    if job.state == "queued":
        before = places.get(job.id, 0)
        return f"{before} job{'' if before == 1 else 's'} before it" if before else "next in turn"
    if job.shards_total and job.state != "done":
        return f"{job.shards_done} of {job.shards_total} shards"
    return ""


def _row(job: Job, places: dict[str, int]) -> dict[str, Any]:
    return {
        "job": job,
        "title": job_title(job),
        "state": STATES[job.state],
        "far": how_far(job, places),
        "percent": round(100 * job.fraction),
        "moves": job.state in UNFINISHED and job.state != "queued",
    }


class JobsTab:
    """The layout and its handlers.

    Args:
        service: What the page works with.
        tab: The tab, whose text says how many are active.
        started: The job that was started last, on whatever tab.
    """

    def __init__(self, service: Service, tab: gr.Tab, started: Sequence[gr.State]) -> None:
        self._service, self._tab, self._started = service, tab, started
        self._shown = gr.State({})
        self._chosen = gr.State("")
        self._timer = gr.Timer(EVERY_S, active=False)
        heading(
            "Jobs", "Your own jobs, the newest first. They go on when you close this page, and nobody else sees them."
        )
        self._said = live()
        with gr.Column(visible=False, elem_classes="hm-choose") as self._choose:
            self._job = gr.Dropdown([], value=None, label="Job", filterable=False)
            with gr.Row(elem_classes="hm-buttons"):
                self._cancel = gr.Button("Cancel", variant="stop", size="md")
                self._resume = gr.Button("Resume", size="md")
                self._forget = gr.Button("Forget", size="md")
        self._done = live()
        self._under_way = gr.HTML("")
        self._over = gr.HTML("")
        self._listen()

    def _listen(self) -> None:
        self.refresh(self._timer.tick)
        self.refresh(self._tab.select)
        # All that name a job go without gradio's check that it is among the choices: the table knows whose it is.
        for trigger, named in ((self._job.input, self._job), *((s.change, s) for s in self._started)):
            chosen = trigger(lambda key: str(key or ""), [named], [self._chosen], preprocess=False, **TABLE)
            self.refresh(chosen.then)
        for button, act in ((self._cancel, "cancel"), (self._resume, "resume"), (self._forget, "forget")):
            acted = button.click(self._act(act), [self._job], [self._done], preprocess=False, **TABLE)
            self.refresh(acted.then)

    def refresh(self, trigger: Any) -> Any:
        """Show how far the jobs are, after something has happened."""
        return trigger(
            self.look, [self._chosen, self._shown],
            [
                self._under_way, self._over, self._said, self._job, self._choose, self._cancel, self._resume,
                self._forget, self._timer, self._tab, self._shown,
            ],
            trigger_mode="always_last", **TABLE,
        )  # fmt: skip

    def look(self, chosen: str, before: Shown, request: gr.Request) -> tuple[Any, ...]:
        """What has changed since it was shown last."""
        visitor = self._service.sessions.visitor_of(request)
        jobs = self._service.runner.table.of(visitor.name) if visitor is not None else ()
        now = shown_jobs(jobs, self._places(visitor, jobs), chosen)
        if visitor is None:
            now["said"] = text.note("Sign in first: then your jobs are shown here.")
        changed = {part for part in _PARTS if now[part] != before.get(part)}

        def if_changed(value: Any, *parts: str) -> Any:
            return value if changed & {*parts} else gr.skip()

        choices = [tuple(c) for c in now["choices"]]
        return (
            if_changed(now["under_way"], "under_way"),
            if_changed(now["over"], "over"),
            if_changed(now["said"], "said"),
            if_changed(gr.update(choices=choices, value=now["chosen"] or None), "choices", "chosen"),
            if_changed(gr.update(visible=bool(choices)), "choices"),
            *(if_changed(gr.update(interactive=applies), "buttons") for applies in now["buttons"]),
            if_changed(gr.Timer(active=now["active"]), "active"),
            if_changed(gr.update(label=now["tab"]), "tab"),
            now,
        )

    def _places(self, visitor: Visitor | None, jobs: Sequence[Job]) -> dict[str, int]:
        waiting = [j.id for j in jobs if j.state == "queued"]
        return {key: self._service.runner.place_in_queue(visitor, key) for key in waiting} if visitor else {}

    def _act(self, what: str) -> Callable[..., str]:
        """The handler of a button."""
        runner = self._service.runner

        def act(key: Any, request: gr.Request) -> str:
            try:
                visitor = visitor_of(self._service, request)
                key = str(key or "")
                target = runner.table.get(visitor.name, key).target
                if what == "cancel":
                    runner.cancel(visitor, key)
                elif what == "resume":
                    runner.resume(visitor, key)
                else:
                    runner.table.forget(visitor.name, key)
            except HubMergeError as error:
                return text.problem(error)
            return text.note(f"{_ACTS[what]}: {target}.", kind="done")

        return act
