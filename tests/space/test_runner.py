"""Jobs in processes of their own: they publish, end when they are told to, continue, and are their owner's alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hubmerge.localhub import LocalHub
from hubmerge.space.orders import Order
from tests.space.scene import ANN, BOB, RECIPE, Scene, open_scene, wait_for

MERGE = Order("merge", "ann/merged", recipe=RECIPE)


@pytest.fixture
def scene(start_hub: Callable[..., LocalHub], tmp_path: Path) -> Scene:
    return open_scene(start_hub, tmp_path)


def test_a_merge_is_published_with_the_visitors_own_token(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    with scene.server() as runner:
        ann = scene.visitor(ANN)
        job = runner.submit(ann, MERGE)
        ended = wait_for(runner, "ann", job.id)
    assert (ended.state, ended.message) == ("done", ""), ended
    assert ended.url == f"{scene.town.hub.endpoint}/ann/merged"
    assert ended.shards_done == ended.shards_total == 7
    api = HfApi(endpoint=scene.town.hub.endpoint, token=ANN.token)
    assert api.model_info("ann/merged").sha == ended.commit_id
    assert api.list_repo_commits("ann/merged")[0].authors == ["ann"]
