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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from examples.demo.data import BLOCK_SIZE, IMAGE_SIZE, SPLITS, _equal_contrast
from hubmerge.memory import merge_tensors
from hubmerge.methods import all_methods

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import quality_merge  # noqa: E402
import quality_models  # noqa: E402
import quality_tasks  # noqa: E402
from quality_geometry import mean_cosine, measure_geometry, singular_task_interference  # noqa: E402
from quality_merge import contenders, merge  # noqa: E402
from quality_models import KINDS, SCALES, Exam, Suite, encoder_of, fit_head, moved, state_of, train_suite  # noqa: E402
from quality_report import order_sheet, sheets, to_markdown  # noqa: E402
from quality_study import Field, Outcome, Study, at_scale, tune  # noqa: E402
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
        return train_suite(pictures, scale, tmp_path_factory.mktemp("suite"), seed=0)


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


def test_the_best_scale_is_the_best_on_the_exam(suite: Suite) -> None:
    """Two images and a delta that points from one class to the other: only half the scales get both right."""
    contender = next(c for c in contenders() if c.method == "task_arithmetic")
    task = TASKS[0].name
    head = nn.Linear(128, 2)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    head.weight.data[1, 0] = 1.0
    bias = "layernorm.bias"
    base = {**suite.base, bias: suite.base[bias].clone()}
    pixels = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        first = float(encoder_of(base)(pixel_values=pixels).last_hidden_state[0, 0, 0])
    base[bias][0] -= first + 0.65  # the feature is now -0.65; a delta of 1 takes it above 0 from scale 0.7 on
    delta = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    delta[bias][0] = contender.scale
    exam = Exam({task: (pixels, torch.tensor([1]))})
    pushed = replace(suite, base=base, heads={task: head})
    assert tune(contender, delta, pushed, exam, {task: 1.0}, grid_step=1) == 0.7


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
        assert sum(field["ceiling"].values()) > sum(found["base"].values()) + 0.1
        assert 0 < field["geometry"]["cosine"] < 0.5
        assert field["geometry"]["interference"] > 0
        for task in TASKS:
            assert (tmp_path / "work" / "seed-0" / kind / task.name).is_dir()
    assert "tsv_merge" in run.stdout
    assert all(c.label in page.read_text() for c in contenders())


def test_moving_back_restores_the_fine_tune(suite: Suite) -> None:
    """Deltas are exact up to the rounding of one float32 addition."""
    tuned = moved(suite.base, suite.deltas["full"][0])
    saved = state_of(quality_models.ViTForImageClassification.from_pretrained(suite.tuned_folder("full", TASKS[0])).vit)
    for name, tensor in saved.items():
        torch.testing.assert_close(tuned[name], tensor, rtol=1e-6, atol=1e-7)
