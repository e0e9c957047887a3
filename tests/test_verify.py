"""Verification: any changed bit, missing file or additional weight file is found, in a folder and on the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hubmerge.errors import AccessError, HubMergeError, SourceError, UsageError, VerificationError
from hubmerge.hub import Hub
from hubmerge.localhub import LocalHub
from hubmerge.lock import LOCK_NAME, build_lock, dumps
from hubmerge.spec import FileSpec
from hubmerge.verification import Mismatch, verify
from tests import factories as make

WEIGHTS = bytes(range(256)) * 300
FILES = {
    "README.md": b"---\nlicense: mit\n---\n# Stories\n",
    "config.json": b'{"model_type": "gpt2"}\n',
    "heads/a.safetensors": b"\x08" * 99,
    "hubmerge.yaml": b"method: task_arithmetic\n",
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
}


def lock_of(files: dict[str, bytes]) -> bytes:
    base, ft = make.pinned("org/base", role="base"), make.pinned("org/ft")
    asked = make.recipe(base, [ft])
    outputs = [FileSpec(p, len(c), sha256=hashlib.sha256(c).hexdigest()) for p, c in files.items()]
    return dumps(build_lock(make.plan(asked, base, [ft]), asked.normalized(), outputs)).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    for path, content in {**FILES, LOCK_NAME: lock_of(FILES)}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def paths(mismatches: tuple[Mismatch, ...]) -> list[tuple[str, str]]:
    return [(m.kind, m.path) for m in mismatches]


# --- folders


def test_an_untouched_folder_is_ok_and_all_of_it_was_read(folder: Path) -> None:
    report = verify(folder)
    assert report.ok
    assert report.files == len(FILES)
    assert report.size_bytes == report.read_bytes == sum(map(len, FILES.values()))
    assert report.lock_sha256 == hashlib.sha256((folder / LOCK_NAME).read_bytes()).hexdigest()
    assert report.text() == f"OK: {folder}: 6 files, {report.size_bytes:,} bytes as in hubmerge.lock.json"
    report.raise_for_mismatch()
    assert verify(str(folder)) == report


@pytest.mark.parametrize("path", sorted(FILES))
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_bit_is_found_in_every_file(folder: Path, path: str, where: str) -> None:
    data = bytearray(FILES[path])
    data[{"first": 0, "middle": len(data) // 2, "last": -1}[where]] ^= 1
    (folder / path).write_bytes(data)
    report = verify(folder)
    assert not report.ok
    assert paths(report.mismatches) == [("changed", path)]
    expected, found = hashlib.sha256(FILES[path]).hexdigest(), hashlib.sha256(data).hexdigest()
    size = len(data)
    assert str(report.mismatches[0]) == (
        f"changed  {path}: expected {size} bytes with sha256 {expected}, found {size} bytes with sha256 {found}"
    )


@pytest.mark.parametrize("path", sorted(FILES))
def test_every_missing_file_is_found(folder: Path, path: str) -> None:
    (folder / path).unlink()
    assert paths(verify(folder).mismatches) == [("missing", path)]


@pytest.mark.parametrize("path", sorted(FILES))
def test_another_length_is_found_without_reading(folder: Path, path: str) -> None:
    (folder / path).write_bytes(FILES[path] + b"\n")
    report = verify(folder)
    assert paths(report.mismatches) == [("changed", path)]
    assert report.mismatches[0].found is not None
    assert report.mismatches[0].found.sha256 is None
    assert report.read_bytes == report.size_bytes - len(FILES[path])


@pytest.mark.parametrize(
    "path",
    [
        "extra.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors", "sub/x.GGUF", "onnx/model.onnx",
        "modeling_x.py", "model.safetensors.index.json", "adapter_config.json", "chat_template.jinja", "spiece.model",
        "generation_config.json",
    ],
)  # fmt: skip
def test_a_file_that_changes_what_is_loaded_must_be_in_the_lock(folder: Path, path: str) -> None:
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_bytes(b"x" * 7)
    report = verify(folder)
    assert paths(report.mismatches) == [("extra", path)]
    assert f"extra    {path}: 7 bytes; the lock has no such file" in report.text()


def test_harmless_files_are_noted_and_hidden_folders_passed_over(folder: Path) -> None:
    for path in ("assets/plot.svg", "LICENSE", ".gitattributes", ".git/x.bin", ".cache/huggingface/y.safetensors"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"x")
    report = verify(folder)
    assert report.ok
    assert report.unlisted == ("LICENSE", "assets/plot.svg")
    assert "\n  note     LICENSE: not in the lock\n" in report.text()


def test_all_differences_are_listed_and_raised_with_exit_code_3(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "README.md").write_bytes(b"---\nlicense: mit\n---\n# Storied\n")
    (folder / "evil.pt").write_bytes(b"x")
    report = verify(folder)
    assert paths(report.mismatches) == [("changed", "README.md"), ("missing", "config.json"), ("extra", "evil.pt")]
    assert report.text().startswith(f"MISMATCH: {folder}: 3 files differ from hubmerge.lock.json, which lists 6\n")
    with pytest.raises(VerificationError) as caught:
        report.raise_for_mismatch()
    assert caught.value.exit_code == 3
    for path in ("README.md", "config.json", "evil.pt"):
        assert path in str(caught.value)
    data = json.loads(json.dumps(report.to_json()))
    assert data["ok"] is False
    assert data["mismatches"][1] == {
        "path": "config.json",
        "kind": "missing",
        "expected": {"size_bytes": 23, "sha256": hashlib.sha256(FILES["config.json"]).hexdigest()},
        "found": None,
    }


def test_a_name_cannot_forge_the_report(folder: Path) -> None:
    (folder / "a\nOK: fine\x1b[2J\u202e.bin").write_bytes(b"x")
    text = verify(folder).text()
    assert len(text.splitlines()) == 2
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_a_cache_snapshot_of_links_is_followed(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    for path in (*FILES, LOCK_NAME):
        blob = blobs / hashlib.sha256(path.encode()).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        (folder / path).rename(blob)
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).symlink_to(blob)
    assert verify(snapshot).ok
    (snapshot / "config.json").resolve().unlink()
    assert paths(verify(snapshot).mismatches) == [("missing", "config.json")]


def test_a_folder_in_place_of_a_file_counts_as_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert paths(verify(folder).mismatches) == [("missing", "config.json")]


def test_a_file_that_cannot_be_read_is_an_error(folder: Path) -> None:
    # A regular file of 0 bytes whose reading fails for everybody, root included.
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/proc/self/mem")
    (folder / LOCK_NAME).write_bytes(lock_of({**FILES, "config.json": b""}))
    with pytest.raises(SourceError, match=r"config\.json: cannot be read: Input/output error"):
        verify(folder)


def test_no_lock_or_a_broken_one_is_a_failed_verification(folder: Path) -> None:
    lock = folder / LOCK_NAME
    text = lock.read_text()
    lock.write_text(text.replace('"seed": 0', '"seed": "0"'))
    with pytest.raises(VerificationError, match="seed"):
        verify(folder)
    lock.write_text(text.replace("model.safetensors", "../model.safetensors"))
    with pytest.raises(VerificationError, match="does not stay inside"):
        verify(folder)
    with lock.open("wb") as f:
        f.truncate(32_000_001)
    with pytest.raises(VerificationError, match="too large for a lock"):
        verify(folder)
    lock.unlink()
    with pytest.raises(VerificationError, match=r"has no hubmerge\.lock\.json"):
        verify(folder)


def test_a_newer_lock_is_no_mismatch(folder: Path) -> None:
    (folder / LOCK_NAME).write_text('{"format_version": 2}')
    with pytest.raises(HubMergeError, match="lock format 2") as caught:
        verify(folder)
    assert caught.value.exit_code == 1


def test_what_is_neither_folder_nor_repo_is_a_usage_error(tmp_path: Path) -> None:
    for target in ("a b", "./nowhere", tmp_path / "nowhere", "", "org/name@"):
        with pytest.raises(UsageError):
            verify(target)


# --- the Hub


@pytest.fixture
def publish(hub: LocalHub) -> Callable[..., str]:
    """Commits files, after those there are, and returns the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    api.create_repo("local/merged")

    def publish(files: dict[str, bytes], delete: tuple[str, ...] = ()) -> str:
        added = [CommitOperationAdd(p, c) for p, c in files.items()]
        gone = [CommitOperationDelete(p) for p in delete]
        return str(api.create_commit("local/merged", [*added, *gone], commit_message="x").oid)

    return publish


@pytest.fixture
def published(publish: Callable[..., str]) -> str:
    return publish({**FILES, LOCK_NAME: lock_of(FILES)})


LARGE = ("heads/a.safetensors", "model.safetensors")


def test_a_published_model_is_ok_at_its_commit(published: str) -> None:
    report = verify("local/merged")
    assert report.ok
    assert report.commit == published
    small = sum(len(c) for p, c in FILES.items() if p not in LARGE)
    assert report.read_bytes == small
    assert report.text().startswith(f"OK: local/merged at {published[:12]}: 6 files, ")
    assert report.text().endswith(f"; {small:,} bytes read, the rest by the Hub's list")


def test_deep_verification_reads_every_byte(published: str, hub: LocalHub) -> None:
    hub.requests.clear()
    report = verify("local/merged", Hub(), deep=True)
    assert report.ok
    assert report.read_bytes == report.size_bytes
    from_cdn = [r for r in hub.requests if r.port == hub.cdn_port and r.method == "GET"]
    assert {r.status for r in from_cdn} <= {200, 206}
    assert len(from_cdn) >= len(LARGE)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("path", sorted(FILES))
def test_one_flipped_bit_is_found_on_the_hub(
    published: str, publish: Callable[..., str], path: str, deep: bool
) -> None:
    data = bytearray(FILES[path])
    data[-1] ^= 1
    now = publish({path: bytes(data)})
    report = verify("local/merged", deep=deep)
    assert report.commit == now
    assert paths(report.mismatches) == [("changed", path)]
    assert report.mismatches[0].found is not None
    assert report.mismatches[0].found.sha256 == hashlib.sha256(data).hexdigest()
    assert verify(f"local/merged@{published}").ok


def test_missing_and_extra_files_are_found_on_the_hub(published: str, publish: Callable[..., str]) -> None:
    publish({"pytorch_model.bin": b"x", "notes.md": b"x"}, delete=("tokenizer.json", "model.safetensors"))
    report = verify("local/merged", Hub())
    assert paths(report.mismatches) == [
        ("missing", "model.safetensors"),
        ("missing", "tokenizer.json"),
        ("extra", "pytorch_model.bin"),
    ]
    assert report.unlisted == ("notes.md",)


def test_a_lock_removed_on_the_hub_is_a_failed_verification(published: str, publish: Callable[..., str]) -> None:
    publish({}, delete=(LOCK_NAME,))
    with pytest.raises(VerificationError, match=r"local/merged: has no hubmerge\.lock\.json"):
        verify("local/merged")


def test_a_missing_repository_is_an_access_error(hub: LocalHub) -> None:
    with pytest.raises(AccessError):
        verify("local/nowhere")
