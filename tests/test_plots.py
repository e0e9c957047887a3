"""The plots: the same bytes from the same figures, well-formed whatever the names are, and readable in both themes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence

import pytest
import torch

from hubmerge.analysis import Diagnostics, TensorFigures
from hubmerge.drawing import _DARK, _LIGHT, _NAMES, MARKERS
from hubmerge.plots import MAX_SERIES, WIDTH, Plot, _kind_labels, _nice_ticks, as_files, plots
from hubmerge.spectra import measure_spectra
from tests.test_analysis import relations

SVG = "{http://www.w3.org/2000/svg}"
KINDS = ("attn.q_proj", "attn.v_proj", "mlp.up_proj")
HOSTILE = ("<script>alert(1)</script>", "a & b \" ' </desc>", "\u202egpj.exe\x00", "x" * 300, "]]>", "ünïcode 日本語")


def diagnostics(
    tasks: Sequence[str], kinds: Sequence[str] = KINDS, layers: int = 4, *, spectra: bool = True
) -> Diagnostics:
    """Figures of random task vectors that share more the deeper they lie."""
    generator = torch.Generator().manual_seed(5)
    tensors = []
    for layer in range(layers):
        for kind in kinds:
            shared = torch.randn(12, 10, generator=generator)
            deltas = [torch.randn(12, 10, generator=generator) + 0.2 * layer * shared for _ in tasks]
            flat = [d.view(-1) for d in deltas]
            merged = sum(flat[1:], flat[0]) * 0.3
            found = relations(flat, merged, torch.randn(120, generator=generator))
            measured = measure_spectra(deltas, len(tasks)) if spectra and layer != 2 else None
            tensors.append(
                TensorFigures(f"model.layers.{layer}.{kind}.weight", "linear", layer, (12, 10), found, measured)
            )
    return Diagnostics(tuple(tasks), "task_arithmetic", "0" * 64, tuple(tensors), len(tensors))


def texts(plot: Plot) -> list[str]:
    return ["".join(e.itertext()) for e in ET.fromstring(plot.svg).iter(f"{SVG}text")]


# --- bytes ------------------------------------------------------------------------------------------------------


def test_same_bytes_in_two_processes_with_other_hash_seeds() -> None:
    code = (
        "import hashlib; from tests.test_plots import diagnostics; from hubmerge.plots import as_files\n"
        "for n, c in as_files(diagnostics(['a', 'b', 'c'])).items(): print(n, hashlib.sha256(c).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True,
            check=True,
        ).stdout
        for seed in ("1", "4242")
    ]  # fmt: skip
    assert runs[0] == runs[1]
    assert [line.split()[0] for line in runs[0].splitlines()] == [
        "diagnostics.json", "assets/cosines.svg", "assets/interference.svg", "assets/spectrum.svg",
    ]  # fmt: skip
    assert as_files(diagnostics(["a", "b", "c"])) == as_files(diagnostics(["a", "b", "c"]))


# --- what they show ---------------------------------------------------------------------------------------------


def test_the_heat_map_shows_every_pair_and_the_merge() -> None:
    found = diagnostics(["red", "green", "blue"])
    (heat, *_) = plots(found)
    shown = texts(heat)
    assert shown[0] == "Cosines of the task vectors"
    assert [t for t in shown if t in found.tasks] == ["red", "red", "green", "green", "blue", "blue"]
    numbers = [float(t.replace("−", "-")) for t in shown if re.fullmatch(r"−?\d\.\d\d", t)]
    cosines, merged = found.model.cosines, found.model.merged_cosines
    expected = [cosines[i, j] for i in range(3) for j in range(3) if i != j] + list(merged)
    assert numbers == pytest.approx(expected, abs=0.005)
    high = max((cosines[i, j], i, j) for i in range(3) for j in range(i))
    assert heat.alt.startswith(f"Most alike are {found.tasks[high[2]]} and {found.tasks[high[1]]} ({high[0]:.2f})")


def test_depth_shows_the_layers_that_were_measured() -> None:
    found = diagnostics(["a", "b"])
    depth = plots(found)[1]
    root = ET.fromstring(depth.svg)
    curves = [e.get("d", "") for e in root.iter(f"{SVG}path") if "curve" in e.get("class", "")]
    assert len(curves) == len(KINDS)
    assert all(len(re.split("[ML]", curve)[1:]) == 3 for curve in curves)  # layers 0, 1 and 3
    assert {"attn.q_proj", "attn.v_proj", "mlp.up_proj", "layer", "0", "3"} <= set(texts(depth))
    assert "A sample: 9 of 12 weights." in depth.alt
    heights = [float(point.split()[1]) for curve in curves for point in re.split("[ML]", curve)[1:]]
    assert max(heights) <= 340
    assert min(heights) >= 74


def test_the_spectrum_rises_to_all_of_the_energy() -> None:
    found = diagnostics(["a", "b"])
    spectrum = plots(found)[2]
    root = ET.fromstring(spectrum.svg)
    curves = [e.get("d", "") for e in root.iter(f"{SVG}path") if "curve" in e.get("class", "")]
    for curve in curves:
        points = [tuple(map(float, point.split())) for point in re.split("[ML]", curve)[1:]]
        assert points == sorted(points, key=lambda p: (p[0], -p[1]))
        assert points[-1][1] == 74  # 100 %
    assert "of 10 at most" in spectrum.alt


@pytest.mark.parametrize(
    ("tasks", "spectra", "expected"),
    [(["a"], True, ["spectrum"]), (["a", "b"], False, ["cosines"]), (["a"], False, [])],
)
def test_what_was_not_measured_is_not_drawn(tasks: list[str], spectra: bool, expected: list[str]) -> None:
    assert [p.path for p in plots(diagnostics(tasks, spectra=spectra))] == [f"assets/{name}.svg" for name in expected]


def test_tasks_that_change_nothing() -> None:
    nothing = relations([torch.zeros(6)] * 2, torch.zeros(6), torch.ones(6))
    zero = measure_spectra([torch.zeros(3, 2)] * 2, 2)
    found = Diagnostics(("a", "b"), "ties", "0" * 64, (TensorFigures("w", "linear", 0, (3, 2), nothing, zero),), 1)
    assert [p.path for p in plots(found)] == ["assets/cosines.svg"]
    assert "No two tasks change anything" in plots(found)[0].alt
    assert plots(Diagnostics(("a", "b"), "ties", "0" * 64, (), 0))[0].svg


def test_more_series_than_colours() -> None:
    found = diagnostics([f"task {i}" for i in range(11)], kinds=[f"part{i}.w{i}x" for i in range(10)], layers=2)
    for plot in plots(found)[1:]:
        curves = [e for e in ET.fromstring(plot.svg).iter(f"{SVG}path") if "curve" in e.get("class", "")]
        assert len(curves) == MAX_SERIES
        assert any("shown)" in t for t in texts(plot))


# --- that anyone can read them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [HOSTILE[:2], HOSTILE[2:4], HOSTILE[4:]])
def test_hostile_names_stay_text(names: Sequence[str]) -> None:
    found = diagnostics(names, kinds=["<b>.w", "a&b"])
    assert len(plots(found)) == 3
    for plot in plots(found):
        root = ET.fromstring(plot.svg)
        assert {e.tag.removeprefix(SVG) for e in root.iter()} <= {
            "svg",
            "title",
            "desc",
            "style",
            "rect",
            "text",
            "path",
        }
        assert not any(a.lower().startswith("on") or "href" in a for e in root.iter() for a in e.attrib)
        assert "\u202e" not in plot.svg
        assert "http" not in plot.svg.replace("http://www.w3.org/2000/svg", "")
        assert all(len(t) < 60 for t in texts(plot))


def test_every_plot_is_described_and_lies_within_its_frame() -> None:
    for plot in plots(diagnostics(["a", "a-task-with-a-rather-long-name"])):
        root = ET.fromstring(plot.svg)
        assert root.get("role") == "img"
        assert root.get("aria-labelledby") == "title desc"
        assert root.findtext(f"{SVG}title") == plot.title
        assert root.findtext(f"{SVG}desc") == plot.alt
        width, height = float(root.get("width", "0")), float(root.get("height", "0"))
        assert width <= WIDTH
        for text in root.iter(f"{SVG}text"):
            if text.get("x") is not None:
                assert 0 <= float(text.get("x", "")) <= width
                assert 0 < float(text.get("y", "")) <= height


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def blend(top: str, under: str, share: float) -> str:
    mixed = [round(int(top[i : i + 2], 16) * share + int(under[i : i + 2], 16) * (1 - share)) for i in (1, 3, 5)]
    return "#" + "".join(f"{c:02x}" for c in mixed)


@pytest.mark.parametrize("theme", [_LIGHT, _DARK], ids=["light", "dark"])
def test_contrast_in_both_themes(theme: Sequence[str]) -> None:
    """At least what WCAG 2.1 asks: 4.5 for text, 3 for lines; text in cells on the strongest of their colours, too."""
    colours = dict(zip(_NAMES, theme, strict=True))
    surface = colours["surface"]
    assert contrast(colours["ink"], surface) >= 7
    assert contrast(colours["muted"], surface) >= 4.5
    for i in range(len(MARKERS)):
        assert contrast(colours[f"s{i}"], surface) >= 3, i
    for sign in ("plus", "minus"):
        assert contrast(colours["ink"], blend(colours[sign], surface, 0.8)) >= 4.5, sign


# --- small parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("largest", "labels"), [(1.0, ["0", "0.25", "0.5", "0.75", "1"]), (0.0, ["0", "1"]),
                                                 (37.0, ["0", "10", "20", "30", "40"])])  # fmt: skip
def test_ticks_are_round(largest: float, labels: list[str]) -> None:
    assert [label for _, label in _nice_ticks(largest)] == labels


@pytest.mark.parametrize("largest", [1e-9, 0.3, 0.7, 1.01, 9.99, 123456.0])
def test_ticks_reach_the_largest(largest: float) -> None:
    ticks = _nice_ticks(largest)
    assert 3 <= len(ticks) <= 7
    assert ticks[-1][0] >= largest * (1 - 1e-6)


@pytest.mark.parametrize(
    ("kinds", "labels"),
    [
        (
            ["model.layers.*.self_attn.q_proj.weight", "model.layers.*.mlp.up_proj.weight"],
            ["self_attn.q_proj", "mlp.up_proj"],
        ),
        (["encoder.*.q.weight", "decoder.*.q.weight"], ["encoder.*.q", "decoder.*.q"]),
        (["classifier.weight"], ["classifier"]),
    ],
)
def test_kinds_are_named_by_what_distinguishes_them(kinds: list[str], labels: list[str]) -> None:
    assert _kind_labels(kinds) == labels
