"""Jobs without a secret at the local Hub, through huggingface_hub's own client and through ours."""

from __future__ import annotations

from collections.abc import Callable

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from hubmerge.errors import AccessError
from hubmerge.hub import Hub
from hubmerge.hub.identity import JobToken
from hubmerge.localhub import LocalHub, User
from hubmerge.localhub.publishers import GRANT_TYPE, ID_TOKEN_TYPE

ANN = User("ann", "hf_ann", orgs=("lab",))
BOB = User("bob", "hf_bob")
HERE = {"repository": "ann/recipes", "branch": "main", "workflow": "merge.yml"}


@pytest.fixture
def town(start_hub: Callable[..., LocalHub], monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """Two repositories of ann's, one trusted; a gated one of bob's, which ann may read; and a job of ann's."""
    hub = start_hub(users=(ANN, BOB))
    monkeypatch.delenv("HF_TOKEN")
    for owner, name in ((ANN, "ann/merged"), (ANN, "ann/other"), (BOB, "bob/base")):
        api = HfApi(endpoint=hub.endpoint, token=owner.token)
        api.create_repo(name, private=owner is ANN)
        api.create_commit(name, [CommitOperationAdd("config.json", b"{}")], commit_message="a file")
    hub.set_gated("bob/base", True)
    hub.grant_access("bob/base", "ann")
    hub.trust("ann/merged", **HERE)
    hub.trust("ann", repository="ann/recipes")
    for name, value in hub.job_environment("ann/recipes").items():
        monkeypatch.setenv(name, value)
    return hub


def as_job(monkeypatch: pytest.MonkeyPatch, resource: str) -> HfApi:
    monkeypatch.setattr("huggingface_hub.utils._auth._OIDC_TOKEN_CACHE", None)
    monkeypatch.setenv("HF_OIDC_RESOURCE", resource)
    return HfApi()


def write(api: HfApi, repo: str, **options: bool) -> object:
    return api.create_commit(repo, [CommitOperationAdd("new.txt", b"new")], commit_message="new", **options)


def test_a_job_writes_to_the_repository_that_trusts_it_and_to_no_other(
    town: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = as_job(monkeypatch, "ann/merged")
    assert str(get_token()).startswith("hf_jwt_")
    write(api, "ann/merged")
    write(api, "ann/merged", create_pr=True)
    assert api.list_repo_commits("ann/merged")[0].authors == ["[OIDC]"]
    api.create_branch("ann/merged", branch="stage")
    api.delete_branch("ann/merged", branch="stage")
    with pytest.raises(RepositoryNotFoundError):
        write(api, "ann/other")
    town.set_private("ann/other", False)
    for options in ({}, {"create_pr": True}):
        with pytest.raises(HfHubHTTPError) as caught:
            write(api, "ann/other", **options)
        assert caught.value.response.status_code == 403
    for call in (lambda: api.create_repo("ann/new"), api.whoami, lambda: api.delete_repo("ann/other")):
        with pytest.raises(HfHubHTTPError):
            call()
    with pytest.raises(GatedRepoError):
        api.hf_hub_download("bob/base", "config.json")


def test_a_job_reads_what_its_user_may_of_gated_repositories_and_nothing_private(
    town: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = as_job(monkeypatch, "ann")
    assert str(get_token()).startswith("hf_oauth_")
    assert api.hf_hub_download("bob/base", "config.json")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("ann/merged")
    with pytest.raises(HfHubHTTPError):
        write(api, "bob/base")


@pytest.mark.parametrize(
    "job",
    [
        {"repository": "mallory/recipes"},
        {"repository": "ann/recipes", "ref": "refs/heads/main-backup"},
        {"repository": "ann/recipes", "ref": "refs/pull/1/merge"},
        {"repository": "ann/recipes", "workflow": "merge.yml.evil.yml"},
    ],
    ids=lambda job: "-".join(job.values()).replace("/", "."),
)
def test_claims_are_matched_exactly(job: dict[str, str], town: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in town.job_environment(**job).items():
        monkeypatch.setenv(name, value)
    as_job(monkeypatch, "ann/merged")
    with pytest.raises(HfHubHTTPError, match="invalid_grant"):
        get_token()
    with pytest.raises(AccessError, match="the Hub does not trust this job"):
        Hub().check_write("ann/merged")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"resource": ""}, "invalid_request"),
        ({"grant_type": "password"}, "invalid_request"),
        ({"subject_token_type": "urn:other"}, "invalid_request"),
        ({"resource": "ann/none"}, "invalid_grant"),
        ({"subject_token": "a.b.c"}, "invalid_grant"),
        ({"subject_token": "nothing"}, "invalid_grant"),
    ],
)
def test_refusals_have_oauths_words(change: dict[str, str], error: str, town: LocalHub) -> None:
    asked = town.core.publishers.request_token({"repository": "ann/recipes"})
    body = {
        "grant_type": GRANT_TYPE, "subject_token_type": ID_TOKEN_TYPE, "resource": "ann",
        "subject_token": town.core.publishers.identity_token(asked, town.endpoint, "issuer"),
    }  # fmt: skip
    assert httpx2.post(f"{town.endpoint}/oauth/token", json=body).json()["expires_in"] == 3600
    refused = httpx2.post(f"{town.endpoint}/oauth/token", json=body | change)
    assert (refused.status_code, refused.json()["error"]) == (400, error)
    assert httpx2.post(f"{town.endpoint}/oauth/token", content=b"no").json()["error"] == "invalid_request"


def test_an_identity_is_for_one_audience_and_only_for_those_who_may_ask(town: LocalHub) -> None:
    publishers = town.core.publishers
    asked = publishers.request_token({"repository": "ann/recipes"})
    foreign = publishers.identity_token(asked, "https://elsewhere.example", "issuer")
    body = {"grant_type": GRANT_TYPE, "subject_token_type": ID_TOKEN_TYPE, "resource": "ann"}
    for token in (foreign, asked):
        refused = httpx2.post(f"{town.endpoint}/oauth/token", json=body | {"subject_token": token})
        assert refused.json()["error"] == "invalid_grant"
    for headers in ({}, {"Authorization": "Bearer nobody"}, {"Authorization": f"Bearer {foreign}"}):
        assert httpx2.get(f"{town.endpoint}/_oidc/token", headers=headers).status_code == 401


def test_our_client_publishes_as_the_job_and_reads_as_its_user(town: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    as_job(monkeypatch, "ann/merged")
    hub = Hub()
    target = hub.check_write("ann/merged")
    assert (target.exists, target.private, target.writable) == (True, True, True)
    assert hub.reader() is hub
    monkeypatch.setenv("HUBMERGE_READ_AS", "ann")
    reader = hub.reader()
    commit = reader.pin("bob/base")
    assert reader.read_small("bob/base", commit, "config.json") == b"{}"
    with pytest.raises(AccessError, match="is gated"):
        hub.read_small("bob/base", commit, "config.json")
    monkeypatch.setenv("HUBMERGE_READ_TOKEN", ANN.token)
    assert hub.reader().pin("ann/other")
    with pytest.raises(AccessError, match="it does not exist, and a trusted publisher cannot create it"):
        hub.check_write("ann/new")
    with pytest.raises(AccessError, match="it does not exist"):
        hub.check_write("merged")


def test_a_token_is_kept_until_shortly_before_it_expires(town: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("hubmerge.hub.identity.monotonic", lambda: now[0])
    token = JobToken("ann/merged", town.endpoint)
    first = token()
    now[0] += 3299
    assert token() == first
    now[0] += 2
    assert token() != first
    assert first not in repr(token)
    assert len(town.requests.find("POST", "^/oauth/token$")) == 2


def test_a_job_without_an_identity_is_told_how_to_get_one(town: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACTIONS_ID_TOKEN_REQUEST_URL")
    with pytest.raises(AccessError, match="it has none") as caught:
        JobToken("ann", town.endpoint)()
    assert "id-token: write" in str(caught.value)
    as_job(monkeypatch, "ann/merged")
    with pytest.raises(AccessError, match="id-token: write"):
        Hub().check_write("ann/merged")


def test_a_token_of_the_users_own_goes_first(town: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    as_job(monkeypatch, "ann/merged")
    own = Hub(token=ANN.token)
    monkeypatch.setenv("HUBMERGE_READ_AS", "ann")
    assert own.reader() is own
    assert own.check_write("ann/new").repo == "ann/new"
