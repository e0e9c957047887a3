"""Uploading and committing with the unmodified client."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    metadata_load,
)
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, RemoteEntryNotFoundError
from pushing import add, blob, paths, put, text

from hubmerge.localhub import LocalHub

StartHub = Callable[..., LocalHub]


def test_small_and_large_files_round_trip(api: HfApi):
    large = blob(300_000)
    oid = put(api, {"config.json": "{}", "model.safetensors": large, "sub/dir/notes.txt": "hello"})
    assert text(api, "sub/dir/notes.txt") == "hello"
    assert Path(api.hf_hub_download("local/m", "model.safetensors")).read_bytes() == large
    info = api.model_info("local/m", files_metadata=True)
    assert info.sha == oid
    sizes = {s.rfilename: (s.size, s.lfs is not None) for s in info.siblings or []}
    assert sizes["model.safetensors"] == (300_000, True)
    assert sizes["config.json"] == (2, False)


def test_threshold_decides_for_unlisted_extensions(start_hub: StartHub):
    hub = start_hub(lfs_threshold_bytes=1000)
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("local/m")
    put(api, {"under.txt": b"a" * 999, "at.txt": b"a" * 1000, "tiny.safetensors": b"12345678", "empty.bin": b""})
    found = {s.rfilename: s.lfs is not None for s in api.model_info("local/m", files_metadata=True).siblings or []}
    assert found == {
        ".gitattributes": False, "under.txt": False, "at.txt": True, "tiny.safetensors": True, "empty.bin": False,
    }  # fmt: skip


def test_same_content_is_not_sent_twice(api: HfApi, hub: LocalHub):
    put(api, {"a.bin": blob(5000)})
    put(api, {"b.bin": blob(5000)})
    assert len(hub.requests.find("PUT", "^/_lfs/")) == 1
    assert paths(api) == {"a.bin", "b.bin"}


def test_unchanged_files_make_no_commit(api: HfApi):
    first = put(api, {"a.txt": "a", "w.bin": blob(100)})
    assert put(api, {"a.txt": "a", "w.bin": blob(100)}) == first


def test_multipart_upload(start_hub: StartHub, tmp_path: Path):
    data = blob(250_000)
    hub = start_hub(root=tmp_path / "h", part_size_bytes=100_000)
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("local/m")
    put(api, {"w.bin": data})
    sizes = [r.request_bytes for r in hub.requests.find("PUT", "^/_lfs/")]
    assert sizes == [100_000, 100_000, 50_000]
    assert Path(api.hf_hub_download("local/m", "w.bin")).read_bytes() == data
    assert not list((tmp_path / "h" / "parts").iterdir())


def test_upload_from_file_object_and_folder(api: HfApi, tmp_path: Path):
    api.upload_file(path_or_fileobj=io.BytesIO(b"from memory"), path_in_repo="m.txt", repo_id="local/m")
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.txt").write_text("a")
    (folder / "w.bin").write_bytes(blob(1000))
    api.upload_folder(repo_id="local/m", folder_path=folder, path_in_repo="up")
    assert paths(api) == {"m.txt", "up/deep/a.txt", "up/w.bin"}


def test_gitignore_is_honoured(api: HfApi):
    put(
        api,
        {".gitignore": "*.log\nbuild/\n!keep.log\n", "a.log": "x", "keep.log": "x", "build/b.txt": "x", "c.txt": "x"},
    )
    put(api, {"later.log": "x", "d.txt": "x"})
    assert paths(api) == {".gitignore", "keep.log", "c.txt", "d.txt"}


def test_delete_files_and_folders(api: HfApi):
    put(api, {"a/1.txt": "1", "a/2.txt": "2", "b.txt": "b"})
    operations = [CommitOperationDelete("a/"), CommitOperationDelete("b.txt"), add("c.txt", "c")]
    api.create_commit("local/m", operations, commit_message="clean")
    assert paths(api) == {"c.txt"}
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        api.delete_file("nope.txt", "local/m")


@pytest.mark.parametrize("path", ["a/./b", "a//b", "x\0y"])
def test_impossible_paths_are_refused(api: HfApi, path: str):
    with pytest.raises(BadRequestError):
        put(api, {path: "x"})


def test_a_name_cannot_be_file_and_folder(api: HfApi):
    put(api, {"a": "file"})
    with pytest.raises(BadRequestError, match="both a file and a folder"):
        put(api, {"a/b": "x"})


def test_stale_parent_is_refused_and_changes_nothing(api: HfApi):
    first = put(api, {"a.txt": "1"})
    second = put(api, {"a.txt": "2"}, parent_commit=first)
    with pytest.raises(HfHubHTTPError) as caught:
        put(api, {"a.txt": "3"}, parent_commit=first)
    assert caught.value.response.status_code == 412
    assert api.model_info("local/m").sha == second


def test_of_concurrent_commits_on_one_parent_exactly_one_wins(api: HfApi):
    parent = api.model_info("local/m").sha
    outcomes: list[str] = []
    barrier = threading.Barrier(4)

    def push(number: int) -> None:
        barrier.wait()
        try:
            put(api, {f"{number}.txt": str(number)}, parent_commit=parent)
            outcomes.append("won")
        except HfHubHTTPError as error:
            outcomes.append(str(error.response.status_code))

    threads = [threading.Thread(target=push, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["412", "412", "412", "won"]
    assert len(api.list_repo_commits("local/m")) == 2


def test_concurrent_commits_without_parent_all_arrive(api: HfApi):
    threads = [
        threading.Thread(target=put, args=(api, {f"{n}.txt": str(n), f"{n}.bin": blob(2000, n)})) for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths(api) == {f"{n}.{kind}" for n in range(6) for kind in ("txt", "bin")}
    assert len(api.list_repo_commits("local/m")) == 7


def test_copies_within_and_across_revisions_send_no_large_files(api: HfApi, hub: LocalHub):
    api.create_branch("local/m", branch="stage")
    put(api, {"w.bin": blob(9000), "small.txt": "s"}, revision="stage")
    hub.requests.clear()
    copies = [
        CommitOperationCopy("w.bin", "model/w.bin", src_revision="stage"),
        CommitOperationCopy("small.txt", "small.txt", src_revision="stage"),
    ]
    api.create_commit("local/m", copies, commit_message="publish", parent_commit=api.model_info("local/m").sha)
    assert not hub.requests.find("PUT")
    assert Path(api.hf_hub_download("local/m", "model/w.bin")).read_bytes() == blob(9000)
    assert text(api, "small.txt") == "s"


def test_server_side_copy_operation(api: HfApi, hub: LocalHub):
    import httpx2

    first = put(api, {"w.bin": blob(100), "a.txt": "a"})
    put(api, {"a.txt": "b"})
    lines = (
        '{"key":"header","value":{"summary":"copy"}}\n'
        '{"key":"copyFile","value":{"path":"w2.bin","srcPath":"w.bin"}}\n'
        f'{{"key":"copyFile","value":{{"path":"old.txt","srcPath":"a.txt","srcRevision":"{first}"}}}}\n'
    )
    answer = httpx2.post(
        f"{hub.endpoint}/api/models/local/m/commit/main",
        content=lines,
        headers={"Authorization": f"Bearer {hub.token}"},
    )
    assert answer.status_code == 200, answer.text
    assert paths(api) == {"w.bin", "w2.bin", "a.txt", "old.txt"}
    assert text(api, "old.txt") == "a"


def test_readme_is_validated_before_upload(api: HfApi):
    put(api, {"README.md": "---\nlicense: apache-2.0\nbase_model: a/b\n---\n# ok"})
    with pytest.raises(ValueError, match="license"):
        put(api, {"README.md": "---\nlicense: nonsense-1\n---\n"})
    with pytest.raises(ValueError, match="base_model"):
        put(api, {"README.md": "---\nbase_model: [not a repo]\n---\n"})
    with pytest.raises(ValueError, match="YAML"):
        put(api, {"README.md": "---\n a: [\n---\n"})
    with pytest.warns(UserWarning, match="empty or missing"):
        put(api, {"README.md": "no front matter"})
    assert metadata_load(api.hf_hub_download("local/m", "README.md")) is None


def test_unencodable_messages_stay_out_of_headers(api: HfApi):
    with pytest.raises(BadRequestError, match="Invalid file path"):
        put(api, {"bad//\n\x7fé": "x"})
