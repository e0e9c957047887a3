"""Every codec, for many architectures: what is retrieved loads as the task's own class and predicts as it must."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import hubmerge
from hubmerge.align import is_transposed
from hubmerge.codec import Codec
from hubmerge.codecs import all_codecs
from tests.bundles.scene import Tensors, given_back, manifest, recipe, stored
from tests.end_to_end import support
from tests.merge import naive
from tests.merge.models import FAMILIES, LABELS, build, unknown_architecture

Made = tuple[Path, list[Path]]
TASKS = ("task0", "task1")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """The base and the fine-tunes of an architecture, built once."""
    made: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in made:
            made[name] = build(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def expected(codec: Codec, base: Path, tunes: list[Path], **parameters: Any) -> dict[str, Tensors]:
    """What each task's checkpoint must hold, under its own names: by brute force, and by the codec in memory."""
    tensors = stored(base)
    models = {t.name: stored(t) for t in tunes}
    aligned = {n: naive.align(tensors, m) for n, m in models.items()}
    restored = given_back(codec.name, tensors, aligned, **parameters)
    found = {}
    for task, model in models.items():
        own = {id(t): n for n, t in model.items()}
        matched = {own[id(t)]: restored[task][n] for n, t in aligned[task].items()}
        found[task] = {n: matched.get(n, t) for n, t in model.items()}
    return found


def assert_close(codec: Codec, found: Tensors, wanted: Tensors, config: Mapping[str, Any]) -> None:
    """The same bits; where matrices were decomposed in another orientation, as good as."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        if codec.unit == "matrix" and is_transposed(name, tuple(tensor.shape), config):
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found[name], tensor), name


def load(cls: Any, folder: Path) -> Any:
    """The model in float32, with nothing missing and nothing left over."""
    with contextlib.redirect_stderr(io.StringIO()):
        model, report = cls.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def predict(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(**inputs).values()))


def is_quick(name: str, codec: Codec) -> bool:
    """Every architecture with one codec, and every codec with three architectures; the others take minutes."""
    return codec.name == "superposition" or name in ("bert", "gpt2", "vit")


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        pytest.param(name, codec, id=f"{name}-{codec.name}", marks=[] if is_quick(name, codec) else pytest.mark.slow)
        for name in FAMILIES
        for codec in all_codecs()
    ],
)
def test_architectures(name: str, codec: Codec, family: Callable[[str], Made], tmp_path: Path) -> None:
    base, tunes = family(name)
    place = tmp_path / "bundle"
    hubmerge.create_bundle(recipe(codec.name, base, tunes), out=place)
    config = {"model_type": FAMILIES[name].base().config.model_type}
    wanted = expected(codec, base, tunes)
    for i, task in enumerate(TASKS):
        hubmerge.retrieve_task(place, task, tmp_path / task, base=base)
        found = stored(tmp_path / task)
        assert_close(codec, found, wanted[task], config)
        cls = type(FAMILIES[name].tune(LABELS[i]))
        restored, reference = load(cls, tmp_path / task), load(cls, tunes[i])
        reference.load_state_dict(
            restored.state_dict() | {n: t for n, t in found.items() if n in reference.state_dict()}
        )
        outputs = [predict(m, FAMILIES[name].inputs) for m in (restored, reference, load(cls, tunes[i]))]
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("codec", all_codecs(), ids=lambda c: c.name)
def test_unknown_architecture(codec: Codec, tmp_path: Path) -> None:
    """Odd shapes, an empty tensor, a scalar; integers are the base's."""
    base, tunes = unknown_architecture(tmp_path)
    place = tmp_path / "bundle"
    hubmerge.create_bundle(recipe(codec.name, base, tunes), out=place)
    assert support.hubmerge("verify", place).code == 0
    models = {t.name: stored(t) for t in tunes}
    wanted = given_back(codec.name, stored(base), models)
    for task in TASKS:
        hubmerge.retrieve_task(place, task, tmp_path / "out" / task, base=base)
        found = stored(tmp_path / "out" / task)
        assert_close(codec, found, wanted[task], {})
        assert found["steps"].tolist() == [3, 4]


@pytest.mark.parametrize("codec", all_codecs(), ids=lambda c: c.name)
def test_one_task_comes_back_as_it_was(codec: Codec, family: Callable[[str], Made], tmp_path: Path) -> None:
    """With nobody to share with, and nothing left out, a bundle keeps a model exactly: its deltas are exact here."""
    lossless = {"magnitude_mask": {"density": 1.0}, "tsv_compress": {"budget": 100.0}}.get(codec.name, {})
    base, tunes = family("bert")
    tune = tmp_path / "tune"
    _on_a_grid(base, tunes[0], tmp_path / "base", tune)
    hubmerge.create_bundle(recipe(codec.name, tmp_path / "base", [tune], parameters=lossless), out=tmp_path / "bundle")
    hubmerge.retrieve_task(tmp_path / "bundle", "tune", tmp_path / "out", base=tmp_path / "base")
    found, wanted = stored(tmp_path / "out"), stored(tune)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], t) for n, t in wanted.items())
    assert manifest(tmp_path / "bundle").tasks[0].error in (None, 0.0)


def _on_a_grid(base: Path, tune: Path, new_base: Path, new_tune: Path) -> None:
    """The two models with values that are multiples of 1/1024, whose differences float32 holds."""
    from safetensors.torch import save_file

    for old, new in ((base, new_base), (tune, new_tune)):
        new.mkdir()
        (new / "config.json").write_bytes((old / "config.json").read_bytes())
        rounded = {n: (t.float() * 1024).round() / 1024 for n, t in stored(old).items()}
        save_file(rounded, new / "model.safetensors", metadata={"format": "pt"})
