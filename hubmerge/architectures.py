"""Which transformers class loads a checkpoint, as its config says: a table of names, so that nothing is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Input = Literal["text", "image", "audio", "multimodal"]


@dataclass(frozen=True, slots=True)
class Loading:
    """How a checkpoint is loaded and what it is for."""

    loader: str
    """A class that ``transformers`` exports: an Auto class where it is certain, else the architecture itself."""
    pipeline_tag: str | None
    """The Hub's name of the task, where the architecture leaves no doubt."""
    input: Input
    remote_code: bool = False
    """The architecture's code lies in the repository."""


_BY_SUFFIX: tuple[tuple[str, str, str | None, Input], ...] = (
    ("ForCausalLM", "AutoModelForCausalLM", "text-generation", "text"),
    ("ForMaskedLM", "AutoModelForMaskedLM", "fill-mask", "text"),
    ("ForSequenceClassification", "AutoModelForSequenceClassification", "text-classification", "text"),
    ("ForTokenClassification", "AutoModelForTokenClassification", "token-classification", "text"),
    ("ForQuestionAnswering", "AutoModelForQuestionAnswering", "question-answering", "text"),
    ("ForMultipleChoice", "AutoModelForMultipleChoice", None, "text"),
    ("ForNextSentencePrediction", "AutoModelForNextSentencePrediction", None, "text"),
    ("ForImageClassification", "AutoModelForImageClassification", "image-classification", "image"),
    ("ForObjectDetection", "AutoModelForObjectDetection", "object-detection", "image"),
    ("ForSemanticSegmentation", "AutoModelForSemanticSegmentation", "image-segmentation", "image"),
    ("ForDepthEstimation", "AutoModelForDepthEstimation", "depth-estimation", "image"),
    ("ForVideoClassification", "AutoModelForVideoClassification", "video-classification", "image"),
    ("ForCTC", "AutoModelForCTC", "automatic-speech-recognition", "audio"),
    ("Model", "AutoModel", None, "text"),
)
# Families in which a suffix means another task than elsewhere; the class itself is then named.
_AUDIO = (
    "data2vec-audio", "hubert", "sew", "sew-d", "unispeech", "unispeech-sat", "wav2vec2", "wav2vec2-bert",
    "wav2vec2-conformer", "wavlm",
)  # fmt: skip
_EXCEPTIONS: Mapping[str, tuple[str, ...]] = {
    "ForCausalLM": ("mistral4",),
    "ForSequenceClassification": _AUDIO,
    "ForQuestionAnswering": ("blip", "layoutlm", "layoutlmv2", "layoutlmv3", "lxmert", "tapas", "vilt"),
    "ForObjectDetection": ("grounding-dino", "mm-grounding-dino", "omdet-turbo", "owlv2", "owlvit"),
}
_TEXT_TO_TEXT = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "fsmt", "led", "longt5", "m2m_100", "marian", "mbart",
    "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "switch_transformers", "t5", "umt5",
)  # fmt: skip
_SPEECH_TO_TEXT = ("moonshine", "speech_to_text", "whisper")
_DECODERS = ("ctrl", "gpt2", "gpt-sw3", "openai-gpt")
_NOT_BARE = re.compile(r"(LMHead|Heads|Decoder|Encoder|MT|Text|Tracker|^EdgeTam|^Sam\d?)Model$")
_CLASS = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}", re.ASCII)
_AUTO_CLASS = re.compile(r"AutoModel(For[A-Z][A-Za-z0-9]{1,60})?", re.ASCII)


def loading(config: Mapping[str, Any]) -> Loading | None:
    """How to load a checkpoint with this ``config.json``; None if it names no architecture."""
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str) or not _CLASS.fullmatch(name):
        return None
    own_code = _own_code(name, config.get("auto_map"))
    if own_code is not None:
        return own_code
    kind = str(config.get("model_type"))
    if name.endswith("ForConditionalGeneration"):
        return _generation(name, kind, config)
    if name.endswith("LMHeadModel") and kind in _DECODERS:
        return Loading("AutoModelForCausalLM", "text-generation", "text")
    for suffix, loader, tag, given in _BY_SUFFIX:
        if name.endswith(suffix) and kind not in _EXCEPTIONS.get(suffix, ()) and not _NOT_BARE.search(name):
            return Loading(loader, tag, _input(config) if loader == "AutoModel" else given)
    return Loading(name, None, _input(config))


# PEFT's task types, and the class onto whose modules such an adapter fits.
_BY_TASK: Mapping[str, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def with_task(found: Loading | None, task_type: str | None) -> Loading | None:
    """How to load a base for an adapter of PEFT's ``task_type``; as its own config says where there is none."""
    loader = _BY_TASK.get(task_type or "")
    if found is None or loader is None or found.remote_code:
        return found
    tag = next((t for _, c, t, _ in _BY_SUFFIX if c == loader), None)
    return Loading(loader, tag, found.input)


def _own_code(name: str, auto_map: Any) -> Loading | None:
    if not isinstance(auto_map, dict):
        return None
    for loader, place in auto_map.items():
        if isinstance(place, str) and place.rpartition(".")[2] == name and _AUTO_CLASS.fullmatch(str(loader)):
            tag, given = next(((t, i) for _, c, t, i in _BY_SUFFIX if c == loader), (None, "text"))
            return Loading(str(loader), tag, given, remote_code=True)
    return None


def _generation(name: str, kind: str, config: Mapping[str, Any]) -> Loading:
    if kind in _TEXT_TO_TEXT:
        return Loading("AutoModelForSeq2SeqLM", None, "text")
    if kind in _SPEECH_TO_TEXT:
        return Loading("AutoModelForSpeechSeq2Seq", "automatic-speech-recognition", "audio")
    return Loading(name, "image-text-to-text" if "vision_config" in config else None, _input(config))


def _input(config: Mapping[str, Any]) -> Input:
    if "vision_config" in config or "audio_config" in config:
        return "multimodal"
    if "image_size" in config and "patch_size" in config:
        return "image"
    return "text"
