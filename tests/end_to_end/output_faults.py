"""Results that have no place: folders, disks, memory and repositories that will not take them."""

from __future__ import annotations

import json
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hubmerge.localhub import Fault
from tests.end_to_end import support
from tests.end_to_end.scene import TARGET, Arguments, Case, Scene, with_flags
from tests.end_to_end.support import UP, RepoState


def out_is_full(scene: Scene) -> Arguments:
    scene.out.mkdir(parents=True)
    (scene.out / "thesis.txt").write_text("mine")
    return scene.merge()


def out_is_a_file(scene: Scene) -> Arguments:
    scene.out.parent.mkdir()
    scene.out.write_text("mine")
    return scene.merge()


def out_below_a_file(scene: Scene) -> Arguments:
    # Also root cannot write there, which may write to any folder whatever its mode.
    scene.out = scene.base / "config.json" / "out"
    return scene.merge()


def larger_than_the_disk(scene: Scene) -> Arguments:
    """A base that is all hole: larger than what is free, without taking any of it."""
    columns = 2 * shutil.disk_usage(scene.tmp).free // 4 // 16
    for folder in (scene.base, scene.a, scene.b):
        header = json.dumps({UP: {"dtype": "F32", "shape": [16, columns], "data_offsets": [0, 64 * columns]}}).encode()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + 64 * columns)
    return scene.merge()


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Writing beyond this size fails as on a disk that cannot take more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def disk_refuses(scene: Scene) -> Arguments:
    arguments = scene.merge()
    scene.stack.enter_context(file_size_limit(1000))
    return arguments


def too_large_to_download(scene: Scene) -> Arguments:
    scene.town.publish("local/a", scene.a)
    return [*scene.merge(models=["local/a"]), "--fetch", "cache", "--max-disk", "1KB"]


def existing_target(scene: Scene, *, private: bool = False, files: dict[str, bytes] | None = None) -> None:
    scene.town.api.create_repo(TARGET, private=private)
    for path, content in (files or {"hubmerge.lock.json": b"{}"}).items():
        scene.town.commit(TARGET, path, content)


def foreign_target(scene: Scene) -> Arguments:
    existing_target(scene, files={"thesis.txt": b"mine"})
    return scene.push()


def existing(*more: str, private: bool = False, tag: str | None = None) -> Callable[[Scene], Arguments]:
    """Push to a repository that hubmerge made before."""

    def arrange(scene: Scene) -> Arguments:
        existing_target(scene, private=private)
        if tag:
            scene.town.api.create_tag(TARGET, tag=tag)
        return scene.push(*more)

    return arrange


def target_moves(scene: Scene) -> Arguments:
    """Somebody commits while the weights are being uploaded: the storage is down until they have."""
    existing_target(scene)
    hub = scene.town.hub
    hub.requests.clear()
    hub.faults.add(Fault(method="PUT", path="^/_lfs/", status=503, times=None))

    def intrude() -> None:
        deadline = time.monotonic() + 60
        while not hub.requests.find("PUT", "^/_lfs/") and time.monotonic() < deadline:
            time.sleep(0.01)
        scene.notes["theirs"] = scene.town.commit(TARGET, "theirs.txt", b"1")
        hub.faults.clear()

    thread = threading.Thread(target=intrude)
    thread.start()
    scene.stack.callback(thread.join)

    def expected(before: RepoState | None) -> RepoState:
        assert before is not None
        files = (*before.files, "theirs.txt")
        after = RepoState(before.private, {"main": scene.notes["theirs"]}, before.tags, before.pull_requests, files)
        return support.with_stage(after, scene.town, TARGET, "model.safetensors")

    scene.expected_target = expected
    return scene.push()


def staged(arrange: Callable[[Scene], Arguments]) -> Callable[[Scene], Arguments]:
    """Whoever fails after the weights are uploaded keeps them staged."""

    def arranged(scene: Scene) -> Arguments:
        scene.expected_target = lambda before: support.with_stage(before, scene.town, TARGET, "model.safetensors")
        return arrange(scene)

    return arranged


def storage_refuses(scene: Scene) -> Arguments:
    existing_target(scene)
    scene.town.hub.faults.add(Fault(method="PUT", path="^/_lfs/", status=403, times=None))
    return scene.push()


def commit_refused(branch: str) -> Callable[[Scene], Arguments]:
    def arrange(scene: Scene) -> Arguments:
        arguments = scene.push()
        path = f"/commit/{branch}"
        scene.town.hub.faults.add(
            Fault(method="POST", path=path, status=422, body='{"error": "out of luck"}', times=None)
        )
        return arguments

    return arrange


def tampered(scene: Scene) -> Arguments:
    """Not a merge at all: the check of an earlier one."""
    made = support.hubmerge(*scene.merge())
    assert made.code == 0, made.text
    (scene.out / "config.json").write_text("{}")
    return ["verify", scene.out]


OUTPUT_CASES = [
    Case("out is not empty", 1, out_is_full, ("{out}: the folder is not empty",), "--overwrite"),
    Case("out is a file", 1, out_is_a_file, ("{out}: is a file",), "give --out another name"),
    Case(
        "out cannot be made",
        1,
        out_below_a_file,
        ("{base}/config.json: cannot be written", "is a file"),
        "give --out a folder",
    ),
    Case("larger than the disk", 1, larger_than_the_disk, ("{tmp}/results", "GB needed", "GB free"), "free some space"),
    Case(
        "disk refuses",
        1,
        disk_refuses,
        ("model.safetensors", "cannot be reserved", "File too large"),
        "free some disk space",
    ),
    Case(
        "too little memory",
        1,
        with_flags("--max-memory", "1MB"),
        ("this merge needs about", "with one worker, 1 MB are allowed"),
        "raise --max-memory to 3",
    ),
    Case("too large to download", 1, too_large_to_download, ("local/a", "to download"), "--fetch stream"),
    Case(
        "shard larger than the disk",
        1,
        lambda s: s.push("--max-disk", "1KB"),
        ("are needed at a time, 1 kB may be used",),
        "set output.shard_size (--shard-size) to at most 995 B",
    ),
    Case(
        "target of others",
        1,
        foreign_target,
        (f"{TARGET}@main holds 1 files that hubmerge did not make, e.g. thesis.txt",),
        "--overwrite",
    ),
    Case(
        "target moved",
        1,
        target_moves,
        (f"{TARGET}@main moved from ", "nothing was committed"),
        "run the same command again",
    ),
    Case(
        "tag exists", 1, existing("--tag", "v1", tag="v1"), (f"{TARGET} has a tag 'v1' already",), "Choose another tag"
    ),
    Case(
        "revision is a tag",
        1,
        existing("--revision", "v1", tag="v1"),
        (f"'v1' is a tag of {TARGET}",),
        "Publish to a branch",
    ),
    Case("private result in public", 1, existing("--private"), (f"{TARGET} is public",), "private"),
    Case(
        "pull request to no branch",
        1,
        existing("--pr", "--revision", "nope"),
        (f"{TARGET} has no branch 'nope'",),
        "Its branches are: main",
    ),
    Case("pull request with a tag", 2, existing("--pr", "--tag", "v1"), ("pull request",), "tag"),
    Case(
        "private and public",
        2,
        lambda s: s.push("--private", "--public"),
        ("--private and --public exclude each other",),
        "give one of them",
    ),
    Case("no repository id", 2, lambda s: [*s.push()[:2], "--to", "a/b/c"], ("a/b/c",), "namespace/name"),
    Case(
        "card that the Hub refuses",
        1,
        lambda s: s.push(card={"license": "no-such-licence"}),
        ("front matter of README.md", "license"),
        "`card:`",
    ),
    Case(
        "storage refuses the weights",
        1,
        storage_refuses,
        ("cannot upload hubmerge/stage-", f"/model.safetensors to {TARGET}", "HTTP 403"),
        "run the same command again",
    ),
    Case(
        "Hub refuses to stage",
        1,
        commit_refused("hubmerge/stage-"),
        (f"cannot commit to {TARGET}@hubmerge/stage-", "out of luck"),
        "run the same command again",
    ),
    Case(
        "Hub refuses the commit",
        1,
        staged(commit_refused("main")),
        (f"cannot commit to {TARGET}@main", "out of luck", "1 of 1 files are staged"),
        "run the same command again",
    ),
    Case(
        "clean-up with a recipe",
        2,
        lambda s: s.push("--cleanup"),
        ("--cleanup merges nothing",),
        f"hubmerge push --to {TARGET} --cleanup",
    ),
    Case(
        "verify a missing folder",
        2,
        lambda s: ["verify", s.tmp / "nothing"],
        ("{tmp}/nothing: no such folder",),
        "give a folder",
    ),
    Case(
        "verify without a lock",
        3,
        lambda s: ["verify", s.base],
        ("{base}: has no hubmerge.lock.json",),
        "hubmerge did not publish this model",
    ),
    Case(
        "verify a changed folder",
        3,
        tampered,
        ("config.json", "{out} differs from its lock in 1 file"),
        "find out who changed it",
    ),
]
