"""A bundle's card and what is listed of it: true, complete, and safe whatever strangers have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import hubmerge
from hubmerge.bundles.card import bundle_card
from hubmerge.bundles.manifest import Manifest, Origin, TaskEntry, loads
from hubmerge.bundles.report import Sizes, describe
from hubmerge.errors import PublishError
from hubmerge.localhub import LocalHub
from hubmerge.lock import OutputDigest, SourceFile
from hubmerge.recipe import Card
from tests import factories as make
from tests.bundles.scene import manifest, recipe, save

HUB = "https://huggingface.co"
MIT = {"license": "mit"}


def origin(name: str, size_bytes: int = 1000, repo: str | None = "", **keys: Any) -> Origin:
    where = f"org/{name}" if repo == "" else repo
    commit = make.digest(name, 40) if where else None
    file = SourceFile(path="model.safetensors", size_bytes=size_bytes)
    data = {"license": MIT, "files": (file,), "header_sha256": make.digest(name)} | keys
    return Origin(name=name, repo=where, commit=commit, **data)


def task(name: str, number: int, *, adapter: bool = False, error: float | None = 1.5, **keys: Any) -> TaskEntry:
    return TaskEntry(id=number, name=name, source=origin(name, **keys), adapter=adapter, norm=2.0, error=error)


def made(*tasks: TaskEntry, size_bytes: int = 500, base: Origin | None = None, **keys: Any) -> Manifest:
    """A manifest with these tasks."""
    file = OutputDigest(path="bundle-00001-of-00001.safetensors", size_bytes=size_bytes, sha256=make.digest("sum"))
    return Manifest(
        format_version=1, hubmerge_version="0.1.0", codec="superposition", parameters={"storage": "int8"}, seed=0,
        base=base or origin("base"), targets=(), tasks=tasks, next_id=len(tasks), files=(file,), **keys,
    )  # fmt: skip


def card(found: Manifest, repo: str | None = "org/bundle") -> ModelCard:
    read = ModelCard(bundle_card(found, repo, HUB))
    assert read.data.to_dict()["library_name"] == "hubmerge"
    return read


# --- what it says -----------------------------------------------------------------------------------------------


def test_every_source_and_every_expectation_is_there() -> None:
    text = card(made(task("a", 0), task("b", 1, error=None), task("c", 2, adapter=True, error=0.0))).text
    for name, kind, error in (("a", "full model", "75 %"), ("b", "full model", "–"), ("c", "adapter", "0")):
        commit = make.digest(name, 40)
        link = f"[org/{name}]({HUB}/org/{name}) | [{commit[:7]}]({HUB}/org/{name}/tree/{commit})"
        assert f"| `{name}` | {link} | {kind} | mit | {error} |" in text
    base = make.digest("base", 40)
    assert f"The base is [org/base]({HUB}/org/base) at commit [{base[:7]}]({HUB}/org/base/tree/{base})" in text
    assert "3 fine-tunes and adapters of org/base in one bundle, kept by the codec `superposition`" in text
    assert "hubmerge bundle retrieve org/bundle --task a --out a\n" in text
    assert 'hubmerge.load_bundle("org/bundle")' in text
    assert 'bundle.switch(model, "b")' in text
    assert "| `storage` | `int8` |" in text
    assert "https://arxiv.org/abs/2505.11204" in text


def test_a_codec_without_theory_claims_nothing() -> None:
    text = card(made(task("a", 0, error=None))).text
    assert "no theory says how far a restored model is from the true one" in text
    assert "Expected error:" not in text


def test_a_local_base_is_asked_for_and_its_path_is_nowhere(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "mine")):
        save(tmp_path / "secret" / name, seed)
    asked = recipe("superposition", tmp_path / "secret" / "base", [tmp_path / "secret" / "mine"])
    hubmerge.create_bundle(asked, out=tmp_path / "bundle")
    text = (tmp_path / "bundle" / "README.md").read_text()
    assert "--task mine --out mine --base path/to/the/base" in text
    assert "secret" not in text
    assert "base_model" not in text
    assert "| `mine` | mine (local folder) | – | full model | apache-2.0 | 0 |" in text
    assert manifest(tmp_path / "bundle").tasks[0].source.label == "the local folder 'mine'"


@pytest.mark.parametrize(
    ("licenses", "wanted", "note"),
    [
        ((MIT, MIT, MIT), "mit", None),
        ((MIT, {"license": "apache-2.0"}, MIT), "apache-2.0", "the parents declare different licences"),
        ((MIT, {"license": "cc-by-nd-4.0"}, MIT), None, "org/a is under cc-by-nd-4.0, which allows no derivatives"),
        ((MIT, {}, MIT), None, "org/a declares no licence: the bundle's card states none"),
        (({"license": "other", "license_name": "acme-1", "license_link": "LICENSE"},) * 3, "other", None),
    ],
)
def test_the_licence_is_what_all_parents_declare(
    licenses: tuple[dict[str, Any], ...], wanted: str | None, note: str | None
) -> None:
    base, a, b = licenses
    found = card(made(task("a", 0, license=a), task("b", 1, license=b), base=origin("base", license=base)))
    assert found.data.to_dict().get("license") == wanted
    assert note is None or note in found.text
    if wanted == "other":
        address = f"{HUB}/org/base/blob/{make.digest('base', 40)}/LICENSE"
        assert found.data.to_dict()["license_link"] == address


def test_what_only_a_person_can_say() -> None:
    words = Card(title="Two in one", summary="A *summary*.", limitations="Small.", authors="Ada", language=("de",))
    found = card(made(task("a", 0), card=words))
    assert found.text.lstrip().startswith("# Two in one\n\nA *summary*.")
    assert "## Limitations\n\nSmall." in found.text
    assert "## Authors\n\nAda" in found.text
    assert found.data.to_dict()["language"] in ("de", ["de"])


def test_what_the_models_cards_say_stands_in_the_manifest() -> None:
    """So that the card can be made anew without looking at any model."""
    base = origin(
        "base", limitations=("It is *small*.",), bibtex="@misc{base}", languages=("en",), datasets=("org/web",)
    )
    tasks = [
        task("a", 0, limitations=("It is *small*.",), languages=("de", "en"), datasets=("org/web", "org/more")),
        task("b", 1, limitations=("It is slow.", "- Very."), repo=None),
    ]
    found = made(*tasks, base=base)
    read = card(loads(found.dumps()))
    told = read.text.split("## Limitations\n\n")[1].split("\n\n## ")[0]
    at = {n: f"[org/{n} at {(c := make.digest(n, 40))[:7]}]({HUB}/org/{n}/blob/{c}/README.md)" for n in ("base", "a")}
    assert told == (
        f"Quoted from the cards of the models it is made of:\n\n{at['base']} and {at['a']}:\n\n> It is \\*small\\*.\n\n"
        "the local model b:\n\n> It is slow.\n>\n> - Very."
    )
    assert f"The card of {at['base']} says how to cite the base:\n\n```bibtex\n@misc{{base}}\n```" in read.text
    assert read.data.to_dict()["language"] == ["en", "de"]
    assert read.data.to_dict()["datasets"] == ["org/web", "org/more"]


def test_the_hub_checks_the_metadata_before_anything_is_encoded(hub: LocalHub, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "mine")):
        save(tmp_path / name, seed)
    words = {"license": "no-such-licence"}
    asked = recipe("superposition", tmp_path / "base", [tmp_path / "mine"], card=words)
    hub.requests.clear()
    with pytest.raises(PublishError, match="must be one of the identifiers the Hub knows, not 'no-such-licence'"):
        hubmerge.create_bundle(asked, to="local/bundle")
    assert {r.path for r in hub.requests.find("POST")} == {"/api/validate-yaml"}


# --- sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "size_bytes", "verdict"),
    [
        (3, 500, "The bundle with its base takes 1.5 kB, the models as they are 3 kB: 0.50 of it."),
        (1, 500, "Plain storage is no larger: the model as they are take 1 kB, the bundle with its base 1.5 kB."),
        (2, 1000, "Plain storage is no larger: the models as they are take 2 kB, the bundle with its base 2 kB."),
    ],
)
def test_full_models_need_no_base(tasks: int, size_bytes: int, verdict: str) -> None:
    found = made(*(task(f"t{i}", i) for i in range(tasks)), size_bytes=size_bytes)
    assert Sizes.of(found).verdict == verdict.replace("model as they are take", "model as it is takes")
    assert Sizes.of(found).verdict in card(found).text


@pytest.mark.parametrize(
    ("full", "size_bytes", "verdict"),
    [
        (False, 500, "The bundle takes 500 B, the adapters as they are 2 kB: 0.25 of it."),
        (False, 3000, "Plain storage is no larger: the adapters as they are take 2 kB, the bundle 3 kB."),
        (True, 500, "The bundle with its base takes 1.5 kB, the models as they are with it 3 kB: 0.50 of it."),
    ],
)
def test_adapters_need_the_base_too(full: bool, size_bytes: int, verdict: str) -> None:
    found = made(task("a", 0, adapter=True), task("b", 1, adapter=not full), size_bytes=size_bytes)
    assert Sizes.of(found).verdict == verdict
    assert describe(found)["saves"] is verdict.startswith("The bundle")


# --- strangers --------------------------------------------------------------------------------------------------

EVIL = [
    "x](https://evil.example) [y",
    "<script>alert(1)</script>",
    "a|b|c\n\n# Owned",
    "`code` ![i](https://evil.example/p.png)",
    "\u202egnp.exe",
]


@pytest.mark.parametrize("text", EVIL)
def test_what_strangers_wrote_shows_as_it_is(text: str) -> None:
    """A manifest from anywhere: names of repositories and of licences are text, and never links, headings or HTML."""
    bad = origin("a", repo=text, license={"license": "other", "license_name": text, "license_link": text})
    entry = TaskEntry(id=0, name="a", source=bad, norm=1.0, error=1.0)
    found = card(made(entry, base=origin("base", repo=text)))
    assert text not in str(found.data.to_dict().get("base_model"))
    tokens = [
        t for token in MarkdownIt("commonmark").enable("table").parse(found.text) for t in (token.children or [token])
    ]
    assert not [t for t in tokens if t.type in ("html_inline", "html_block", "image")]
    addresses = [str(t.attrs["href"]) for t in tokens if t.type == "link_open"]
    assert all(a.startswith((f"{HUB}/", "https://arxiv.org/")) for a in addresses)
    assert "\u202e" not in found.text
    assert [line for line in found.text.splitlines() if line.startswith("# ")] == ["# bundle"]
