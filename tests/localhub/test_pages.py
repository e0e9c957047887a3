"""What a repository's address shows in a browser."""

from __future__ import annotations

from collections.abc import Callable

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from hubmerge.localhub import LocalHub

CARD = """\
---
license: mit
---

# A card

| a | b |
|---|---|
| 1 | --- |

<script>alert(1)</script> [a link](javascript:alert(1))

![a plot](assets/plot.svg)
"""


@pytest.fixture
def hub(start_hub: Callable[..., LocalHub]) -> LocalHub:
    started = start_hub()
    api = HfApi(endpoint=started.endpoint, token=started.token)
    for name in ("local/shown", "local/hidden"):
        api.create_repo(name, private=name.endswith("hidden"))
        files = {"README.md": CARD, "assets/plot.svg": "<svg/>", "a <b>.txt": "x"}
        operations = [CommitOperationAdd(path, text.encode()) for path, text in files.items()]
        api.create_commit(name, operations, commit_message="files")
    return started


def test_the_card_and_links_to_the_files(hub: LocalHub) -> None:
    page = httpx2.get(f"{hub.endpoint}/local/shown")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "<h1>A card</h1>" in page.text
    assert "license: mit" not in page.text
    assert "<td>---</td>" in page.text
    assert '<base href="/local/shown/resolve/main/">' in page.text
    assert "<script" not in page.text
    assert 'href="javascript' not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for link in ("assets/plot.svg", "a%20%3Cb%3E.txt"):
        assert f'href="{link}"' in page.text
        assert httpx2.get(f"{hub.endpoint}/local/shown/resolve/main/{link}").status_code == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [("/local/hidden", 401), ("/local/missing", 401), ("/local", 404), ("/api/nothing", 404), ("/_admin/none", 404)],
)
def test_strangers_see_no_private_page_and_no_other(hub: LocalHub, path: str, status: int) -> None:
    assert httpx2.get(hub.endpoint + path).status_code == status
