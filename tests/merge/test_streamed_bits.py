"""The engine fills streams with the bytes of its files: with any number of workers, however little may be kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from hubmerge import api, shipping
from hubmerge.engine import Engine
from hubmerge.errors import HubMergeError
from hubmerge.hub import Hub
from hubmerge.inputs import Inputs
from hubmerge.io.stream import StreamWriter
from hubmerge.ranking import GRAIN
from hubmerge.spec import OutputFile, Plan
from hubmerge.tuning import Tuning
from tests.merge.test_same_bits import make, recipe

# With passes over each tensor or over the whole model, with none, with tensors that come whole; random bits.
METHODS = [("task_arithmetic", ()), ("ties", ()), ("ties", ("trim=tensor",)), ("dare_ties", ()), ("iso_c", ())]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models"), 1, 0)


class Kept:
    """A stream into memory, which can break after so many bytes."""

    def __init__(self, breaks_after: int | None) -> None:
        self.content = bytearray()
        self.aborted = False
        self._breaks_after = breaks_after

    def write(self, data: bytes) -> None:
        if self._breaks_after is not None and len(self.content) + len(data) > self._breaks_after:
            raise HubMergeError("the stream broke")
        self.content += data

    def abort(self) -> None:
        self.aborted = True


class Streams:
    """A sink without files."""

    def __init__(self, breaks_after: int | None = None) -> None:
        self.open: dict[str, Kept] = {}
        self.digests: dict[str, str] = {}
        self._breaks_after = breaks_after

    def place(self, output: OutputFile, stopped: Callable[[], bool]) -> Kept:
        self.open[output.path] = Kept(self._breaks_after)
        return self.open[output.path]

    def finished(self, output: OutputFile, place: Kept, sha256: str) -> None:
        assert len(place.content) == output.size_bytes
        assert hashlib.sha256(place.content).hexdigest() == sha256
        self.digests[output.path] = sha256


def streamed(planned: Plan, workers: int, sink: Streams) -> dict[str, str]:
    with Inputs(planned, Hub(), "auto") as inputs:
        Engine(planned, inputs, sink, Tuning(workers, GRAIN, GRAIN)).run()
    return sink.digests


@pytest.mark.parametrize(("method", "params"), METHODS, ids=str)
def test_streams_get_the_bytes_of_files(
    method: str, params: tuple[str, ...], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(f"{root}/", method, params)
    made = api.merge(asked, tmp_path / "out", options=api.RunOptions(workers=1))
    expected = {f.path: f.sha256 for f in made.files if f.path.endswith(".safetensors")}
    assert len(expected) == 4
    for workers, room in ((1, 0), (4, 0), (4, 100_000)):
        monkeypatch.setattr(shipping, "StreamWriter", partial(StreamWriter, held_bytes=room))
        assert streamed(api.plan(asked), workers, Streams()) == expected


def test_a_stream_that_breaks_ends_the_run_and_aborts_the_others(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "StreamWriter", partial(StreamWriter, held_bytes=0))
    sink = Streams(breaks_after=100_000)
    with pytest.raises(HubMergeError, match="the stream broke"):
        streamed(api.plan(recipe(f"{root}/", "task_arithmetic", ())), 4, sink)
    assert sink.open
    assert all(stream.aborted for path, stream in sink.open.items() if path not in sink.digests)
