"""The hub's pure parts: paths, merges, ranges, patterns, cards, git ids."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubmerge.localhub import cards
from hubmerge.localhub.errors import HubError
from hubmerge.localhub.files import parse_range
from hubmerge.localhub.patterns import DEFAULT_GITATTRIBUTES, IgnoreRules, LfsRules
from hubmerge.localhub.trees import Edit, Entry, folder_oids, merge_snapshots, regular_entry

NAMES = st.sampled_from(["a", "b", "c/d", "c/e", "f/g/h"])
SNAPSHOTS = st.dictionaries(NAMES, st.sampled_from([b"1", b"2", b"3"]), max_size=5)


def snapshot(files: dict[str, bytes]) -> dict[str, Entry]:
    return {path: regular_entry(path, data, "0" * 64) for path, data in files.items()}


@given(SNAPSHOTS, SNAPSHOTS)
def test_merging_a_side_that_did_not_change_gives_the_other(base: dict[str, bytes], changed: dict[str, bytes]):
    before, after = snapshot(base), snapshot(changed)
    assert merge_snapshots(before, before, after) == (after, [])
    assert merge_snapshots(before, after, before) == (after, [])
    assert merge_snapshots(before, after, after) == (after, [])


@given(SNAPSHOTS, SNAPSHOTS, SNAPSHOTS)
def test_conflicts_are_symmetric_and_exactly_the_double_changes(
    base: dict[str, bytes], ours: dict[str, bytes], theirs: dict[str, bytes]
):
    merged, conflicts = merge_snapshots(snapshot(base), snapshot(ours), snapshot(theirs))
    other, mirrored = merge_snapshots(snapshot(base), snapshot(theirs), snapshot(ours))
    expected = [
        p for p in sorted({*base, *ours, *theirs})
        if ours.get(p) != base.get(p) and theirs.get(p) != base.get(p) and ours.get(p) != theirs.get(p)
    ]  # fmt: skip
    assert conflicts == mirrored == expected
    if not conflicts:
        assert merged == other


@given(st.integers(0, 50), st.integers(0, 60), st.integers(0, 60))
def test_ranges_select_what_slices_do(size: int, first: int, last: int):
    content = bytes(range(size))
    if first < size and first <= last:
        start, end = parse_range(f"bytes={first}-{last}", size) or (0, size)
        assert content[start:end] == content[first : last + 1]
    elif first <= last:
        with pytest.raises(HubError) as caught:
            parse_range(f"bytes={first}-{last}", size)
        assert (caught.value.status, caught.value.headers["Content-Range"]) == (416, f"bytes */{size}")


def test_open_and_suffix_ranges():
    assert parse_range("bytes=5-", 10) == (5, 10)
    assert parse_range("bytes=-3", 10) == (7, 10)
    assert parse_range("bytes=-30", 10) == (0, 10)
    for header in (None, "bytes=0-1,3-4", "lines=1-2", "bytes=", "bytes=-", "bytes=7-3"):
        assert parse_range(header, 10) is None


def test_folder_ids_are_those_of_git(tmp_path: Path):
    files = {"a.txt": b"a", "a/b/c.txt": b"c", "a-b": b"x", "a.b/c": b"", "z": b"z" * 1000}
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    git = ["git", "-c", "core.autocrlf=false", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    expected = subprocess.run([*git, "write-tree"], check=True, capture_output=True, text=True).stdout.strip()
    assert folder_oids(snapshot(files))[""] == expected


@pytest.mark.parametrize("path", ["", "/a", "a/", "a//b", "a/../b", ".git/config", "x/.GIT/y", "a\0", "a" * 2000])
def test_impossible_paths(path: str):
    with pytest.raises(HubError):
        Edit({}).put(regular_entry(path, b"", "0" * 64))


PATTERNS = [
    "*.log",
    "build/",
    "/top.txt",
    "a/**/z",
    "docs/*.md",
    "!keep.log",
    "[ab].txt",
    "?.py",
    "**/deep",
    "x/**",
    "\\!odd",
]
PATHS = [
    "a.log", "x/y.log", "keep.log", "build/a", "sub/build/b", "build", "top.txt", "sub/top.txt", "a/z", "a/b/c/z",
    "docs/i.md", "docs/s/i.md", "a.txt", "c.txt", "p.py", "pp.py", "deep", "q/deep", "q/deep/f", "x/y", "!odd", "other",
]  # fmt: skip


def test_ignore_rules_agree_with_git(tmp_path: Path):
    (tmp_path / ".gitignore").write_text("# comment\n\n" + "\n".join(PATTERNS))
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    answer = subprocess.run(
        ["git", "-C", str(tmp_path), "check-ignore", "--no-index", "--stdin"],
        input="\n".join(PATHS), capture_output=True, text=True,
    )  # fmt: skip
    rules = IgnoreRules((tmp_path / ".gitignore").read_text())
    assert [path for path in PATHS if rules.matches(path)] == answer.stdout.splitlines()


def test_large_file_rules():
    rules = LfsRules(DEFAULT_GITATTRIBUTES + "notes.bin -filter\n")
    large = ["w.safetensors", "sub/w.bin", "saved_model/v/x", "runs/events.out.tfevents.1", "a.tar.gz"]
    small = ["config.json", "README.md", "notes.bin", "model.safetensors.index.json", "saved_model.txt"]
    assert [p for p in large + small if rules.matches(p)] == large


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ("license: apache-2.0", None),
        ("license: [mit, apache-2.0]", None),
        ("license: llama3.1\nbase_model:\n- a/b\n- c/d\nbase_model_relation: merge\ntags: [merge]", None),
        ("language: [en, no]", None),
        ("license: my-own", "license"),
        ("base_model: https://somewhere/a/b", "base_model"),
        ("base_model: 3", "base_model"),
        ("base_model_relation: cousin", "base_model_relation"),
        ("tags: merge", "tags"),
        ("datasets: [1]", "datasets"),
        ("pipeline_tag: [text-generation]", "pipeline_tag"),
        ("model-index: {}", "model-index"),
        ("model-index: [{name: x}]", "results"),
        ("model-index: [{results: []}]", "name"),
        ("a: [1", "YAML"),
        ("- a\n- b", "mapping"),
    ],
)
def test_cards(metadata: str, complaint: str | None):
    report = cards.validate(f"---\n{metadata}\n---\n# Title", "model")
    if complaint is None:
        assert report.errors == []
    else:
        assert complaint in report.errors[0]


def test_cards_without_metadata_and_other_licences_are_warned_about():
    assert cards.validate("# Title", "model").warnings
    assert cards.validate("---\n---\n", "model").warnings
    assert cards.validate("---\nlicense: other\n---\n", "model").warnings
    assert not cards.validate("---\nlicense: other\nlicense_name: x\n---\n", "model").warnings


def test_card_metadata_is_json_ready():
    assert cards.metadata("---\ndate: 2024-01-02\nn: 1\n1: {x: [true]}\n---\n") == {
        "date": "2024-01-02", "n": 1, "1": {"x": [True]},
    }  # fmt: skip
    assert cards.metadata(None) == cards.metadata("---\na: [\n---\n") == {}
