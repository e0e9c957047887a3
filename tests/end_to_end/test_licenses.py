"""Licences from the Hub to the Hub: what is forbidden is not published, what is allowed carries what was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from ruamel.yaml import YAML

from hubmerge.localhub import LocalHub
from hubmerge.lock import Lock, loads
from tests.end_to_end import support
from tests.end_to_end.support import Outcome, Town, save, save_adapter, tensors

TARGET = "local/merged"
LLAMA = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n\nthe text\n"
LLAMA_NOTICE = (
    "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."
)


@pytest.fixture
def town(start_hub: Callable[..., LocalHub]) -> Town:
    return support.open_town(start_hub)


@pytest.fixture
def models(town: Town, tmp_path: Path) -> Callable[..., Path]:
    """Publishes a base and fine-tunes under these licences; returns a recipe that merges them."""

    def publish(*licenses: str | None, **keys: Any) -> Path:
        names = ["base", *"abcd"[: len(licenses) - 1]]
        for seed, (name, found) in enumerate(zip(names, licenses, strict=True)):
            folder = save(tmp_path / "in" / name, tensors(seed))
            with_license(folder, found)
            town.publish(f"local/{name}", folder)
        recipe = tmp_path / "merge.yaml"
        data = {"method": "task_arithmetic", "base": "local/base", "models": [f"local/{n}" for n in names[1:]]}
        recipe.write_text(json.dumps(data | keys))
        return recipe

    return publish


def with_license(folder: Path, found: str | None, **files: str) -> Path:
    """The folder, with a card that declares this licence, and these files."""
    (folder / "README.md").write_text(f"---\nlicense: {found}\n---\n" if found else "---\nlanguage: en\n---\n")
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def push(recipe: Path, *flags: str, to: str = TARGET) -> Outcome:
    return support.hubmerge("push", recipe, "--to", to, *flags)


def published(town: Town, repo: str, path: str) -> str:
    return Path(town.api.hf_hub_download(repo, path)).read_text()


def lock_of(town: Town, repo: str) -> Lock:
    return loads(published(town, repo, "hubmerge.lock.json"))


# --- what is forbidden


@pytest.mark.parametrize(
    ("licenses", "says"),
    [
        (("mit", "cc-by-nc-nd-4.0"), "local/a is under cc-by-nc-nd-4.0, which allows no derivatives"),
        (("gpl-3.0", "mit", "cc-by-nc-4.0"), "no licence satisfies all of the parents'"),
        (("llama3.1", "mit"), "llama3.1 asks for a name that begins with “Llama”, and 'merged' does not"),
    ],
)
def test_a_forbidden_push_creates_nothing(
    town: Town, models: Callable[..., Path], licenses: tuple[str, ...], says: str
) -> None:
    recipe = models(*licenses)
    town.hub.requests.clear()
    for flags in (("--public",), ("--license", "other"), ("--accept-license-risk", "--pr")):
        found = push(recipe, *flags)
        assert found.code == 5, found.text
        assert says in found.err
        assert "--accept-license-risk" in found.err
    assert town.state(TARGET) is None
    assert not [r for r in town.hub.requests if r.method not in ("GET", "HEAD")]


def test_an_existing_repository_stays_as_it_is(town: Town, models: Callable[..., Path]) -> None:
    recipe = models("mit", "mit")
    assert push(recipe).code == 0
    before = town.state(TARGET)
    town.commit("local/a", "README.md", b"---\nlicense: cc-by-nd-4.0\n---\n")
    assert push(recipe).code == 5
    assert town.state(TARGET) == before


def test_who_states_a_licence_and_accepts_the_risk_publishes(town: Town, models: Callable[..., Path]) -> None:
    recipe = models("mit", "cc-by-nd-4.0")
    done = push(recipe, "--license", "cc-by-nd-4.0", "--accept-license-risk")
    assert done.code == 0, done.text
    assert "do not allow the result to be published" in done.err
    card = ModelCard(published(town, TARGET, "README.md"))
    assert card.data.license == "cc-by-nd-4.0"
    assert "allows no derivatives, and a merge is one; the card states cc-by-nd-4.0, as the recipe says" in card.text
    check = lock_of(town, TARGET).license
    assert check is not None
    assert (check.verdict, check.license, check.accepted_risk) == ("blocked", "cc-by-nd-4.0", True)
    # What was stated is part of the recipe that is published.
    assert YAML(typ="safe", pure=True).load(published(town, TARGET, "hubmerge.yaml"))["card"] == {
        "license": "cc-by-nd-4.0"
    }


def test_a_licence_that_drops_what_a_parent_asks_is_refused_too(town: Town, models: Callable[..., Path]) -> None:
    found = push(models("mit", "cc-by-nc-4.0"), "--license", "mit")
    assert found.code == 5
    assert "mit drops what cc-by-nc-4.0 asks" in found.err
    assert town.state(TARGET) is None


def test_a_local_merge_is_told_and_not_stopped(models: Callable[..., Path], tmp_path: Path) -> None:
    recipe = models("mit", "cc-by-nd-4.0")
    done = support.hubmerge("merge", recipe, "--out", tmp_path / "out")
    assert done.code == 0, done.text
    assert "licence: none can be stated; the parents' licences do not allow the result to be published" in done.err
    assert "local/a is under cc-by-nd-4.0, which allows no derivatives, and a merge is one" in done.err
    assert "license:" not in (tmp_path / "out" / "README.md").read_text().split("---")[1]


def test_the_plan_says_it_before(models: Callable[..., Path]) -> None:
    recipe = models("mit", "cc-by-nd-4.0")
    shown = support.hubmerge("plan", recipe)
    assert shown.code == 0
    assert "licence  none can be stated; the parents' licences do not allow the result to be published" in shown.out
    assert "- local/a is under cc-by-nd-4.0" in shown.out
    answer = json.loads(support.hubmerge("plan", recipe, "--json").out)
    assert answer["license"] is None
    assert answer["license_check"]["verdict"] == "blocked"
    assert json.loads(support.hubmerge("plan", recipe, "--json", "--license", "mit").out)["license"] == "mit"
    wrong = support.hubmerge("plan", recipe, "--license", "no licence")
    assert wrong.code == 2
    assert "not the identifier of a licence" in wrong.err


# --- what is allowed


def test_the_llama_family(town: Town, models: Callable[..., Path], tmp_path: Path) -> None:
    recipe = models("llama3.1", "apache-2.0", "mit")
    for name in ("base", "a"):
        files = {"LICENSE": LLAMA, "USE_POLICY__md": f"{name}'s copy", "NOTICE": f"Copyright {name}\n"}
        town.publish(f"local/{name}", with_license(tmp_path / "in" / name, "llama3.1", **files))
    repo = "local/Llama-3.1-merged"
    done = push(recipe, "--json", to=repo)
    assert done.code == 0, done.text
    check = json.loads(done.out)["license_check"]
    assert (check["verdict"], check["license"]) == ("allowed", "llama3.1")
    assert all(duty["done"] for duty in check["duties"])
    assert published(town, repo, "LICENSE") == LLAMA
    assert published(town, repo, "USE_POLICY.md") == "base's copy"
    assert published(town, repo, "licenses/a/USE_POLICY.md") == "a's copy"
    assert published(town, repo, "licenses/a/NOTICE") == "Copyright a\n"
    assert published(town, repo, "NOTICE") == f"Copyright base\n\n{LLAMA_NOTICE}\n"
    assert "licenses/a/LICENSE" not in town.api.list_repo_files(repo)  # the base's
    card = ModelCard(published(town, repo, "README.md"))
    assert card.data.license == "llama3.1"
    assert "\n**Built with Llama**\n" in card.text
    assert support.hubmerge("verify", repo).code == 0
    check_of_lock = lock_of(town, repo).license
    assert check_of_lock is not None
    assert (check_of_lock.verdict, check_of_lock.license) == ("allowed", "llama3.1")


def test_a_fine_tune_that_calls_itself_mit_but_has_llamas_text(
    town: Town, models: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = models("mit", "mit")
    town.publish("local/a", with_license(tmp_path / "in" / "a", "mit", LICENSE=LLAMA))
    assert push(recipe).code == 5
    assert push(recipe, to="local/Llama-x").code == 0
    assert ModelCard(published(town, "local/Llama-x", "README.md")).data.license == "llama3.1"
    assert published(town, "local/Llama-x", "NOTICE") == f"{LLAMA_NOTICE}\n"


def test_several_licences_that_limit_use_are_named_together(town: Town, models: Callable[..., Path]) -> None:
    done = push(models("gemma", "cc-by-nc-4.0"))
    assert done.code == 0, done.text
    assert "left to you: give the licence's text along" in done.err
    card = ModelCard(published(town, TARGET, "README.md"))
    assert card.data.license == "other"
    assert card.data.license_name == "gemma-and-cc-by-nc-4.0"
    assert card.data.license_link == "NOTICE"
    assert "non-commercial use only (cc-by-nc-4.0)" in card.text
    notice = published(town, TARGET, "NOTICE")
    assert "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms" in notice
    assert "local/a: cc-by-nc-4.0, https://creativecommons.org/licenses/by-nc/4.0/" in notice


def test_what_is_not_known_is_published_without_a_licence_and_says_so(town: Town, models: Callable[..., Path]) -> None:
    done = push(models("apache-2.0", None))
    assert done.code == 0, done.text
    assert "licence: none can be stated; it is not known whether the result may be published" in done.err
    card = ModelCard(published(town, TARGET, "README.md"))
    assert card.data.license is None
    assert "local/a declares no licence: the merged model's card states none" in card.text


def test_a_merged_adapter(town: Town, tmp_path: Path) -> None:
    base = with_license(save(tmp_path / "base", tensors(0)), "llama3.1", LICENSE=LLAMA)
    town.publish("local/base", base)
    for name in ("x", "y"):
        adapter = save_adapter(tmp_path / name, base="local/base")
        town.publish(f"local/{name}", with_license(adapter, "cc-by-nc-4.0", LICENSE=f"{name}'s text"))
    flags = ["--method", "linear", "--model", "local/x", "--model", "local/y", "--format", "adapter"]
    assert support.hubmerge("push", *flags, "--to", TARGET).code == 5
    done = support.hubmerge("push", *flags, "--to", "local/Llama-x")
    assert done.code == 0, done.text
    card = ModelCard(published(town, "local/Llama-x", "README.md"))
    assert card.data.license_name == "llama3.1-and-cc-by-nc-4.0"
    assert "\n**Built with Llama**\n" in card.text
    assert published(town, "local/Llama-x", "licenses/y/LICENSE") == "y's text"


# --- bundles


def bundle(*arguments: str | Path) -> Outcome:
    return support.hubmerge("bundle", *arguments)


@pytest.fixture
def bundles(town: Town, models: Callable[..., Path]) -> Callable[..., Path]:
    def publish(*licenses: str | None) -> Path:
        return models(*licenses, method="superposition", output={"format": "bundle"})

    return publish


def test_a_forbidden_bundle_is_not_created(town: Town, bundles: Callable[..., Path], tmp_path: Path) -> None:
    recipe = bundles("mit", "mit", "cc-by-nd-4.0")
    found = bundle("create", recipe, "--to", TARGET)
    assert found.code == 5, found.text
    assert town.state(TARGET) is None
    local = bundle("create", recipe, "--out", tmp_path / "out")
    assert local.code == 0, local.text
    assert "do not allow the result to be published" in local.err
    done = bundle("create", recipe, "--to", TARGET, "--license", "cc-by-nd-4.0", "--accept-license-risk")
    assert done.code == 0, done.text
    check = lock_of(town, TARGET).license
    assert check is not None
    assert check.accepted_risk


def test_a_forbidden_addition_leaves_the_bundle_as_it_is(town: Town, bundles: Callable[..., Path]) -> None:
    recipe = bundles("mit", "mit", "mit", "cc-by-nd-4.0")
    data = json.loads(recipe.read_text())
    recipe.write_text(json.dumps(data | {"models": ["local/a", "local/b"]}))
    assert bundle("create", recipe, "--to", TARGET).code == 0
    before = town.state(TARGET)
    found = bundle("add", TARGET, "--model", "local/c")
    assert found.code == 5, found.text
    assert "local/c is under cc-by-nd-4.0" in found.err
    assert town.state(TARGET) == before


def test_a_llama_bundle_grows_and_shrinks(town: Town, bundles: Callable[..., Path], tmp_path: Path) -> None:
    recipe = bundles("mit", "mit", "mit")
    repo = "local/Llama-bundle"
    base_notice = with_license(tmp_path / "in" / "base", "mit", NOTICE="Copyright base\n")
    town.publish("local/base", base_notice)
    assert bundle("create", recipe, "--to", repo).code == 0
    assert published(town, repo, "NOTICE") == "Copyright base\n"
    adapter = save_adapter(tmp_path / "x", base="local/base")
    town.publish("local/x", with_license(adapter, "llama3.1", LICENSE=LLAMA))
    done = bundle("add", repo, "--model", "local/x", "--json")
    assert done.code == 0, done.text
    assert json.loads(done.out)["license_check"]["license"] == "llama3.1"
    assert published(town, repo, "NOTICE") == f"Copyright base\n\n{LLAMA_NOTICE}\n"
    assert published(town, repo, "licenses/x/LICENSE") == LLAMA
    assert ModelCard(published(town, repo, "README.md")).data.license == "llama3.1"
    assert json.loads(bundle("ls", repo, "--json").out)["license_check"]["license"] == "llama3.1"
    assert support.hubmerge("verify", repo).code == 0
    assert bundle("remove", repo, "--task", "x").code == 0
    assert ModelCard(published(town, repo, "README.md")).data.license == "mit"
    assert "licenses/x/LICENSE" not in town.api.list_repo_files(repo)
    assert support.hubmerge("verify", repo).code == 0


# --- hostile text


HOSTILE = [
    "mit\nlicense: apache-2.0", "*", "<script>alert(1)</script>", "{{ 7 * 7 }}", "\u202etim", "mit\0", "# mit", "- mit",
    "[x](javascript:alert(1))", "![x](http://x)", "x" * 20_000, "(" * 200 + " or mit", "mit and " * 5000, "`a` | b",
]  # fmt: skip


def test_hostile_licences_do_no_harm(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tensors(0))
    places = []
    for i, text in enumerate(HOSTILE):
        for kind, stated in (("a", text), ("b", "other"), ("c", [text, {text: text}])):
            places.append(save(tmp_path / f"{kind}{i}", tensors(0)))
            front = json.dumps({"license": stated, "license_name": text, "license_link": text})
            (places[-1] / "README.md").write_text(f"---\n{front}\n---\n")
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(json.dumps({"method": "linear", "base": str(base), "models": [str(p) for p in places]}))
    done = support.hubmerge("merge", recipe, "--out", tmp_path / "out")
    assert done.code == 0, done.text
    text = (tmp_path / "out" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert "license" not in YAML(typ="safe", pure=True).load(front)
    inline = [t for token in MarkdownIt("commonmark").parse(body) for t in (token, *(token.children or ()))]
    assert not {"html_block", "html_inline", "image"} & {t.type for t in inline}
    assert not [t for t in inline if t.type == "link_open" and not str(t.attrs["href"]).startswith("https://")]
    assert "49" not in body.split("## Licence")[1]
    for shown in (text, done.text):
        assert not any(c in shown for c in "\u202e\0")
        assert max(map(len, shown.splitlines())) < 2500
