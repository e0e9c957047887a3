"""Situations whose cards are checked in: merges and bundles as facts that are the same on every machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hubmerge.bundles.card import bundle_card
from hubmerge.bundles.manifest import Manifest, Origin, TaskEntry
from hubmerge.card import HUB_URL, CardFacts, render_card
from hubmerge.evaluation import compare
from hubmerge.lock import OutputDigest
from hubmerge.parent_cards import read_card
from hubmerge.recipe import Card
from hubmerge.spec import DTYPES, AdapterPart, FactorPair, PinnedModel, Problem, TensorJob, Truncation
from tests import factories as make

EVALUATIONS = Path(__file__).parent / "data" / "evaluations"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "acme/lynx-1b"}
LIMITS = """\
It was trained on **English** text only and [invents facts](https://acme.example/report).

- It cannot count.
- It cannot rhyme.
"""
BIBTEX = """\
@misc{lynx2025,
  title  = {Lynx: a small language model},
  author = {Ann Acme and Bo Bird},
  year   = {2025}
}"""
LYNX = f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
datasets: acme/web
---
# Lynx

## Bias, Risks, and Limitations

{LIMITS}
### Recommendations

[More Information Needed]

## Citation

```bibtex
{BIBTEX}
```
"""


def parent(repo: str, text: str, **keys: Any) -> PinnedModel:
    """A model with this card."""
    card, quotes = read_card(text)
    return dataclasses.replace(make.pinned(repo, card=card, **keys), quotes=quotes)


def lynx(**keys: Any) -> PinnedModel:
    """A base whose card has everything."""
    return parent("acme/lynx-1b", LYNX, role="base", config=LLAMA, **keys)


def tuned(name: str, *, license_: str = "apache-2.0", data: str = "", more: str = "", **keys: Any) -> PinnedModel:
    """A fine-tune of that base."""
    front = f"license: {license_}\nlanguage: en\npipeline_tag: text-generation\n"
    front += f"datasets: {data}\n" if data else ""
    return parent(f"acme/{name}", f"---\n{front}---\n# {name}\n\n{more}", config=LLAMA, **keys)


def full() -> str:
    """Two fine-tunes of one base, with the author's words."""
    base = lynx()
    models = [
        tuned("lynx-1b-math", data="acme/sums", more="## Limitations\n\nProofs are often wrong.\n"),
        tuned("lynx-1b-code", data="acme/programs", more=f"## Limitations\n\n{LIMITS}"),
    ]
    words = {
        "title": "Lynx 1B, better at mathematics and code",
        "summary": "A small *English* language model that solves school mathematics and writes Python.",
        "intended_use": "Research on model merging.",
        "out_of_scope_use": "Anything on which somebody's health or money depends.",
        "limitations": "No one has tried it with more than 2,000 tokens.",
        "authors": "Cleo Carr",
        "contact": "cleo@example.org",
        "tags": ["mathematics", "code"],
    }
    asked = make.recipe(base, models, method="ties", parameters={"density": 0.3}, card=words)
    said = "acme/lynx-1b-code: has no 'model.layers.3.self_attn.rotary_emb.inv_freq': counted as unchanged"
    planned = make.plan(asked, base, models, problems=(Problem("note", said),))
    return render_card(CardFacts(planned, asked, "cleo/lynx-1b-math-code"))


def lora_inputs() -> str:
    """Adapters merged into a whole checkpoint; one of them is the author's own folder."""
    base = lynx()
    models = [
        tuned("lynx-1b-poems-lora", adapter=LORA),
        make.pinned("./letters", root="/home/cleo/letters", name="letters", card={"license": "mit"}, adapter=LORA),
    ]
    asked = make.recipe(base, models, method="dare_linear", seed=7)
    return render_card(CardFacts(make.plan(asked, base, models), asked, "cleo/lynx-1b-writer"))


def adapter() -> str:
    """Adapters merged into one adapter, which lost something to its rank."""
    base = lynx()
    models = [tuned(f"lynx-1b-{name}-lora", adapter=LORA) for name in ("poems", "letters", "recipes")]
    part = AdapterPart("model.layers.0.mlp.up_proj", "weight", "low_rank", (), rank=16)
    jobs = tuple(
        TensorJob(
            i, f"model.layers.{i}.mlp.up_proj.weight", "linear", (256, 64), DTYPES["F32"], 0, 0, 4, "merge", None,
            (part, part, part), factors=FactorPair(("down", "up"), rank),
        )
        for i, rank in enumerate((24, 32))
    )  # fmt: skip
    asked = make.recipe(base, models, output={"format": "adapter", "rank": 32})
    planned = make.plan(asked, base, models, jobs=jobs, files=())
    lost = Truncation(0.0123, "model.layers.0.mlp.up_proj.weight", 0.0456)
    return render_card(CardFacts(planned, asked, "cleo/lynx-1b-all-lora", truncation=lost))


def private_heads() -> str:
    """An encoder of which each fine-tune has a head of its own; in a folder."""
    encoder, classifier = make.BERT, {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    card = {"license": "mit", "pipeline_tag": "fill-mask"}
    base = make.pinned("acme/encoder", role="base", config=encoder, card=card)
    models = [
        make.pinned(f"acme/encoder-{name}", name=name, config=classifier, card={"license": "mit", "language": "de"})
        for name in ("sentiment", "topics")
    ]
    asked = make.recipe(base, models, method="consensus")
    planned = make.with_heads(make.plan(asked, base, models), {"sentiment": classifier, "topics": classifier})
    return render_card(CardFacts(planned, asked))


def mixed_licences() -> str:
    """Parents under licences of which one forbids commercial use, and one that states none."""
    base = lynx()
    models = [tuned("lynx-1b-chat", license_="cc-by-nc-4.0"), make.pinned("bo/lynx-stories", config=LLAMA)]
    asked = make.recipe(base, models, method="breadcrumbs")
    return render_card(CardFacts(make.plan(asked, base, models), asked, "cleo/lynx-1b-stories"))


def gated_llama() -> str:
    """A gated base whose licence asks for a name, a sentence and a notice."""
    text = b"LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n\nLlama 3.1 Version Release Date: July 23, 2024\n"
    front = "---\nlicense: llama3.1\nlanguage: [en, de]\npipeline_tag: text-generation\n---\n"
    limits = "## Ethical Considerations and Limitations\n\nIt may in some instances produce inaccurate responses.\n"
    keys: dict[str, Any] = {"config": LLAMA, "notices": {"LICENSE": text}}
    base = parent("meta-llama/Llama-3.1-8B", front + limits, role="base", **keys)
    models = [parent(f"acme/Llama-3.1-8B-{name}", front, **keys) for name in ("law", "medicine")]
    asked = make.recipe(base, models, method="tsv_merge")
    return render_card(CardFacts(make.plan(asked, base, models), asked, "cleo/Llama-3.1-8B-law-medicine"))


def no_base() -> str:
    """An average of models that needs no base, with a recipe that cites itself."""
    models = [make.pinned(f"acme/otter-{n}", config=QWEN, card={"license": "apache-2.0"}) for n in ("a", "b", "c")]
    stand_in = dataclasses.replace(models[0], role="base", name="base")
    words = {"citation": "@misc{otter,\n  title = {Otter soup}\n}", "evaluation": "It *tastes* good."}
    asked = make.recipe(stand_in, models, method="linear", base=None, card=words)
    return render_card(CardFacts(make.plan(asked, stand_in, models), asked, "cleo/otter-soup"))


def evaluated() -> str:
    """A merge that was evaluated, as its parents were."""
    card = {"license": "mit", "pipeline_tag": "text-generation"}
    base = make.pinned("org/base", role="base", config=LLAMA, card=card)
    models = [make.pinned(f"org/{name}", config=LLAMA, card=card) for name in ("math", "chat")]
    files = [str(EVALUATIONS / f"harness-{name}.json") for name in ("base", "math", "chat", "merged")]
    asked = make.recipe(base, models)
    results = compare(files, ("me/merge",), (base, *models))
    return render_card(CardFacts(make.plan(asked, base, models), asked, "me/merge", results=results))


def bundle() -> str:
    """Three fine-tunes kept in one bundle."""
    base = lynx()
    sources = [
        tuned("lynx-1b-math", data="acme/sums", more="## Limitations\n\nProofs are often wrong.\n"),
        tuned("lynx-1b-code", data="acme/programs"),
        tuned("lynx-1b-chat"),
    ]
    tasks = tuple(
        TaskEntry(id=i, name=m.name, source=Origin.of(m), norm=2.0, error=0.1 * (i + 1)) for i, m in enumerate(sources)
    )
    file = OutputDigest(path="bundle-00001-of-00001.safetensors", size_bytes=1100, sha256=make.digest("sum"))
    manifest = Manifest(
        format_version=1, hubmerge_version="0.0.0", codec="superposition", parameters={"storage": "int8"}, seed=0,
        base=Origin.of(base), targets=(), tasks=tasks, next_id=3, files=(file,),
        card=Card(intended_use="One small model for three kinds of questions."),
    )  # fmt: skip
    return bundle_card(manifest, "cleo/lynx-1b-three", HUB_URL)


SITUATIONS: Mapping[str, Callable[[], str]] = {
    "full": full,
    "lora-inputs": lora_inputs,
    "adapter": adapter,
    "private-heads": private_heads,
    "mixed-licences": mixed_licences,
    "gated-llama": gated_llama,
    "no-base": no_base,
    "evaluated": evaluated,
    "bundle": bundle,
}
