"""Licence files: which licence a text is. What restricts is known by its title; what permits, only by every word."""

from __future__ import annotations

import hashlib
import re

MAX_TEXT_BYTES = 256_000
_TITLE_WORDS = 40
_WORD = re.compile(r"[a-z0-9]+(?:\.[0-9]+)*")
_APPENDIX_WORDS = 250

_LLAMA = {f"llama {v} community license agreement": f"llama{v}" for v in ("2", "3", "3.1", "3.2", "3.3", "4")}
_GNU = {
    "gnu affero general public license version 3": "agpl-3.0",
    "gnu lesser general public license version 3": "lgpl-3.0",
    "gnu lesser general public license version 2.1": "lgpl-2.1",
    "gnu general public license version 3": "gpl-3.0",
    "gnu general public license version 2": "gpl-2.0",
}
_CC = {
    f"attribution {long}{version} {scope}": f"cc-by-{short}-{version}"
    for version, scope in (("4.0", "international"), ("3.0", "unported"))
    for long, short in (
        ("noncommercial sharealike ", "nc-sa"), ("noncommercial noderivatives ", "nc-nd"),
        ("noncommercial noderivs ", "nc-nd"), ("noncommercial ", "nc"), ("sharealike ", "sa"), ("noderivatives ", "nd"),
    )
}  # fmt: skip
_OTHERS = {
    "gemma terms of use": "gemma",
    "bigscience bloom rail 1.0": "bigscience-bloom-rail-1.0",
    "bigscience rail license v1.0": "bigscience-bloom-rail-1.0",
    "bigscience openrail m": "bigscience-openrail-m",
    "bigcode open rail m": "bigcode-openrail-m",
    "bigcode openrail m": "bigcode-openrail-m",
    "creativeml open rail m": "creativeml-openrail-m",
    "creativeml openrail m": "creativeml-openrail-m",
    "fair noncommercial research license": "fair-noncommercial-research-license",
    "apple machine learning research model": "apple-amlr",
    "mozilla public license version 2.0": "mpl-2.0",
}
_TITLES = {**_LLAMA, **_GNU, **_CC, **_OTHERS}
# Of the words from the first to the last one named, in lower case and without punctuation, joined by single spaces.
_APACHE = ("apache license version 2.0", "end of terms and conditions")
_APACHE_SHA256 = "f47877a515859acb20223d6cd0901e88fe5ce58d4fdcd3614434f4ed627d9d40"
_MIT = "permission is hereby granted free of charge"
_MIT_SHA256 = "0cf21bdfd1964a97a8615e128534845826afbc887edc95aa5c925cbf64386b5c"
_MIT_HEAD = re.compile(
    r"(the )?(mit|expat) license( mit)?|(spdx license identifier )?mit|(c )?copyright.*|all rights reserved"
)


def identify(content: bytes) -> str | None:
    """The identifier of the licence that a file is the text of; None if it is none that is known."""
    if len(content) > MAX_TEXT_BYTES:
        return None
    text = content.decode("utf-8", "replace")
    words = _words(text)
    if _is_apache(words):
        return "apache-2.0"
    if _is_mit(text, words):
        return "mit"
    title = f" {' '.join(words.split()[:_TITLE_WORDS])} "
    # The longest title first: "noncommercial" is part of the name of others.
    return next((_TITLES[t] for t in sorted(_TITLES, key=len, reverse=True) if f" {t} " in title), None)


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))


def _digest(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()


def _is_apache(words: str) -> bool:
    """The whole text from its title on, and after its end nothing but its own appendix."""
    first, last = _APACHE
    body, end, rest = words.partition(last)
    if not (words.startswith(first) and end and _digest(body + end) == _APACHE_SHA256):
        return False
    return not rest or (rest.startswith(" appendix how to apply") and len(rest.split()) <= _APPENDIX_WORDS)


def _is_mit(text: str, words: str) -> bool:
    """The whole permission, and before it nothing but a title and copyright lines."""
    _, start, rest = words.partition(_MIT)
    if not start or _digest(start + rest) != _MIT_SHA256:
        return False
    head = re.split("permission is hereby granted", text, flags=re.IGNORECASE)[0]
    return all(_MIT_HEAD.fullmatch(line) for line in map(_words, head.splitlines()) if line)
