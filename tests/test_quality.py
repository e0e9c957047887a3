"""The quality benchmark: its tasks, heads and figures against naive ones, its way of trying scales, and a small run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from examples.demo.data import BLOCK_SIZE, IMAGE_SIZE, SPLITS, _equal_contrast
from hubmerge.codecs import all_codecs
from hubmerge.memory import merge_tensors
from hubmerge.methods import all_methods

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import quality_bundles  # noqa: E402
import quality_merge  # noqa: E402
import quality_models  # noqa: E402
import quality_tasks  # noqa: E402
from quality_bundles import EXACT, PACKINGS, Fidelity, pack_and_unpack, packings  # noqa: E402
from quality_geometry import mean_cosine, measure_geometry, singular_task_interference  # noqa: E402
from quality_merge import contenders, merge  # noqa: E402
from quality_models import (  # noqa: E402
    KINDS,
    SCALES,
    Exam,
    State,
    Suite,
    encoder_of,
    fit_head,
    moved,
    state_of,
    suite_of,
)
from quality_report import GUESSING, bundles_sheet, order_sheet, sheets, storage_sheet, to_markdown  # noqa: E402
from quality_study import Field, Outcome, Recovery, Study, at_scale, choose_lambda, own_scores, tune  # noqa: E402
from quality_tasks import TASKS, Pictures, load_pictures  # noqa: E402

law = settings(deadline=None, derandomize=True, max_examples=25)


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return load_pictures()


@pytest.fixture(scope="module")
def suite(pictures: Pictures, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Real models, hardly trained."""
    scale = replace(SCALES["small"], pretrain_steps=4, fine_tune_steps=3, lora_steps=3)
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 for a property that is about to be renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        own = tmp_path_factory.getbasetemp()
        shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "suite"  # by all who run these tests
        with FileLock(f"{shared}.lock"):
            return suite_of(pictures, scale, shared, seed=0)


# --- tasks and heads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_task_shows_all_its_classes_in_every_split(task: quality_tasks.Task, pictures: Pictures) -> None:
    for split in SPLITS:
        pixels, labels = Exam.draw(pictures, split, 200).questions[task.name]
        assert pixels.shape == (200, 3, IMAGE_SIZE, IMAGE_SIZE)
        assert float(pixels.min()) >= -1
        assert float(pixels.max()) <= 1
        assert sorted(labels.unique().tolist()) == list(range(len(task.label_names)))


def test_an_exam_is_the_same_at_every_call(pictures: Pictures) -> None:
    for one, other in zip(*(Exam.draw(pictures, "test", 50).questions.values() for _ in range(2)), strict=True):
        assert all(map(torch.equal, one, other))


def test_colour_patches_are_those_that_the_demo_shows_in_gray(pictures: Pictures) -> None:
    for split in SPLITS:
        colours, photos = pictures.colours[split], pictures.photos[split]
        gray = _equal_contrast(colours.images.mean(dim=1, keepdim=True))
        torch.testing.assert_close(gray, photos.images, rtol=0, atol=1e-4)
        assert torch.equal(colours.labels, photos.labels)


def test_patches_of_different_splits_share_no_pixel() -> None:
    rows, columns = torch.arange(5 * BLOCK_SIZE) // BLOCK_SIZE, torch.arange(7 * BLOCK_SIZE) // BLOCK_SIZE
    photo = (7 * rows[:, None] + columns).float().expand(3, -1, -1)  # every pixel tells its block
    blocks = [set(quality_tasks._patches([photo], split, seed=0).images.unique().tolist()) for split in SPLITS]
    assert sum(map(len, blocks)) == len(set.union(*blocks)) == 35


def test_reordered_channels_are_where_the_order_says(pictures: Pictures) -> None:
    images = pictures.colours["test"].images[:40]
    mixed, order = quality_tasks.reordered(images, torch.Generator().manual_seed(3))
    for image, found, number in zip(images, mixed, order.tolist(), strict=True):
        for place, channel in enumerate(quality_tasks.ORDERS[number].tolist()):
            assert torch.equal(found[place], image[channel])


def test_a_head_names_the_nearest_class_mean(suite: Suite, pictures: Pictures) -> None:
    task, encoder = TASKS[0], encoder_of(suite.base)
    index = torch.arange(len(pictures.digits["train"].labels)).repeat(2)
    pixels, labels = task.batch(pictures, "train", index, torch.Generator().manual_seed(7))
    with torch.no_grad():
        features = encoder(pixel_values=pixels).last_hidden_state[:, 0]
        guesses = fit_head(encoder, task, pictures, seed=7)(features).argmax(dim=1)
    means = torch.stack([features[labels == label].double().mean(dim=0) for label in range(2)])
    distances = torch.cdist(features.double(), means)
    clear = (distances[:, 0] - distances[:, 1]).abs() > 1e-4
    assert int(clear.sum()) > 1900
    assert torch.equal(guesses[clear], distances.argmin(dim=1)[clear])


# --- geometry ---------------------------------------------------------------------------------------------------


def test_interference_of_a_hand_worked_pair() -> None:
    u, v = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    score, total = singular_task_interference([torch.outer(u[t], v[t]) for t in range(2)])
    # UᵀU - I is 0.6 and VᵀV - I is 0.8 off the diagonal, so the product has 0.48 twice, on the diagonal.
    assert score == pytest.approx(0.96, abs=1e-6)
    assert total == pytest.approx(2.0, abs=1e-6)


matrices = st.integers(0, 2**32 - 1).map(
    lambda seed: list(torch.randn(3, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
)


@law
@given(matrices, st.permutations(range(3)), st.floats(0.01, 100), st.sampled_from([1, -1]))
def test_interference_knows_no_order_and_grows_with_the_deltas(
    deltas: list[torch.Tensor], order: list[int], factor: float, sign: int
) -> None:
    score, total = singular_task_interference(deltas)
    found = singular_task_interference([sign * factor * deltas[i] for i in order])
    assert found == pytest.approx((factor * score, factor * total), rel=1e-9)


@law
@given(matrices)
def test_tasks_with_left_spaces_of_their_own_do_not_interfere(deltas: list[torch.Tensor]) -> None:
    apart = [torch.zeros_like(delta) for delta in deltas]
    for t, delta in enumerate(deltas):
        apart[t][3 * t : 3 * t + 3] = delta[3 * t : 3 * t + 3]
    assert singular_task_interference(apart, rank=3)[0] < 1e-9


def test_directions_that_a_delta_has_not_do_not_interfere() -> None:
    """Rank one each, orthogonal on the left; a decomposition's null vectors would lie anywhere."""
    deltas = [torch.outer(torch.eye(8)[t], torch.ones(8)) for t in range(2)]
    assert singular_task_interference(deltas, rank=8)[0] == pytest.approx(0, abs=1e-12)


def test_geometry_of_a_hand_worked_suite() -> None:
    base = {"w": torch.tensor([[3.0, 0.0], [0.0, 0.0]]), "b": torch.tensor([4.0])}
    deltas = [
        {"w": torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "b": torch.tensor([0.0])},
        {"w": torch.tensor([[0.6, 0.0], [0.0, 0.0]]), "b": torch.tensor([0.8])},
    ]
    found = measure_geometry(base, deltas, {"w"})
    assert found.relative_norm == pytest.approx(0.2)
    assert found.cosine == pytest.approx(0.6)
    # The same direction twice: UᵀU - I = VᵀV - I = [[0, 1], [1, 0]], so Σ = (1, 0.6) itself is what interferes.
    assert (found.interference, found.relative_interference) == (pytest.approx(1.6), pytest.approx(1.0))


def test_mean_cosine_is_over_pairs() -> None:
    assert mean_cosine(torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])) == pytest.approx(-1 / 3)


# --- contenders, merges and scales ------------------------------------------------------------------------------


def test_every_method_that_takes_eight_models_is_a_contender() -> None:
    found = contenders()
    assert {c.method for c in found} == {m.name for m in all_methods()} - {"slerp"}
    assert len({c.label for c in found}) == len(found)
    assert {"drm", "drm, vertical", "drm, not renormalised"} <= {c.label for c in found}
    for contender in found:
        assert (contender.scale is None) == (not contender.grid)
        assert contender.scale is None or contender.scale in contender.grid


@pytest.mark.parametrize("contender", [c for c in contenders() if c.scale is not None], ids=lambda c: c.label)
def test_the_merged_delta_is_proportional_to_the_scale(contender: quality_merge.Contender) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(24, 16, dtype=torch.float64, generator=generator)
    models = [base + 0.1 * torch.randn(base.shape, dtype=torch.float64, generator=generator) for _ in range(4)]
    parameters = dict(text.split("=") for text in contender.parameters)
    default = merge_tensors(contender.method, base, models, parameters=parameters) - base
    for scale in (contender.grid[0], contender.grid[-1]):
        found = merge_tensors(contender.method, base, models, parameters={**parameters, "scale": scale}) - base
        torch.testing.assert_close(default * (scale / contender.scale), found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", ["ties", "drm, vertical"])
def test_a_scale_tried_without_merging_is_what_merging_gives(suite: Suite, kind: str, label: str) -> None:
    contender = next(c for c in contenders() if c.label == label)
    default = merge(contender, suite, kind)
    delta = {name: default[name] - tensor for name, tensor in suite.base.items()}
    assert any(bool(d.any()) for d in delta.values())
    tried, merged = at_scale(contender, delta, suite, 1.3), merge(contender, suite, kind, scale=1.3)
    for name, tensor in merged.items():
        torch.testing.assert_close(tried[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_merges_are_the_mean_of_the_saved_models(suite: Suite, kind: str) -> None:
    merged = merge(next(c for c in contenders() if c.method == "linear"), suite, kind)
    for name, tensor in merged.items():
        mean = sum(delta[name] for delta in suite.deltas[kind]) / len(TASKS)
        torch.testing.assert_close(tensor, suite.base[name] + mean, rtol=0, atol=1e-6)


def test_scales_that_are_equally_good_leave_the_one_nearest_to_the_default(suite: Suite, pictures: Pictures) -> None:
    contender = next(c for c in contenders() if c.method == "task_arithmetic")
    still = {name: torch.zeros_like(tensor) for name, tensor in suite.base.items()}
    exam, goal = Exam.draw(pictures, "validation", 4), dict.fromkeys((task.name for task in TASKS), 1.0)
    assert tune(contender, still, suite, exam, goal, grid_step=1) == 0.3
    assert tune(contender, still, suite, exam, goal, grid_step=4) == 0.1  # of 0.1, 0.5, 0.9


BIAS = "layernorm.bias"


def two_classes(suite: Suite, feature: float) -> State:
    """The base with its first feature moved there, as found for an empty picture."""
    base = {**suite.base, BIAS: suite.base[BIAS].clone()}
    with torch.no_grad():
        features = encoder_of(base)(pixel_values=torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)).last_hidden_state[0, 0]
    base[BIAS][0] += feature - float(features[0])
    return base


def push(base: State, length: float) -> State:
    """A delta that moves the first feature so far."""
    delta = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    delta[BIAS][0] = length
    return delta


def by_sign() -> nn.Linear:
    """A head that says whether the first feature is positive."""
    head = nn.Linear(128, 2)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    head.weight.data[1, 0] = 1.0
    return head


def test_the_best_scale_is_the_best_on_the_exam(suite: Suite) -> None:
    """A picture of class 1, and a feature that is positive from scale 0.7 on."""
    contender = next(c for c in contenders() if c.method == "task_arithmetic")
    task, base = TASKS[0].name, two_classes(suite, -0.65)
    delta = push(base, contender.scale)
    exam = Exam({task: (torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE), torch.tensor([1]))})
    pushed = replace(suite, base=base, heads={task: by_sign()})
    assert tune(contender, delta, pushed, exam, {task: 1.0}, grid_step=1) == 0.7


# --- bundles ----------------------------------------------------------------------------------------------------

peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
BY_LABEL = {packing.label: packing for packing in PACKINGS}


@pytest.fixture
def three(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """Three tasks only, which are bundled sooner."""
    monkeypatch.setattr(quality_bundles, "TASKS", TASKS[:3])
    return replace(suite, deltas={kind: deltas[:3] for kind, deltas in suite.deltas.items()})


def test_every_codec_is_bundled_exactly_and_in_int8() -> None:
    assert {p.codec for p in PACKINGS} == {c.name for c in all_codecs()}
    assert len(BY_LABEL) == len(PACKINGS)
    for packing in PACKINGS:
        assert packing.storages[0] == EXACT
        assert packing.whole or "int8" in packing.storages
        assert all(packing.whole or 1.0 in packing.grid(kind) for kind in packing.kinds)
    assert BY_LABEL["PSP"].grid("full") == ()
    assert {p.label for p in packings("lora")} == {"STA", "TA+Shuffle", "STA+Shuffle", "tsv_compress"}


@peft_warns
@pytest.mark.parametrize(("label", "kind"), [("STA+Shuffle", "full"), ("STA+Shuffle", "lora"), ("emr", "full")])
def test_a_lambda_tried_without_retrieving_is_what_retrieving_gives(three: Suite, label: str, kind: str) -> None:
    (whole, _), (half, _) = (pack_and_unpack(BY_LABEL[label], three, kind, EXACT, scale=scale) for scale in (None, 0.5))
    for task, (one, other) in enumerate(zip(whole, half, strict=True)):
        assert any(bool((one[name] != whole[task - 1][name]).any()) for name in one)
        for name, tensor in other.items():
            torch.testing.assert_close(0.5 * one[name], tensor, rtol=0, atol=1e-6)


@peft_warns
def test_the_leading_singular_vectors_of_an_adapter_are_the_adapter(three: Suite) -> None:
    """Rank 8 of 42 that are kept: nothing is left out, and it takes as much as the adapters do."""
    deltas, fidelity = pack_and_unpack(BY_LABEL["tsv_compress"], three, "lora", EXACT)
    for found, true in zip(deltas, three.deltas["lora"], strict=True):
        for name, tensor in true.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    assert fidelity.theory == pytest.approx(0, abs=1e-6)
    assert fidelity.per_models == pytest.approx(1, abs=0.02)


def test_fidelity_is_that_of_the_deltas_and_files(three: Suite) -> None:
    deltas, fidelity = pack_and_unpack(BY_LABEL["STA+Shuffle"], three, "full", "int8")
    errors, theories = [], []
    energies = [sum(float(d.double().square().sum()) for d in delta.values()) for delta in three.deltas["full"]]
    for found, true, energy in zip(deltas, three.deltas["full"], energies, strict=True):
        missed = sum(float((found[name] - true[name]).double().square().sum()) for name in true)
        errors.append(missed / energy)
        theories.append((sum(energies) - energy) / energy)
    assert fidelity.error == pytest.approx(sum(errors) / 3, rel=1e-4)
    assert fidelity.theory == pytest.approx(sum(theories) / 3, rel=1e-4)
    assert fidelity.error == pytest.approx(fidelity.theory, rel=0.2)
    # 8.25 bits instead of 32, and besides it the heads and the files' headers.
    assert fidelity.per_base == pytest.approx(8.25 / 32, abs=0.03)
    assert fidelity.per_models == pytest.approx(fidelity.per_base / 3, rel=0.01)


def test_superposed_whole_weights_differ_in_their_signs_alone(three: Suite) -> None:
    """Of three nearly equal weights one is left where two tasks' signs differ, and for one of them it is wrong."""
    deltas, fidelity = pack_and_unpack(BY_LABEL["PSP"], three, "full", EXACT)
    first, *others = (moved(three.base, delta) for delta in deltas)
    total = sum(float(tensor.double().square().sum()) for tensor in first.values())
    for other in others:
        for name, tensor in other.items():
            torch.testing.assert_close(tensor.abs(), first[name].abs(), rtol=0, atol=1e-5)
        apart = sum(float((other[n] - first[n]).double().square().sum()) for n in first)
        assert apart == pytest.approx(2 / 3 * total, rel=0.1)
    assert fidelity.theory == pytest.approx(2, rel=0.01)
    assert 1.5 < fidelity.error < 2.5


def test_every_task_is_asked_of_its_own_model(suite: Suite) -> None:
    """Pictures of class 0; the first task's delta makes class 1 of it, from λ = 0.7 on."""
    base = two_classes(suite, -0.65)
    deltas = [push(base, 1.0 if number == 0 else 0.0) for number in range(len(TASKS))]
    names = [task.name for task in TASKS]
    picture = (torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE), torch.tensor([0]))
    exam = Exam(dict.fromkeys(names, picture))
    still = [push(base, 0.0) for _ in TASKS]
    pushed = replace(suite, base=base, heads=dict.fromkeys(names, by_sign()), deltas={"full": still})
    assert own_scores(pushed, deltas, exam) == {**dict.fromkeys(names, 1.0), names[0]: 0.0}
    # Of 0.1, 0.4, 0.7 and 1, the first two are right.
    assert choose_lambda(BY_LABEL["STA"], deltas, pushed, "full", exam, grid_step=3) == 0.4
    assert choose_lambda(BY_LABEL["STA"], still, pushed, "full", exam, grid_step=3) == 1.0
    assert choose_lambda(BY_LABEL["PSP"], deltas, pushed, "full", exam, grid_step=1) is None


# --- the report -------------------------------------------------------------------------------------------------


def study(seed: int, **scores: float) -> Study:
    """Every task's accuracy is the same: half of the fine-tune's times the score."""
    tasks = [task.name for task in TASKS]
    everywhere = {label: dict.fromkeys(tasks, 0.5 * score) for label, score in scores.items()}
    outcomes = {label: Outcome(found, found, 0.3, 1.0) for label, found in everywhere.items()}
    geometry = measure_geometry({"w": torch.eye(2)}, [{"w": torch.eye(2)}, {"w": -torch.eye(2)}], {"w"})
    field = Field(dict.fromkeys(tasks, 0.5), outcomes, {}, geometry)
    return Study(seed, dict.fromkeys(tasks, 0.25), dict.fromkeys(KINDS, field), 1.0, 1.0)


ASCENDING = {"linear": 0.5, "task_arithmetic": 0.6, "ties": 0.7, "drm": 0.8, "tsv_merge": 0.9}


def test_the_order_is_judged_by_the_mean_over_seeds() -> None:
    labels = {"drm, not renormalised": 0.75}
    studies = [study(0, **ASCENDING, **labels), study(1, **{**ASCENDING, "ties": 0.45}, **labels)]
    rows = {row[0]: row[1:] for row in order_sheet(studies, "full").rows}
    assert rows["linear < task_arithmetic"] == ("+10.0", "2 of 2", "+10.0", "2 of 2")
    assert rows["task_arithmetic < ties"] == ("-2.5", "1 of 2", "-2.5", "1 of 2")
    assert rows["drm, not renormalised < drm"] == ("+5.0", "2 of 2", "+5.0", "2 of 2")


def with_bundles(seed: int, **scores: dict[str, float]) -> Study:
    """The same for bundles: label -> storage -> score at λ = 1; at the best λ it is 5 points more."""
    plain = study(seed, **ASCENDING)

    def recovery(score: float) -> Recovery:
        default, best = (dict.fromkeys(GUESSING, 0.5 * s) for s in (score, score + 0.05))
        return Recovery(default, best, 0.4, Fidelity(error=7.5 + seed, theory=7.0, per_base=0.26, per_models=0.0325))

    bundles = {label: {form: recovery(score) for form, score in forms.items()} for label, forms in scores.items()}
    return replace(plain, fields={kind: replace(field, bundles=bundles) for kind, field in plain.fields.items()})


def test_storage_is_compared_with_float32_of_the_same_seed() -> None:
    forms = [{"float32": 0.9, "int8": 0.89}, {"float32": 0.8, "int8": 0.82}]
    studies = [with_bundles(seed, STA=scores) for seed, scores in enumerate(forms)]
    gap = "+0.50 (-1.00 to +2.00)"
    assert storage_sheet(studies, "full").rows == [("STA", "int8", gap, gap, "0.26", "0.03", "8")]


def test_bundles_are_shown_in_float32_beside_guessing_and_the_base() -> None:
    studies = [with_bundles(seed, STA={"float32": 0.9, "int8": 0.1}) for seed in range(2)]
    guessing, base, sta = bundles_sheet(studies, "full").rows
    chance = (2 / 2 + 4 / 10 + 1 / 3 + 1 / 6) / 8  # two questions with two answers, four with ten
    assert guessing[:3] == ("guessing", f"{100 * chance / 0.5:.1f}", "0.0")
    assert base[:3] == ("base", "50.0", "0.0")
    assert sta == ("STA", "90.0", "0.0", "95.0", "0.0", "0.4, 0.4", "0.26", "0.03", "8", "7")


def test_tables_give_accuracy_as_a_fraction_of_the_fine_tunes() -> None:
    page = to_markdown({"seeds": "0"}, sheets([study(0, **ASCENDING, **{"drm, not renormalised": 0.75})]))
    assert "| the base itself | 50.0 | – |" in page
    assert "| tsv_merge | 90.0 | – | 90.0 | – | 0.3 | 1.00 |" in page
    assert "| ties | 35.0 | 35.0 |" in page


# --- the whole --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_small_benchmark_runs_and_is_sane(tmp_path: Path) -> None:
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / "quality.py"), "--scale", "small"]
    command += ["--out", str(page), "--json", str(figures), "--work", str(tmp_path / "work")]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    (found,) = json.loads(figures.read_text())["studies"]
    tasks = {task.name for task in TASKS}
    assert set(found["base"]) == tasks
    for kind in KINDS:
        field = found["fields"][kind]
        assert set(field["outcomes"]) == {c.label for c in contenders()}
        assert all(set(o["default"]) == set(o["best"]) == tasks for o in field["outcomes"].values())
        assert {label: tuple(forms) for label, forms in field["bundles"].items()} == {
            packing.label: packing.storages for packing in packings(kind)
        }
        exact = field["bundles"]["tsv_compress"][EXACT]
        assert sum(exact["default"].values()) > 0.95 * sum(field["ceiling"].values())
        assert sum(field["ceiling"].values()) > sum(found["base"].values()) + 0.1
        assert 0 < field["geometry"]["cosine"] < 0.5
        assert field["geometry"]["interference"] > 0
        for task in TASKS:
            assert (tmp_path / "work" / "seed-0" / kind / task.name).is_dir()
    psp = found["fields"]["full"]["bundles"]["PSP"][EXACT]
    assert sum(psp["default"].values()) < 0.9 * sum(found["base"].values())
    assert "tsv_merge" in run.stdout
    assert all(row.label in page.read_text() for row in (*contenders(), *PACKINGS))


def test_moving_back_restores_the_fine_tune(suite: Suite) -> None:
    """Deltas are exact up to the rounding of one float32 addition."""
    tuned = moved(suite.base, suite.deltas["full"][0])
    saved = state_of(quality_models.ViTForImageClassification.from_pretrained(suite.tuned_folder("full", TASKS[0])).vit)
    for name, tensor in saved.items():
        torch.testing.assert_close(tuned[name], tensor, rtol=1e-6, atol=1e-7)
