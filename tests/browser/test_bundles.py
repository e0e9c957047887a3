"""A bundle is made, gets a task, gives one back, and loses one."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Locator, expect

from tests.browser.scene import ANN, Visit
from tests.space.running import Town

pytestmark = pytest.mark.browser


def done(job: Locator) -> None:
    expect(job).to_contain_text(re.compile("done", re.IGNORECASE))


def opened(visit: Visit, bundle: str) -> Locator:
    """The table of a bundle's tasks."""
    visit.open("Bundles")
    visit.fill("Bundle", bundle)
    visit.button("Open").click()
    return visit.page.get_by_role("table").filter(has_text="local/")


def test_a_bundle_is_made_extended_and_taken_from(visit: Callable[..., Visit], town: Town) -> None:
    ann = visit(ANN)
    ann.fill("Base model", "local/base")
    for number, repo in enumerate(("local/a", "local/b"), 1):
        ann.add(repo, number)
    ann.choose("Method", "magnitude_mask")
    ann.fill("Publish to", "ann/bundle")
    ann.button("Make the bundle here").click()
    done(ann.job("ann/bundle"))
    assert "bundle.json" in town.files("ann/bundle") or any("bundle" in f for f in town.files("ann/bundle"))

    tasks = opened(ann, "ann/bundle")
    expect(tasks).to_contain_text("local/a")
    ann.fill("Model to add", "local/adapter")
    ann.fill("Name of the task", "third")
    ann.button("Add task").click()
    done(ann.job("third"))

    tasks = opened(ann, "ann/bundle")
    expect(tasks).to_contain_text("third")
    ann.choose("Task to retrieve", "a")
    ann.fill("Publish the model to", "ann/retrieved")
    ann.button("Retrieve task").click()
    done(ann.job("ann/retrieved"))
    assert any(f.endswith(".safetensors") for f in town.files("ann/retrieved"))

    tasks = opened(ann, "ann/bundle")
    ann.choose("Task to remove", "third")
    ann.button("Remove task").click()
    done(ann.job("third").filter(has_text=re.compile("remove", re.IGNORECASE)))
    tasks = opened(ann, "ann/bundle")
    expect(tasks).to_contain_text("local/b")
    expect(tasks).not_to_contain_text("third")
