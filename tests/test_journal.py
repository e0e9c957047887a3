"""The journal of a folder: only whole files of the same plan are taken over, by one process at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from hubmerge.errors import TargetNotEmptyError
from hubmerge.journal import Journal, Resumable, Written, resumable
from hubmerge.output import FolderSink
from hubmerge.spec import DTYPES, FactorPair, OutputFile, Plan, TensorJob
from tests import factories as make

NAMES = ("model-1.safetensors", "model-2.safetensors", "heads/a.safetensors")
WORK = Resumable(make.digest("plan"), tuple(OutputFile(name, b"", 1000) for name in NAMES), recipe={"method": "linear"})


def content(name: str) -> bytes:
    return sha256(name.encode()).digest()[:10] * 100


def written(name: str) -> Written:
    return Written(name, 1000, sha256(content(name)).hexdigest())


def fill(folder: Path, *names: str) -> Journal:
    """A folder with files, and a journal that names them; it is closed, as after a crash."""
    folder.mkdir(exist_ok=True)
    journal = Journal(folder, WORK)
    journal.open()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content(name))
        journal.add(written(name))
    journal.close(keep=True)
    return journal


def reopened(folder: Path, work: Resumable = WORK) -> tuple[Written, ...]:
    journal = Journal(folder, work)
    try:
        return journal.open()
    finally:
        journal.close(keep=True)


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_finished_files_are_taken_over_however_often(tmp_path: Path) -> None:
    folder = tmp_path / "partial"
    fill(folder, *NAMES[:2])
    for _ in range(3):
        assert reopened(folder) == tuple(map(written, NAMES[:2]))
    assert files(folder) == set(NAMES[:2])


def test_a_line_that_was_cut_short_is_not_believed_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "partial"
    path = fill(folder, *NAMES[:2]).path
    whole = path.read_bytes()
    for cut in range(1, 40):
        path.write_bytes(whole[:-cut])
        (folder / NAMES[1]).write_bytes(content(NAMES[1]))
        assert reopened(folder) == (written(NAMES[0]),)
        assert files(folder) == {NAMES[0]}
        fill(folder, NAMES[2])
        assert set(reopened(folder)) == {written(NAMES[0]), written(NAMES[2])}


@pytest.mark.parametrize("harm", ["changed", "shorter", "missing"])
def test_a_file_that_is_not_what_was_written_is_made_again(harm: str, tmp_path: Path) -> None:
    folder = tmp_path / "partial"
    fill(folder, *NAMES)
    path = folder / NAMES[0]
    if harm == "changed":
        path.write_bytes(content("other"))
    elif harm == "shorter":
        path.write_bytes(content(NAMES[0])[:-1])
    else:
        path.unlink()
    assert set(reopened(folder)) == {written(NAMES[1]), written(NAMES[2])}
    assert files(folder) == set(NAMES[1:])


def test_what_was_never_noted_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "partial"
    fill(folder, NAMES[0])
    (folder / NAMES[1]).write_bytes(content(NAMES[1]))
    (folder / "README.md").write_text("of the run before")
    assert reopened(folder) == (written(NAMES[0]),)
    assert files(folder) == {NAMES[0]}


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(WORK, digest=make.digest("other plan")),
        dataclasses.replace(WORK, resume=False),
    ],
    ids=["other plan", "no resume"],
)
def test_nothing_is_taken_over(other: Resumable, tmp_path: Path) -> None:
    folder = tmp_path / "partial"
    fill(folder, *NAMES)
    assert reopened(folder, other) == ()
    assert files(folder) == set()
    assert reopened(folder) == ()


def test_a_journal_says_what_it_is_about(tmp_path: Path) -> None:
    first = json.loads(fill(tmp_path / "partial").path.read_text().splitlines()[0])
    assert first["plan_sha256"] == WORK.digest
    assert first["recipe"] == {"method": "linear"}
    assert [o["path"] for o in first["outputs"]] == list(NAMES)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "partial"
    fill(folder, NAMES[0])
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('mine', flush=True); "
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(folder) + ".journal"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(TargetNotEmptyError, match="partial: another run is writing there"):
            reopened(folder)
        other.kill()
    assert reopened(folder) == (written(NAMES[0]),)


# --- a sink with a journal --------------------------------------------------------------------------------------


def sink(out: Path, work: Resumable = WORK, **options: object) -> FolderSink:
    return FolderSink(out, work.tag, 3000, work=work, **options)  # type: ignore[arg-type]


def write(to: FolderSink, *names: str) -> None:
    for name in names:
        output = next(o for o in WORK.outputs if o.path == name)
        path = to.place(output, lambda: False)
        path.write_bytes(content(name))
        to.finished(output, path, written(name).sha256)


def interrupted(out: Path, *names: str, error: BaseException | None = None) -> list[str]:
    """A run that ends after some files; returns the notes on its error."""
    error = error or KeyboardInterrupt()
    with pytest.raises(type(error)) as caught, sink(out) as to:  # noqa: PT012 - it is left from within
        write(to, *names)
        raise error
    return getattr(caught.value, "__notes__", [])


def test_a_run_continues_where_the_one_before_ended(tmp_path: Path) -> None:
    out = tmp_path / "results" / "out"
    notes = interrupted(out, NAMES[0])
    assert notes == [f"1 finished file kept in {sink(out).folder}; the same command continues from there"]
    assert "2 finished files kept" in interrupted(out, NAMES[1], error=OSError(28, "No space left on device"))[0]
    assert not out.exists()
    with sink(out) as to:
        assert [w.path for w in to.written] == list(NAMES[:2])
        write(to, NAMES[2])
        to.commit({"config.json": b"{}"})
    assert files(out) == {*NAMES, "config.json"}
    assert all((out / name).read_bytes() == content(name) for name in NAMES)
    assert os.listdir(out.parent) == ["out"]


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    assert interrupted(tmp_path / "results" / "out") == []
    assert os.listdir(tmp_path / "results") == []


def test_the_rest_of_another_plan_is_left_alone_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    interrupted(out, NAMES[0])
    left = sink(out).folder
    other = dataclasses.replace(WORK, digest=make.digest("other plan"))
    with sink(out, other) as to:
        assert to.written == []
        write(to, *NAMES)
        to.commit({})
    assert f"{left} is left of another merge" in caplog.text
    with sink(out, overwrite=True) as to:
        assert [w.path for w in to.written] == [NAMES[0]]


def test_killed_while_the_old_result_is_being_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two renames nothing stands under the final name; the next run finds both folders."""
    out = tmp_path / "results" / "out"
    with sink(out) as to:
        write(to, *NAMES)
        to.commit({})
    rename = Path.rename

    def die(self: Path, target: Path) -> Path:
        if target == out:
            os._exit(9)
        return rename(self, target)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Path, "rename", die)
        with sink(out, overwrite=True) as to:
            write(to, *NAMES)
            to.commit({"new": b"1"})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not out.exists()
    with sink(out, overwrite=True) as to:
        assert files(out) == set(NAMES)
        assert {w.path for w in to.written} == set(NAMES)
        to.commit({"new": b"1"})
    assert files(out) == {*NAMES, "new"}
    assert os.listdir(out.parent) == ["out"]


# --- what is the same run ---------------------------------------------------------------------------------------


def planned(root: Path | None = None, **changes: object) -> Plan:
    base, model = make.pinned("org/base", role="base"), make.pinned("org/ft", root=str(root) if root else None)
    return make.plan(make.recipe(base, [model]), base, [model], **changes)


def test_hub_inputs_are_identified_by_the_plan_alone() -> None:
    assert resumable(planned(), {}).digest == planned().digest


def test_a_local_model_that_was_saved_again_is_another_input(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1" * 4096)
    os.utime(weights, ns=(10**18, 10**18))
    first = resumable(planned(tmp_path), {}).digest
    assert resumable(planned(tmp_path), {}).digest == first != planned().digest
    weights.write_bytes(b"2" * 4096)
    os.utime(weights, ns=(10**18, 10**18 + 1))
    assert resumable(planned(tmp_path), {}).digest != first


def test_merged_adapters_are_computed_again() -> None:
    job = TensorJob(
        0, "w", "linear", (8, 8), DTYPES["F32"], 0, 0, 128, "merge", None, (), factors=FactorPair(("A", "B"), 2)
    )
    outputs = (OutputFile("adapter_model.safetensors", b"", 10), OutputFile("heads/a.safetensors", b"", 10))
    work = resumable(planned(jobs=(job,), outputs=outputs), {})
    assert [o.path for o in work.outputs] == ["heads/a.safetensors"]
    assert work.takes_over("heads/a.safetensors")
    assert not work.takes_over("adapter_model.safetensors")
