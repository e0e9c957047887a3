"""How papers are cited: what a method's ``paper`` says, as a link and in BibTeX, and never more."""

from __future__ import annotations

import re

import pytest

from hubmerge.card import bibtex, paper_url
from hubmerge.codecs import all_codecs
from hubmerge.methods import all_methods
from hubmerge.spec import Algorithm

ALL = (*all_methods(), *all_codecs())


def fields(entry: str) -> dict[str, str]:
    """The fields of an entry with one on each line."""
    kind, *lines, end = entry.split("\n")
    assert re.fullmatch(r"@misc\{[a-z]+\d{4}[a-z]+,", kind)
    assert end == "}"
    found = [re.fullmatch(r"  (\w+) +=\ \{(.*)\},", line) for line in lines]
    return {m[1]: m[2] for m in found if m is not None}


@pytest.mark.parametrize("algorithm", ALL, ids=lambda a: a.name)
def test_every_paper_can_be_cited(algorithm: Algorithm) -> None:
    entry, url = bibtex(algorithm.paper), paper_url(algorithm.paper)
    assert entry is not None
    assert url is not None
    found = fields(entry)
    assert {"title", "author", "year", "url"} < found.keys()
    assert found["url"] == url
    title = re.sub(r"[{}]", "", found["title"])
    assert algorithm.paper.startswith(title)
    assert f", {found['year']}, " in algorithm.paper
    assert all(name in algorithm.paper for name in re.split(" and ", found["author"].removesuffix(" and others")))
    assert found.get("eprint", found.get("doi", "nothing")) in algorithm.paper
    assert entry.count("{") == entry.count("}")


def test_an_entry_in_full() -> None:
    assert bibtex("A 5% rule & more (NICK), Ada et al., 2024, arXiv 2401.01234") == (
        "@misc{ada2024rule,\n"
        "  title         = {{A 5\\% rule \\& more}},\n"
        "  author        = {Ada and others},\n"
        "  year          = {2024},\n"
        "  eprint        = {2401.01234},\n"
        "  archivePrefix = {arXiv},\n"
        "  url           = {https://arxiv.org/abs/2401.01234},\n"
        "}"
    )


@pytest.mark.parametrize(
    ("paper", "url"),
    [
        ("An example", None),
        ("A title, no year, arXiv 2401.01234", "https://arxiv.org/abs/2401.01234"),
        ("See arXiv:2401.01234v2", "https://arxiv.org/abs/2401.01234"),
        ("A title, Ada, 2024, doi 10.1000/x.y", "https://doi.org/10.1000/x.y"),
        ("A title, Ada, 2024, doi 10.1000/x](https://evil.example)", "https://doi.org/10.1000/x"),
        ("A title, Ada, 2024, https://evil.example", None),
    ],
)
def test_what_is_not_known_is_not_invented(paper: str, url: str | None) -> None:
    assert paper_url(paper) == url
    assert (bibtex(paper) is None) == ("Ada, 2024, doi 10.1000/x.y" not in paper)
