"""Tasks' models served out of a bundle: what a switch leaves in a model is what retrieval writes, for every pass."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import hubmerge
from hubmerge.bundles import weights
from hubmerge.bundles.serving import ServedBundle
from hubmerge.codec import Codec
from hubmerge.codecs import all_codecs
from hubmerge.errors import HubMergeError, IntegrityError, SourceError, UsageError
from hubmerge.ranking import GRAIN
from hubmerge.storage import Storage
from tests.bundles.scene import manifest, recipe, stored
from tests.end_to_end import support
from tests.merge.models import FAMILIES, LABELS, _llama, _save, build
from tests.merge.test_adapters import make_adapter, reload
from tests.merge.test_merged_adapters import LORAS, applied

TASKS = ("task0", "task1")
WAIT_S = 60
State = Mapping[str, torch.Tensor]


def load(cls: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """An ordinary folder's model."""
    with contextlib.redirect_stderr(io.StringIO()):
        return cls.from_pretrained(folder, dtype=dtype).eval()


def state(model: Any) -> dict[str, torch.Tensor]:
    """A copy of everything that a checkpoint of the model would hold."""
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def predict(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(**inputs).values())).clone()


def is_close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Up to rounding, which depends on where matrices happen to lie in memory; tasks are a thousand times as far."""
    return found.shape == wanted.shape and bool((found - wanted).abs().max() < 2e-6)


def assert_same(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@dataclass(frozen=True)
class Scene:
    """Two fine-tunes of a base, their bundle, and what is retrieved from it."""

    folder: Path
    inputs: dict[str, torch.Tensor]

    def open(self) -> ServedBundle:
        return hubmerge.load_bundle(self.folder / "bundle", base=self.folder / "base")

    def retrieved(self, task: str) -> Path:
        out = self.folder / "out" / task
        if not out.exists():
            hubmerge.retrieve_task(self.folder / "bundle", task, out, base=self.folder / "base")
        return out

    def reference(self, model: Any, task: str, dtype: torch.dtype = torch.float32) -> Any:
        return load(type(model), self.retrieved(task), dtype)


def bundled(folder: Path, inputs: dict[str, torch.Tensor], codec: str = "superposition", **keys: Any) -> Scene:
    """The bundle of a folder's ``task0`` and ``task1``."""
    tunes = [folder / t for t in TASKS]
    hubmerge.create_bundle(recipe(codec, folder / "base", tunes, **keys), out=folder / "bundle", overwrite=True)
    return Scene(folder, inputs)


def scene_of(name: str, folder: Path, codec: str = "superposition", **keys: Any) -> Scene:
    build(name, folder)
    return bundled(folder, FAMILIES[name].inputs, codec, **keys)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene_of("vit", tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene_of("llama-tied", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def tinier_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK", GRAIN)


# --- the same as retrieval --------------------------------------------------------------------------------------


def assert_served_as_retrieved(scene: Scene) -> Any:
    """A model made for one task, then switched to and fro, has the bits and predictions of the retrieved ones."""
    served = scene.open()
    assert served.tasks == TASKS
    model = served.model("task0")
    for i in (0, 1, 0):
        served.switch(model, TASKS[i])
        reference = scene.reference(model, TASKS[i])
        assert_same(state(model), state(reference))
        assert is_close(predict(model, scene.inputs), predict(reference, scene.inputs))
        assert served.task_of(model) == TASKS[i]
        ours, theirs = model.config, reference.config
        assert (ours.num_labels, ours.id2label, ours.label2id) == (theirs.num_labels, theirs.id2label, theirs.label2id)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_architectures(name: str, tmp_path: Path) -> None:
    """Also what transformers converts when it loads: the experts of a mixtral are stored one by one."""
    scene = scene_of(name, tmp_path)
    model = assert_served_as_retrieved(scene)
    assert type(model) is type(FAMILIES[name].tune(LABELS[0]))
    assert not model.training
    fresh = scene.open().model("task1")
    assert_same(state(fresh), state(scene.reference(fresh, "task1")))


@pytest.mark.parametrize("codec", all_codecs(), ids=lambda c: c.name)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_codecs(name: str, codec: Codec, tmp_path: Path) -> None:
    assert_served_as_retrieved(scene_of(name, tmp_path, codec.name))


@pytest.mark.parametrize("codec", ["superposition", "emr", "tsv_compress"])
@pytest.mark.parametrize("storage", ["bfloat16", "int8", "int4"])
def test_storage_forms(storage: Storage, codec: str, tmp_path: Path) -> None:
    assert_served_as_retrieved(scene_of("vit", tmp_path, codec, parameters={"storage": storage}))


@pytest.mark.parametrize(
    "parameters",
    [{"scale": 0.3}, {"shuffle": False}, {"signs": False}, {"targets": "mlp"}, {"skip_rate": 2}, {"shift": 1}],
    ids=str,
)
def test_variants(parameters: dict[str, Any], tmp_path: Path) -> None:
    assert_served_as_retrieved(scene_of("vit", tmp_path, parameters=parameters))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors of several chunks, in the base's own bfloat16, and one that is stored in float32."""
    folder = tmp_path_factory.mktemp("large")
    config = tf.LlamaConfig(
        hidden_size=192, intermediate_size=500, num_hidden_layers=2, num_attention_heads=4, vocab_size=700,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    base = tf.LlamaForCausalLM(config).to(torch.bfloat16)
    for name in ("base", *TASKS):
        _save(base, folder / name)
        tensors = load_file(folder / name / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1 / 3
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        with torch.no_grad():
            for value in base.parameters():
                value.add_(0.01 * torch.randn_like(value))
    return folder


@pytest.mark.parametrize("codec", all_codecs(), ids=lambda c: c.name)
def test_neither_chunks_nor_threads_matter(codec: Codec, large: Path, tinier_chunks: None, tmp_path: Path) -> None:
    shutil.copytree(large, tmp_path / "in")
    scene = bundled(tmp_path / "in", {"input_ids": torch.arange(8)[None]}, codec.name)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            served = scene.open()
            model = served.model("task0")
            assert model.dtype == torch.bfloat16  # most of the base is stored so
            for task in ("task1", "task0"):
                served.switch(model, task)
                assert_same(state(model), state(scene.reference(model, task, torch.bfloat16)))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)


def test_scale_multiplies_the_deltas(vit: Scene, tmp_path: Path) -> None:
    served = vit.open()
    model = served.model("task0", scale=0.25)
    for task in TASKS:
        out = tmp_path / task
        hubmerge.retrieve_task(vit.folder / "bundle", task, out, base=vit.folder / "base", scale=0.25)
        served.switch(model, task, scale=0.25)
        assert_same(state(model), state(load(type(model), out)))


def test_a_base_with_a_head_of_its_own(tmp_path: Path) -> None:
    """A classifier tuned for other labels: its head takes the place of the base's."""
    for name, labels in (("base", 10), ("task0", 3), ("task1", 5)):
        torch.manual_seed(labels)
        _save(FAMILIES["vit"].tune(labels), tmp_path / name)
    scene = bundled(tmp_path, FAMILIES["vit"].inputs)
    model = assert_served_as_retrieved(scene)
    assert model.classifier.out_features == 3


def test_what_a_task_lacks_is_the_bases(tmp_path: Path) -> None:
    """Whatever task the model was before: nothing of it stays."""
    scene = scene_of("vit", tmp_path / "first")
    tensors = load_file(tmp_path / "first" / "task1" / "model.safetensors")
    names = ("vit.layernorm.weight", "vit.layernorm.bias")
    assert {tensors.pop(n).shape for n in names} == {(32,)}
    save_file(tensors, tmp_path / "first" / "task1" / "model.safetensors", metadata={"format": "pt"})
    scene = bundled(tmp_path / "first", scene.inputs)
    assert manifest(tmp_path / "first" / "bundle").task("task1").absent == ("layernorm.bias", "layernorm.weight")
    served = scene.open()
    model = served.model("task0")
    served.switch(model, "task1")
    base = stored(scene.folder / "base")
    assert all(torch.equal(model.state_dict()[n], base[n.removeprefix("vit.")]) for n in names)


def test_how_a_task_generates_is_its_own(tmp_path: Path) -> None:
    for name, limit in (("base", 5), ("task0", 7), ("task1", 9)):
        model = FAMILIES["gpt2-lm"].base()
        model.generation_config.max_new_tokens = limit
        _save(model, tmp_path / name)
    served = bundled(tmp_path, {}).open()
    model = served.model("task0")
    assert model.generation_config.max_new_tokens == 7
    served.switch(model, "task1")
    assert model.generation_config.max_new_tokens == 9


# --- adapters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_adapters(storage: str, tmp_path: Path) -> None:
    """A bundle of LoRA adapters gives models, base and adapter merged; elsewhere it gives adapters back."""
    torch.manual_seed(0)
    _save(tf.LlamaForCausalLM(_llama()), tmp_path / "base")
    for i, task in enumerate(TASKS):
        config = peft.LoraConfig(task_type="CAUSAL_LM", **LORAS[i])
        make_adapter(config, reload(tmp_path / "base"), tmp_path / task, seed=i + 1)
    scene = bundled(tmp_path, FAMILIES["llama-untied"].inputs, parameters={"storage": storage})
    assert manifest(tmp_path / "bundle").factors
    served = scene.open()
    model = served.model("task1")
    for task in TASKS:
        served.switch(model, task)
        wanted = applied(reload(tmp_path / "base"), scene.retrieved(task))
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2-lm", "bert"])
def test_adapters_with_heads(name: str, tmp_path: Path) -> None:
    """Trained on the class for the task, on top of a base that has another head, or none; Conv1D stores [in, out]."""
    build(name, tmp_path / "made")
    shutil.copytree(tmp_path / "made" / "base", tmp_path / "base")
    cls = type(FAMILIES[name].tune(2))
    for i, task in enumerate(TASKS):
        targets = ["c_attn", "c_proj"] if name == "gpt2-lm" else ["query", "dense"]
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2 + i, target_modules=targets, fan_in_fan_out=name != "bert")
        with contextlib.redirect_stderr(io.StringIO()):
            model = cls.from_pretrained(tmp_path / "base", num_labels=LABELS[i])
        make_adapter(config, model, tmp_path / task, seed=i)
    scene = bundled(tmp_path, FAMILIES[name].inputs)
    served = scene.open()
    model = served.model("task0")
    for i, task in enumerate((*TASKS, "task0")):
        served.switch(model, task)
        with contextlib.redirect_stderr(io.StringIO()):
            base = cls.from_pretrained(tmp_path / "base", num_labels=LABELS[i % 2])
        wanted = applied(base, scene.retrieved(task))
        assert predict(model, scene.inputs).shape[-1] == LABELS[i % 2]
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, wanted[key], rtol=0, atol=1e-6)


# --- in place ---------------------------------------------------------------------------------------------------


def test_parameters_stay_where_they_are(llama: Scene) -> None:
    served = llama.open()
    model = served.model("task0").train()
    model.model.layers[0].register_buffer("mine", torch.arange(3.0), persistent=False)
    before = {n: (p, p.data_ptr()) for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    served.switch(model, "task1")
    assert {n: (p, p.data_ptr()) for n, p in model.named_parameters()} == before
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    assert_same(dict(model.named_buffers()), buffers)
    assert "model.rotary_emb.inv_freq" in buffers


@pytest.mark.parametrize("name", ["llama-tied", "t5", "bert-mlm"])
def test_tied_weights_stay_tied(name: str, tmp_path: Path) -> None:
    scene = scene_of(name, tmp_path)
    served = scene.open()
    model = served.model("task0")
    served.switch(model, "task1")
    reference = scene.reference(model, "task1")
    names = [n for n, _ in reference.named_parameters()]
    assert [n for n, _ in model.named_parameters()] == names
    assert len(dict(model.named_parameters(remove_duplicate=False))) == len(
        dict(reference.named_parameters(remove_duplicate=False))
    )


def test_a_head_of_other_labels_replaces_the_old_one(vit: Scene) -> None:
    served = vit.open()
    model = served.model("task0")
    body = list(model.vit.parameters())
    for i in (1, 0, 1):
        served.switch(model, TASKS[i])
        assert (model.classifier.out_features, model.classifier.in_features) == (LABELS[i], 32)
        assert model.num_labels == LABELS[i]
        assert len(model.config.id2label) == LABELS[i]
        labels = torch.tensor([LABELS[i] - 1, 0])
        assert torch.isfinite(model(**vit.inputs, labels=labels).loss)
        assert model.classifier.weight.requires_grad
    assert all(a is b for a, b in zip(body, model.vit.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_model_is_respected(dtype: torch.dtype, vit: Scene) -> None:
    served = vit.open()
    moved, made = served.model("task0").to(dtype), served.model("task0", dtype=dtype)
    assert made.config.dtype == made.dtype == dtype
    for task in ("task1", "task0"):
        wanted = state(vit.reference(moved, task).to(dtype))
        for model in (moved, made):
            served.switch(model, task)
            assert_same(state(model), wanted)


def test_memory_of_any_layout_is_written(vit: Scene) -> None:
    """By way of a tensor of its own, as for devices that are not the processor."""
    served = vit.open()
    model = served.model("task0")
    weight = model.classifier.weight
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter is not weight:
            parameter.data = parameter.data.transpose(0, 1).contiguous().transpose(0, 1)
    served.switch(model, "task1")
    assert_same(state(model), state(vit.reference(model, "task1")))
    assert sum(not p.is_contiguous() for p in model.parameters()) > 10


def test_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    """A process of its own switches a model of 71 MB, and all its memory is watched that is not a file's.

    What its two threads need besides, 2 MB each, does not grow with the model.
    """
    config = tf.LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8, vocab_size=1000
    )
    torch.manual_seed(0)
    for name in ("base", *TASKS):
        _save(tf.LlamaForCausalLM(config), tmp_path / name)
    bundled(tmp_path, {})
    program = (
        "import re, sys, threading, hubmerge, pathlib, torch\n"
        "torch.set_num_threads(2)\n"
        "status = pathlib.Path('/proc/self/status')\n"
        "def now(): return sum(map(int, re.findall(r'Rss(?:Anon|Shmem):\\s*(\\d+)', status.read_text())))\n"
        "served = hubmerge.load_bundle(sys.argv[1], base=sys.argv[2])\n"
        "model = served.model('task0')\n"
        "served.switch(model, 'task1')\n"
        "before, seen, end = now(), [], threading.Event()\n"
        "def watch():\n"
        "    while not end.wait(0.0005): seen.append(now())\n"
        "thread = threading.Thread(target=watch); thread.start()\n"
        "for _ in range(3): served.switch(model, 'task0'); served.switch(model, 'task1')\n"
        "end.set(); thread.join()\n"
        "size = sum(p.numel() * 4 for p in model.parameters())\n"
        "print(size, (max(seen) - before) * 1024, len(seen))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "bundle"), str(tmp_path / "base")],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    size, more, samples = map(int, done.stdout.split())
    assert size > 60_000_000
    assert samples > 20
    assert more < 0.25 * size


# --- threads ----------------------------------------------------------------------------------------------------


def test_no_pass_sees_a_mixture(vit: Scene) -> None:
    """Passes in four threads while two others switch: every output is that of one of the tasks."""
    served = vit.open()
    model = served.model("task0")
    expected = [predict(vit.reference(model, t), vit.inputs) for t in TASKS]
    until = time.monotonic() + 1.5
    counts = [0, 0]

    def run() -> None:
        while time.monotonic() < until:
            found = predict(model, vit.inputs)
            which = [i for i, e in enumerate(expected) if is_close(found, e)]
            assert len(which) == 1
            counts[which[0]] += 1

    def change(i: int) -> int:
        done = 0
        while time.monotonic() < until:
            served.switch(model, TASKS[(i + done) % 2])
            done += 1
        return done

    with ThreadPoolExecutor(6) as pool:
        passes = [pool.submit(run) for _ in range(4)]
        changes = [pool.submit(change, i) for i in range(2)]
        for work in passes:
            work.result(WAIT_S)
        assert all(w.result(WAIT_S) > 3 for w in changes)
    assert min(counts) > 3


def test_generate_is_held_together(llama: Scene) -> None:
    """``generate`` is many passes; within ``holding`` all of them are of one task, though another thread switches."""
    served = llama.open()
    model = served.model("task0")
    ids = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}

    def generate(one: Any) -> torch.Tensor:
        made = one.generate(**ids, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True)
        return torch.cat(made.logits)

    expected = {t: generate(llama.reference(model, t)) for t in TASKS}
    assert (expected["task0"] - expected["task1"]).abs().max() > 2e-3

    def use(task: str) -> None:
        for _ in range(6):
            with served.holding(model, task) as held:
                assert held == task == served.task_of(model)
                assert is_close(generate(model), expected[task])

    with ThreadPoolExecutor(2) as pool:
        for work in [pool.submit(use, t) for t in TASKS]:
            work.result(WAIT_S)


def test_holding(vit: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    served = vit.open()
    model = served.model("task0")
    with ThreadPoolExecutor(1) as pool:
        with served.holding(model) as task:
            assert task == "task0"
            work = pool.submit(served.switch, model, "task1")
            with pytest.raises(UsageError, match="holds the model already"):
                served.switch(model, "task1")
            time.sleep(0.05)
            assert not work.done()
            assert is_close(predict(model, vit.inputs), predict(vit.reference(model, "task0"), vit.inputs))
        work.result(WAIT_S)
    assert served.task_of(model) == "task1"
    monkeypatch.setattr(weights.TaskWeights, "write", lambda *_: pytest.fail("nothing needs to be written"))
    with served.holding(model, "task1"):
        pass
    with pytest.raises(pytest.fail.Exception), served.holding(model, "task1", scale=0.5):
        pass


def test_a_pass_that_fails_does_not_block_a_switch(vit: Scene) -> None:
    served = vit.open()
    model = served.model("task0")
    with pytest.raises(AttributeError, match="dtype"):
        model()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(served.switch, model, "task1").result(WAIT_S)


def test_a_switch_that_is_broken_off_leaves_no_model_behind(vit: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    served = vit.open()
    model = served.model("task0")
    write, calls = weights.TaskWeights.write, []

    def breaking(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(weights.TaskWeights, "write", breaking)
    with pytest.raises(KeyboardInterrupt):
        served.switch(model, "task1")
    monkeypatch.undo()
    with pytest.raises(HubMergeError, match="of no task"):
        model(**vit.inputs)
    with served.holding(model, "task0"):
        assert is_close(predict(model, vit.inputs), predict(vit.reference(model, "task0"), vit.inputs))


def test_models_of_one_bundle_do_not_wait_for_each_other(vit: Scene) -> None:
    served = vit.open()
    one, other = served.model("task0"), served.model("task0")
    with ThreadPoolExecutor(1) as pool, served.holding(one):
        pool.submit(served.switch, other, "task1").result(WAIT_S)
    assert_same(state(one), state(vit.reference(one, "task0")))


def test_switching_within_inference_mode(vit: Scene) -> None:
    served = vit.open()
    with torch.inference_mode():
        model = served.model("task0")
        served.switch(model, "task1")
    loss = model(**vit.inputs, labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert model.classifier.weight.grad is not None


# --- what is refused --------------------------------------------------------------------------------------------


def refused(served: ServedBundle, model: Any, task: str, *words: str) -> None:
    """A switch is refused, and the model is as it was."""
    before = state(model)
    was = served.task_of(model)
    with pytest.raises(UsageError) as caught:
        served.switch(model, task)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert_same(state(model), before)
    assert served.task_of(model) == was


def test_another_class(tmp_path: Path) -> None:
    build("bert-mlm", tmp_path)
    torch.manual_seed(0)
    base = FAMILIES["bert-mlm"].base().config
    _save(tf.BertForSequenceClassification(base), tmp_path / "task1")
    served = bundled(tmp_path, FAMILIES["bert-mlm"].inputs).open()
    model = served.model("task0")
    refused(
        served, model, "task1", "BertForTokenClassification", "BertForSequenceClassification", "bundle.model('task1')"
    )
    assert type(served.model("task1")) is tf.BertForSequenceClassification


@pytest.mark.parametrize("place", ["top", "nested"])
def test_another_design(place: str, tmp_path: Path) -> None:
    """The same class may compute something else; dropout and the like do not matter."""
    build("vit", tmp_path)
    path = tmp_path / "task1" / "config.json"
    config = json.loads(path.read_text())
    harmless = {"hidden_dropout_prob": 0.5, "transformers_version": "5.0.0", "initializer_range": 0.1}
    path.write_text(json.dumps(config | harmless))
    served = bundled(tmp_path, FAMILIES["vit"].inputs).open()
    served.switch(served.model("task0"), "task1")
    path.write_text(json.dumps(config | {"hidden_act": "relu"}))
    served = bundled(tmp_path, FAMILIES["vit"].inputs).open()
    refused(served, served.model("task0"), "task1", "hidden_act is 'gelu' and 'relu'", "bundle.model('task1')")


def test_another_head(tmp_path: Path) -> None:
    """Of the same class by name, but with tensors that the other lacks."""
    build("vit", tmp_path)
    path = tmp_path / "task1" / "model.safetensors"
    tensors = load_file(path)
    for old, new in ((("task0", "task1"), "has no 'classifier.bias'"), (("task1", "task0"), "has 'classifier.bias'")):
        save_file({n: t for n, t in tensors.items() if n != "classifier.bias"}, path, metadata={"format": "pt"})
        served = bundled(tmp_path, FAMILIES["vit"].inputs).open()
        with contextlib.redirect_stderr(io.StringIO()):
            refused(served, served.model(old[0]), old[1], new)


def test_models_that_the_bundle_did_not_make(vit: Scene) -> None:
    served = vit.open()
    model = served.model("task0")
    copied = copy.deepcopy(model)
    for other in (copied, vit.reference(model, "task0")):
        for use in (lambda m=other: served.switch(m, "task1"), lambda m=other: served.task_of(m)):
            with pytest.raises(UsageError, match="was not made by the bundle"):
                use()
    served.switch(model, "task1")
    assert is_close(predict(copied, vit.inputs), predict(vit.reference(model, "task0"), vit.inputs))


def test_models_that_were_changed(vit: Scene, llama: Scene) -> None:
    served = llama.open()
    model = served.model("task0")
    model.resize_token_embeddings(120, mean_resizing=False)
    refused(served, model, "task1", "model.embed_tokens.weight", "(120, 32) in the model, not (96, 32)")
    model = served.model("task0")
    del model.model.layers[1]
    refused(served, model, "task1", "'model.layers.1.", "is gone")
    served = vit.open()
    model = served.model("task0")
    model.classifier.to("meta")
    with pytest.raises(UsageError, match=r"'classifier.bias': the model's is torch\.\w+ on meta"):
        served.switch(model, "task1")


def test_unknown_tasks(vit: Scene) -> None:
    served = vit.open()
    model = served.model("task0")
    refused(served, model, "task2", "no task 'task2'", "task0, task1")
    with pytest.raises(UsageError, match="no task 'task2'"):
        served.model("task2")


def test_architectures_that_transformers_does_not_have(vit: Scene, tmp_path: Path) -> None:
    shutil.copytree(vit.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "bundle" / "heads" / "task0.config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"architectures": ["ViTForTelepathy"]}, "has no ViTForTelepathy"),
        ({"architectures": []}, "names no architecture"),
        ({"auto_map": {"AutoModel": "mine.ViTForImageClassification"}}, "code lies in a repository"),
        ({"hidden_size": 40}, "cannot make a ViTForImageClassification"),
    ):
        path.write_text(json.dumps(config | change))
        served = hubmerge.load_bundle(tmp_path / "copy" / "bundle", base=tmp_path / "copy" / "base")
        with pytest.raises(SourceError, match=message), contextlib.redirect_stderr(io.StringIO()):
            served.model("task0")
        served.model("task1")


@pytest.mark.parametrize(
    "file", ["bundle-00001-of-00001.safetensors", "heads/task1.safetensors", "tasks/1.safetensors"]
)
def test_damaged_files(file: str, tmp_path: Path) -> None:
    """Shared files are checked when the bundle is opened, a task's own when it is first wanted."""
    scene = scene_of("vit", tmp_path, "emr")
    path = tmp_path / "bundle" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if file.startswith("bundle"):
        path.write_bytes(content)
        with pytest.raises(IntegrityError, match=file):
            scene.open()
        return
    served = scene.open()
    model = served.model("task0")
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=file):
        served.switch(model, "task1")
    assert_same(state(model), state(scene.reference(model, "task0")))


def test_a_base_that_is_not_at_hand(vit: Scene) -> None:
    with pytest.raises(SourceError, match="only its maker has"):
        hubmerge.load_bundle(vit.folder / "bundle")
    with pytest.raises(SourceError, match="no bundle"):
        hubmerge.load_bundle(vit.folder / "base")


# --- from the Hub -----------------------------------------------------------------------------------------------


def test_from_the_hub(start_hub: Callable[..., Any], tmp_path: Path) -> None:
    """Bundle and base are fetched once, at their commits; a later one of the bundle is another bundle."""
    build("vit", tmp_path)
    town = support.open_town(start_hub)
    for name in ("base", *TASKS):
        town.publish(f"local/{name}", tmp_path / name)
    asked = recipe("superposition", "local/base", [f"local/{t}" for t in TASKS])
    first = hubmerge.create_bundle(asked, to="local/bundle").commit
    hubmerge.retrieve_task("local/bundle", "task1", tmp_path / "out")
    served = hubmerge.load_bundle("local/bundle")
    hubmerge.remove_task("local/bundle", "task1")
    assert served.tasks == TASKS
    model = served.model("task0")
    served.switch(model, "task1")
    assert_same(state(model), state(load(type(model), tmp_path / "out")))
    assert hubmerge.load_bundle("local/bundle").tasks == ("task0",)
    assert hubmerge.load_bundle(f"local/bundle@{first}").tasks == TASKS


def test_threads_that_end_are_not_left_behind(vit: Scene) -> None:
    served = vit.open()
    model = served.model("task0")
    before = set(threading.enumerate())
    for task in (*TASKS, *TASKS):
        served.switch(model, task)
    assert set(threading.enumerate()) <= before
