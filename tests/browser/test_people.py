"""For everybody: axe finds nothing serious, the keyboard is enough, and a narrow screen, too."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, ViewportSize, expect

from hubmerge.localhub import User
from tests.browser.scene import ANN, BOB, EVE, Visit
from tests.space.running import Town
from tests.space.scene import RECIPE

pytestmark = pytest.mark.browser

SERIOUS = ("serious", "critical")
NARROW: ViewportSize = {"width": 320, "height": 640}


def violations(page: Page) -> list[str]:
    """What axe finds wrong, so that one can find it: the rule, how bad, and the first places."""
    found = Axe().run(page).response["violations"]
    return [
        f"{v['id']} ({v['impact']}): {v['help']}: " + " | ".join(n["html"][:200] for n in v["nodes"][:4])
        for v in found
        if v["impact"] in SERIOUS
    ]


def test_axe_would_find_something(visit: Callable[..., Visit]) -> None:
    page = visit(ANN, signed_in=False).page
    assert violations(page) == []
    page.evaluate(
        "document.querySelector('h1').outerHTML = '<img src=data:,><p style=\"color:#ccc;background:#fff\">grey</p>'"
    )
    assert [found.split()[0] for found in violations(page)] == ["color-contrast", "image-alt"]


def states(visit: Visit, town: Town, target: str) -> Iterator[str]:
    """Leads a page through its main states, and says which one it is in."""
    page = visit.page
    yield "signed out"
    visit.open("Bundles")
    yield "bundles, signed out"
    visit.open("Jobs")
    yield "jobs, signed out"
    visit.sign_in()
    yield "signed in"
    visit.search("local/")
    expect(visit.found("local/base")).to_be_visible()
    yield "found"
    visit.fill("Base model", "local/base")
    for number, repo in enumerate(("local/a", "local/b"), 1):
        visit.add(repo, number)
    visit.choose("Method", "ties")
    visit.button("Settings of model 1").click()
    visit.fill("Publish to", target)
    expect(page.get_by_text("Planned: fits here")).to_be_visible()
    for name in ("Preview of the model card", "Recipe (YAML)"):
        visit.button(name).click()
    yield "planned"
    visit.write_recipe("method: nothing\n")
    visit.button("Plan").click()
    expect(page.get_by_text("cannot run").first).to_be_visible()
    yield "refused"
    town.stall_uploads()
    visit.start(RECIPE, target)
    expect(visit.job(target).get_by_role("progressbar")).to_be_visible()
    yield "running"
    visit.button("Cancel").click()
    town.behave()
    expect(visit.job(target)).to_contain_text(re.compile("cancelled", re.IGNORECASE))
    visit.button("Resume").click()
    expect(visit.job(target)).to_contain_text(re.compile("done", re.IGNORECASE))
    yield "done"


@pytest.mark.parametrize(("theme", "user"), [("light", ANN), ("dark", EVE)])
def test_axe_finds_nothing_serious_and_narrow_screens_do(
    visit: Callable[..., Visit], town: Town, theme: str, user: User
) -> None:
    somebody = visit(user, signed_in=False, color_scheme=theme)
    page = somebody.page
    assert ("dark" in (page.locator("body").get_attribute("class") or "")) == (theme == "dark")
    wrong, wide = {}, {}
    for state in states(somebody, town, f"{user.name}/seen-in-{theme}"):
        if found := violations(page):
            wrong[state] = found
        if (width := narrowest(page)) > NARROW["width"]:
            wide[state] = width
    assert (wrong, wide) == ({}, {})


def narrowest(page: Page) -> int:
    """How wide the page is on a narrow screen."""
    before = page.viewport_size
    assert before is not None
    page.set_viewport_size(NARROW)
    width: int = page.evaluate("document.documentElement.scrollWidth")
    page.set_viewport_size(before)
    return width


_FOCUSED = """() => {
    const e = document.activeElement
    if (!e || e === document.body) return ""
    const labels = [...(e.labels ?? [])].map((l) => l.innerText)
    return (e.getAttribute("aria-label") || labels.join(" ") || e.innerText || e.value || e.tagName).trim()
}"""


class Keyboard:
    """A page without a mouse."""

    def __init__(self, page: Page) -> None:
        self._page = page

    def press(self, *keys: str) -> None:
        for key in keys:
            self._page.keyboard.press(key)

    def write(self, text: str) -> None:
        """In place of what is in a text box."""
        self.press("Control+a", "Delete")
        self._page.keyboard.type(text)

    def to(self, name: str, key: str = "Tab") -> None:
        """Press Tab until something of that name has the focus."""
        passed: list[str] = []
        for _ in range(150):
            self.press(key)
            passed.append(self._page.evaluate(_FOCUSED))
            if re.match(name, passed[-1]):
                return
        raise AssertionError(f"{key} does not lead to {name!r}, but to {passed}")

    def back_to(self, name: str) -> None:
        """The same, the other way round."""
        self.to(name, "Shift+Tab")


def test_the_keyboard_is_enough(visit: Callable[..., Visit]) -> None:
    bob = visit(BOB, signed_in=False)
    keys = Keyboard(bob.page)
    keys.to("Sign in with Hugging Face")
    keys.press("Enter")
    bob.page.wait_for_url("**/oauth/authorize**")
    keys.to("Sign in as")
    keys.press("b")
    keys.to("Authorize")
    keys.press("Enter")
    expect(bob.page.get_by_text("Signed in as bob")).to_be_visible()

    keys.to("Find models on the Hub")
    keys.write("local/")
    keys.to("Search")
    keys.press("Enter")
    expect(bob.found("local/base")).to_be_visible()
    keys.to("local/")
    _go_to(keys, bob, "local/base")
    keys.to("Use as base")
    keys.press("Enter")
    expect(bob.box("Base model")).to_have_value("local/base")
    for number, repo in enumerate(("local/a", "local/b"), 1):
        keys.back_to("local/")
        _go_to(keys, bob, repo)
        keys.to("Add to the merge")
        keys.press(" ")
        expect(bob.box(f"Model {number}")).to_have_value(repo)
    keys.to("Publish to")
    keys.write("bob/by-keyboard")
    keys.press("Tab")
    expect(bob.page.get_by_text("Planned: fits here")).to_be_visible()
    keys.to("Merge here")
    keys.press("Enter")
    expect(bob.job("bob/by-keyboard")).to_contain_text(re.compile("done", re.IGNORECASE))


def _go_to(keys: Keyboard, visit: Visit, repo: str) -> None:
    """With the arrows, to one of what was found."""
    for _ in range(10):
        keys.press("ArrowDown")
        if visit.found(repo).is_checked():
            return
    raise AssertionError(f"the arrows do not lead to {repo}")
