"""The bill of materials: valid by CycloneDX's own schema, true to the lock, and the same for the same inputs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.schema._res import SPDX_JSON
from cyclonedx.validation.json import JsonStrictValidator
from hypothesis import given, settings
from hypothesis import strategies as st
from license_expression import get_license_index
from packageurl import PackageURL

import hubmerge
from hubmerge.aibom import AIBOM_NAME, Ancestor, Material, bill, merge_bill
from hubmerge.card import HUB_URL, CardFacts
from hubmerge.licenses import License, declared
from hubmerge.licenses.table import spdx_spelling
from hubmerge.localhub.cards import LICENSES
from hubmerge.output import Written
from hubmerge.spec import PinnedModel
from tests import factories as make
from tests.bundles import scene
from tests.end_to_end import support

VALIDATOR = JsonStrictValidator(SchemaVersion.V1_6)
BASE = make.pinned("org/base", role="base", card={"license": "apache-2.0"})
FT = make.pinned("org/ft", card={"license": "apache-2.0"})
WRITTEN = [Written(f"model-0000{i}-of-00002.safetensors", 100, make.digest(f"shard {i}")) for i in (2, 1)]


def facts(*models: PinnedModel, base: PinnedModel = BASE, repo: str | None = "me/merged", **keys: Any) -> CardFacts:
    asked = make.recipe(base, list(models))
    return CardFacts(make.plan(asked, base, list(models)), asked, repo, **keys)


def read(text: bytes) -> dict[str, Any]:
    """The bill, if the schema allows it."""
    problem = VALIDATOR.validate_str(text.decode())
    assert problem is None, str(problem)[:500]
    found: dict[str, Any] = json.loads(text)
    return found


def properties(component: dict[str, Any]) -> dict[str, str]:
    return {p["name"].removeprefix("hubmerge:"): p["value"] for p in component["properties"]}


# --- what it says -----------------------------------------------------------------------------------------------


def test_the_result_its_files_and_its_ancestors() -> None:
    made = facts(FT)
    data = read(merge_bill(made, WRITTEN))
    assert data["metadata"]["tools"]["components"] == [
        {"type": "application", "name": "hubmerge", "version": hubmerge.__version__}
    ]
    result = data["metadata"]["component"]
    assert (result["type"], result["name"], result["purl"]) == (
        "machine-learning-model", "me/merged", "pkg:huggingface/me/merged",
    )  # fmt: skip
    assert [(f["name"], f["hashes"]) for f in result["components"]] == [
        (w.path, [{"alg": "SHA-256", "content": w.sha256}]) for w in reversed(WRITTEN)
    ]
    assert result["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert result["modelCard"]["modelParameters"] == {
        "architectureFamily": "gpt2", "modelArchitecture": "GPT2LMHeadModel",
    }  # fmt: skip
    said = properties(result)
    assert said["method"] == made.plan.method
    assert said["plan_sha256"] == made.plan.digest
    assert json.loads(said["parameters"]) == made.plan.params.model_dump(mode="json")
    base, ft = result["pedigree"]["ancestors"]
    for model, found in ((BASE, base), (FT, ft)):
        purl = PackageURL("huggingface", "org", model.repo.removeprefix("org/"), model.commit)
        assert found["purl"] == purl.to_string() == f"pkg:huggingface/{model.repo}@{model.commit}"
        assert found["version"] == model.commit
        assert found["licenses"] == [{"license": {"id": "Apache-2.0"}}]
        assert found["externalReferences"][0]["url"] == f"{HUB_URL}/{model.repo}/tree/{model.commit}"
        assert properties(found) == {"role": model.role, "name": model.name, "header_sha256": model.header_sha256}


def test_a_local_parent_has_a_name_and_no_place() -> None:
    local = make.pinned("./secret/mine", root="/home/alice/secret/mine", name="mine")
    text = merge_bill(facts(local, repo=None), WRITTEN)
    found = read(text)["metadata"]["component"]["pedigree"]["ancestors"][1]
    assert found["name"] == "mine"
    assert not {"purl", "version", "externalReferences"} & found.keys()
    for secret in (b"alice", b"secret", b"home"):
        assert secret not in text


def test_a_merge_in_a_folder_has_a_title_and_no_place() -> None:
    result = read(merge_bill(facts(FT, repo=None), WRITTEN))["metadata"]["component"]
    assert result["name"] == facts(FT, repo=None).title
    assert "purl" not in result


def test_another_hub_is_named_in_every_package_url() -> None:
    result = read(merge_bill(facts(FT, hub_url="https://hub.example:8000"), WRITTEN))["metadata"]["component"]
    places = [result["purl"], *(a["purl"] for a in result["pedigree"]["ancestors"])]
    for place in places:
        assert PackageURL.from_string(place).to_string() == place
        assert place.endswith("?repository_url=https://hub.example:8000")


def test_the_same_inputs_give_the_same_text_whatever_the_order_of_files() -> None:
    assert merge_bill(facts(FT), WRITTEN) == merge_bill(facts(FT), WRITTEN[::-1])
    serial = read(merge_bill(facts(FT), WRITTEN))["serialNumber"]
    elsewhere = read(merge_bill(facts(FT, repo="me/other"), WRITTEN))["serialNumber"]
    other = facts(FT)
    other = dataclasses.replace(other, plan=dataclasses.replace(other.plan, digest="0" * 64))
    assert len({serial, elsewhere, read(merge_bill(other, WRITTEN))["serialNumber"]}) == 3


# --- licences ---------------------------------------------------------------------------------------------------


def material(found: License | None, *parents: License | None) -> Material:
    ancestors = [Ancestor("model", f"m{i}", f"org/m{i}", "0" * 40, p) for i, p in enumerate(parents)]
    return Material("m", None, HUB_URL, found, {"method": "linear"}, "0" * 64, ancestors, [])


def test_every_licence_of_the_hub_is_named_by_spdx_or_with_its_address() -> None:
    listed = set(json.loads(Path(SPDX_JSON).read_text())["enum"])  # what the schema takes as an id
    for name in sorted(LICENSES - {"unknown", "other"}):
        text = bill(material(declared({"license": name})))
        (entry,) = (e["license"] for e in json.loads(text)["metadata"]["component"]["licenses"])
        assert entry.get("id", entry.get("name")).lower() == name
        assert entry["id"] in listed if "id" in entry else entry["url"].startswith("https://")
    for name in ("mit", "gpl-3.0", "gemma"):
        read(bill(material(declared({"license": name}), declared({"license": name}), None)))
    assert declared({"license": "unknown"}) is None


def test_spdx_spellings_are_spdxs() -> None:
    listed = set(json.loads(Path(SPDX_JSON).read_text())["enum"])
    known = {e["spdx_license_key"] for e in get_license_index() if e.get("spdx_license_key") and not e["is_exception"]}
    for name in known | {n for e in get_license_index() for n in e.get("other_spdx_license_keys", ())}:
        assert (found := spdx_spelling(name)) is None or found in listed, name
    assert (spdx_spelling("gpl-3.0"), spdx_spelling("0bsd")) == ("GPL-3.0", "0BSD")
    assert (spdx_spelling("gpl"), spdx_spelling("llama3.1")) == (None, None)


def test_a_licence_of_ones_own_has_its_name_and_its_address() -> None:
    own = License(("mit", "other"), "acme-1", "https://acme.example/licence")
    assert read(bill(material(own)))["metadata"]["component"]["licenses"] == [
        {"license": {"id": "MIT"}},
        {"license": {"name": "acme-1", "url": "https://acme.example/licence"}},
    ]
    beside = License(("other",), "acme-1", "LICENSE")
    assert read(bill(material(beside)))["metadata"]["component"]["licenses"] == [{"license": {"name": "acme-1"}}]


def test_with_a_silent_parent_no_licence_is_named() -> None:
    silent = make.pinned("org/silent")
    result = read(merge_bill(facts(FT, silent), WRITTEN))["metadata"]["component"]
    assert "licenses" not in result
    assert ["licenses" in a for a in result["pedigree"]["ancestors"]] == [True, True, False]


# --- hostile text -----------------------------------------------------------------------------------------------


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=4)


@settings(deadline=None, derandomize=True, max_examples=10)
@given(model_type=JSON, classes=JSON, license_=JSON, title=st.text(min_size=1))
def test_whatever_strangers_write_it_stays_valid(model_type: Any, classes: Any, license_: Any, title: str) -> None:
    config = {"model_type": model_type, "architectures": classes}
    base = make.pinned("org/base", role="base", config=config, card={"license": license_, "license_name": license_})
    read(merge_bill(facts(FT, base=base), WRITTEN))
    assert json.loads(bill(dataclasses.replace(material(None), name=title)))["metadata"]["component"]["name"] == title


# --- in what is made --------------------------------------------------------------------------------------------


def test_a_merge_has_it_and_lists_it_in_the_lock(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a")):
        support.save(tmp_path / name, support.tensors(seed))
    recipe = {"method": "linear", "base": str(tmp_path / "base"), "models": [str(tmp_path / "a")]}
    for out in ("out", "again"):
        hubmerge.merge(hubmerge.Recipe.from_data(recipe), tmp_path / out)
    assert_listed(tmp_path / "out")
    assert (tmp_path / "out" / AIBOM_NAME).read_bytes() == (tmp_path / "again" / AIBOM_NAME).read_bytes()


def assert_listed(folder: Path) -> dict[str, Any]:
    text = (folder / AIBOM_NAME).read_bytes()
    lock = json.loads((folder / "hubmerge.lock.json").read_text())
    listed = {f["path"]: f["sha256"] for f in lock["outputs"]}
    assert listed[AIBOM_NAME] == hashlib.sha256(text).hexdigest()
    data = read(text)
    result = data["metadata"]["component"]
    weights = {f["name"]: f["hashes"][0]["content"] for f in result["components"]}
    assert weights
    assert weights == {p: d for p, d in listed.items() if p.endswith(".safetensors")}
    assert properties(result)["plan_sha256"] == lock["plan_sha256"]
    return data


def test_a_bundle_has_it_and_keeps_it_true_when_it_changes(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        scene.save(tmp_path / name, seed)
    place = tmp_path / "bundle"
    hubmerge.create_bundle(scene.recipe("magnitude_mask", tmp_path / "base", [tmp_path / "a"]), out=place)
    before = assert_listed(place)
    assert properties(before["metadata"]["component"])["codec"] == "magnitude_mask"
    hubmerge.add_task(place, tmp_path / "b", base=tmp_path / "base")
    ancestors = assert_listed(place)["metadata"]["component"]["pedigree"]["ancestors"]
    assert [(properties(a)["role"], a["name"]) for a in ancestors] == [("base", "base"), ("model", "a"), ("model", "b")]
