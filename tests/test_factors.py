"""Balanced factors, and adapters superposed through them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.coding import decode_tensors, encode_tensors
from hubmerge.factors import balanced, retrieved, superposable
from hubmerge.spec import LowRank

law = settings(deadline=None, derandomize=True, max_examples=25)


def adapter(seed: int, rank: int, *, layers: int = 6, scale: float = 2.0, gauge: float = 1.0) -> dict[str, LowRank]:
    """Deltas (48, 32); the gauge shifts size from one factor to the other and leaves the product as it is."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{i}.q.weight": LowRank(
            torch.randn(48, rank, generator=generator) * gauge,
            torch.randn(rank, 32, generator=generator) / gauge,
            scale,
        )
        for i in range(layers)
    }


def superposed(adapters: list[dict[str, LowRank]], seed: int = 0) -> list[dict[str, LowRank]]:
    base, models = superposable(adapters)
    encoded = encode_tensors("superposition", base, models, seed=seed)
    ranks = [{n: d.rank for n, d in a.items()} for a in adapters]
    return [retrieved(decode_tensors(encoded, base, t), r) for t, r in zip(encoded.tasks, ranks, strict=True)]


def error(found: dict[str, LowRank], wanted: dict[str, LowRank]) -> float:
    """Relative, of all products together."""
    off = sum(float((found[n].dense() - d.dense()).square().sum()) for n, d in wanted.items())
    return (off / sum(float(d.dense().square().sum()) for d in wanted.values())) ** 0.5


@law
@given(st.integers(1, 8), st.integers(1, 10), st.integers(0, 99), st.sampled_from([0.01, 1.0, 100.0]))
def test_balanced_factors(rank: int, asked: int, seed: int, gauge: float) -> None:
    delta = adapter(seed, rank, layers=1, gauge=gauge)["layers.0.q.weight"]
    up, down = balanced(delta, asked)
    assert (up.shape, down.shape) == ((asked, 48), (asked, 32))
    values = torch.linalg.svdvals(delta.dense().double()).float()[:asked]
    values[rank:] = 0.0
    for factor in (up, down):
        gram = factor @ factor.T
        torch.testing.assert_close(gram, torch.diag(values), rtol=1e-4, atol=1e-4 * float(values[0]))
    assert not up[rank:].any()
    left = float((up.T @ down - delta.dense()).square().sum()) ** 0.5
    left_out = float(torch.linalg.svdvals(delta.dense().double())[asked:].square().sum()) ** 0.5
    assert left == pytest.approx(left_out, abs=1e-4 * float(values[0]))


def test_matrices_are_balanced_as_their_factors_are() -> None:
    delta = adapter(0, 4, layers=1)["layers.0.q.weight"]
    found, expected = ((u.T @ d) for u, d in (balanced(delta.dense(), 3), balanced(delta, 3)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_delta_of_rank_0() -> None:
    up, down = balanced(LowRank(torch.zeros(5, 0), torch.zeros(0, 3)), 2)
    assert (up.tolist(), down.tolist()) == (torch.zeros(2, 5).tolist(), torch.zeros(2, 3).tolist())


def test_one_adapter_comes_back_with_its_scale() -> None:
    wanted = adapter(0, 4, scale=0.25)
    (found,) = superposed([wanted])
    for name, delta in wanted.items():
        assert found[name].rank == 4
        torch.testing.assert_close(found[name].dense(), delta.dense(), rtol=1e-4, atol=1e-5)


def test_ranks_may_differ_and_tensors_may_be_missing() -> None:
    first, second = adapter(0, 2), adapter(1, 8)
    del second["layers.3.q.weight"]
    second["layers.9.k.weight"] = adapter(2, 5, layers=1)["layers.0.q.weight"]
    base, models = superposable([first, second])
    assert {tuple(t.shape) for n, t in base.items() if n.endswith(".up")} == {(8, 48), (2, 48), (5, 48)}
    assert all(list(m) == list(base) for m in models)
    found = superposed([first, second])
    assert [{n: d.rank for n, d in f.items()} for f in found] == [
        {n: d.rank for n, d in a.items()} for a in (first, second)
    ]
    # Alone in its place, a delta is exact but for what shuffled layers bring there.
    lone = found[1]["layers.9.k.weight"]
    torch.testing.assert_close(lone.dense(), second["layers.9.k.weight"].dense(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [2, 4])
def test_the_error_of_a_product_of_superposed_factors(count: int) -> None:
    """Each factor is off by √(T - 1), their product by √(2 (T - 1) + (T - 1)²), if all adapters are of like norm."""
    adapters = [adapter(i, 8, layers=12) for i in range(count)]
    for found, wanted in zip(superposed(adapters), adapters, strict=True):
        assert error(found, wanted) == pytest.approx((count**2 - 1) ** 0.5, rel=0.06)


def test_the_gauge_of_the_factors_does_not_matter() -> None:
    plain = [adapter(i, 4) for i in range(3)]
    skewed = [adapter(i, 4, gauge=g) for i, g in enumerate((1.0, 30.0, 0.02))]
    for found, other, wanted in zip(superposed(plain), superposed(skewed), plain, strict=True):
        assert error(found, wanted) == pytest.approx(error(other, wanted), rel=0.2)


def test_unbalanced_factors_would_do_much_worse() -> None:
    skewed = [adapter(i, 4, gauge=g) for i, g in enumerate((1.0, 30.0, 0.02))]
    base = {f"{n}{end}": torch.zeros(4, size) for n in skewed[0] for end, size in ((".up", 48), (".down", 32))}
    models = [
        {f"{n}{end}": t for n, d in a.items() for end, t in ((".up", d.up.T * d.scale), (".down", d.down))}
        for a in skewed
    ]
    encoded = encode_tensors("superposition", base, models)
    ranks = dict.fromkeys(skewed[0], 4)
    raw = [error(retrieved(decode_tensors(encoded, base, t), ranks), a) for t, a in zip("012", skewed, strict=True)]
    found = [error(f, a) for f, a in zip(superposed(skewed), skewed, strict=True)]
    assert sum(raw) > 10 * sum(found)
