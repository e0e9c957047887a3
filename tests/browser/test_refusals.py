"""What cannot be done is said where it was asked for; what others do cannot be seen; what others write is text."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Request, Route, expect

from tests.browser.scene import ANN, BOB, CY, PATIENCE_MS, Visit
from tests.space.running import HOSTILE, Town
from tests.space.scene import RECIPE

pytestmark = pytest.mark.browser


def test_a_gated_model_without_access(visit: Callable[..., Visit]) -> None:
    bob = visit(BOB)
    bob.write_recipe(RECIPE.replace("local/b]", "local/gated]"))
    bob.button("Plan").click()
    expect(bob.page.get_by_text("cannot run").first).to_be_visible()
    expect(bob.page.get_by_text(re.compile("local/gated.*(gated|access)", re.DOTALL)).first).to_be_visible()
    expect(bob.button("Merge here")).to_be_disabled()
    bob.write_recipe(RECIPE)
    bob.fill("Publish to", "bob/allowed")
    expect(bob.page.get_by_text("Planned: fits here")).to_be_visible()
    expect(bob.button("Merge here")).to_be_enabled()


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("method: task_arithmetic\nbase: [", ":3:|line 3|expected"),
        (RECIPE.replace("task_arithmetic", "tas_arithmetic"), "task_arithmetic"),
        (RECIPE.replace("local/a", "/etc/passwd"), "no repository of the Hub"),
        (RECIPE.replace("local/a", "https://example.org/x"), "neither a repo id"),
        (RECIPE.replace("local/a", "local/missing"), "local/missing"),
        (RECIPE + "card: {template: card.md}\n", "card.template"),
    ],
)
def test_a_bad_recipe_says_what_is_wrong(visit: Callable[..., Visit], recipe: str, said: str) -> None:
    bob = visit(BOB)
    bob.write_recipe(recipe)
    bob.button("Plan").click()
    expect(bob.page.get_by_text("cannot run").first).to_be_visible()
    expect(bob.page.get_by_text(re.compile(said)).first).to_be_visible()
    expect(bob.button("Merge here")).to_be_disabled()


def test_two_visitors_do_not_see_each_other(visit: Callable[..., Visit], town: Town) -> None:
    cy, bob = visit(CY), visit(BOB)
    town.stall_uploads()
    cy.start(RECIPE, "cy/private-work")
    expect(cy.job("cy/private-work")).to_contain_text(re.compile("merging", re.IGNORECASE))
    bob.open("Jobs")
    bob.start(RECIPE, "bob/other-work")
    expect(bob.job("bob/other-work")).to_be_visible()
    expect(bob.job("cy/private-work")).to_have_count(0)
    expect(cy.job("bob/other-work")).to_have_count(0)

    answer = _ask_as(bob, _asked_by(cy, "Cancel", cy.job("cy/private-work").get_attribute("data-job") or ""))
    assert "you have no job" in answer
    assert "private-work" not in answer
    cy.page.reload()
    cy.open("Jobs")
    expect(cy.job("cy/private-work")).to_contain_text(re.compile("merging", re.IGNORECASE))
    for one in (cy, bob):
        one.button("Cancel").click()
        expect(one.page.get_by_text("Cancelled. What is finished stays staged").first).to_be_visible()


def _asked_by(visit: Visit, button: str, key: str) -> dict[str, Any]:
    """What a page asks its server for about a job when a button is pressed; it is kept back."""
    asked: list[dict[str, Any]] = []

    def keep(route: Route, request: Request) -> None:
        if key in request.post_data_json["data"]:
            asked.append(request.post_data_json)
            route.abort()
        else:
            route.continue_()

    visit.page.route("**/queue/join*", keep)
    visit.button(button).click()
    ends_at = time.monotonic() + PATIENCE_MS / 1000
    while not asked and time.monotonic() < ends_at:
        visit.page.wait_for_timeout(50)
    visit.page.unroute("**/queue/join*")
    (one,) = asked
    return one


def _ask_as(visit: Visit, asked: dict[str, Any]) -> str:
    """The same, asked in somebody else's name: everything that comes back."""
    said: str = visit.page.evaluate(
        """async (asked) => {
            const session_hash = "s" + Math.random().toString(36).slice(2)
            const joined = await fetch("gradio_api/queue/join", {
                method: "POST", headers: {"content-type": "application/json"},
                body: JSON.stringify({...asked, session_hash}),
            })
            if (!joined.ok) return await joined.text()
            const stream = await fetch("gradio_api/queue/data?session_hash=" + session_hash)
            return await stream.text()
        }""",
        asked,
    )
    return said


def test_what_others_have_written_is_text(visit: Callable[..., Visit]) -> None:
    ann = visit(ANN)
    page = ann.page
    ann.search("local/hostile")
    expect(ann.found("local/hostile")).to_be_visible()
    ann.found("local/hostile").check()
    ann.button("Add to the merge").click()
    ann.fill("Base model", "local/base")
    ann.fill("Name of model 1", HOSTILE.replace("\u202e", ""))
    ann.fill("Title of the card", HOSTILE.replace("\u202e", ""))
    ann.button("Plan").click()
    expect(page.get_by_text("window.caught = 1").first).to_be_visible()
    recipe = json.dumps(HOSTILE.replace("\u202e", ""))
    ann.write_recipe(f"method: linear\nbase: local/base\nmodels: [local/hostile]\ncard: {{title: {recipe}}}\n")
    ann.fill("Publish to", "ann/hostile")
    ann.button("Plan").click()
    ann.button("Preview of the model card").click()
    expect(page.get_by_role("heading").filter(has_text="window.caught = 1").first).to_be_visible()
    assert page.evaluate("window.caught") is None
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("a[href^=javascript]").count() == 0
