"""Who may do what, and which of the client's exception classes says so."""

from __future__ import annotations

from collections.abc import Callable

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, HfFileSystem, hf_hub_download
from huggingface_hub.errors import (
    BadRequestError,
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from hubmerge.localhub import LocalHub, User, parse_user

USERS = (
    User("ann", "hf_ann", orgs=("guild",)),
    User("ann", "hf_ann_read", "read", orgs=("guild",)),
    User("bob", "hf_bob"),
)


@pytest.fixture
def town(start_hub: Callable[..., LocalHub]) -> LocalHub:
    hub = start_hub(users=USERS)
    ann = HfApi(endpoint=hub.endpoint, token="hf_ann")
    ann.create_repo("ann/m")
    files = [CommitOperationAdd("config.json", b"{}"), CommitOperationAdd("w.bin", b"12345")]
    ann.create_commit("ann/m", files, commit_message="files")
    return hub


def client(hub: LocalHub, token: str | bool) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def status_of(call: Callable[[], object]) -> int:
    with pytest.raises(HfHubHTTPError) as caught:
        call()
    return caught.value.response.status_code


def test_public_repositories_are_readable_by_everyone(town: LocalHub):
    for token in ("hf_ann", "hf_ann_read", "hf_bob", False):
        assert client(town, token).model_info("ann/m").id == "ann/m"
        assert hf_hub_download("ann/m", "w.bin", endpoint=town.endpoint, token=token)
        client(town, token).auth_check("ann/m")


@pytest.mark.parametrize("token", ["hf_bob", False])
def test_private_repositories_do_not_exist_for_others(town: LocalHub, token: str | bool):
    town.set_private("ann/m", True)
    other = client(town, token)
    assert client(town, "hf_ann_read").model_info("ann/m").private
    for call in (
        lambda: other.model_info("ann/m"),
        lambda: list(other.list_repo_tree("ann/m")),
        lambda: other.hf_hub_download("ann/m", "config.json"),
        lambda: other.auth_check("ann/m"),
        lambda: other.auth_check("ann/m", write=True),
        lambda: other.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="ann/m"),
        lambda: other.create_branch("ann/m", branch="b"),
    ):
        with pytest.raises(RepositoryNotFoundError):
            call()
    assert [m.id for m in other.list_models()] == []
    assert client(town, "hf_ann").repo_exists("ann/m")


@pytest.mark.parametrize("repo_id", ["ann/nope", "nobody/nope", "gpt2"])
def test_missing_repositories(town: LocalHub, repo_id: str):
    for token in ("hf_ann", False):
        with pytest.raises(RepositoryNotFoundError):
            client(town, token).model_info(repo_id)
        with pytest.raises(RepositoryNotFoundError):
            client(town, token).hf_hub_download(repo_id, "config.json")


def test_gated_repositories_show_metadata_but_no_files(town: LocalHub):
    town.set_gated("ann/m", True)
    for token in ("hf_bob", False):
        other = client(town, token)
        assert other.model_info("ann/m").gated == "auto"
        assert len(list(other.list_repo_tree("ann/m"))) == 3
        with pytest.raises(GatedRepoError):
            other.auth_check("ann/m")
        with pytest.raises(GatedRepoError):
            other.hf_hub_download("ann/m", "w.bin")
    with pytest.raises(GatedRepoError):
        HfFileSystem(endpoint=town.endpoint, token="hf_bob").read_bytes("ann/m/w.bin")
    assert status_of(lambda: client(town, "hf_bob").auth_check("ann/m")) == 403
    assert client(town, "hf_ann").hf_hub_download("ann/m", "w.bin")
    client(town, "hf_ann").grant_access("ann/m", "bob")
    assert client(town, "hf_bob").hf_hub_download("ann/m", "w.bin")
    assert status_of(lambda: client(town, "hf_ann").grant_access("ann/m", "bob")) == 400
    assert status_of(lambda: client(town, "hf_ann").grant_access("ann/m", "nobody")) == 404
    client(town, "hf_ann").reject_access_request("ann/m", "bob", rejection_reason=None)
    with pytest.raises(GatedRepoError):
        client(town, "hf_bob").auth_check("ann/m")


def test_disabled_repositories(town: LocalHub):
    town.set_disabled("ann/m", True)
    with pytest.raises(DisabledRepoError):
        client(town, "hf_ann").model_info("ann/m")
    with pytest.raises(LocalEntryNotFoundError) as caught:  # the client then looks in its cache
        client(town, "hf_ann").hf_hub_download("ann/m", "config.json")
    assert isinstance(caught.value.__cause__, DisabledRepoError)
    town.set_disabled("ann/m", False)
    assert client(town, "hf_ann").hf_hub_download("ann/m", "config.json")


def test_read_tokens_cannot_write(town: LocalHub):
    reader = client(town, "hf_ann_read")
    assert reader.whoami()["auth"]["accessToken"]["role"] == "read"
    for call in (
        lambda: reader.create_repo("ann/new"),
        lambda: reader.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="ann/m"),
        lambda: reader.create_tag("ann/m", tag="v1"),
        lambda: reader.auth_check("ann/m", write=True),
        lambda: reader.update_repo_settings("ann/m", visibility="private"),
        lambda: reader.create_discussion("ann/m", "title"),
    ):
        assert status_of(call) == 403


def test_strangers_cannot_write_but_may_contribute(town: LocalHub):
    bob = client(town, "hf_bob")
    for call in (
        lambda: bob.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="ann/m"),
        lambda: bob.create_repo("ann/theirs"),
        lambda: bob.create_repo("guild/theirs"),
        lambda: bob.auth_check("ann/m", write=True),
    ):
        assert status_of(call) == 403
    files = [CommitOperationAdd("idea.bin", b"abc"), CommitOperationAdd("idea.txt", b"abc")]
    proposal = bob.create_commit("ann/m", files, commit_message="An idea", create_pr=True)
    assert (proposal.pr_num, proposal.pr_revision) == (1, "refs/pr/1")
    again = [CommitOperationAdd("more.txt", b"more")]
    bob.create_commit("ann/m", again, commit_message="More", revision="refs/pr/1")
    assert status_of(lambda: bob.merge_pull_request("ann/m", 1)) == 403
    client(town, "hf_ann").merge_pull_request("ann/m", 1)
    assert {"idea.bin", "idea.txt", "more.txt"} <= set(bob.list_repo_files("ann/m"))


def test_nobody_else_commits_to_a_pull_request(town: LocalHub):
    ann, bob = client(town, "hf_ann"), client(town, "hf_bob")
    number = ann.create_pull_request("ann/m", "Mine alone").num
    assert (
        status_of(
            lambda: bob.create_commit(
                "ann/m", [CommitOperationAdd("x.txt", b"x")], commit_message="x", revision=f"refs/pr/{number}"
            )
        )
        == 403
    )


def test_organisations_belong_to_their_members(town: LocalHub):
    ann = client(town, "hf_ann")
    assert [org["name"] for org in ann.whoami()["orgs"]] == ["guild"]
    ann.create_repo("guild/m", private=True)
    ann.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="guild/m")
    with pytest.raises(RepositoryNotFoundError):
        client(town, "hf_bob").model_info("guild/m")


def test_without_a_token_nothing_can_be_changed(town: LocalHub):
    nobody = client(town, False)
    with pytest.raises(RepositoryNotFoundError):
        nobody.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="ann/m")
    assert status_of(lambda: nobody.create_repo("ann/new")) == 401
    assert httpx2.get(f"{town.endpoint}/api/whoami-v2").status_code == 401


def test_unknown_tokens_are_refused_even_for_public_repositories(town: LocalHub):
    stranger = client(town, "hf_unknown")
    assert status_of(stranger.whoami) == 401
    assert status_of(lambda: stranger.model_info("ann/m")) == 401


def test_other_peoples_objects_cannot_be_claimed_by_their_hash(town: LocalHub):
    import hashlib

    bob = client(town, "hf_bob")
    bob.create_repo("bob/m")
    oid = hashlib.sha256(b"12345").hexdigest()
    lines = f'{{"key":"header","value":{{"summary":"x"}}}}\n{{"key":"lfsFile","value":{{"path":"w","oid":"{oid}"}}}}\n'
    answer = httpx2.post(
        f"{town.endpoint}/api/models/bob/m/commit/main", content=lines, headers={"Authorization": "Bearer hf_bob"}
    )
    assert answer.status_code == 400
    assert "does not exist" in answer.headers["X-Error-Message"]


HEADER = b'{"key":"header","value":{"summary":"s"}}\n'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json\n",
        b'{"key":"file"}\n',
        HEADER + b'{"key":"what","value":{"path":"x"}}\n',
        HEADER + b'{"key":"file","value":{"path":"../x","content":""}}\n',
        HEADER + b'{"key":"file","value":{"path":"x","content":"*","encoding":"base64"}}\n',
    ],
)
def test_malformed_commits_are_refused(town: LocalHub, body: bytes):
    answer = httpx2.post(
        f"{town.endpoint}/api/models/ann/m/commit/main", content=body, headers={"Authorization": "Bearer hf_ann"}
    )
    assert answer.status_code == 400
    assert answer.headers["X-Request-Id"]


def test_signed_addresses_expire_and_cannot_be_forged(start_hub: Callable[..., LocalHub]):
    import time

    hub = start_hub(url_ttl_s=0.4)
    api = client(hub, hub.token)
    api.create_repo("local/m")
    api.upload_file(path_or_fileobj=b"12345", path_in_repo="w.bin", repo_id="local/m")
    redirect = httpx2.head(f"{hub.endpoint}/local/m/resolve/main/w.bin")
    address = redirect.headers["Location"]
    assert httpx2.get(address).content == b"12345"
    assert httpx2.get(address.replace("expires=1", "expires=2")).status_code == 403
    assert httpx2.get(address.partition("?")[0]).status_code == 403
    time.sleep(0.5)
    assert httpx2.get(address).status_code == 403


def test_wrong_bytes_are_not_accepted(town: LocalHub):
    batch = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": "0" * 64, "size": 3}]}
    headers = {"Authorization": "Bearer hf_ann"}
    answer = httpx2.post(f"{town.endpoint}/ann/m.git/info/lfs/objects/batch", json=batch, headers=headers).json()
    actions = answer["objects"][0]["actions"]
    assert httpx2.put(actions["upload"]["href"], content=b"abc").status_code == 400
    assert httpx2.put(actions["upload"]["href"], content=b"x" * 5_000_000).status_code == 400
    verify = httpx2.post(actions["verify"]["href"], json={"oid": "0" * 64, "size": 3}, headers=headers)
    assert verify.status_code == 404


def test_user_strings():
    assert parse_user("ann:hf_x") == User("ann", "hf_x", "write")
    assert parse_user("ann:hf_x:read:guild,club") == User("ann", "hf_x", "read", ("guild", "club"))
    for text in ("ann", "ann:", ":hf_secret", "ann:hf_secret:admin", "a:b:read:c:d"):
        with pytest.raises(ValueError, match="user") as caught:
            parse_user(text)
        assert "secret" not in str(caught.value)
    assert "hf_x" not in repr(User("ann", "hf_x"))


def test_bad_names_are_refused(town: LocalHub):
    ann = {"Authorization": "Bearer hf_ann"}
    for name in ("", "a/b", "..", "-x", "x--y", "x.git", "é"):
        answer = httpx2.post(
            f"{town.endpoint}/api/repos/create", json={"name": name, "organization": "ann"}, headers=ann
        )
        assert answer.status_code == 400, name
    with pytest.raises(BadRequestError):
        client(town, "hf_ann").create_branch("ann/m", branch="bad..name")
