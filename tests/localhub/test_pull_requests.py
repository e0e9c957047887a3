"""Discussions and pull requests through the client."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.community import DiscussionComment, DiscussionCommit, DiscussionStatusChange, DiscussionTitleChange
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError


def commit(api: HfApi, path: str, content: str | None, **options: object) -> object:
    operation = CommitOperationDelete(path) if content is None else CommitOperationAdd(path, content.encode())
    return api.create_commit("local/m", [operation], commit_message=f"change {path}", **options)  # type: ignore[call-overload]


def text(api: HfApi, path: str, revision: str = "main") -> str:
    return Path(api.hf_hub_download("local/m", path, revision=revision)).read_text()


def test_create_read_and_merge(api: HfApi):
    commit(api, "a.txt", "old\n")
    info = commit(api, "a.txt", "new\n", create_pr=True)
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert text(api, "a.txt") == "old\n"
    assert text(api, "a.txt", "refs/pr/1") == "new\n"
    assert api.model_info("local/m", revision="refs/pr/1").sha == info.oid
    refs = api.list_repo_refs("local/m", include_pull_requests=True)
    assert [(r.ref, r.target_commit) for r in refs.pull_requests or []] == [("refs/pr/1", info.oid)]
    details = api.get_discussion_details("local/m", 1)
    assert (details.status, details.target_branch, details.conflicting_files) == ("open", "refs/heads/main", [])
    assert "-old\n+new\n" in (details.diff or "")
    api.merge_pull_request("local/m", 1, comment="nice")
    details = api.get_discussion_details("local/m", 1)
    assert details.status == "merged"
    assert details.merge_commit_oid == api.model_info("local/m").sha
    assert text(api, "a.txt") == "new\n"
    assert text(api, "a.txt", "refs/pr/1") == "new\n"
    with pytest.raises(HfHubHTTPError):
        api.merge_pull_request("local/m", 1)


def test_upload_folder_as_pull_request(api: HfApi, tmp_path: Path):
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "w.bin").write_bytes(b"weights")
    (tmp_path / "up" / "c.json").write_text("{}")
    info = api.upload_folder(repo_id="local/m", folder_path=tmp_path / "up", create_pr=True)
    revision = info.pr_revision
    assert revision is not None
    assert {"w.bin", "c.json"} <= set(api.list_repo_files("local/m", revision=revision))
    assert "w.bin" not in api.list_repo_files("local/m")


def test_merges_combine_changes_to_different_files(api: HfApi):
    commit(api, "a.txt", "1")
    commit(api, "b.txt", "1")
    commit(api, "c.txt", "1")
    commit(api, "a.txt", "2", create_pr=True)
    commit(api, "c.txt", None, revision="refs/pr/1")
    commit(api, "b.txt", "2")
    api.merge_pull_request("local/m", 1)
    assert (text(api, "a.txt"), text(api, "b.txt")) == ("2", "2")
    assert not api.file_exists("local/m", "c.txt")


def test_conflicts_are_found_and_refused(api: HfApi):
    commit(api, "a.txt", "1")
    commit(api, "a.txt", "2", create_pr=True)
    commit(api, "a.txt", "3")
    assert api.get_discussion_details("local/m", 1).conflicting_files == ["a.txt"]
    with pytest.raises(HfHubHTTPError) as caught:
        api.merge_pull_request("local/m", 1)
    assert caught.value.response.status_code == 409
    assert "a.txt" in str(caught.value)
    assert text(api, "a.txt") == "3"
    commit(api, "a.txt", "3", revision="refs/pr/1")
    api.merge_pull_request("local/m", 1)


def test_a_pull_request_may_start_from_an_older_commit(api: HfApi):
    old = commit(api, "a.txt", "1").oid
    commit(api, "a.txt", "2")
    info = commit(api, "b.txt", "b", create_pr=True, parent_commit=old)
    assert text(api, "a.txt", info.pr_revision) == "1"
    api.merge_pull_request("local/m", 1)
    assert (text(api, "a.txt"), text(api, "b.txt")) == ("2", "b")


def test_stale_parents_are_refused_on_pull_requests_too(api: HfApi):
    first = commit(api, "a.txt", "1", create_pr=True)
    commit(api, "a.txt", "2", revision="refs/pr/1", parent_commit=first.oid)
    with pytest.raises(HfHubHTTPError) as caught:
        commit(api, "a.txt", "3", revision="refs/pr/1", parent_commit=first.oid)
    assert caught.value.response.status_code == 412
    with pytest.raises(RevisionNotFoundError):
        commit(api, "a.txt", "3", revision="refs/pr/99")


def test_draft_pull_requests_open_with_their_first_commit(api: HfApi):
    draft = api.create_pull_request("local/m", "Draft first", description="why")
    assert (draft.num, draft.status, draft.is_pull_request) == (1, "draft", True)
    commit(api, "a.txt", "1", revision="refs/pr/1")
    assert api.get_discussion_details("local/m", 1).status == "open"


def test_the_life_of_a_discussion(api: HfApi):
    talk = api.create_discussion("local/m", "A question", description="Why?")
    assert (talk.num, talk.status, talk.is_pull_request, talk.target_branch) == (1, "open", False, None)
    comment = api.comment_discussion("local/m", 1, "Because.")
    api.edit_discussion_comment("local/m", 1, comment.id, "Because of that.")
    api.rename_discussion("local/m", 1, "An answer")
    api.change_discussion_status("local/m", 1, "closed", comment="done")
    with pytest.warns(UserWarning, match="irreversible"):
        api.hide_discussion_comment("local/m", 1, comment.id)
    details = api.get_discussion_details("local/m", 1)
    assert (details.title, details.status, details.author) == ("An answer", "closed", "local")
    kinds = [type(e) for e in details.events]
    assert kinds == [
        DiscussionComment, DiscussionComment, DiscussionTitleChange, DiscussionComment, DiscussionStatusChange,
    ]  # fmt: skip
    edited = details.events[1]
    assert isinstance(edited, DiscussionComment)
    assert (edited.edited, edited.hidden, edited.number_of_edits) == (True, True, 2)
    with pytest.raises(HfHubHTTPError):
        api.get_discussion_details("local/m", 7)


def test_discussions_are_listed_and_filtered(api: HfApi):
    for number in range(12):
        api.create_discussion("local/m", f"Talk {number}")
    commit(api, "a.txt", "1", create_pr=True)
    api.change_discussion_status("local/m", 1, "closed")
    found = list(api.get_repo_discussions("local/m"))
    assert [d.num for d in found] == list(range(13, 0, -1))
    assert [d.num for d in api.get_repo_discussions("local/m", discussion_type="pull_request")] == [13]
    assert [d.num for d in api.get_repo_discussions("local/m", discussion_status="closed")] == [1]
    assert list(api.get_repo_discussions("local/m", author="nobody")) == []
    assert isinstance(api.get_discussion_details("local/m", 13).events[1], DiscussionCommit)
