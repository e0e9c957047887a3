"""The table of PEFT adapter kinds: which tensors each one stores, and why some kinds cannot be merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdapterKind:
    """What an adapter of one PEFT type stores.

    ``tensors`` are names below an adapted module, ``shared`` are names at the top that all modules use, and ``copies``
    are names below a module that only repeat a shared tensor.
    """

    peft_type: str
    tensors: frozenset[str]
    required: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    copies: frozenset[str] = frozenset()


def _kind(peft_type: str, required: str, optional: str = "", shared: str = "", copies: str = "") -> AdapterKind:
    return AdapterKind(
        peft_type,
        frozenset(required.split()) | frozenset(optional.split()),
        frozenset(required.split()),
        frozenset(shared.split()),
        frozenset(copies.split()),
    )


LORA_TENSORS = "lora_A.weight lora_B.weight lora_B.bias lora_embedding_A lora_embedding_B lora_magnitude_vector"
TOKENS = "trainable_tokens_delta"

# LoRA has no tensor that every module needs: linear and embedding modules use different names.
KINDS: Mapping[str, AdapterKind] = {
    kind.peft_type: kind
    for kind in (
        _kind("LORA", "", LORA_TENSORS),
        _kind("ADALORA", "lora_A lora_B lora_E"),
        _kind("LOHA", "hada_w1_a hada_w1_b hada_w2_a hada_w2_b", "hada_t1 hada_t2"),
        _kind("LOKR", "", "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2"),
        _kind("IA3", "ia3_l"),
        _kind("VERA", "vera_lambda_b vera_lambda_d", shared="vera_A vera_B"),
        _kind("OFT", "", "oft_R.weight oft_embedding_R.weight"),
        _kind("BOFT", "boft_R boft_s"),
        _kind("HRA", "hra_u"),
        _kind("FOURIERFT", "fourierft_spectrum"),
        _kind("MISS", "miss_block"),
        _kind(
            "RANDLORA",
            "randlora_lambda randlora_gamma",
            shared="randlora_A randlora_B",
            copies="randlora_A randlora_B",
        ),
        _kind("C3A", "c3a_kernel"),
        _kind("LN_TUNING", "", "ln_tuning_layers.weight ln_tuning_layers.bias"),
        _kind("TRAINABLE_TOKENS", TOKENS),
    )
}

_PROMPT = "it adds tokens or activations to the input and changes no weight, so there is nothing to merge"
_ROUTED = "it chooses between adapters for each input, so no single set of weights is equal to it"

REFUSED: Mapping[str, str] = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "ADAPTION_PROMPT": "it adds gated attention over learned prompts and changes no weight",
    "XLORA": _ROUTED,
    "POLY": _ROUTED,
    "LILY": _ROUTED,
    "SHADOW": "it runs a second network next to the model and changes no weight",
}

# Parts of a tensor's name that belong to PEFT: a plain weight never has them, so a leftover one is an unknown tensor.
WRAPPERS = frozenset({"base_layer", "original_module", "modules_to_save", "token_adapter", "parametrizations"})
PREFIXES = (
    "lora_", "hada_", "lokr_", "ia3_", "vera_", "oft_", "boft_", "hra_", "fourierft_", "miss_", "bone_",
    "randlora_", "c3a_", "ln_tuning_", "trainable_tokens_", "prompt_", "adaption_", "vblora_", "shira_", "road_",
    "waveft_", "osf_", "delora_", "gralora_", "hira_", "deft_", "beft_", "glora_", "psoft_", "pvera_", "unilora_",
    "frod_", "adamss_", "tinylora_", "peanut_", "lily_", "supertuning_", "xlora_", "internal_xlora_",
)  # fmt: skip
