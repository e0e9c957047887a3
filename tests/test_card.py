"""The card: it says what happened, its front matter survives any parent's text, and its snippets run."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from ruamel.yaml import YAML

from hubmerge import markdown, templating
from hubmerge.architectures import Loading, loading
from hubmerge.card import CardFacts, front_matter, render_card
from hubmerge.spec import Problem, SmallFile
from tests import factories as make

SECTIONS = ["How to use it", "What was merged", "How it was merged", "Reproduce and verify", "Provenance", "Licence"]
HEAD = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}


def facts(
    *,
    repo_id: str | None = "me/story-merge",
    base: dict[str, Any] | None = None,
    ft: dict[str, Any] | None = None,
    plan: dict[str, Any] | None = None,
    **recipe: Any,
) -> CardFacts:
    """The facts of a merge of one model, with changes to the parts named."""
    first = make.pinned("org/base", role="base", **({"card": {"license": "mit"}} | (base or {})))
    model = make.pinned("org/ft", **({"card": {"license": "mit"}} | (ft or {})))
    asked = make.recipe(first, [model], **recipe)
    return CardFacts(make.plan(asked, first, [model], **(plan or {})), asked, repo_id)


def split(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and body, read independently of the code that wrote them."""
    found = re.fullmatch(r"---\n(.*?\n)---\n\n(.*)", text, flags=re.DOTALL)
    assert found is not None
    return YAML(typ="safe", pure=True).load(found[1]), found[2]


def outline(body: str) -> list[str]:
    """Level-2 headings that stand at the top level of the document."""
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    return [b.content for a, b in itertools.pairwise(tokens) if a.tag == "h2" and a.level == 0 and a.nesting == 1]


def kinds(body: str) -> set[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    return {t.type for token in tokens for t in (token, *(token.children or ()))}


def section(body: str, title: str) -> str:
    return re.split(r"\n## ", body.split(f"\n## {title}\n")[1])[0].strip()


# --- what it says


def test_front_matter_says_what_the_hub_understands() -> None:
    made = facts(
        base={"card": {"license": "mit", "language": "en", "datasets": ["org/web"]}},
        ft={"card": {"license": "mit", "language": ["en", "no"], "datasets": "org/chat"}},
        card={"tags": ["story telling", "merge"]},
    )
    assert split(render_card(made))[0] == {
        "base_model": ["org/base", "org/ft"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "language": ["en", "no"],
        "datasets": ["org/web", "org/chat"],
        "tags": ["merge", "hubmerge", "task_arithmetic", "story telling"],
    }


def test_the_hubs_own_client_reads_it() -> None:
    from huggingface_hub import ModelCard

    made = facts(ft={"card": {"license": "mit", "language": ["no", "y"]}})
    card = ModelCard(render_card(made))
    assert card.data.to_dict() == front_matter(made)
    assert card.data.language == ["no", "y"][:1]
    assert card.data.base_model_relation == "merge"
    assert card.text.strip().startswith("# story-merge")


def test_sections_stand_in_order_and_those_without_facts_are_left_out() -> None:
    body = split(render_card(facts()))[1]
    assert outline(body) == SECTIONS
    words = {
        "evaluation": "Good.", "intended_use": "Research.", "out_of_scope_use": "Medicine.", "limitations": "Many.",
        "citation": "@misc{a}", "authors": "Ann", "contact": "ann@example.org", "acknowledgements": "Thanks.",
    }  # fmt: skip
    body = split(
        render_card(facts(card={**words, "title": "Stories", "summary": "It *tells* stories.", "description": "More."}))
    )[1]
    assert body.startswith("# Stories\n\nIt *tells* stories.\n\nMore.\n\n## Evaluation\n\nGood.\n\n## How to use it\n")
    use = ["Intended use", "Out-of-scope use", "Limitations"]
    people = ["Citation", "Authors", "Contact", "Acknowledgements"]
    assert outline(body) == ["Evaluation", *SECTIONS[:3], *use, *SECTIONS[3:], *people]
    assert section(body, "Citation") == "```\n@misc{a}\n```"
    for text in ("More Information Needed", "None", "TODO", "\n\n\n"):
        assert text not in body


def test_every_input_is_listed_with_role_commit_weight_and_licence() -> None:
    rows = section(split(render_card(facts(ft={"card": {}})))[1], "What was merged").splitlines()[2:]
    base, ft = make.digest("org/base", 40), make.digest("org/ft", 40)
    hub = "https://huggingface.co"
    assert rows == [
        f"| base | [org/base]({hub}/org/base) | [{base[:7]}]({hub}/org/base/tree/{base}) | – | mit |",
        f"| model | [org/ft]({hub}/org/ft) | [{ft[:7]}]({hub}/org/ft/tree/{ft}) | `0.5` | none stated |",
    ]


def test_method_parameters_and_notes() -> None:
    note = Problem("note", "org/ft: has no 'x_y*': counted as unchanged")
    body = split(render_card(facts(parameters={"scale": 0.4}, plan={"problems": (note, Problem("error", "stop"))})))[1]
    told = section(body, "How it was merged")
    assert "| `scale` | `0.4` | λ, which multiplies" in told
    assert "| `normalize` | `false` |" in told
    assert "(https://arxiv.org/abs/2212.04089)" in told
    assert "- org/ft: has no 'x_y\\*': counted as unchanged" in told
    assert "stop" not in told


def test_a_gradient_is_shown_as_written() -> None:
    body = split(render_card(facts(parameters={"scale": [0.0, 0.5, 1.0]})))[1]
    assert "| `scale` | `[0.0, 0.5, 1.0]` |" in body


def test_local_models_are_named_and_their_folders_never_shown() -> None:
    root = "/home/alice/secret plans/ft"
    base = make.pinned("org/base", role="base", card={"license": "mit"})
    model = make.pinned(root, root=root, name="ft")
    other = make.pinned("../b", root="/home/alice/b", name="b")
    asked = make.recipe(base, [model, other])
    said = (Problem("note", f"{root}: odd"), Problem("warning", f"tensor 'x': in {root}/x, (2,) in ../b"))
    text = render_card(CardFacts(make.plan(asked, base, [model, other], problems=said), asked))
    data, body = split(text)
    assert data["base_model"] == ["org/base"]
    assert "license" not in data
    for secret in ("alice", "secret", "../b", "/home"):
        assert secret not in text
    assert "- ft: odd\n- tensor 'x': in ft/x, (2,) in b\n" in body
    assert "| model | ft (local folder) | – | `0.5` | none stated |" in body
    assert "into the folder where the command runs: `ft`, `b`.\n" in body
    assert "the local model ft and the local model b: each declares no licence" in section(body, "Licence")


def test_nothing_on_the_hub_means_no_base_model() -> None:
    base = make.pinned("./b", role="base", root="/b")
    model = make.pinned("./m", root="/m", name="m")
    asked = make.recipe(base, [model])
    data, body = split(render_card(CardFacts(make.plan(asked, base, [model]), asked)))
    assert "base_model" not in data
    assert "base_model_relation" not in data
    assert "merged onto a local base by" in body


def test_a_model_that_stands_in_for_the_base_is_listed_once() -> None:
    a, b = make.pinned("org/a"), make.pinned("org/b")
    stand_in = dataclasses.replace(a, role="base", name="base")
    asked = make.recipe(stand_in, [a, b], method="linear", base=None)
    data, body = split(render_card(CardFacts(make.plan(asked, stand_in, [a, b]), asked, "me/m")))
    assert data["base_model"] == ["org/a", "org/b"]
    assert body.startswith("# m\n\na and b, merged by `linear`. ")
    assert "| base |" not in body


@pytest.mark.parametrize(
    ("base", "ft", "config", "tag"),
    [
        ("fill-mask", None, make.BERT, None),
        ("fill-mask", "fill-mask", make.BERT, "fill-mask"),
        ("fill-mask", "text-classification", make.BERT, None),
        ("summarization", "summarization", make.GPT2, "summarization"),
        ("summarization", "translation", make.GPT2, "text-generation"),
        ("x: y", "x: y", make.GPT2, "text-generation"),
        (None, None, {}, None),
    ],
)
def test_a_pipeline_tag_is_stated_only_if_certain(base: Any, ft: Any, config: Any, tag: str | None) -> None:
    made = facts(base={"card": {"pipeline_tag": base}, "config": config}, ft={"card": {"pipeline_tag": ft}})
    assert front_matter(made).get("pipeline_tag") == tag


def test_the_authors_language_replaces_the_parents() -> None:
    made = facts(ft={"card": {"language": "en"}}, card={"language": ["de", "no"]})
    assert front_matter(made)["language"] == ["de", "no"]


def test_licence_keys_follow_the_decision() -> None:
    card = {"license": "other", "license_name": "acme-1", "license_link": "https://acme.example/l_1_"}
    data, body = split(render_card(facts(base={"card": card}, ft={"card": card})))
    assert {k: v for k, v in data.items() if k.startswith("license")} == card
    told = section(body, "Licence")
    assert told.startswith(
        "other (acme-1), as every parent declares. [Text of the licence](https://acme.example/l_1_).\n\n"
        "- org/base and org/ft: each is under other (acme-1), of which it is not known what it asks\n\n"
    )
    assert told.endswith("not legal advice.")


# --- hostile text


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("`~<>!-#*[]()|\\\n\t &;ax1."), max_size=60), st.booleans())
def test_prose_is_contained(text: str, indented: bool) -> None:
    body = f"{markdown.prose('  ' * indented + text)}\n\n## After\n\nend\n"
    assert outline(body)[-1:] == ["After"]
    assert not kinds(body) & {"html_block", "html_inline"}


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("`~<>!-+=#*_[]()|\\$ &;ax1.:/"), max_size=40))
def test_escaped_text_shows_just_its_characters(text: str) -> None:
    for before in ("", "- ", "# ", "x ") if text.strip() else ():
        tokens = (
            MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(before + markdown.escape(text) + "\n")
        )
        inline = [t for t in tokens if t.type == "inline"]
        shown = "".join(c.content for t in inline for c in t.children or () if c.type in ("text", "text_special"))
        assert shown == (before if before == "x " else "") + " ".join(text.split())
        assert {c.type for t in inline for c in t.children or ()} <= {"text", "text_special"}


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("`|\\ a<&*"), min_size=1, max_size=20).filter(str.strip))
def test_code_shows_just_its_characters(text: str) -> None:
    line = " ".join(text.split())
    span = MarkdownIt("commonmark").parseInline(str(markdown.code(text)))[0].children
    assert span is not None
    assert [(t.type, t.content) for t in span] == [("code_inline", line)]
    # GFM takes the bar's backslash away before it looks for code spans, as this parser does.
    table = f"| a | b |\n| --- | --- |\n| {markdown.code_cell(text)} | end |\n"
    cells = [t for t in MarkdownIt("commonmark").enable("table").parse(table) if t.type == "inline"]
    assert len(cells) == 4
    assert cells[3].content == "end"


def test_what_the_author_may_write_is_kept() -> None:
    text = "A *list*, [a link](https://x.example) and `p < 0.05`:\n\n- one\n- two\n\n```python\nif a < b: x()\n```"
    assert str(markdown.prose(text)) == text


def test_templates_are_found_in_a_checkout_and_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (templating.template_folder() / "model_card.md.jinja").is_file()
    package = tmp_path / "hubmerge"
    monkeypatch.setattr(templating, "_PACKAGE", package)
    (tmp_path / "templates").mkdir()
    assert templating.template_folder() == tmp_path / "templates"
    (package / "templates").mkdir(parents=True)
    assert templating.template_folder() == package / "templates"


# --- snippets and the classes they name


def test_the_class_named_is_one_that_transformers_would_choose() -> None:
    import transformers
    from transformers.models.auto import modeling_auto

    choices: dict[tuple[str, str], set[str]] = {}
    for name in (n for n in dir(modeling_auto) if n.startswith("AutoModel")):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        for kind, classes in getattr(mapping, "_model_mapping", {}).items():
            for each in classes if isinstance(classes, tuple | list) else (classes,):
                choices.setdefault((kind, each), set()).add(name)
    assert len(choices) > 1000
    certain = 0
    for (kind, architecture), loaders in choices.items():
        found = loading({"model_type": kind, "architectures": [architecture]})
        assert found is not None
        if found.loader != architecture:
            assert found.loader in loaders, (kind, architecture)
            certain += 1
    assert certain > 0.7 * len(choices)
    assert hasattr(transformers, "AutoModelForCausalLM")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"architectures": None}, None),
        ({"architectures": ["os; import x"]}, None),
        (make.GPT2, Loading("AutoModelForCausalLM", "text-generation", "text")),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            Loading("AutoModelForSeq2SeqLM", None, "text"),
        ),
        (
            {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]},
            Loading("AutoModelForSpeechSeq2Seq", "automatic-speech-recognition", "audio"),
        ),
        (
            {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "vision_config": {}},
            Loading("LlavaForConditionalGeneration", "image-text-to-text", "multimodal"),
        ),
        (
            {"architectures": ["AcmeForCausalLM"], "auto_map": {"AutoModelForCausalLM": "m.AcmeForCausalLM"}},
            Loading("AutoModelForCausalLM", "text-generation", "text", remote_code=True),
        ),
        (
            {"architectures": ["Acme"], "auto_map": {"os.system('x')": "m.Acme", "AutoConfig": 3}},
            Loading("Acme", None, "text"),
        ),
    ],
)  # fmt: skip
def test_loading(config: dict[str, Any], expected: Loading | None) -> None:
    assert loading(config) == expected


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_no_snippet_without_an_architecture_and_a_warning_with_remote_code() -> None:
    assert not snippets(render_card(facts(base={"config": {}})))
    own = {"architectures": ["A"], "auto_map": {"AutoModel": "m.A"}}
    text = render_card(facts(base={"config": own}))
    assert 'from_pretrained("me/story-merge", trust_remote_code=True)' in text
    assert "read it before you run it" in text


def test_no_tokenizer_means_none_in_the_snippet() -> None:
    text = render_card(facts(plan={"files": (SmallFile("config.json", source=-1),)}))
    load = 'model = AutoModelForCausalLM.from_pretrained("me/story-merge")'
    assert snippets(text) == [f"from transformers import AutoModelForCausalLM\n\n{load}\n"]


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<pad>", "The", "capital", "of", "France", "is", "Paris"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)


def test_the_generation_snippet_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=8, n_positions=32, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer(tmp_path)
    [code] = snippets(render_card(facts(repo_id=None)))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "capital of France" in capsys.readouterr().out


def test_the_heads_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    BertModel(config).save_pretrained(tmp_path)
    tokenizer(tmp_path)
    head = {"classifier.weight": torch.full((3, 8), 0.25), "classifier.bias": torch.arange(3.0)}
    (tmp_path / "heads").mkdir()
    save_file(head, tmp_path / "heads" / "sst2.safetensors")
    config.architectures = ["BertForSequenceClassification"]
    (tmp_path / "heads" / "sst2.config.json").write_text(config.to_json_string())
    made = facts(repo_id=None, base={"config": make.BERT})
    made = dataclasses.replace(made, plan=make.with_heads(made.plan, {"sst2": HEAD}))
    text = render_card(made)
    assert "| `sst2` | `heads/sst2.safetensors` | `AutoModelForSequenceClassification` |" in text
    first, second = snippets(text)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(first, scope)
    assert scope["outputs"].last_hidden_state.shape == (1, 5, 8)
    exec(second, scope)
    assert torch.equal(scope["model"].classifier.bias, torch.arange(3.0))
    assert isinstance(scope["model"], BertForSequenceClassification)


def test_on_the_hub_heads_are_downloaded_by_name() -> None:
    made = facts(base={"config": make.BERT})
    text = render_card(dataclasses.replace(made, plan=make.with_heads(made.plan, {"sst2": HEAD})))
    assert 'head = load_file(hf_hub_download("me/story-merge", "heads/sst2.safetensors"))' in text
    assert 'config = AutoConfig.from_pretrained(hf_hub_download("me/story-merge", "heads/sst2.config.json"))' in text
