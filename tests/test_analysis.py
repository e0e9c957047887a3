"""Figures of merges: equal to a naive computation in float64, symmetric, and of the task vectors alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.analysis import Diagnostics, Relations, Tally, TensorFigures, relations_of_factors
from hubmerge.ranking import GRAIN
from hubmerge.spec import LowRank
from hubmerge.spectra import Spectra, decomposed, measure_spectra, number
from tests.naive_figures import naive_figures, naive_spectra

laws = settings(deadline=None, derandomize=True, max_examples=25)
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def vectors(seed: int, tasks: int, n: int) -> list[torch.Tensor]:
    """Task vectors that share a direction, with zeros in them."""
    shared = draw(seed, n)
    made = [draw(seed + 1 + t, n) * (1 + t) + 0.5 * shared for t in range(tasks)]
    return [v * (draw(seed + 99 + t, n) > -1) for t, v in enumerate(made)]


def relations(deltas: list[torch.Tensor], merged: torch.Tensor, base: torch.Tensor, cut: int = 10**9) -> Relations:
    """The relations of chunks of at most ``cut`` elements, the last one first."""
    tally = Tally(len(deltas), len(base))
    for i in reversed(range(0, len(base), cut)):
        tally.add(i, [d[i : i + cut] for d in deltas], merged[i : i + cut], base[i : i + cut])
    assert tally.left == 0
    return tally.relations()


# --- lengths, angles, signs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, GRAIN + 5, 3 * GRAIN])
def test_relations_equal_a_naive_computation(n: int) -> None:
    deltas, merged, base = vectors(1, 4, n), draw(50, n), draw(51, n)
    found, naive = relations(deltas, merged, base), naive_figures(deltas, merged, base)
    for name, expected in naive.items():
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-6, atol=1e-6, err_msg=name)


def test_hand_example() -> None:
    deltas = [torch.tensor([3.0, 4.0, 0.0]), torch.tensor([4.0, -3.0, 2.0])]
    found = relations(deltas, torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 4.0]))
    np.testing.assert_allclose(found.norms, [5.0, math.sqrt(29)])
    assert found.base_norm == 5.0
    assert found.merged_norm == 3.0
    np.testing.assert_allclose(found.cosines, [[1, 0], [0, 1]], atol=1e-15)
    np.testing.assert_allclose(found.sign_agreement, [[1, 0.5], [0.5, 1]])
    np.testing.assert_allclose(found.merged_cosines, [0.6, 4 / math.sqrt(29)])
    np.testing.assert_allclose(found.distances, [4 / 5, math.sqrt(14 / 29)])


def test_a_model_that_changes_nothing_has_no_angles() -> None:
    found = relations([torch.tensor([1.0, 2.0]), torch.zeros(2)], torch.tensor([1.0, 2.0]), torch.ones(2))
    assert np.isnan(found.cosines[0, 1])
    assert np.isnan(found.sign_agreement[0, 1])
    assert np.isnan(found.distances[1])
    assert found.distances[0] == 0.0
    assert found.to_json()["cosines"] == [None]


@laws
@given(seeds, st.integers(1, 5), st.integers(1, 6))
def test_chunks_do_not_matter(seed: int, tasks: int, grains: int) -> None:
    n = grains * GRAIN + 11
    deltas, merged, base = vectors(seed, tasks, n), draw(seed, n), draw(seed + 1, n)
    whole = relations(deltas, merged, base)
    for cut in (GRAIN, 2 * GRAIN):
        found = relations(deltas, merged, base, cut)
        assert found.gram.tobytes() == whole.gram.tobytes()
        assert found.same.tolist() == whole.same.tolist()
        assert found.both.tolist() == whole.both.tolist()


@laws
@given(seeds, st.permutations(range(4)))
def test_tasks_may_be_permuted(seed: int, order: list[int]) -> None:
    deltas, merged, base = vectors(seed, 4, 300), draw(seed, 300), draw(seed + 1, 300)
    found, permuted = relations(deltas, merged, base), relations([deltas[i] for i in order], merged, base)
    for name in ("cosines", "sign_agreement"):
        table = getattr(found, name)
        np.testing.assert_array_equal(table, table.T)
        np.testing.assert_allclose(getattr(permuted, name), table[np.ix_(order, order)], rtol=1e-13)
    for name in ("norms", "distances", "merged_cosines"):
        np.testing.assert_allclose(getattr(permuted, name), getattr(found, name)[order], rtol=1e-13)


@laws
@given(seeds, st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3))
def test_lengths_do_not_change_angles_and_signs(seed: int, factors: list[float]) -> None:
    deltas = [d.double() for d in vectors(seed, 3, 300)]
    merged, base = draw(seed, 300, dtype=torch.float64), draw(seed + 1, 300, dtype=torch.float64)
    found = relations(deltas, merged, base)
    scaled = relations([d * f for d, f in zip(deltas, factors, strict=True)], merged, base)
    np.testing.assert_allclose(scaled.cosines, found.cosines, rtol=1e-10, atol=1e-13)
    np.testing.assert_array_equal(scaled.sign_agreement, found.sign_agreement)
    np.testing.assert_allclose(scaled.norms, found.norms * factors, rtol=1e-12)


def factors_of(seed: int, rank: int, scale: float, rows: int = 40, columns: int = 30) -> LowRank:
    return LowRank(draw(seed, rows, rank), draw(seed + 1, rank, columns), scale)


@laws
@given(seeds, st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_factors_are_as_their_products(seed: int, ranks: list[int]) -> None:
    deltas = [factors_of(seed + 10 * i, rank, 0.5 + i) for i, rank in enumerate(ranks)]
    merged = factors_of(seed + 777, 3, 2.0)
    found = relations_of_factors(deltas, merged)
    dense = [LowRank(d.up.double(), d.down.double(), d.scale).dense().view(-1) for d in (*deltas, merged)]
    naive = naive_figures(dense[:-1], dense[-1], torch.zeros(1200))
    for name in ("norms", "cosines", "sign_agreement", "merged_norm", "merged_cosines", "distances"):
        np.testing.assert_allclose(getattr(found, name), naive[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_signs_of_large_products_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubmerge.analysis.SIGN_ENTRIES", 300)
    deltas = [factors_of(i, 4, 1.0) for i in range(2)]
    found = relations_of_factors(deltas, deltas[0])
    rows = torch.arange(0, 40, 4)
    a, b = (d.dense()[rows].view(-1) for d in deltas)
    assert found.both[0, 1] == 300
    assert found.same[0, 1] == int((a.sign() == b.sign()).sum())


# --- singular values and subspaces ------------------------------------------------------------------------------


def matrices(seed: int, tasks: int, rows: int, columns: int) -> list[torch.Tensor]:
    shared = draw(seed, rows, columns)
    return [draw(seed + 1 + t, rows, columns) * (1 + t) + shared for t in range(tasks)]


@pytest.mark.parametrize("shape", [(9, 9), (40, 12), (12, 40), (300, 280), (270, 300)])
def test_spectra_equal_a_naive_computation(shape: tuple[int, int]) -> None:
    deltas = matrices(3, 3, *shape)
    found, naive = measure_spectra(iter(deltas), 3), naive_spectra(deltas)
    np.testing.assert_allclose(found.energy, naive.pop("energy"), rtol=1e-6)
    for name, expected in naive.items():
        assert getattr(found, name) == pytest.approx(expected, rel=1e-6), name


def test_spectra_of_factors_are_those_of_their_products() -> None:
    deltas = [factors_of(i, 2 + i, 0.5, rows=60, columns=50) for i in range(4)]
    found, naive = measure_spectra(deltas, 4), naive_spectra([d.dense() for d in deltas])
    np.testing.assert_allclose(found.energy, naive.pop("energy"), rtol=1e-6)
    for name, expected in naive.items():
        assert getattr(found, name) == pytest.approx(expected, rel=1e-6), name


def test_interference_of_the_hand_example() -> None:
    u, v = torch.tensor([0.6, 0.8, 0.0]), torch.tensor([0.8, 0.6, 0.0])
    first = torch.zeros(3, 3)
    first[0, 0] = 1.0
    found = measure_spectra([first, torch.outer(u, v)], 2)
    assert found.kept == 1
    assert found.interference == pytest.approx(0.96, rel=1e-6)
    assert found.induced == pytest.approx(0.48, rel=1e-6)
    assert found.relative_interference == pytest.approx(0.48, rel=1e-6)


def test_orthogonal_spaces_do_not_interfere() -> None:
    left, right = torch.zeros(2, 8, 8)
    left[:4], right[4:] = draw(1, 4, 8), draw(2, 4, 8)
    assert measure_spectra([left, right], 2).interference == pytest.approx(0.0, abs=1e-6)
    assert measure_spectra([left.T, right.T], 2).interference == pytest.approx(0.0, abs=1e-6)


@laws
@given(seeds, st.permutations(range(3)), st.sampled_from([-4.0, 0.25]))
def test_interference_knows_neither_order_nor_length(seed: int, order: list[int], factor: float) -> None:
    deltas = matrices(seed, 3, 10, 14)
    found, changed = measure_spectra(deltas, 3), measure_spectra([deltas[i] * factor for i in order], 3)
    assert changed.interference == pytest.approx(abs(factor) * found.interference, rel=1e-9)
    assert changed.relative_interference == pytest.approx(found.relative_interference, rel=1e-9)
    np.testing.assert_allclose(changed.energy, found.energy[order], rtol=1e-9)


def test_null_directions_take_no_part() -> None:
    deltas = [draw(i, 64, 2) @ draw(9 + i, 2, 64) for i in range(2)]  # rank 2 of 32 that are compared
    found = measure_spectra(deltas, 2)
    assert found.interference == pytest.approx(float(naive_spectra(deltas, rank=2)["interference"]), rel=1e-5)


def test_a_model_that_changes_nothing_interferes_with_none() -> None:
    found = measure_spectra([draw(1, 6, 5), torch.zeros(6, 5)], 2)
    assert found.interference == 0.0
    assert np.isnan(found.energy[1]).all()
    nothing = measure_spectra([torch.zeros(6, 5)] * 2, 2)
    assert nothing.to_json()["interference_relative"] is None


def test_blurred_gram_matrices_are_not_relied_on() -> None:
    left, right = torch.linalg.qr(draw(1, 300, 280)).Q, torch.linalg.qr(draw(2, 280, 280)).Q
    # Values that float32 holds, but whose squares float64 loses beside the largest.
    matrix = left * torch.logspace(0, -8, 280) @ right
    double = matrix.double()
    exact = torch.linalg.svdvals(double)
    _, found = decomposed(matrix.double(), 280)
    np.testing.assert_allclose(found.values, exact, rtol=1e-6)
    squares, leading = decomposed(matrix, 100)
    np.testing.assert_allclose(squares[:100], exact[:100].square(), rtol=1e-6)
    np.testing.assert_allclose(leading.values, exact[: leading.rank], rtol=1e-9)


# --- the whole --------------------------------------------------------------------------------------------------


def made(tensors: int = 4) -> Diagnostics:
    figures = []
    for i in range(tensors):
        deltas = matrices(i, 3, 8, 6)
        flat = [d.reshape(-1) for d in deltas]
        spectra: Spectra | None = measure_spectra(deltas, 3) if i else None
        figures.append(
            TensorFigures(
                f"layers.{i // 2}.w{i}.weight", "linear", i // 2 if i else None, (8, 6),
                relations(flat, flat[0], draw(99, 48)), spectra,
            )
        )  # fmt: skip
    return Diagnostics(("a", "b", "c"), "ties", "0" * 64, tuple(figures), tensors)


def test_blocks_and_the_model_are_sums_of_their_tensors() -> None:
    found = made()
    deltas = [torch.cat([matrices(i, 3, 8, 6)[t].reshape(-1) for i in range(4)]) for t in range(3)]
    naive = naive_figures(deltas, deltas[0], draw(99, 48).repeat(4))
    np.testing.assert_allclose(found.model.cosines, naive["cosines"], rtol=1e-6)
    np.testing.assert_allclose(found.model.distances, naive["distances"], rtol=1e-6, atol=1e-6)
    assert list(found.blocks) == [0, 1, None]
    np.testing.assert_allclose(sum(b.gram for b in found.blocks.values()), found.model.gram, rtol=1e-12)


def test_json_says_all_of_it() -> None:
    said = made().to_json()
    assert said["pairs"] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert (said["matrices"], said["matrices_decomposed"]) == (4, 3)
    assert [b["layer"] for b in said["blocks"]] == [0, 1, None]
    assert [t["name"] for t in said["tensors"]] == [f"layers.{i // 2}.w{i}.weight" for i in range(4)]
    assert said["tensors"][1]["spectra"]["ranks"] == [1, 2, 4, 6]
    assert said["tensors"][1]["spectra"]["energy"][0][-1] == 1.0
    assert len(said["model"]["cosines"]) == 3


@pytest.mark.parametrize(
    ("value", "shown"), [(1 / 3, 0.3333333), (math.nan, None), (math.inf, None), (12345678.9, 12345680.0)]
)
def test_numbers_have_seven_digits(value: float, shown: float | None) -> None:
    assert number(value) == shown
