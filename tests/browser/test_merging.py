"""A merge by clicking and typing: from signing in to the result, with what can come between."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from tests.browser.scene import ANN, CY, DEE, Visit, agree
from tests.space.running import Server, Town
from tests.space.scene import RECIPE

pytestmark = pytest.mark.browser


def test_somebody_signs_in_and_out(visit: Callable[..., Visit], town: Town) -> None:
    ann = visit(ANN, signed_in=False)
    page = ann.page
    expect(page.get_by_text("Sign in first").first).to_be_visible()
    page.get_by_role("link", name="Sign in with Hugging Face").click()
    expect(page).to_have_url(re.compile(f"^{re.escape(town.endpoint)}/oauth/authorize"))
    agree(page, "ann", deny=True)
    expect(page.get_by_role("heading", level=1)).to_have_text("You are not signed in")
    page.get_by_role("link", name="Sign in with Hugging Face").click()
    agree(page, "ann")
    expect(page.get_by_text("Signed in as ann")).to_be_visible()
    (cookie,) = (c for c in page.context.cookies() if c["name"].endswith("hubmerge"))
    assert cookie["httpOnly"]
    assert not page.evaluate("document.cookie")
    ann.home()
    expect(page.get_by_text("Signed in as ann")).to_be_visible()
    page.get_by_role("link", name="Sign out").or_(ann.button("Sign out")).click()
    if page.get_by_role("heading", name="Sign out?").is_visible():
        ann.button("Sign out").click()
    expect(page.get_by_role("link", name="Sign in with Hugging Face")).to_be_visible()


def test_two_models_and_an_adapter_are_merged(visit: Callable[..., Visit], town: Town) -> None:
    ann = visit(ANN)
    page = ann.page
    ann.search("local/")
    expect(page.get_by_text("models found")).to_be_visible()
    expect(ann.found("local/adapter")).to_have_accessible_name(re.compile("adapter, .*apache-2.0"))
    ann.found("local/base").check()
    ann.button("Use as base").click()
    expect(ann.box("Base model")).to_have_value("local/base")
    for number, repo in enumerate(("local/a", "local/adapter"), 1):
        ann.found(repo).check()
        ann.button("Add to the merge").click()
        expect(ann.box(f"Model {number}")).to_have_value(repo)
    ann.add("local/b", 3)
    ann.fill("Name of model 1", "first")
    ann.choose("Method", "ties")
    ann.fill("Publish to", "ann/by-clicking")
    ann.fill("Title of the card", "Made by clicking")
    page.get_by_label("Make it public").check()

    expect(page.get_by_text("Planned: fits here")).to_be_visible()
    expect(page.get_by_text("May be published: apache-2.0")).to_be_visible()
    ann.button("Recipe (YAML)").click()
    expect(ann.recipe).to_have_value(re.compile("method: ties(.|\n)*repo: local/a\n *name: first\n"))
    ann.button("Preview of the model card").click()
    expect(page.get_by_role("heading", name="Made by clicking")).to_be_visible()

    ann.button("Merge here").click()
    expect(ann.job("ann/by-clicking")).to_contain_text(re.compile("done", re.IGNORECASE))
    with page.context.expect_page() as opened:
        ann.job("ann/by-clicking").get_by_role("link").first.click()
    assert opened.value.url == f"{town.endpoint}/ann/by-clicking"
    expect(opened.value.get_by_role("heading", level=1)).to_have_text("Made by clicking")
    assert any(f.endswith(".safetensors") for f in town.files("ann/by-clicking"))


def test_a_merge_is_cancelled_and_resumed_where_it_was(visit: Callable[..., Visit], town: Town) -> None:
    cy = visit(CY)
    town.stall_uploads(after=2)
    cy.start(RECIPE, "cy/cancelled")
    job = cy.job("cy/cancelled")
    expect(job).to_contain_text("2 of 6")
    expect(job.get_by_role("progressbar")).to_be_visible()
    cy.button("Cancel").click()
    expect(job).to_contain_text(re.compile("cancelled", re.IGNORECASE))
    town.behave()
    cy.page.reload()
    cy.open("Jobs")
    expect(job).to_contain_text(re.compile("cancelled", re.IGNORECASE))
    cy.button("Resume").click()
    expect(job).to_contain_text(re.compile("done", re.IGNORECASE))
    assert sum(f.endswith(".safetensors") for f in town.files("cy/cancelled")) == 6
    cy.button("Forget").click()
    expect(job).to_have_count(0)


def test_a_merge_goes_on_when_the_server_was_killed(visit: Callable[..., Visit], town: Town, server: Server) -> None:
    dee = visit(DEE)
    town.stall_uploads(after=3)
    dee.start(RECIPE, "dee/interrupted")
    expect(dee.job("dee/interrupted")).to_contain_text("3 of 6")
    server.restart_after_kill()
    town.behave()
    dee.page.reload()
    expect(dee.page.get_by_text("Signed in as dee")).to_be_visible()
    dee.open("Jobs")
    expect(dee.job("dee/interrupted")).to_contain_text(re.compile("done", re.IGNORECASE))
    assert sum(f.endswith(".safetensors") for f in town.files("dee/interrupted")) == 6
    files = [path for path in server.folder.rglob("*") if path.is_file()]
    assert [path for path in files if b"hf_oauth_" in path.read_bytes()] == []  # the token that signing in gave
