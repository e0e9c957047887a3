"""What a page shows before anything costs, what search finds, and what a worker does with bundles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load_file

from hubmerge.errors import AccessError, BudgetError, HubMergeError
from hubmerge.localhub import LocalHub
from hubmerge.quantities import size
from hubmerge.space.bundle import bundle_facts
from hubmerge.space.orders import Order
from hubmerge.space.plan import job_offer, live_plan, machines
from hubmerge.space.search import search
from hubmerge.space.visitors import Visitor, sign_in
from hubmerge.space.worker import perform
from tests.end_to_end.support import tensors
from tests.space.scene import ANN, BOB, PUBLISHER, RECIPE, SMALL, Scene, open_scene

BUNDLE = """\
method: magnitude_mask
base: local/base
models: [local/a]
parameters: {density: 1.0}
output: {format: bundle}
"""


@pytest.fixture
def scene(start_hub: Callable[..., LocalHub], tmp_path: Path) -> Scene:
    return open_scene(start_hub, tmp_path)


def test_a_visitor_is_who_the_hub_says(scene: Scene) -> None:
    found = sign_in(ANN.token, scene.town.hub.endpoint)
    assert found.name == "ann"
    assert ANN.token not in repr(found)
    for token in (None, "", "hf_wrong"):
        with pytest.raises(AccessError):
            sign_in(token, scene.town.hub.endpoint)


def test_a_plan_says_what_a_merge_takes_and_whether_it_fits(scene: Scene) -> None:
    plan = live_plan(scene.visitor(ANN), RECIPE, "ann/merged", SMALL)
    assert (plan["ok"], plan["fits_here"], plan["why_not"], plan["staged"]) == (True, True, "", 0)
    assert (plan["shards"], plan["method"], plan["verdict"]) == (6, "task_arithmetic", "allowed")
    size = sum(t.nbytes for t in tensors(0).values())
    assert (plan["read_bytes"], plan["write_bytes"] >= size) == (3 * size, True)
    assert plan["time"] == "less than a minute"
    small = live_plan(scene.visitor(ANN), RECIPE, "", replace(SMALL, write_bytes=size // 2))
    assert (small["ok"], small["fits_here"]) == (True, False)
    assert small["why_not"].startswith("this writes")


def test_a_plan_that_cannot_be_made_says_why(scene: Scene) -> None:
    HfApi(endpoint=scene.town.hub.endpoint, token=PUBLISHER.token).update_repo_settings("local/b", private=True)
    for recipe, said in (
        (RECIPE, "local/b"),
        (RECIPE.replace("local/a", "local/none"), "local/none"),
        (RECIPE.replace("local/a", "/etc"), "/etc"),
        ("method: linearr\n", "did you mean 'linear'"),
    ):
        plan = live_plan(scene.visitor(ANN), recipe, "", SMALL)
        assert not plan["ok"]
        assert said in plan["error"], plan
        assert plan["hint"]
        assert ANN.token not in str(plan)
    assert live_plan(scene.visitor(PUBLISHER), RECIPE, "", SMALL)["ok"]


def test_a_gated_model_is_read_by_those_who_were_let_in(scene: Scene) -> None:
    api = HfApi(endpoint=scene.town.hub.endpoint, token=PUBLISHER.token)
    api.update_repo_settings("local/a", gated="manual")
    api.grant_access("local/a", "bob")
    plans = [live_plan(scene.visitor(user), RECIPE, "", SMALL) for user in (ANN, BOB)]
    assert [p["ok"] for p in plans] == [False, True]
    assert "local/a" in plans[0]["error"]


def test_search_says_what_a_model_is(scene: Scene) -> None:
    api = HfApi(endpoint=scene.town.hub.endpoint, token=PUBLISHER.token)
    api.update_repo_settings("local/b", gated="auto")
    api.update_repo_settings("local/a", private=True)
    found = {m["repo"]: m for m in search(scene.visitor(ANN), "local/")["models"]}
    assert {r: (m["what"], m["gated"], m["license"]) for r, m in found.items()} == {
        "local/base": ("full", False, "apache-2.0"),
        "local/b": ("full", True, "apache-2.0"),
        "local/adapter": ("adapter", False, "apache-2.0"),
    }
    assert found["local/b"]["label"].endswith("apache-2.0, gated)")
    assert {m["repo"] for m in search(scene.visitor(PUBLISHER), "local/a")["models"]} == {"local/a", "local/adapter"}
    assert search(scene.visitor(ANN), "/")["models"] == []
    wrong = search(Visitor("ann", "hf_wrong", scene.town.hub.endpoint), "local")
    assert not wrong["ok"]
    assert "hf_wrong" not in str(wrong)


def test_jobs_are_offered_with_their_price(scene: Scene) -> None:
    offered = machines(scene.visitor(ANN))
    assert [m["name"] for m in offered if m["default"]] == ["cpu-upgrade"]
    assert [m["at_most_usd"] for m in offered] == sorted(m["at_most_usd"] for m in offered)
    offer = job_offer(scene.visitor(ANN), RECIPE, "ann/merged", SMALL, timeout_s=3600)
    assert (offer["paid by"], offer["at_most_usd"]) == ("ann", 0.03)
    assert ANN.token not in str(offer)


def test_a_bundle_is_created_extended_reduced_and_a_task_retrieved(scene: Scene, tmp_path: Path) -> None:
    ann = scene.visitor(ANN)
    told: list[Mapping[str, Any]] = []

    def done(order: Order) -> dict[str, Any]:
        return perform(order, ann, SMALL, told.append)

    made = done(Order("bundle create", "ann/bundle", recipe=BUNDLE))
    assert made["url"] == f"{scene.town.hub.endpoint}/ann/bundle"
    done(Order("bundle add", "ann/bundle", model="local/b", task="second"))
    found = done(Order("bundle retrieve", "ann/second", bundle="ann/bundle", task="second"))
    done(Order("bundle remove", "ann/bundle", task="a"))
    with pytest.raises(HubMergeError, match="a"):
        done(Order("bundle retrieve", "ann/first", bundle="ann/bundle", task="a"))
    folder = snapshot_download(
        "ann/second", revision=found["commit_id"], token=ANN.token, local_dir=tmp_path / "second"
    )  # fmt: skip
    values = load_file(Path(folder) / "model.safetensors")
    wanted = tensors(2)
    assert values.keys() == wanted.keys()
    assert all((values[n] - t).abs().max() < 0.5 for n, t in wanted.items())
    assert {"planning", "running", "publishing"} <= {t["state"] for t in told}


def test_a_bundle_is_planned_as_it_will_be_and_shown_as_it_is(scene: Scene) -> None:
    ann = scene.visitor(ANN)
    plan = live_plan(ann, BUNDLE, "ann/bundle", SMALL)
    assert (plan["kind"], plan["ok"], plan["fits_here"], plan["verdict"]) == ("bundle", True, True, "allowed")
    assert [(s["role"], s["repo"], s["license"]) for s in plan["sources"]] == [
        ("base", "local/base", "apache-2.0"), ("model", "local/a", "apache-2.0"),
    ]  # fmt: skip
    assert not live_plan(ann, BUNDLE, "", replace(SMALL, read_bytes=1))["fits_here"]
    perform(Order("bundle create", "ann/bundle", recipe=BUNDLE), ann, SMALL, lambda _: None)
    made = HfApi(endpoint=scene.town.hub.endpoint, token=ANN.token).model_info("ann/bundle", files_metadata=True)
    weights = [s.size for s in made.siblings or () if s.rfilename.endswith(".safetensors")]
    assert (plan["write"], plan["shards"]) == (size(sum(w or 0 for w in weights)), len(weights))
    facts = bundle_facts(ann, "ann/bundle")
    assert (facts["ok"], facts["codec"], facts["incremental"]) == (True, "magnitude_mask", True)
    assert [(t["name"], t["repo"], t["license"]) for t in facts["tasks"]] == [("a", "local/a", "apache-2.0")]
    for wrong in ("", "/etc", "../x", "local/base", "ann/none", "https://host/x"):
        refused = bundle_facts(ann, wrong)
        assert (refused["ok"], bool(refused["error"]), ANN.token in str(refused)) == (False, True, False)


def test_a_plan_shows_the_card_before_anything_is_read(scene: Scene) -> None:
    plan = live_plan(scene.visitor(ANN), RECIPE + "card: {title: A title}\n", "ann/merged", SMALL)
    assert plan["card"].startswith("---\n")
    assert "# A title" in plan["card"]
    assert "ann/merged" in plan["card"]


@pytest.mark.parametrize(
    "order",
    [
        Order("merge", "ann/merged", recipe=RECIPE),
        Order("bundle create", "ann/merged", recipe=BUNDLE),
        Order("bundle add", "ann/merged", model="local/a"),
    ],
    ids=lambda order: order.kind,
)
def test_a_worker_refuses_by_itself_what_is_too_large(scene: Scene, order: Order) -> None:
    told: list[Mapping[str, Any]] = []
    with pytest.raises(BudgetError, match="this reads"):
        perform(order, scene.visitor(ANN), replace(SMALL, read_bytes=10), told.append)
    assert not scene.town.api.repo_exists("ann/merged")
