"""Where tensors of a checkpoint ended up: whole, cut out of, stacked into or joined from a model's parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hubmerge.bundles.places import Piece, locate, tensors_of

laws = settings(deadline=None, derandomize=True, max_examples=25)
Tensors = dict[str, torch.Tensor]


class Model(nn.Module):
    """Parameters of these shapes, and what transformers would do to save them."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], undo: Callable[[Tensors], Tensors]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.undo = undo


@pytest.fixture(autouse=True)
def reverting(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.core_model_loading as loading

    monkeypatch.setattr(loading, "revert_weight_conversion", lambda model, state: model.undo(state))


def write_back(model: Model, places: Any, given: Tensors) -> None:
    """Write what is given through the places."""
    owned = tensors_of(model)
    for name, pieces in places.items():
        for piece in pieces:
            rows = given[name] if piece.part is None else given[name].view(-1, *given[name].shape[1:])[piece.part.rows]
            memory = piece.memory(owned)
            memory.copy_(rows.reshape(memory.shape))


def assert_found(model: Model, expected: set[str]) -> None:
    """Everything has a place; what is written there is what the model would save."""
    state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    stored = {n: t.clone() for n, t in model.undo(state).items()}
    places, lost = locate(model, stored, ())
    assert not lost
    assert places.keys() == expected
    other = {n: torch.randn(t.shape) for n, t in stored.items()}
    write_back(model, places, other)
    saved = model.undo(dict(model.state_dict()))
    assert all(torch.equal(saved[n], t) for n, t in other.items())


def test_what_became_a_parameter_is_recognised_by_its_memory() -> None:
    model = Model({"a": (3, 4), "b": (5,)}, undo=lambda _: pytest.fail("not needed"))
    stored = {"x.a": model.a.data, "x.b": model.b.data, "unused": torch.ones(3, 4)}
    places, lost = locate(model, stored, ())
    assert places == {"x.a": (Piece("a"),), "x.b": (Piece("b"),)}
    assert not lost


@laws
@given(experts=st.integers(1, 3), out=st.integers(1, 4), inner=st.integers(1, 4))
def test_stacked_and_fused(experts: int, out: int, inner: int) -> None:
    """As mixtures of experts are: each gate and up projection is a slice of one parameter of a layer."""

    def undo(state: Tensors) -> Tensors:
        found = {}
        for name, t in state.items():
            gates, ups = t.chunk(2, dim=1)
            for i in range(experts):
                found[f"{name}.{i}.gate"] = gates[i].contiguous()
                found[f"{name}.{i}.up"] = ups[i].contiguous()
        return found

    model = Model({"first": (experts, 2 * out, inner), "second": (experts, 2 * out, inner)}, undo)
    names = {f"{n}.{i}.{p}" for n in ("first", "second") for i in range(experts) for p in ("gate", "up")}
    assert_found(model, names)


@laws
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(1, 4), st.booleans())
def test_split(rows: list[int], columns: int, bias: bool) -> None:
    """As attention is whose query, key and value are stored together."""
    shapes = {f"p{i}": (n,) if bias else (n, columns) for i, n in enumerate(rows)}
    assert_found(Model(shapes, lambda state: {"all": torch.cat([state[n] for n in shapes])}), {"all"})


@laws
@given(shape=st.lists(st.integers(1, 4), min_size=2, max_size=4), data=st.data())
def test_transposed(shape: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    assert_found(Model({"p": tuple(shape)}, lambda s: {"stored": s["p"].permute(order).contiguous()}), {"stored"})


def test_renamed_and_scalars() -> None:
    model = Model({"a": (), "b": (1, 1), "c": (2, 3)}, lambda state: {f"old.{n}": t for n, t in state.items()})
    assert_found(model, {"old.a", "old.b", "old.c"})


def failing(state: Tensors) -> Tensors:
    raise ValueError("cannot be undone")


@pytest.mark.parametrize(
    ("undo", "load"),
    [
        (lambda s: s, lambda p: p + 1),  # other values in the same places
        (lambda s: {"p": s["p"].flip(0)}, lambda p: p.flip(0)),  # backwards is no stride
        (lambda s: {"p": torch.cat([s["p"][::2], s["p"][1::2]])}, lambda p: torch.cat([p[::2], p[1::2]])),
        (lambda s: {"p": s["p"][:3]}, lambda p: p[:3].clone()),
        (failing, lambda p: p.clone()),
    ],
    ids=["changed", "backwards", "interleaved", "incomplete", "failing"],
)
def test_what_has_no_place_is_reported(undo: Any, load: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = Model({"p": (4, 2)}, undo)
    _, lost = locate(model, {"p": load(model.p.data)}, ())
    assert lost == ["p"]


def test_what_was_missing_is_nobodys() -> None:
    model = Model({"p": (4, 2)}, lambda state: state)
    assert locate(model, {}, {"p"}) == ({}, [])


def test_tied_parameters_are_one() -> None:
    model = Model({"a": (3, 4)}, undo=lambda state: {})
    model.b = model.a
    stored = {"a": model.a.data, "b": torch.zeros(3, 4)}
    places, lost = locate(model, stored, ())
    assert places == {"a": (Piece("a"),)}
    assert not lost
