"""Repositories that are missing or closed, and tokens that do not open them."""

from __future__ import annotations

from collections.abc import Callable

from huggingface_hub import HfApi

from hubmerge.localhub import Fault
from tests.end_to_end.scene import TARGET, Arguments, Case, Scene
from tests.end_to_end.support import READER, STRANGER


def theirs(scene: Scene, repo: str, *, private: bool = False) -> None:
    """A model of somebody else."""
    api = HfApi(endpoint=scene.town.hub.endpoint, token=STRANGER.token)
    api.create_repo(repo, private=private)
    api.upload_folder(repo_id=repo, folder_path=scene.a)


def model_on_hub(repo: str, *, private: bool = False) -> Callable[[Scene], Arguments]:
    """Merge a model of somebody else."""

    def arrange(scene: Scene) -> Arguments:
        theirs(scene, "mallory/model", private=private)
        return scene.merge(models=[repo])

    return arrange


def gated(scene: Scene) -> Arguments:
    arguments = model_on_hub("mallory/model")(scene)
    scene.town.hub.set_gated("mallory/model", True)
    return arguments


def disabled(scene: Scene) -> Arguments:
    arguments = model_on_hub("mallory/model")(scene)
    scene.town.hub.set_disabled("mallory/model", True)
    return arguments


def missing_base_on_hub(scene: Scene) -> Arguments:
    _ = scene.town
    return scene.merge(base="local/base")


def push_with_token(token: str | None) -> Callable[[Scene], Arguments]:
    def arrange(scene: Scene) -> Arguments:
        arguments = scene.push()
        if token is None:
            scene.monkeypatch.delenv("HF_TOKEN")
        else:
            scene.monkeypatch.setenv("HF_TOKEN", token)
        return arguments

    return arrange


def push_to_a_strangers_name(scene: Scene) -> Arguments:
    return [str(a).replace(TARGET, "mallory/merged") for a in scene.push()]


def not_a_hub(scene: Scene) -> Arguments:
    scene.town.hub.faults.add(
        Fault(path="^/api/models/org/model", status=200, body="<html>Please log in</html>", times=None)
    )
    return scene.merge(models=["org/model"])


WRONG_TOKEN = "hf_tokenOfNobody"
ACCESS_CASES = [
    Case(
        "missing model",
        4,
        model_on_hub("org/nothing"),
        ("/org/nothing does not exist, or is private",),
        "Check the spelling of org/nothing",
    ),
    Case(
        "private model",
        4,
        model_on_hub("mallory/model", private=True),
        ("/mallory/model does not exist, or is private",),
        "use a token of an account that may see it",
    ),
    Case("gated model", 4, gated, ("mallory/model is gated",), "Ask for access at http"),
    Case("disabled model", 4, disabled, ("/mallory/model was disabled",), "Choose another repository"),
    Case(
        "wrong revision",
        4,
        model_on_hub("mallory/model@v9"),
        ("mallory/model@v9", "no such branch, tag or commit"),
        "/mallory/model/commits/main",
    ),
    Case(
        "missing base on the Hub",
        4,
        missing_base_on_hub,
        ("cannot find local/base",),
        "Check the spelling of local/base",
    ),
    Case(
        "push without a token",
        4,
        push_with_token(None),
        (f"cannot write to {TARGET}", "there is no token"),
        "set HF_TOKEN to a token with write permission",
    ),
    Case(
        "push with a read-only token",
        4,
        push_with_token(READER.token),
        (f"cannot write to {TARGET}", "read-only"),
        "Create one with write permission at http",
    ),
    Case(
        "push with a wrong token",
        4,
        push_with_token(WRONG_TOKEN),
        (f"cannot write to {TARGET}", "did not accept the token"),
        "hf auth login",
    ),
    Case(
        "push to somebody else",
        4,
        push_to_a_strangers_name,
        ("cannot write to mallory/merged", "local may not create it in mallory"),
        "Publish to local/merged",
    ),
    Case("a server that is no Hub", 1, not_a_hub, ("cannot find org/model",), "check that it is compatible"),
]
