"""What the browser's tests share: people, and what they do with their pages."""

from __future__ import annotations

import re
from dataclasses import dataclass

from playwright.sync_api import Locator, Page, expect

from hubmerge.localhub import User
from tests.space.running import Server
from tests.space.scene import ANN, BOB

CY = User("cy", "hf_" + "cY01357924680" * 3)
DEE = User("dee", "hf_" + "dEE1122334455" * 3)
EVE = User("eve", "hf_" + "eVE5544332211" * 3)
PEOPLE = (ANN, BOB, CY, DEE, EVE)
PATIENCE_MS = 30_000
"""For whatever a page shows in the end; machines are busy."""


def agree(page: Page, name: str, *, deny: bool = False) -> None:
    """Answer the Hub's question who one is, and whether one wants to."""
    page.get_by_role("combobox", name="Sign in as").select_option(name)
    page.get_by_role("button", name="Deny" if deny else "Authorize").click()


@dataclass
class Visit:
    """Somebody's page, by what is written on it."""

    page: Page
    server: Server
    name: str

    def home(self) -> None:
        """Open the page anew."""
        self.page.goto(self.server.url)
        expect(self.page.get_by_role("heading", name="hubmerge", level=1)).to_be_visible()

    def sign_in(self) -> None:
        """By the link on the page and the Hub's question."""
        self.home()
        self.page.get_by_role("link", name="Sign in with Hugging Face").click()
        agree(self.page, self.name)
        expect(self.page.get_by_text(f"Signed in as {self.name}")).to_be_visible()

    def open(self, tab: str) -> None:
        self.page.get_by_role("tab", name=re.compile(f"^{tab}")).click()

    def box(self, name: str) -> Locator:
        return self.page.get_by_role("textbox", name=name, exact=True)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def fill(self, name: str, text: str) -> None:
        self.box(name).fill(text)
        self.box(name).blur()

    def choose(self, name: str, option: str) -> None:
        """One of a drop-down list's."""
        self.page.get_by_role("combobox", name=name, exact=True).click()
        self.page.get_by_role("option", name=re.compile(rf"(^|\s){re.escape(option)}($| \()")).click()

    def search(self, text: str) -> None:
        self.fill("Find models on the Hub", text)
        self.button("Search").click()

    def found(self, repo: str) -> Locator:
        return self.page.get_by_role("radio", name=f"{repo} (")

    def add(self, repo: str, number: int) -> None:
        """A model by its name, whatever was searched for before."""
        box = self.box("Find models on the Hub")
        box.clear()
        box.press_sequentially(repo)
        expect(self.page.get_by_role("radio", checked=True)).to_have_count(0)
        self.button("Add to the merge").click()
        expect(self.box(f"Model {number}")).to_have_value(repo)

    def write_recipe(self, text: str) -> None:
        """Into the editor, in place of what is there."""
        editor = self.recipe
        if not editor.is_visible():
            self.button("Recipe (YAML)").click()
        editor.fill(text)
        editor.blur()

    @property
    def recipe(self) -> Locator:
        return self.box("Recipe")

    def start(self, recipe: str, target: str) -> None:
        """A merge of a recipe that is typed, as soon as it is planned."""
        self.open("Merge")
        self.write_recipe(recipe)
        self.fill("Publish to", target)
        self.button("Plan").click()
        expect(self.page.get_by_text("Planned: fits here")).to_be_visible()
        self.button("Merge here").click()
        expect(self.page.get_by_role("tab", name=re.compile("^Jobs"))).to_have_attribute("aria-selected", "true")

    def job(self, target: str) -> Locator:
        """What is said of the job that publishes there."""
        return self.page.get_by_role("listitem").filter(has=self.page.get_by_role("heading", name=f": {target}"))
