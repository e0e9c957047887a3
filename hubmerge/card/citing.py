"""How the papers behind a method are cited, from what its ``paper`` says and nothing else."""

from __future__ import annotations

import re

# "Title (NICKNAME), First et al., 2024, arXiv 2401.01234"; the nickname is not part of the title.
_PLACE = re.compile(r"arXiv[ :](?P<arxiv>\d{4}\.\d{4,5})|doi[ :](?P<doi>10\.\d{4,9}/[\w./-]+)", re.ASCII)
_PAPER = re.compile(
    rf"(?P<title>.+?)(?: \([^()]*\))?, (?P<authors>[^,]+), (?P<year>\d{{4}}), (?:{_PLACE.pattern})", re.ASCII
)
_SPECIAL = re.compile(r"[&%$#_{}~^\\]")


def paper_url(paper: str) -> str | None:
    """Where a paper is; None if that is not known."""
    found = _PLACE.search(paper)
    if found is None:
        return None
    return f"https://arxiv.org/abs/{found['arxiv']}" if found["arxiv"] else f"https://doi.org/{found['doi']}"


def bibtex(paper: str) -> str | None:
    """A BibTeX entry with what is known of a paper; None if it is not told in the usual form."""
    found = _PAPER.fullmatch(paper)
    if found is None:
        return None
    title, authors, year = (_SPECIAL.sub(r"\\\g<0>", found[k]) for k in ("title", "authors", "year"))
    surname = re.sub(r"\W", "", re.split(r" et al\.| and ", found["authors"])[0]).lower()
    words = re.findall(r"[A-Za-z]{4,}|[A-Z]{2,}", found["title"])
    word = words[0].lower() if words else ""
    where = {"eprint": found["arxiv"], "archivePrefix": "arXiv"} if found["arxiv"] else {"doi": found["doi"]}
    fields = {
        # Braces keep the capitals of names such as TIES, which bibliography styles would lower.
        "title": f"{{{title}}}",
        "author": re.sub(r" et al\.$", " and others", authors),
        "year": year,
        **where,
        "url": paper_url(paper),
    }
    lines = [f"  {name:<13} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@misc{{{surname}{year}{word},", *lines, "}"])
