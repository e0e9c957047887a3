"""Which device computes what: names of devices, their memory, shares of the layers, and what fits nowhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge import cli, devices
from hubmerge.devices import DeviceMap, Lane, assign, device_map, has_float64, parse_device, parse_memory
from hubmerge.errors import UsageError
from hubmerge.footprint import footprint, working_set_bytes
from hubmerge.methods import get_method
from hubmerge.spec import DTYPES, Kind, Plan, Settings, TensorJob, TensorSpec
from tests import factories
from tests.merge.models import unknown_architecture

law = settings(deadline=None, derandomize=True, max_examples=25)
TWO_GPUS = (torch.device("cuda", 0), torch.device("cuda", 1))
GB = 10**9


def job(index: int, name: str, shape: tuple[int, ...], kind: Kind = "linear", method: str = "tsv_merge") -> TensorJob:
    params = get_method(method).parameters()
    spec = TensorSpec(name, DTYPES["BF16"], shape, "model.safetensors", 0, 2 * torch.Size(shape).numel())
    layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
    return TensorJob(
        index=index, name=name, kind=kind, shape=shape, dtype=spec.dtype, output=0, start_byte=0, end_byte=0,
        action="merge", base=spec, inputs=(spec, spec), settings=Settings(params, (params,) * 2, (1.0, 1.0)),
        layer=layer,
    )  # fmt: skip


def plan_of(jobs: Sequence[TensorJob], method: str = "tsv_merge") -> Plan:
    base, models = factories.pinned("org/base", role="base"), [factories.pinned("org/a"), factories.pinned("org/b")]
    return factories.plan(factories.recipe(base, models, method=method), base, models, jobs=tuple(jobs))


def layers(shapes: Sequence[tuple[int, int]], per_layer: int = 2) -> list[TensorJob]:
    """Layers of some equal matrices and a vector each, and an embedding before them."""
    names = [(f"layers.{i}.{k}.weight", s) for i, s in enumerate(shapes) for k in range(per_layer)]
    found = [job(n, name, shape) for n, (name, shape) in enumerate(names)]
    found += [job(len(found) + i, f"layers.{i}.norm", (s[0],), "vector") for i, s in enumerate(shapes)]
    return [*found, job(len(found), "embed.weight", (50, 8), "embedding")]


def lane(name: str, memory_bytes: int = GB) -> Lane:
    return Lane(name, torch.device("cpu"), memory_bytes)


def need(one: TensorJob, method: str = "tsv_merge") -> int:
    return working_set_bytes(one, get_method(method), 2)


# --- names and sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [("auto", TWO_GPUS), ("cpu", ()), ("cuda", TWO_GPUS), ("cuda:1", TWO_GPUS[1:]), ("cuda:0", TWO_GPUS[:1])],
)
def test_a_name_means_all_or_one(name: str, found: tuple[torch.device, ...]) -> None:
    assert parse_device(name, TWO_GPUS) == found


def test_without_accelerators_auto_is_the_cpu() -> None:
    assert parse_device("auto", ()) == parse_device("cpu", ()) == ()


@pytest.mark.parametrize("name", ["gpu", "cuda:2", "mps", "CUDA", "cuda:", "cuda:00", ""])
def test_other_names_are_explained(name: str) -> None:
    with pytest.raises(UsageError, match=rf"device {name!r}: this machine has cuda:0, cuda:1") as caught:
        parse_device(name, TWO_GPUS)
    assert caught.value.hint == "give auto, cpu, cuda:0, cuda:1"
    with pytest.raises(UsageError, match="no accelerator that PyTorch can use"):
        parse_device(name, ())


def test_memory_of_the_host_or_by_device() -> None:
    assert parse_memory("10GB") == {"cpu": 10 * GB}
    assert parse_memory("cuda:0=20GB, cuda:1=4GiB,cpu=500MB") == {
        "cuda:0": 20 * GB, "cuda:1": 4 << 30, "cpu": 500_000_000,
    }  # fmt: skip
    assert parse_memory("cuda=1GB") == {"cuda": GB}


@pytest.mark.parametrize(
    "text",
    ["lots", "cuda:0=lots", "cuda:0=", "=1GB", "cuda:0", "cuda=1GB,cuda=2GB", "auto=1GB", "Cuda=1GB", "cpu=1GB,"],
)
def test_other_sizes_are_explained(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected (a size such as 5GB|DEVICE=SIZE once for each device)"):
        parse_memory(text)


def test_all_devices_of_this_machines_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert devices.accelerators() == (torch.device("xpu", 0), torch.device("xpu", 1))
    # A build for an accelerator names it where there is none, too.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert devices.accelerators() == ()


def test_float64_is_tried_out() -> None:
    assert has_float64(torch.device("cpu"))
    assert not has_float64(torch.device("meta"))  # which computes nothing


# --- the map ----------------------------------------------------------------------------------------------------


@law
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12),
    st.lists(st.integers(1_000, 400_000), min_size=1, max_size=4),
)
def test_every_matrix_is_where_its_work_fits(shapes: list[tuple[int, int]], memory: list[int]) -> None:
    plan = plan_of(layers(shapes))
    lanes = [lane(f"gpu:{i}", m) for i, m in enumerate(memory)]
    found = assign(plan, lanes)
    for one in plan.jobs:
        place = found.places.get(one.index)
        fits_somewhere = one.kind == "linear" and need(one) <= max(memory)
        assert (place is not None) == fits_somewhere, one.name
        assert place is None or need(one) <= place.memory_bytes
    matrices = [j for j in plan.jobs if j.kind == "linear"]
    assert bool(found.notes) == any(j.index not in found.places for j in matrices)
    shares = found.shares(plan)
    assert sum(count for count, _ in shares.values()) == len(matrices)
    assert sum(elements for _, elements in shares.values()) == sum(j.numel for j in matrices)


@law
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 3))
def test_equal_layers_are_shared_evenly_and_never_cut(count: int, devices_: int, per_layer: int) -> None:
    plan = plan_of(layers([(8, 8)] * count, per_layer))
    found = assign(plan, [lane(f"gpu:{i}") for i in range(devices_)])
    by_layer: dict[int | None, set[str]] = {}
    for one in plan.jobs:
        if one.kind == "linear":
            by_layer.setdefault(one.layer, set()).add(found.places[one.index].name)
    assert all(len(names) == 1 for names in by_layer.values())
    counts = [sum(names == {f"gpu:{i}"} for names in by_layer.values()) for i in range(devices_)]
    assert max(counts) == -(-count // devices_)


def test_devices_take_turns_so_that_all_work_on_the_same_file() -> None:
    plan = plan_of(layers([(8, 8)] * 12, 1))
    found = assign(plan, [lane(f"gpu:{i}") for i in range(3)])
    order = [found.places[j.index].name for j in plan.jobs if j.kind == "linear"]
    for start in range(0, 12, 3):
        assert sorted(order[start : start + 3]) == ["gpu:0", "gpu:1", "gpu:2"]


def test_shares_follow_the_memory() -> None:
    plan = plan_of(layers([(8, 8)] * 40))
    shares = assign(plan, [lane("big", 3 * GB), lane("small", GB)]).shares(plan)
    assert shares == {"big": (60, 60 * 64), "small": (20, 20 * 64), "cpu": (0, 0)}


def test_what_fits_one_device_only_goes_there() -> None:
    jobs = [*layers([(8, 8)] * 4, 1), job(99, "layers.1.wide.weight", (64, 64))]
    found = assign(plan_of(jobs), [lane("small", need(jobs[0])), lane("big", need(jobs[-1]))])
    assert found.places[99].name == "big"
    assert {found.places[i].name for i in range(4)} <= {"small", "big"}
    assert not found.notes


def test_what_fits_nowhere_is_left_to_the_cpu_and_named() -> None:
    jobs = [*layers([(8, 8)] * 4, 1), job(98, "layers.1.wide.weight", (9, 9)), job(99, "head.weight", (64, 64))]
    found = assign(plan_of(jobs), [lane("gpu:0", need(jobs[0]))])
    assert sorted(found.places) == [0, 1, 2, 3]
    (note,) = found.notes
    assert "2 of the matrices are computed on the CPU" in note
    assert "'head.weight' takes 0.000614 GB" in note
    assert "gpu:0 has 9.6e-06 GB" in note


def test_embeddings_and_vectors_stay_unless_the_method_decomposes_them() -> None:
    plain = plan_of(layers([(8, 8)]))
    wide = get_method("tsv_merge").parameters(include_embeddings=True)
    jobs = [
        j if j.settings is None else factories.dataclasses.replace(j, settings=Settings(wide, (wide,) * 2, (1.0, 1.0)))
        for j in plain.jobs
    ]
    lanes = [lane("gpu:0")]
    kinds = {j.kind for j in plain.jobs if j.index in assign(plain, lanes).places}
    assert kinds == {"linear"}
    with_embeddings = plan_of(jobs)
    kinds = {j.kind for j in jobs if j.index in assign(with_embeddings, lanes).places}
    assert kinds == {"linear", "embedding"}


def test_layers_of_two_stacks_with_one_number_are_two() -> None:
    jobs = [job(i, f"{stack}.layers.0.w{k}.weight", (8, 8)) for i, (stack, k) in
            enumerate([("encoder", 0), ("encoder", 1), ("decoder", 0), ("decoder", 1)])]  # fmt: skip
    found = assign(plan_of(jobs), [lane("gpu:0"), lane("gpu:1")])
    assert [found.places[i].name for i in range(4)] == ["gpu:0", "gpu:0", "gpu:1", "gpu:1"]


def test_what_is_computed_elsewhere_takes_less_memory_here() -> None:
    plan = plan_of(layers([(512, 512)] * 4))
    found = assign(plan, [lane("gpu:0")])
    here = footprint(plan, 2, 32768, 32768, False)
    there = footprint(plan, 2, 32768, 32768, False, elsewhere=found.places, feeders=2)
    feeding = 2 * (3 * 2 + 12) * 512 * 512  # two threads: three versions in bfloat16, and the result three times
    others = max(need(j) for j in plan.jobs if j.kind != "linear")
    assert here.memory_bytes - there.memory_bytes == 2 * (need(plan.jobs[0]) - others) - feeding


# --- this machine's devices -------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Two GPUs by name; what is free on each may be changed."""
    free = {0: 20 * GB, 1: 20 * GB}
    monkeypatch.setattr(devices, "accelerators", lambda: TWO_GPUS)
    monkeypatch.setattr(devices, "has_float64", lambda device: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 24 * GB))
    return free


def test_most_of_the_free_memory_is_used_or_what_is_allowed(gpus: dict[int, int]) -> None:
    plan = plan_of(layers([(8, 8)] * 4))
    memory = {x.name: x.memory_bytes for x in device_map(plan).lanes}
    assert memory == {"cuda:0": 18 * GB, "cuda:1": 18 * GB}
    limited = device_map(plan, "cuda", {"cuda": 5 * GB, "cuda:1": 30 * GB})
    assert [x.memory_bytes for x in limited.lanes] == [5 * GB, 18 * GB]
    assert [x.name for x in device_map(plan, "cuda:1").lanes] == ["cuda:1"]
    assert device_map(plan, "cpu") == DeviceMap()


def test_a_full_device_gets_nothing(gpus: dict[int, int]) -> None:
    gpus[1] = 0
    found = device_map(plan_of(layers([(8, 8)] * 4)))
    assert {place.name for place in found.places.values()} == {"cuda:0"}
    gpus[0] = 0
    found = device_map(plan_of(layers([(8, 8)] * 4)))
    assert not found.places
    assert "8 of the matrices are computed on the CPU" in found.notes[0]


def test_devices_are_not_touched_for_element_wise_methods(
    gpus: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "has_float64", lambda device: pytest.fail("the device was touched"))
    jobs = [job(0, "layers.0.weight", (8, 8), method="ties")]
    assert device_map(plan_of(jobs, "ties")) == DeviceMap()


def test_a_device_without_float64_is_not_used(gpus: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_float64", lambda device: device.index == 1)
    found = device_map(plan_of(layers([(8, 8)] * 4)))
    assert [x.name for x in found.lanes] == ["cuda:1"]
    assert found.notes == ("cuda:0 is not used: it has no float64, in which matrices are decomposed",)
    assert len(found.places) == 8


def test_a_device_that_does_not_tell_its_memory_needs_a_limit(
    gpus: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.cuda, "mem_get_info")
    plan = plan_of(layers([(8, 8)] * 4))
    with pytest.raises(UsageError, match="cuda:0: PyTorch does not tell how much of its memory is free") as caught:
        device_map(plan)
    assert "--max-memory cuda:0=16GB" in caught.value.hint
    assert [x.memory_bytes for x in device_map(plan, limits={"cuda": GB}).lanes] == [GB, GB]


def test_limits_for_devices_that_are_not_here_are_refused(gpus: dict[int, int]) -> None:
    with pytest.raises(UsageError, match="device 'cuda:7'"):
        device_map(plan_of([]), "auto", {"cuda:7": GB})


# --- the command line -------------------------------------------------------------------------------------------


@pytest.fixture
def plan_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    base, tunes = unknown_architecture(tmp_path)

    def run(*options: str) -> tuple[int, str, str]:
        models = [f"--model={t}" for t in tunes]
        with pytest.raises(SystemExit) as left:
            cli.main(["plan", "--method=tsv_merge", f"--base={base}", *models, *options])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run


def test_plan_says_where_matrices_are_computed(
    plan_command: Callable[..., tuple[int, str, str]], gpus: dict[int, int]
) -> None:
    code, out, _ = plan_command()
    assert code == 0
    assert "matrices  1 on cuda:0 (0 M values); 1 on cuda:1 (0 M values); 0 on cpu (0 M values)" in out
    _, text, _ = plan_command("--json", "--device", "cuda:1")
    shown: dict[str, Any] = json.loads(text)
    assert shown["matrices"] == {"cuda:1": {"tensors": 2, "elements": 70}, "cpu": {"tensors": 0, "elements": 0}}
    _, out, err = plan_command("--max-memory", "cuda=1kB,cpu=2GB")
    assert "0 on cuda:0 (0 M values); 0 on cuda:1 (0 M values); 2 on cpu" in out
    assert "2 of the matrices are computed on the CPU: 'enc.blocks.0.w' takes" in err


def test_plan_on_the_cpu_says_nothing_of_devices(plan_command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = plan_command("--device", "cpu")
    assert code == 0
    assert "matrices" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "gpu"], "error: device 'gpu': this machine has cuda:0, cuda:1"),
        (["--max-memory", "cuda:5=1GB"], "error: device 'cuda:5': this machine has cuda:0, cuda:1"),
        (["--max-memory", "cuda:0=huge"], "error: --max-memory: expected a size such as 5GB"),
    ],
)
def test_wrong_options_are_usage_errors(
    plan_command: Callable[..., tuple[int, str, str]], gpus: dict[int, int], options: list[str], message: str
) -> None:
    code, _, err = plan_command(*options)
    assert code == 2
    assert err.startswith(message)
