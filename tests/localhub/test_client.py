"""Reading, listing and managing repositories with the unmodified client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import (
    HfApi,
    HfFileSystem,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, RemoteEntryNotFoundError, RevisionNotFoundError
from pushing import blob, put, text

from hubmerge.localhub import LocalHub

StartHub = Callable[..., LocalHub]


def test_whoami_names_the_user_and_the_tokens_role(api: HfApi):
    me = api.whoami()
    assert (me["name"], me["auth"]["accessToken"]["role"]) == ("local", "write")


def test_branches_and_tags(api: HfApi):
    first = put(api, {"a.txt": "1"}, message="first")
    api.create_branch("local/m", branch="feature/x", revision=first)
    api.create_tag("local/m", tag="v1.0", tag_message="one")
    put(api, {"a.txt": "2"}, revision="feature/x", message="second")
    refs = api.list_repo_refs("local/m")
    assert {b.name for b in refs.branches} == {"main", "feature/x"}
    assert [(t.name, t.ref, t.target_commit) for t in refs.tags] == [("v1.0", "refs/tags/v1.0", first)]
    assert [text(api, "a.txt", r) for r in ("main", "v1.0", "feature/x", first, first[:8])] == ["1", "1", "2", "1", "1"]
    assert [c.title for c in api.list_repo_commits("local/m", revision="feature/x")] == [
        "second", "first", "initial commit",
    ]  # fmt: skip
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_branch("local/m", branch="feature/x")
    assert caught.value.response.status_code == 409
    api.create_branch("local/m", branch="feature/x", exist_ok=True)
    api.create_tag("local/m", tag="v1.0", exist_ok=True)
    api.delete_branch("local/m", branch="feature/x")
    api.delete_tag("local/m", tag="v1.0")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("local/m", revision="v1.0")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag("local/m", tag="v1.0")
    with pytest.raises(BadRequestError):
        api.delete_branch("local/m", branch="main")


def test_tree_is_recursive_paged_and_expandable(start_hub: StartHub):
    hub = start_hub(page_size=3)
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("local/m")
    put(api, {f"d{i}/f{j}.txt": f"{i}{j}" for i in range(3) for j in range(4)}, message="many")
    hub.requests.clear()
    found = list(api.list_repo_tree("local/m", recursive=True))
    assert len(found) == 3 + 12 + 1
    assert len(hub.requests.find("GET", "/tree/")) == 6
    assert [e.path for e in api.list_repo_tree("local/m")] == [".gitattributes", "d0", "d1", "d2"]
    assert [e.path for e in api.list_repo_tree("local/m", "d1")] == [f"d1/f{j}.txt" for j in range(4)]
    item = next(e for e in api.list_repo_tree("local/m", "d1", expand=True))
    assert item.last_commit is not None
    assert item.last_commit.title == "many"
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("local/m", "nowhere"))
    assert len(list(api.list_repo_tree("local/m", "d2", recursive=True, revision="main"))) == 4


def test_paths_info_leaves_unknown_paths_out(api: HfApi):
    put(api, {"a/b.txt": "x", "w.bin": blob(10)})
    found = api.get_paths_info("local/m", ["a", "w.bin", "missing"], expand=True)
    assert [(type(f).__name__, f.path) for f in found] == [("RepoFolder", "a"), ("RepoFile", "w.bin")]
    assert api.file_exists("local/m", "w.bin")
    assert not api.file_exists("local/m", "nope")


def test_git_ids_are_gits(api: HfApi):
    import hashlib

    put(api, {"a.txt": "hello\n", "w.bin": b"hello\n"})
    regular, large = api.get_paths_info("local/m", ["a.txt", "w.bin"])
    assert regular.blob_id == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object of "hello\n"
    digest = hashlib.sha256(b"hello\n").hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 6\n"
    assert large.blob_id == hashlib.sha1(f"blob {len(pointer)}\0{pointer}".encode()).hexdigest()


def test_file_metadata_of_small_and_large_files(api: HfApi, hub: LocalHub):
    oid = put(api, {"a.txt": "hello", "w.bin": blob(5000)})
    small = get_hf_file_metadata(hf_hub_url("local/m", "a.txt", endpoint=hub.endpoint), token=hub.token)
    large = get_hf_file_metadata(hf_hub_url("local/m", "w.bin", endpoint=hub.endpoint), token=hub.token)
    assert (small.size, small.commit_hash, small.xet_file_data) == (5, oid, None)
    assert (large.size, large.commit_hash, len(large.etag or "")) == (5000, oid, 64)
    assert f":{hub.cdn_port}/_cdn/" in large.location


def test_missing_file_and_revision_have_their_errors(api: HfApi):
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("local/m", "nope.txt")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("local/m", "README.md", revision="nope")


def test_the_cdn_never_sees_a_token(api: HfApi, hub: LocalHub):
    put(api, {"w.bin": blob(5000)})
    api.hf_hub_download("local/m", "w.bin")
    seen = hub.requests.find(None, "^/_(cdn|lfs)/")
    assert seen
    assert not any(r.authorized for r in seen if r.port == hub.cdn_port)


def test_metadata_survives_without_a_second_origin(start_hub: StartHub):
    hub = start_hub(separate_cdn=False)
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("local/m")
    oid = put(api, {"w.bin": blob(5000)})
    path = api.hf_hub_download("local/m", "w.bin")
    assert Path(path).read_bytes() == blob(5000)
    assert oid in path


def test_snapshot_download_with_patterns_and_revision(api: HfApi):
    old = put(api, {"a.txt": "1", "b.json": "{}", "w.bin": blob(100)})
    put(api, {"a.txt": "2"})
    folder = Path(snapshot_download("local/m", revision=old, allow_patterns=["*.txt", "*.bin"]))
    assert {p.name for p in folder.iterdir()} == {"a.txt", "w.bin"}
    assert (folder / "a.txt").read_text() == "1"
    assert hf_hub_download("local/m", "a.txt", local_files_only=True, revision=old) == str(folder / "a.txt")


def test_file_system_reads_ranges_and_writes(api: HfApi, hub: LocalHub):
    put(api, {"w.bin": blob(100_000)})
    fs = HfFileSystem(endpoint=hub.endpoint, token=hub.token)
    hub.requests.clear()
    with fs.open("local/m/w.bin", "rb", block_size=1000) as file:
        file.seek(50_000)
        assert file.read(10) == blob(100_000)[50_000:50_010]
    sent = sum(r.response_bytes for r in hub.requests.find("GET", "^/_cdn/"))
    assert 10 <= sent < 10_000
    with fs.open("local/m/new.txt", "w") as file:
        file.write("written")
    assert fs.read_text("local/m/new.txt") == "written"
    assert set(fs.glob("local/m/*.bin")) == {"local/m/w.bin"}
    fs.rm("local/m/new.txt")
    assert not fs.exists("local/m/new.txt")


def test_settings_move_duplicate_and_delete(api: HfApi):
    put(api, {"w.bin": blob(100), "README.md": "---\nlicense: mit\ntags: [x]\nbase_model: [a/b, c/d]\n---\nhi"})
    api.update_repo_settings("local/m", visibility="private", gated="auto")
    info = api.model_info("local/m")
    assert (info.private, info.gated) == (True, "auto")
    assert info.card_data is not None
    assert info.card_data.license == "mit"
    assert {"license:mit", "x", "base_model:a/b", "base_model:merge:c/d"} <= set(info.tags or [])
    api.move_repo("local/m", "local/moved")
    assert api.repo_exists("local/moved")
    assert not api.repo_exists("local/m")
    url = api.duplicate_repo("local/moved", "local/copy")
    assert url.repo_id == "local/copy"
    assert "w.bin" in api.list_repo_files("local/copy")
    assert {m.id for m in api.list_models(author="local")} == {"local/moved", "local/copy"}
    assert [m.id for m in api.list_models(search="COPY", limit=5)] == ["local/copy"]
    api.delete_repo("local/copy")
    api.delete_repo("local/copy", missing_ok=True)
    assert not api.repo_exists("local/copy")


def test_create_repo_twice(api: HfApi):
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("local/m")
    assert caught.value.response.status_code == 409
    assert api.create_repo("m", exist_ok=True).repo_id == "local/m"


def test_datasets_and_spaces(api: HfApi):
    for kind in ("dataset", "space"):
        url = api.create_repo("local/d", repo_type=kind, space_sdk="gradio" if kind == "space" else None)
        assert (url.repo_type, url.repo_id) == (kind, "local/d")
        api.upload_file(path_or_fileobj=blob(99), path_in_repo="w.bin", repo_id="local/d", repo_type=kind)
        assert Path(api.hf_hub_download("local/d", "w.bin", repo_type=kind)).read_bytes() == blob(99)
        assert api.repo_info("local/d", repo_type=kind).id == "local/d"


def test_info_expand_returns_what_was_asked_for(api: HfApi):
    info = api.model_info("local/m", expand=["sha", "private"])
    assert (info.sha is not None, info.private, info.siblings) == (True, False, None)


def test_super_squash_keeps_files_and_drops_history(api: HfApi):
    put(api, {"a.txt": "1"})
    put(api, {"a.txt": "2"})
    api.super_squash_history("local/m")
    assert len(api.list_repo_commits("local/m")) == 1
    assert text(api, "a.txt") == "2"


def test_long_histories_are_paged(api: HfApi):
    for number in range(55):
        put(api, {"a.txt": str(number)}, message=f"n{number}")
    titles = [c.title for c in api.list_repo_commits("local/m")]
    assert titles == [*(f"n{n}" for n in reversed(range(55))), "initial commit"]


def test_safetensors_headers_are_read_by_range(api: HfApi, hub: LocalHub):
    import torch
    from safetensors.torch import save

    put(api, {"model.safetensors": save({"a": torch.zeros(300_000)})})
    hub.requests.clear()
    metadata = api.get_safetensors_metadata("local/m")
    assert metadata.files_metadata["model.safetensors"].tensors["a"].shape == [300_000]
    assert sum(r.response_bytes for r in hub.requests.find("GET", "^/_cdn/")) <= 100_001


def test_storage_listings(api: HfApi):
    put(api, {"w.bin": blob(5000), "a.txt": "a"})
    assert [(f.filename, f.size) for f in api.list_lfs_files("local/m")] == [("w.bin", 5000)]
    (mine,) = api.list_user_repos()
    assert (mine.id, mine.type) == ("local/m", "model")
