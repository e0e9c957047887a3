"""Hostile texts through every place where a card shows what a repository or a user wrote.

The card is rendered as Markdown with HTML let through, as no website does it, and its elements are looked at one by
one: there are those that the template makes, and no others. Each card shows several texts at once, one for each model.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from pydantic import ValidationError

from hubmerge.analysis import Diagnostics
from hubmerge.bundles.card import bundle_card
from hubmerge.bundles.manifest import TaskEntry
from hubmerge.card import CardFacts, render_card
from hubmerge.errors import RecipeError
from hubmerge.localhub.cards import validate
from hubmerge.parent_cards import quotes
from hubmerge.recipe import Recipe
from hubmerge.recipe.refs import name_problem
from hubmerge.spec import DTYPES, AdapterPart, FactorPair, PinnedModel, Problem, Quotes, TensorJob, Truncation
from tests import factories as make
from tests.bundles.test_card import made as bundle
from tests.bundles.test_card import origin
from tests.hostile import TEXTS
from tests.test_card import HEAD, split
from tests.test_plots import diagnostics

HUB = "https://huggingface.co"
OURS = (f"{HUB}/", "https://arxiv.org/abs/", "https://doi.org/", "assets/")
# Elements that only structure text may come in any number: a hostile paragraph may be one more, or one less.
LOOSE = frozenset({"p", "li", "ul", "a", "code"})
HARMLESS = LOOSE | frozenset({
    "h1", "h2", "h3", "table", "thead", "tbody", "tr", "th", "td", "pre", "blockquote", "img", "strong",
})  # fmt: skip
ATTRIBUTES = {"a": {"href"}, "img": {"src", "alt"}, "code": {"class"}, "ol": {"start"}}
AUTHORS_OWN = frozenset({"em", "h4", "h5", "h6", "hr", "ol", "br", "s"})


class Elements(HTMLParser):
    """Every element of a page, and whatever of a page is none."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.titles: list[str] = []
        self.addresses: list[str] = []
        self.strange: list[str] = []
        self._in_title = False

    @property
    def structure(self) -> dict[str, int]:
        """How often each element is there that does more than structure text."""
        return {tag: n for tag, n in self.tags.items() if tag not in LOOSE}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.strange += [f"{tag} {name}" for name, _ in attrs if name not in ATTRIBUTES.get(tag, ())]
        self.addresses += [str(value) for name, value in attrs if name in ("href", "src")]
        self._in_title = tag == "h2"
        self.titles += [""] * self._in_title

    def handle_endtag(self, tag: str) -> None:
        self._in_title = self._in_title and tag != "h2"

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.titles[-1] += data

    def handle_comment(self, data: str) -> None:
        self.strange.append(f"comment {data}")

    def handle_decl(self, decl: str) -> None:
        self.strange.append(f"declaration {decl}")

    def handle_pi(self, data: str) -> None:
        self.strange.append(f"instruction {data}")

    def unknown_decl(self, data: str) -> None:
        self.strange.append(f"section {data}")


def page(body: str, *, any_link: bool = True) -> Elements:
    """The elements of the rendered card; with ``any_link``, addresses that a renderer would refuse are links, too."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    if any_link:
        parser.validateLink = lambda url: True  # type: ignore[method-assign]
    found = Elements()
    found.feed(parser.render(body))
    found.close()
    return found


def check_form(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and text are what they were meant to be, and hold nothing invisible."""
    data, body = split(text)
    assert ModelCard(text).data.to_dict() == data
    assert [e for e in validate(text, "model").errors if '"license"' not in e] == []
    assert {c for c in text if c != "\n" and unicodedata.category(c).startswith("C")} <= {"\u200c", "\u200d", "\t"}
    return data, body


# --- what comes from repositories -------------------------------------------------------------------------------

WRITABLE = [t for t in TEXTS if t != "\ud800"]
"""Half a character stands in no recipe and in no manifest."""
AT_ONCE = 14
SOME = [TEXTS[i : i + AT_ONCE] for i in range(0, len(TEXTS), AT_ONCE)]


def parent(repo: str, evil: str, number: int = 0, **keys: Any) -> PinnedModel:
    """A model that says the same hostile thing wherever it can say something."""
    limits = quotes(f"## Limitations\n\nIt is {number}.\n\n{evil}\n").limitations
    bibtex = quotes(f"```bibtex\n@misc{{a,\n  note = {{{evil[:2000]}}}\n}}\n```\n").bibtex
    names = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets", "tags", "model_name")
    card = dict.fromkeys(names, evil) | {"language": [evil, "en", 3, None], "datasets": {evil: evil}}
    config = {"model_type": evil, "architectures": ["GPT2LMHeadModel"], "auto_map": {evil: evil}}
    made = make.pinned(f"{repo}-{number}", **({"card": card, "config": config} | keys))
    return dataclasses.replace(made, quotes=Quotes(limits, bibtex))


@cache
def measured(count: int) -> Diagnostics:
    """Figures of so many tasks."""
    return diagnostics([str(i) for i in range(count)], spectra=False)


def merged(texts: Sequence[str]) -> str:
    """The card of a merge whose models' names, files, tensors and cards are hostile."""
    base = parent("org/base", texts[0], role="base")
    other = {"license": "other", "license_name": texts[1], "license_link": texts[1]}
    models = [parent("org/ft", t, i) if i % 2 else parent("org/ft", t, i, card=other) for i, t in enumerate(texts)]
    asked = make.recipe(base, models)
    said = [Problem("note", f"{t}{end}") for t in texts for end in ("", ": y")]
    said += [Problem("warning", f"tensor {t!r}: x") for t in texts]
    planned = make.with_heads(make.plan(asked, base, models, problems=tuple(said)), {f"h{t}": HEAD for t in texts})
    named = [dataclasses.replace(m, repo=f"org/{t}", name=t) for m, t in zip(models, texts, strict=True)]
    named[0] = dataclasses.replace(named[0], repo="org/a", commit=texts[0])
    planned = dataclasses.replace(planned, models=tuple(named), digest=texts[-1])
    found = dataclasses.replace(measured(len(texts)), tasks=tuple(texts))
    return render_card(CardFacts(planned, asked, "me/merge", diagnostics=found))


def adapter(texts: Sequence[str]) -> str:
    """The card of a merged adapter of local folders."""
    base = parent("/b", texts[0], role="base", root="/b")
    config = {"task_type": texts[0], "base_model_name_or_path": texts[0]}
    models = [parent("/m", t, i, root=f"/m-{i}", adapter=config) for i, t in enumerate(texts)]
    asked = make.recipe(base, models, output={"format": "adapter"})
    part = AdapterPart(texts[0], "weight", "low_rank", (), rank=4)
    job = TensorJob(
        0, texts[0], "linear", (8, 8), DTYPES["F32"], 0, 0, 4, "merge", None, (part,), factors=FactorPair(("a", "b"), 2)
    )
    named = tuple(dataclasses.replace(m, name=t) for m, t in zip(models, texts, strict=True))
    planned = dataclasses.replace(make.plan(asked, base, models, jobs=(job,)), models=named)
    return render_card(CardFacts(planned, asked, None, truncation=Truncation(0.1, texts[1], 0.2)))


def bundled(texts: Sequence[str]) -> str:
    """The card of a bundle whose manifest somebody has written by hand."""

    def said(text: str, number: int = 0) -> dict[str, Any]:
        terms = {"license": "other", "license_name": text, "license_link": text}
        quoted = {"limitations": (f"It is {number}.", text), "bibtex": f"@misc{{{text}}}"}
        return {"license": terms, "languages": (text,), "datasets": (text,), **quoted}

    places = [{"name": f"n{t}", "repo": None} if i % 2 else {"name": "n", "repo": t} for i, t in enumerate(texts)]
    tasks = [
        TaskEntry(id=i, name=f"t{i}", source=origin(**place, **said(t, i)), norm=1.0, error=1.0)
        for i, (t, place) in enumerate(zip(texts, places, strict=True))
    ]
    return bundle_card(bundle(*tasks, base=origin("base", repo=f"org/{texts[0]}", **said(texts[0]))), "me/b", HUB)


@cache
def harmless(make_card: Callable[[Sequence[str]], str], count: int) -> Elements:
    """The elements of the card where everything is called something decent."""
    return page(split(make_card([f"plain{i}" for i in range(count)]))[1])


@pytest.mark.parametrize("make_card", [merged, adapter, bundled])
@pytest.mark.parametrize("texts", SOME, ids=range(len(SOME)))
def test_nothing_from_a_repository_is_more_than_text(
    texts: Sequence[str], make_card: Callable[[Sequence[str]], str]
) -> None:
    texts = [t for t in texts if t in WRITABLE or make_card is not bundled]
    expected = harmless(make_card, len(texts))
    _, body = check_form(make_card(texts))
    found = page(body)
    assert found.strange == []
    assert found.tags.keys() <= HARMLESS
    assert found.structure == expected.structure
    assert found.titles == expected.titles
    assert [a for a in found.addresses if not a.startswith(OURS)] == []


# --- what comes from a recipe -----------------------------------------------------------------------------------

WORDS = (
    "title", "summary", "description", "license", "intended_use", "out_of_scope_use", "limitations", "evaluation",
    "citation", "authors", "contact", "acknowledgements",
)  # fmt: skip
LAST = ["Reproduce and verify", "Provenance", "Licence", "Citation", "Authors", "Contact", "Acknowledgements"]


def written(texts: Sequence[str]) -> str:
    """The card of a recipe whose author writes these texts, one after the other."""
    base, model = make.pinned("org/base", role="base"), make.pinned("org/ft")
    words = dict(zip(WORDS, texts, strict=True)) | {"tags": [*texts, "fine"], "language": ["xx" + texts[0][:9], "en"]}
    asked = make.recipe(base, [model], card=words)
    return render_card(CardFacts(make.plan(asked, base, [model]), asked, "me/merge"))


@pytest.mark.parametrize("start", range(0, len(TEXTS), 5))
def test_an_author_may_write_markdown_but_nothing_that_runs(start: int) -> None:
    texts = [WRITABLE[(start + i) % len(WRITABLE)] for i in range(len(WORDS))]
    data, body = check_form(written([t[:20_000] for t in texts]))
    assert data["tags"][-1] == "fine"
    found = page(body, any_link=False)
    assert [s for s in found.strange if s not in ("a title", "img title")] == []
    assert found.tags.keys() <= HARMLESS | AUTHORS_OWN
    assert [a for a in found.addresses if a.lower().startswith(("javascript:", "vbscript:", "file:"))] == []
    assert [title for title in found.titles if title in LAST] == LAST


@pytest.mark.parametrize("evil", TEXTS, ids=range(len(TEXTS)))
def test_what_is_no_name_is_refused(evil: str) -> None:
    """Tasks of recipes and of bundles are called by names that are harmless everywhere."""
    data = {"method": "linear", "models": [{"repo": "org/a", "name": evil}]}
    if re.fullmatch(r"[\w.-]+", evil, re.ASCII) and name_problem(evil) is None:
        assert Recipe.from_data(data).names == (evil,)
        return
    with pytest.raises(RecipeError):
        Recipe.from_data(data)
    with pytest.raises(ValidationError):
        TaskEntry(id=0, name=evil, source=origin("a"), norm=1.0)
