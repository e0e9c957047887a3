"""Step 4, second half: merge here, run on Hugging Face Jobs, or take the recipe away."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import gradio as gr

from hubmerge.errors import HubMergeError, UsageError
from hubmerge.remote import submit
from hubmerge.space.orders import Order
from hubmerge.space.page import text
from hubmerge.space.page.common import HUB, TABLE, heading, live, visitor_of
from hubmerge.space.page.planning import Planned, PlanStep, is_of, target_of
from hubmerge.space.page.result import RISK, ResultStep
from hubmerge.space.plan import job_offer, machines

if TYPE_CHECKING:
    from hubmerge.space.app import Service

MINUTES = 120
MAX_MINUTES = 24 * 60
_BUNDLES = "Bundles are made here or on a machine of your own, not on Hugging Face Jobs."


def is_bundle(plan: Planned) -> bool:
    """Whether what is planned is a bundle."""
    return plan.get("kind") == "bundle"


def why_not_here(plan: Planned, machine: str) -> str:
    """Why it cannot be started here, or on what it would run."""
    if not plan or "error" in plan or not plan["ok"]:
        return "There is no plan that can run yet."
    if not plan["fits_here"]:
        return f"It does not fit here: {plan['why_not']}."
    return f"It runs on {machine}, {plan['time']}. You can close this page meanwhile."


def can_start(plan: Planned) -> bool:
    """Whether it can be started here."""
    return bool(plan) and "error" not in plan and plan["ok"] and plan["fits_here"]


def check_planned(plan: Planned, recipe: Any, target: Any, *, risk: bool) -> str:
    """Where the result goes, if what would be started is what the plan on the page is of.

    Raises:
        UsageError: It is not, or the plan says that it cannot be done.
    """
    goes_to = target_of(target)
    if not goes_to:
        raise UsageError("where the result goes is not said", hint="Fill in “Publish to”: owner/name.")
    if not is_of(plan, recipe):
        raise UsageError("this is not planned yet", hint="Press “Plan”, and look at the plan first.")
    if "error" in plan or not plan["ok"]:
        raise UsageError("the plan says that this cannot run", hint="It says above why.")
    if plan["verdict"] == "blocked" and not risk:
        raise UsageError(
            "the models' licences do not allow the result to be published",
            hint=f"Choose other models; or state the licence above, and tick “{RISK}”.",
        )
    return goes_to


def flags(*, public: bool, create_pr: bool, risk: bool) -> tuple[str, ...]:
    """The same wishes as options of ``hubmerge push``."""
    named = {"--public": public, "--pr": create_pr, "--accept-license-risk": risk}
    return tuple(name for name, given in named.items() if given)


def take_away(plan: Planned, target: str, options: tuple[str, ...]) -> str:
    """Commands for a machine of one's own and for GitHub Actions, as they are pasted."""
    to = shlex.quote(target or "YOUR-NAME/NAME")
    if is_bundle(plan):
        rest = " ".join(o for o in options if o != "--pr")
        return text.html("take_away", here=f"hubmerge bundle create merge.yaml --to {to} {rest}".strip(), github="")
    here = " ".join(["hubmerge push merge.yaml --to", to, *options])
    extra = [f"-f flags={shlex.quote(' '.join(options))}"] if options else []
    github = " ".join(["gh workflow run merge.yml -f recipe=merge.yaml -f", f"repo_id={to} -f mode=push", *extra])
    return text.html("take_away", here=here, github=github)


def machine_label(machine: dict[str, Any]) -> str:
    """A machine of the Hub's in a line."""
    return text.plain(f"{machine['name']}: ${machine['usd_per_hour']:.2f} per hour, {machine['hardware']}")


def cost(offered: list[dict[str, Any]], name: Any, minutes: Any) -> str:
    """The most that a job may cost, in words."""
    machine = next((m for m in offered if m["name"] == name), None)
    if machine is None or not isinstance(minutes, int | float) or not 1 <= minutes <= MAX_MINUTES:
        return text.note(f"Choose a machine, and a timeout of 1 to {MAX_MINUTES} minutes.")
    most = machine["usd_per_hour"] * minutes / 60
    return text.html("cost", most=f"${most:.2f}", minutes=int(minutes), name=machine["name"])


class Ways:
    """The layout and its handlers.

    Args:
        service: What the page works with.
        result: Where recipe, target and wishes stand.
        plan: What is planned.
    """

    def __init__(self, service: Service, result: ResultStep, plan: PlanStep) -> None:
        self._service, self._result, self._plan = service, result, plan
        self.started = gr.State("")
        """The job that was started last."""
        self._offered = gr.State([])
        with gr.Row(elem_classes="hm-ways"):
            self._lay_out_here()
            self._lay_out_jobs()
            self._lay_out_taking()
        self._listen()

    def _lay_out_here(self) -> None:
        with gr.Column(elem_classes="hm-way", min_width=260):
            heading("Here", level=3)
            self._why = gr.HTML(text.html("lines", words=why_not_here({}, self._service.machine)))
            self._start = gr.Button("Merge here", variant="primary", interactive=False)
            self._started_text = live()

    def _lay_out_jobs(self) -> None:
        with gr.Column(elem_classes="hm-way", min_width=260):
            heading("Hugging Face Jobs", "The same merge on a machine of the Hub, paid by you and by the minute.", 3)
            self._machine = gr.Dropdown([], value=None, label="Machine")
            self._minutes = gr.Number(value=MINUTES, label="Timeout in minutes", precision=0)
            self._cost = live()
            self._agreed = gr.Checkbox(False, label="Pay at most that much")
            self._submit = gr.Button("Run on Hugging Face Jobs", interactive=False)
            self._submitted = live()

    def _lay_out_taking(self) -> None:
        with gr.Column(elem_classes="hm-way", min_width=260):
            heading("Take it away", "Save the recipe (step 3) as merge.yaml, and run it where you like, for free.", 3)
            self._taking = gr.HTML(take_away({}, "", ()))

    def _listen(self) -> None:
        wishes = [self._result.public, self._result.create_pr, self._result.risk]
        where = [self._result.recipe, self._result.target]
        shown = [self._why, self._start, self._submit]
        taking = [self._plan.planned, self._result.target, *wishes]
        self._plan.planned.change(self.show, [self._plan.planned], shown, **TABLE).then(
            self.offer, [self._offered], [self._offered, self._machine, self._submitted], **HUB
        )
        gr.on(
            [self._plan.planned.change, self._result.target.blur, *(w.input for w in wishes)],
            self.take, taking, [self._taking], **TABLE,
        )  # fmt: skip
        gr.on(
            [self._machine.change, self._minutes.change, self._offered.change],
            cost, [self._offered, self._machine, self._minutes], [self._cost], **TABLE,
        )  # fmt: skip
        # What was changed just now is written into the recipe first, so that nothing older is started.
        self._result.compose_first(self._start.click).then(
            self.start, [*where, *wishes, self._plan.planned], [self._started_text, self.started], **TABLE
        )
        self._result.compose_first(self._submit.click).then(
            self.submit,
            [*where, *wishes, self._plan.planned, self._machine, self._minutes, self._agreed, self._offered],
            [self._submitted, self._agreed], **HUB,
        )  # fmt: skip

    def show(self, plan: Planned) -> tuple[Any, Any, Any]:
        """What can be started, and why something cannot."""
        words = text.html("lines", words=why_not_here(plan, self._service.machine))
        label = "Make the bundle here" if is_bundle(plan) else "Merge here"
        runs = bool(plan) and "error" not in plan and plan["ok"] and not is_bundle(plan)
        return words, gr.update(value=label, interactive=can_start(plan)), gr.update(interactive=runs)

    def offer(self, offered: list[dict[str, Any]], request: gr.Request) -> tuple[Any, Any, Any]:
        """The machines of Hugging Face Jobs, asked for once."""
        visitor = self._service.sessions.visitor_of(request)
        if offered or visitor is None:
            return gr.skip(), gr.skip(), gr.skip()
        try:
            found = machines(visitor)
        except HubMergeError as error:
            return gr.skip(), gr.skip(), text.problem(error, visitor.token)
        chosen = next((m["name"] for m in found if m["default"]), None)
        return found, gr.update(choices=[(machine_label(m), m["name"]) for m in found], value=chosen), ""

    def take(self, plan: Planned, target: Any, public: Any, create_pr: Any, risk: Any) -> str:
        """The commands for elsewhere."""
        try:
            goes_to = target_of(target)
        except HubMergeError:
            goes_to = ""
        return take_away(plan, goes_to, flags(public=bool(public), create_pr=bool(create_pr), risk=bool(risk)))

    def start(
        self, recipe: Any, target: Any, public: Any, create_pr: Any, risk: Any, plan: Planned, request: gr.Request
    ) -> tuple[str, Any]:
        """Start a job of this server's."""
        token = ""
        try:
            visitor = visitor_of(self._service, request)
            token = visitor.token
            goes_to = check_planned(plan, recipe, target, risk=bool(risk))
            bundle = is_bundle(plan)
            order = Order(
                "bundle create" if bundle else "merge", goes_to, recipe=str(recipe), public=bool(public),
                create_pr=bool(create_pr) and not bundle, accept_license_risk=bool(risk),
            )  # fmt: skip
            job = self._service.runner.submit(visitor, order)
        except HubMergeError as error:
            return text.problem(error, token), gr.skip()
        return text.note(f"Started: {goes_to}. The tab “Jobs” shows how far it is.", kind="done"), job.id

    def submit(
        self, recipe: Any, target: Any, public: Any, create_pr: Any, risk: Any, plan: Planned, machine: Any,
        minutes: Any, agreed: Any, offered: list[dict[str, Any]], request: gr.Request,
    ) -> tuple[str, Any]:  # fmt: skip
        """Start a job of the visitor's own on the Hub, at the cost that was shown."""
        token = ""
        try:
            visitor = visitor_of(self._service, request)
            token = visitor.token
            goes_to = check_planned(plan, recipe, target, risk=bool(risk))
            if is_bundle(plan):
                raise UsageError(_BUNDLES, hint="Make it here, or take the recipe away.")
            timeout_s = _timeout(minutes)
            if agreed is not True:
                raise UsageError("this costs money", hint="Tick “Pay at most that much” if you agree.")
            options = flags(public=bool(public), create_pr=bool(create_pr), risk=bool(risk))
            offer = job_offer(
                visitor, str(recipe), goes_to, self._service.limits,
                flavor=str(machine or ""), timeout_s=timeout_s, flags=options,
            )  # fmt: skip
            check_price(offer["submission"].flavor.usd_per_minute * 60, offered, str(machine))
            job = submit(offer["submission"], visitor.hub())
        except HubMergeError as error:
            return text.problem(error, token), gr.skip()
        return text.html("submitted", url=job.url, target=goes_to, offer=offer), False


def _timeout(minutes: Any) -> int:
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 1 <= minutes <= MAX_MINUTES:
        raise UsageError(f"the timeout is 1 to {MAX_MINUTES} minutes", hint="Write another number of minutes.")
    return int(minutes) * 60


def check_price(now: float, offered: list[dict[str, Any]], machine: str) -> None:
    """The Hub may ask more by now than when it was shown; both in US dollars per hour.

    Raises:
        UsageError: It does.
    """
    shown = next((m["usd_per_hour"] for m in offered if m["name"] == machine), 0.0)
    if round(now, 4) > shown:
        raise UsageError(
            f"{machine} costs ${now:.2f} per hour by now, and ${shown:.2f} was shown", hint="Load this page anew."
        )
