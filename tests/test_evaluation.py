"""Results of evaluations: whose they are, what may be compared, what the card and its front matter say of them."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import EvalResult, HfApi, ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from ruamel.yaml import YAML

from hubmerge.card import CardFacts, render_card
from hubmerge.errors import UsageError
from hubmerge.evaluation import Comparison, compare, model_index, result_files, table
from hubmerge.evaluation.comparison import differences
from hubmerge.evaluation.matching import MAX_BYTES, Model, assigned, parent, read
from hubmerge.evaluation.scores import Score, Task
from hubmerge.evaluation.table import _decimals, _rounded
from hubmerge.hub import Hub
from hubmerge.hub.benchmarks import Benchmark, BenchmarkTask
from hubmerge.hub.benchmarks import benchmark as listed_benchmark
from hubmerge.localhub import LocalHub
from hubmerge.spec import PinnedModel
from tests import factories as make

DATA = Path(__file__).parent / "data" / "evaluations"
PARENTS = (make.pinned("org/base", role="base"), make.pinned("org/math"), make.pinned("org/chat"))
FOUR = ("harness-base", "harness-math", "harness-chat", "harness-merged")


def sample(name: str) -> dict[str, Any]:
    """A file's content, to be changed."""
    data: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    return data


def compared(*names: str, parents: tuple[PinnedModel, ...] = PARENTS) -> Comparison:
    """What the sample files say of me/merge."""
    found = compare([str(DATA / f"{n}.json") for n in names], ("me/merge",), parents)
    assert found is not None
    return found


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., str]:
    """Write a sample with changes at paths of keys."""

    def write(name: str, changes: Mapping[tuple[str, ...], Any], file: str = "changed.json") -> str:
        data = sample(name)
        for keys, value in changes.items():
            place = data
            for key in keys[:-1]:
                place = place[key]
            place[keys[-1]] = value
        path = tmp_path / file
        path.write_text(json.dumps(data))
        return str(path)

    return write


def values(found: Comparison) -> dict[tuple[str, str], tuple[Any, ...]]:
    """By task and measure: the parents' values, the merged model's, the difference."""
    return {
        (r.reference.task.name, r.reference.measure): (
            *(s and s.value for s in r.scores), r.merged and r.merged.value, r.delta and round(r.delta, 9)
        )
        for r in found.rows
    }  # fmt: skip


# --- comparing


def test_each_result_stands_beside_its_parents_and_the_difference_is_to_the_best() -> None:
    found = compared(*FOUR)
    assert found.parents == ("org/base", "org/math", "org/chat")
    table_of = values(found)
    assert table_of["arc_challenge", "acc"] == (0.32, 0.33, 0.38, 0.375, -0.005)
    assert table_of["arc_challenge", "acc_norm"] == (0.355, 0.36, 0.4, 0.40625, 0.00625)
    assert table_of["gsm8k", "exact_match (strict-match)"] == (0.02, 0.41, None, 0.36, -0.05)
    # The best perplexity is the lowest.
    assert table_of["wikitext", "word_perplexity"] == (15.5, 17.25, 16.0, 15.75, 0.25)
    # A group stands for its parts.
    assert not {"mmlu_astronomy", "mmlu_virology"} & {task for task, _ in table_of}
    assert ("mmlu", "acc") in table_of
    assert found.programs == ("lm-evaluation-harness 0.4.9.1",)


def test_the_worst_regression_is_relative_to_the_best_parent() -> None:
    worst = compared(*FOUR).regression
    assert worst is not None
    assert (worst.row.reference.task.name, worst.row.reference.filter, worst.parent) == (
        "gsm8k", "strict-match", "org/math"
    )  # fmt: skip
    assert worst.loss == pytest.approx(0.05)
    assert worst.relative == pytest.approx(0.05 / 0.41)
    before, after = (math.sqrt(p * (1 - p) / 1318) for p in (0.41, 0.36))
    assert worst.standard_errors == pytest.approx(0.05 / math.sqrt(before**2 + after**2))


def test_other_settings_are_not_compared_and_the_reason_is_told(caplog: pytest.LogCaptureFixture) -> None:
    (omission,) = compared(*FOUR).omissions
    assert (omission.model, omission.reason) == ("org/chat", "few-shot examples 8 instead of 5")
    assert omission.what == ("gsm8k exact_match (strict-match)", "gsm8k exact_match (flexible-extract)")
    assert "not compared: org/chat: gsm8k exact_match (strict-match), gsm8k" in caplog.text


@pytest.mark.parametrize(
    ("keys", "value", "reason"),
    [
        (("versions", "gsm8k"), 2.0, "task version 2.0 instead of 3.0"),
        (("n-shot", "gsm8k"), 0, "few-shot examples 0 instead of 5"),
        (
            ("n-samples", "gsm8k", "effective"),
            100,
            "limit 100 of 1319 samples instead of none; samples 100 instead of 1319",
        ),
        (("chat_template",), "{{ messages }}", "chat template applied instead of none"),
        (("fewshot_as_multiturn",), True, "few-shot examples as turns yes instead of no"),
        (("config", "gen_kwargs"), {"temperature": 1}, r"generation arguments [0-9a-f]{12} instead of none"),
        (("system_instruction",), "Think.", r"system instruction [0-9a-f]{12} instead of none"),
    ],
)
def test_every_setting_counts(changed: Callable[..., str], keys: tuple[str, ...], value: Any, reason: str) -> None:
    given_files = [changed("harness-math", {keys: value}), str(DATA / "harness-merged.json")]
    found = compare(given_files, ("me/merge",), PARENTS)
    assert found is not None
    assert values(found)["gsm8k", "exact_match (strict-match)"] == (None, 0.36, None)
    assert any(re.fullmatch(reason, o.reason) and any("gsm8k" in w for w in o.what) for o in found.omissions)


def test_samples_need_be_the_same_only_where_both_state_them(changed: Callable[..., str]) -> None:
    silent = changed("harness-math", {("n-samples",): {}})
    found = compare([silent, str(DATA / "harness-merged.json")], ("me/merge",), PARENTS)
    assert found is not None
    assert not found.omissions


def test_groups_of_other_tasks_are_not_compared(changed: Callable[..., str]) -> None:
    fewer = changed("harness-math", {("group_subtasks", "mmlu"): ["mmlu_astronomy"]})
    found = compare([fewer, str(DATA / "harness-merged.json")], ("me/merge",), PARENTS)
    assert found is not None
    assert values(found)["mmlu", "acc"][0] is None
    assert any("mmlu acc" in o.what and "parts 1 tasks" in o.reason for o in found.omissions)


def test_a_parent_at_another_commit_is_not_compared_at_all() -> None:
    moved = (PARENTS[0], make.pinned("org/math", commit="c" * 40), PARENTS[2])
    found = compared("harness-math", "harness-merged", parents=moved)
    assert found.parents == ()
    (omission,) = found.omissions
    assert omission.reason == f"evaluated at commit {make.digest('org/math', 40)[:7]}; ccccccc was merged"
    assert len(omission.what) == 7


def test_lighteval_results_are_read_too() -> None:
    found = compared("lighteval-math", "lighteval-merged")
    assert values(found) == {
        ("leaderboard|arc:challenge", "acc"): (0.33, 0.375, 0.045),
        ("leaderboard|arc:challenge", "acc_norm"): (0.36, 0.40625, 0.04625),
        ("lighteval|gpqa:diamond", "extractive_match"): (0.26, 0.25, -0.01),
        ("leaderboard|mmlu:_average", "acc"): (0.305, 0.36, 0.055),
    }
    assert all(r.reference.higher_is_better for r in found.rows)
    # An average's error is not the mean of its parts' errors.
    assert found.rows[-1].merged is not None
    assert found.rows[-1].merged.stderr is None


def test_names_without_suites_and_older_files_are_read(tmp_path: Path) -> None:
    light = sample("lighteval-merged")
    for key in ("results", "versions", "config_tasks"):
        light[key] = {k.removeprefix("leaderboard|").removeprefix("lighteval|"): v for k, v in light[key].items()}
    light["config_general"]["max_samples"] = 50
    old = {
        "results": {"arc_challenge": {"acc": 0.25, "acc_stderr": 0.01, "acc_norm": 0.5, "acc_norm_stderr": 0.02}},
        "versions": {"arc_challenge": 0},
        "config": {"model": "hf-causal", "model_args": "pretrained=org/math", "num_fewshot": 25, "limit": 0.5},
    }
    for name, data in {"light": light, "old": old}.items():
        (tmp_path / name).write_text(json.dumps(data))
    found = read(tmp_path / "light")
    assert {s.task.name for s in found.scores} >= {"arc:challenge", "gpqa:diamond", "mmlu:_average"}
    assert found.scores[0].task.few_shot == 25
    assert found.scores[0].task.limit == "at most 50 samples" or found.scores[0].task.limit is None
    scores = read(tmp_path / "old").scores
    assert [(s.metric, s.filter, s.value, s.stderr) for s in scores] == [
        ("acc", None, 0.25, 0.01), ("acc_norm", None, 0.5, 0.02)
    ]  # fmt: skip
    assert (scores[0].task.few_shot, scores[0].task.limit) == (25, "0.5 of the samples")
    assert scores[0].higher_is_better


def plain(path: Path, model: str, *entries: dict[str, Any]) -> str:
    """A file in the format for other programs."""
    path.write_text(json.dumps({"program": "flower-bench", "version": "2", "model": model, "results": list(entries)}))
    return str(path)


def test_other_programs_have_a_plain_format(tmp_path: Path) -> None:
    flowers = {"task": "flowers", "task_type": "image-classification", "metric": "accuracy", "higher_is_better": True}
    given = [
        plain(tmp_path / "base.json", "org/base", flowers | {"value": 0.5}, {"task": "x", "metric": "y", "value": 1}),
        plain(tmp_path / "math.json", "org/math", flowers | {"value": 0.75, "settings": {"resolution": 224}}),
        plain(tmp_path / "merged.json", "me/merge", flowers | {"value": 0.625, "stderr": 0.01}),
    ]
    found = compare(given, ("me/merge",), PARENTS)
    assert found is not None
    row = next(r for r in found.rows if r.reference.task.name == "flowers")
    assert (row.best, row.delta) == (0, 0.125)  # the other parent saw larger pictures
    assert any("resolution" in o.reason for o in found.omissions)
    shown = table(found)
    assert shown.programs == ("flower-bench 2",)
    assert not shown.few_shot
    assert [r["task"]["type"] for r in model_index(found, "merge", None)[0]["results"]] == ["image-classification"]
    assert "Few-shot" not in card(found)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"metric": "acc", "value": 1}, "entry 0 of results lacks task"),
        ({"task": "t", "value": 1}, "entry 0 of results lacks metric"),
        ({"task": "t", "metric": "acc", "value": "high"}, "'high' is no number"),
        ({"task": "t", "metric": "acc"}, "is no number"),
        ("t", "lacks task"),
    ],
)
def test_a_plain_file_with_gaps_is_refused(entry: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=problem):
        read(Path(plain(tmp_path / "results.json", "org/base", entry)))


def test_a_metric_of_unknown_direction_is_shown_without_a_difference(changed: Callable[..., str]) -> None:
    nothing = {("higher_is_better", "gsm8k"): {}}
    files = [
        changed(name, nothing | {("results", "gsm8k"): {"novelty,none": value}}, f"{name}.json")
        for name, value in (("harness-math", 3.0), ("harness-merged", 2.0))
    ]
    found = compare(files, ("me/merge",), PARENTS)
    assert found is not None
    assert values(found)["gsm8k", "novelty"] == (3.0, 2.0, None)


def test_what_only_a_parent_was_asked_is_told(changed: Callable[..., str]) -> None:
    data = sample("harness-merged")["results"]
    fewer = changed("harness-merged", {("results",): {k: v for k, v in data.items() if k != "wikitext"}})
    found = compare([fewer, str(DATA / "harness-math.json")], ("me/merge",), PARENTS)
    assert found is not None
    (omission,) = found.omissions
    assert omission.reason == "the merged model was not evaluated on it"
    assert omission.what == ("wikitext word_perplexity", "wikitext bits_per_byte")


def test_a_mean_is_over_tasks_of_one_metric_that_all_models_have() -> None:
    found = compared(*FOUR)
    (mean,) = found.means
    assert (mean.measure, mean.tasks) == ("acc", 2)
    mmlu = [(a * 152 + v * 166) / 318 for a, v in ((0.25, 0.3), (0.29, 0.32), (0.35, 0.4), (0.34, 0.38))]
    expected = [(arc + m) / 2 for arc, m in zip((0.32, 0.33, 0.38, 0.375), mmlu, strict=True)]
    assert (*mean.values, mean.merged) == pytest.approx(expected)
    assert mean.delta == pytest.approx(expected[3] - expected[2])


def test_without_files_there_is_nothing() -> None:
    assert compare([], ("me/merge",), PARENTS) is None


# --- whose it is

LOCAL = make.pinned("../models/poet", root="/data/models/poet", name="poet")


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("org/math", "org/math"),
        ("org__math", "org/math"),
        ("/cache/of/org/math", "org/math"),
        ("me/merge", "me/merge"),
        ("./merged-here/merge/", "me/merge"),
        ("/data/models/poet", "poet"),
        ("_data_models_poet", "poet"),
        ("/elsewhere/poet", "poet"),
        ("math", "org/math"),
    ],
)
def test_the_model_is_known_by_its_name(changed: Callable[..., str], name: str, owner: str) -> None:
    path = changed("lighteval-math", {("config_general", "model_name"): name, ("config_general", "model_sha"): ""})
    ((model, _),) = assigned([path], Model("me/merge", ("me/merge",)), [parent(m) for m in (*PARENTS, LOCAL)])
    assert model.label == owner


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("pretrained=org/math,dtype=bfloat16", ("org/math",)),
        ("pretrained=org/base,peft=org/lora", ("org/lora",)),
        ({"pretrained": "org/math", "dtype": "auto"}, ("org/math",)),
        ('{"model": "org/math", "base_url": "http://localhost"}', ("org/math",)),
        ("", ("me/other",)),
    ],
)
def test_an_adapters_results_are_not_its_bases(changed: Callable[..., str], arguments: Any, names: Any) -> None:
    path = changed(
        "harness-merged",
        {("config", "model_args"): arguments, ("model_name",): "me/other", ("model_name_sanitized",): None},
    )
    assert read(Path(path)).models == names


def test_a_name_can_be_given_and_comes_first(changed: Callable[..., str], tmp_path: Path) -> None:
    path = changed("harness-merged", {}, "a=b.json")
    merged, parents = Model("me/merge", ("me/merge",)), [parent(m) for m in PARENTS]
    for name, owner in {"merged": merged, "org/chat": parents[2], "chat": parents[2], "base": parents[0]}.items():
        assert assigned([f"{name}={path}"], merged, parents)[0][0] is owner
    assert assigned([path], merged, parents)[0][0] is merged  # an equals sign in a file's name


@pytest.mark.parametrize(
    ("given_name", "model", "message"),
    [
        (None, "else/math", "its model is 'else/math', which is neither the merged model (me/merge) nor a parent"),
        (None, "", "it names no model"),
        (None, "/somewhere/math", "its model '/somewhere/math' may be org/math or other/math"),
        ("maths", "org/math", "'maths' names none of the models"),
        ("poem", "org/math", "'poem' names several models"),
    ],
)
def test_what_belongs_to_nobody_is_refused(
    changed: Callable[..., str], given_name: str | None, model: str, message: str
) -> None:
    path = changed("lighteval-math", {("config_general", "model_name"): model})
    others = {"other/math": "math2", "x/poem": "poem1", "y/poem": "poem2"}
    parents = [*PARENTS, *(make.pinned(repo, name=name) for repo, name in others.items())]
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        compare([f"{given_name}={path}" if given_name else path], ("me/merge",), parents)
    assert caught.value.hint.endswith("NAME is merged, org/base, org/math, org/chat, other/math, x/poem, y/poem")


# --- files that cannot be used


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"results": {', "not valid JSON"),
        ("\ud800".encode("utf-8", "surrogatepass"), "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "no results of an evaluation"),
        ('{"accuracy": 0.5}', "no results of an evaluation"),
        ('{"results": {"mteb": 0.5}}', "results of a program that is not known"),
        ('{"results": {}, "config": {"model_args": "pretrained=org/math"}}', "it holds no scores"),
        ('{"results": {"t": {"acc,none": NaN}}, "config": {}}', "task 't', metric 'acc': 'nan' is no number"),
        ('{"results": {"t": {"acc,none": "N/A"}}, "config": {}}', "task 't', metric 'acc': 'N/A' is no number"),
        ('{"results": {"t": {"acc,none": true}}, "config": {}}', "task 't', metric 'acc': 'True' is no number"),
        ('{"results": {"t|0": {"acc": Infinity}}, "config_general": {}}', "task 't', metric 'acc': 'inf' is no number"),
        ('{"results": {"t": {"acc,none": 1' + "0" * 400 + "}}}", "results of a program that is not known"),
        (b" " * (MAX_BYTES + 1), f"{MAX_BYTES + 1} bytes; a file of results has at most {MAX_BYTES}"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(
    tmp_path: Path, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=re.escape(f"--eval {path}: ")) as caught:
        compare([str(path)], ("me/merge",), PARENTS)
    assert message in caught.value.message
    assert caught.value.hint != UsageError.next_step


def test_an_error_that_is_no_number_is_left_out_and_the_value_kept(changed: Callable[..., str]) -> None:
    path = changed("harness-math", {("results", "arc_challenge", "acc_stderr,none"): "N/A"})
    assert read(Path(path)).scores[0].stderr is None


def test_two_values_of_one_result_contradict_each_other(changed: Callable[..., str]) -> None:
    other = changed("harness-math", {("results", "arc_challenge", "acc,none"): 0.5})
    with pytest.raises(UsageError, match=r"org/math: arc_challenge acc is 0\.33 by .*harness-math.json and 0\.5 by"):
        compare([str(DATA / "harness-math.json"), other], ("me/merge",), PARENTS)
    same = changed("harness-math", {})
    assert compare([str(DATA / "harness-math.json"), same], ("me/merge",), PARENTS) is not None


# --- what is shown


@pytest.mark.parametrize(
    ("value", "stderr", "shown"),
    [
        (0.78923, 0.01123, "0.789"),
        (0.78923, 0.0996, "0.789"),
        (0.78923, None, "0.7892"),
        (0.012341, None, "0.01234"),
        (12.3456, None, "12.35"),
        (1234.56, None, "1235"),
        (0.0, None, "0.0000"),
        (5e-12, None, "0.000000"),
        (-0.00001, 0.2, "0.00"),
        (0.5, 0.0, "0.5000"),
    ],
)
def test_numbers_have_as_many_digits_as_they_are_worth(value: float, stderr: float | None, shown: str) -> None:
    assert _rounded(value, _decimals(value, stderr)) == shown


def card(found: Comparison | None, **recipe: Any) -> str:
    """The card of a merge of the three."""
    base, *models = PARENTS
    asked = make.recipe(base, models, **recipe)
    return render_card(CardFacts(make.plan(asked, base, models), asked, "me/merge", results=found))


def test_the_card_shows_the_table_and_names_the_worst() -> None:
    text = card(compared(*FOUR))
    body = text.split("## Results\n")[1].split("\n## ")[0]
    lines = body.splitlines()
    assert "| Task | Few-shot | Metric | `org/base` | `org/math` | `org/chat` | This model | Difference |" in lines
    strict = "0.0200 ± 0.0039 | 0.410 ± 0.014 | – | 0.360 ± 0.013 | −0.050 |"
    assert f"| gsm8k | 5 | exact_match (strict-match) ↑ | {strict}" in lines
    assert "| wikitext | 0 | word_perplexity ↓ | 15.50 | 17.25 | 16.00 | 15.75 | \\+0.25 |" in lines
    assert "| Mean of 2 tasks | – | acc ↑ | 0.2981 | 0.3178 | 0.3781 | 0.3679 | −0.0101 |" in lines
    assert (
        "Worst regression: in gsm8k, exact_match (strict-match) is 0.360 ± 0.013, against 0.410 ± 0.014 of org/math: "
        "worse by 0.050, 12.2 % of that. That is 2.6 standard errors of the difference, taking the two as independent."
    ) in lines
    left_out = "gsm8k exact_match (strict-match), gsm8k exact_match (flexible-extract)"
    assert f"- `org/chat`: {left_out} (few-shot examples 8 instead of 5)" in lines
    assert "\n\n\n" not in text


def test_parents_results_alone_are_labelled_and_stay_out_of_the_front_matter() -> None:
    found = compared("harness-base", "harness-math")
    text = card(found)
    assert "This model was not evaluated. These are its parents' own results." in text
    assert "This model |" not in text
    assert "Difference" not in text
    assert "model-index" not in text
    assert result_files(found, lambda _: pytest.fail("nothing to look up")) == {}
    assert "## Results" not in card(None)


def test_no_regression_is_said_too(changed: Callable[..., str]) -> None:
    weaker = changed("harness-math", {("results",): {"gsm8k": {"exact_match,strict-match": 0.1}}})
    found = compare([weaker, str(DATA / "harness-merged.json")], ("me/merge",), PARENTS)
    assert found is not None
    assert table(found).worst == "In none of the compared results is the merged model worse than its best parent."
    assert table(compared("harness-merged")).worst is None


HOSTILE = [
    "</td><script>alert(1)</script>", "a|b\n## Not mine", "[x](javascript:alert(1))", "{{ 7*7 }}", "`]()`", "\u202egnp",
    "---\nlicense: mit", "<img src=x onerror=alert(1)>", "a: [b", "x" * 5000, "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_strangers_text_stays_text(changed: Callable[..., str], text: str) -> None:
    metrics = {f"{text.replace(',', '')},{text}": 0.5}
    file = changed(
        "harness-merged",
        {
            ("results",): {text: metrics}, ("lm_eval_version",): text, ("n-shot",): {text: 3},
            ("versions",): {text: text},
            ("configs",): {text: {"dataset_path": text, "dataset_name": text, "test_split": text}},
        },
    )  # fmt: skip
    other = changed("harness-math", {("results",): {text: metrics}, ("versions",): {text: 1}}, "other.json")
    found = compare([file, other], ("me/merge",), PARENTS)
    assert found is not None
    assert found.omissions
    written = card(found)
    read_back = ModelCard(written)
    assert read_back.data.license is None
    assert [r.metric_value for r in read_back.data.eval_results] == [0.5]
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(read_back.text)
    assert not re.search(r"<(script|img)|href=.javascript", html)
    assert "7*7" not in text or "7*7" in html
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert "Not mine" not in headings
    assert headings[0] == "Results"
    assert max(map(len, written.splitlines())) < 5000


# --- what the Hub reads


def test_model_index_is_what_the_hubs_client_would_write_of_the_merges_own_results() -> None:
    found = compared(*FOUR)
    index = model_index(found, "merge", "text-generation")
    name, results = model_index_to_eval_results(index)
    assert name == "merge"
    assert eval_results_to_model_index(name, results) == index
    assert results[0] == EvalResult(
        task_type="text-generation", task_name="arc_challenge (25-shot)", dataset_type="allenai/ai2_arc",
        dataset_name="arc_challenge", dataset_config="ARC-Challenge", dataset_split="test",
        dataset_args={"num_few_shot": 25}, metric_type="acc", metric_name="acc", metric_value=0.375,
    )  # fmt: skip
    assert [r.metric_value for r in results[:5]] == [0.375, 0.40625, 0.36, 0.39, 15.75]
    read_back = ModelCard(card(found))
    assert read_back.data.model_name == "merge"
    assert read_back.data.eval_results == results


def test_limited_runs_are_labelled_and_not_in_the_metadata(changed: Callable[..., str]) -> None:
    limited = changed("harness-merged", {("n-samples", "gsm8k", "effective"): 100, ("config", "limit"): 100})
    found = compare([limited], ("me/merge",), PARENTS)
    assert found is not None
    names = [r["dataset"]["name"] for r in model_index(found, "merge", None)[0]["results"]]
    assert names == ["arc_challenge", "wikitext", "mmlu"]
    assert "| gsm8k (100 of 1319 samples) | 5 |" in card(found)


def benchmark(dataset: str) -> Benchmark | None:
    """As if the Hub listed two."""
    return {
        "openai/gsm8k": Benchmark("openai/gsm8k", (BenchmarkTask("gsm8k", "main", "test"),)),
        "allenai/ai2_arc": Benchmark("allenai/ai2_arc", (BenchmarkTask("arc", "ARC-Challenge", "test"),)),
    }.get(dataset)


def test_benchmarks_get_files_of_their_own() -> None:
    files = result_files(compared(*FOUR), benchmark)
    # Of ARC there are two metrics, and its leaderboard would not tell which one it shows.
    assert list(files) == [".eval_results/openai--gsm8k.yaml"]
    data = YAML(typ="safe", pure=True).load(files[".eval_results/openai--gsm8k.yaml"])
    first, second = parse_eval_result_entries(data)
    assert (first.dataset_id, first.task_id, first.value, first.date) == ("openai/gsm8k", "gsm8k", 0.36, "2026-09-10")
    assert first.notes == "5-shot, exact_match (strict-match), lm-evaluation-harness 0.4.9.1"
    assert (second.value, second.source_url, second.verify_token) == (0.39, None, None)


@pytest.mark.parametrize(
    ("changes", "tasks"),
    [
        ({("configs", "gsm8k", "process_docs"): "def f(docs): ..."}, None),
        ({("configs", "gsm8k", "test_split"): "train"}, None),
        ({("configs", "gsm8k", "dataset_name"): "socratic"}, None),
        ({("n-samples", "gsm8k", "effective"): 10}, None),
        ({("configs", "arc_challenge"): sample("harness-merged")["configs"]["gsm8k"]}, None),
        ({}, (BenchmarkTask("a", "main", "test"), BenchmarkTask("b", "main", "test"))),
        ({}, ()),
    ],
)
def test_only_the_whole_of_a_benchmarks_task_is_its_result(
    changed: Callable[..., str], changes: Any, tasks: tuple[BenchmarkTask, ...] | None
) -> None:
    found = compare([changed("harness-merged", changes)], ("me/merge",), PARENTS)
    assert found is not None
    listed = benchmark if tasks is None else lambda d: Benchmark(d, tasks) if d == "openai/gsm8k" else None
    assert result_files(found, listed) == {}


@pytest.mark.parametrize(
    ("tags", "listing", "tasks"),
    [
        ("['benchmark:official']", "tasks: [{id: t, config: c, split: s}, {id: u}, {config: c}, 7]",
         [("t", "c", "s"), ("u", None, None)]),
        ("['benchmark:official']", "tasks: none", []),
        ("['benchmark:official']", "tasks: [", []),
        ("['benchmark:official']", None, None),
        ("[benchmark]", "tasks: [{id: t, config: c, split: s}]", None),
    ],
)  # fmt: skip
def test_benchmarks_are_what_the_hub_lists(hub: LocalHub, tags: str, listing: str | None, tasks: Any) -> None:
    api = HfApi()
    api.create_repo("local/sums", repo_type="dataset")
    files = {"README.md": f"---\ntags: {tags}\n---\n", "eval.yaml": listing}
    for path, text in files.items():
        if text is not None:
            api.upload_file(path_or_fileobj=text.encode(), path_in_repo=path, repo_id="local/sums", repo_type="dataset")
    found = listed_benchmark(Hub(), "local/sums")
    assert (found and [(t.id, t.config, t.split) for t in found.tasks]) == tasks
    assert found is None or found.repo == "local/sums"
    for nowhere in ("local/none", "not a dataset", "../x"):
        assert listed_benchmark(Hub(), nowhere) is None


# --- laws

NAMES = st.text("abc-_.0", min_size=1, max_size=8).filter(lambda s: s.strip("._-") == s)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.lists(st.tuples(NAMES, NAMES), min_size=2, max_size=5, unique_by=lambda r: r), st.data())
def test_a_repositorys_whole_name_is_never_mistaken(repos: list[tuple[str, str]], data: st.DataObject) -> None:
    names = ["/".join(r) for r in repos]
    parents = [parent(make.pinned(name, name=f"model{i}")) for i, name in enumerate(names)]
    wanted = data.draw(st.sampled_from(range(len(names))))
    merged = Model("me/merge", ("me/merge",))
    spelt = {n.replace("/", "_") for n in names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        for name in (names[wanted], "elsewhere/" + repos[wanted][1]):
            content = sample("lighteval-math")
            content["config_general"] |= {"model_name": name, "model_sha": ""}
            path.write_text(json.dumps(content))
            if name in names:
                if len(spelt) == len(names):
                    assert assigned([str(path)], merged, parents)[0][0] is parents[names.index(name)]
            else:
                with pytest.raises(UsageError, match="neither the merged model"):
                    assigned([str(path)], merged, parents)


SHOTS = st.sampled_from([0, 5])
CELL = st.none() | st.tuples(SHOTS, st.floats(0.01, 1, allow_nan=False))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.lists(st.tuples(CELL, CELL, CELL, st.booleans()), min_size=1, max_size=6))
def test_differences_are_those_of_a_naive_loop(tmp_path_factory: pytest.TempPathFactory, tasks: list[Any]) -> None:
    """Three models, the last one merged; a task that two were asked in another way has no difference between them."""
    folder = tmp_path_factory.mktemp("law")
    names = ("org/math", "org/chat", "me/merge")
    files = []
    for column, name in enumerate(names):
        asked = {f"t{i}": (*row[column], row[3]) for i, row in enumerate(tasks) if row[column] is not None}
        if asked:
            content = {
                "results": {t: {"m,none": value} for t, (_, value, _) in asked.items()},
                "n-shot": {t: shots for t, (shots, _, _) in asked.items()},
                "higher_is_better": {t: {"m": higher} for t, (_, _, higher) in asked.items()},
                "config": {"model_args": f"pretrained={name}"},
            }
            path = folder / f"{column}.json"
            path.write_text(json.dumps(content))
            files.append(str(path))
    expected, losses = {}, []
    for i, (math_, chat, merged, higher) in enumerate(tasks):
        fitting = [p[1] for p in (math_, chat) if p is not None and merged is not None and p[0] == merged[0]]
        if fitting:
            best = max(fitting) if higher else min(fitting)
            expected[f"t{i}"] = merged[1] - best
            losses.append((best - merged[1] if higher else merged[1] - best) / best)
    for order in (files, files[::-1]):
        found = compare(order, ("me/merge",), PARENTS)
        if found is None:
            assert not expected
            continue
        assert {r.reference.task.name: r.delta for r in found.rows if r.delta is not None} == expected
        worst = found.regression
        if max(losses, default=0) > 0:
            assert worst is not None
            assert worst.relative == pytest.approx(max(losses))
        else:
            assert worst is None


def test_settings_that_agree_have_no_difference() -> None:
    def score(**stated: str) -> Score:
        return Score("p", Task("t", stated), "m", None, 0.5, None, True)

    assert differences(score(a="1", samples="2"), score(a="1")) == []
    assert differences(score(a="1"), score(b="1")) == ["a not stated instead of 1", "b 1 instead of not stated"]
