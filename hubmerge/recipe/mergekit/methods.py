"""Which of mergekit's methods and parameters hubmerge has, and what they are called here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hubmerge.recipe.mergekit.values import Convert, aggregate, number, rescale, truth

REFUSED_METHODS = (
    "arcee_fusion",
    "della",
    "della_linear",
    "karcher",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "ram",
    "ramplus_tl",
    "sce",
)
_FAMILY = ("weight", "density", "normalize", "rescale", "lambda", "int8_mask")
"""Parameters of all methods of mergekit's task-arithmetic family, whether a method looks at them or not."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of mergekit's."""

    to: str | None
    """Its name here; None if hubmerge does what mergekit does by default, and nothing else."""
    convert: Convert
    default: Any = None
    """mergekit's default, as this side writes it."""
    required: bool = False
    per_model: bool = False


@dataclass(frozen=True, slots=True)
class Port:
    """A method of mergekit's."""

    method: str
    """Its name here."""
    parameters: Mapping[str, Parameter]
    ignored: tuple[str, ...] = ("int8_mask",)
    """What mergekit accepts, and what never changes its result."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of ours that make the method compute what mergekit's does."""
    base: Literal["required", "optional"] = "required"
    min_others: int = 1
    """How many models besides the base, at least; the base itself may be listed among them."""
    n_others: int | None = None


_WEIGHT = Parameter("weight", number, required=True, per_model=True)
_DENSITY = Parameter("density", number, 1.0, per_model=True)
_NORMALIZE = Parameter("normalize", truth, False)
_LAMBDA = Parameter("scale", number, 1.0)


def _sparse(
    method: str, *, signs: bool, normalize: bool, rescales: bool, constants: Mapping[str, Any], **more: Parameter
) -> Port:
    """A method that trims or drops entries of the deltas, and may elect signs."""
    parameters = {
        "weight": _WEIGHT,
        "density": _DENSITY,
        "lambda": _LAMBDA,
        "normalize": Parameter("aggregate", aggregate, aggregate(normalize)) if signs else _NORMALIZE,
        "rescale": Parameter("rescale", rescale, rescale(True)) if rescales else Parameter(None, truth, False),
        **more,
    }
    return Port(method, parameters, constants={"rule": "mergekit", **constants})


METHODS: Mapping[str, Port] = {
    "linear": Port(
        "linear",
        {"weight": _WEIGHT, "normalize": Parameter("normalize", truth, True)},
        ("int8_mask", "density", "rescale", "lambda"),
        base="optional",
    ),
    "slerp": Port("slerp", {"t": Parameter("t", number, required=True)}, _FAMILY, n_others=1),
    "task_arithmetic": Port(
        "task_arithmetic",
        {"weight": _WEIGHT, "lambda": _LAMBDA, "normalize": _NORMALIZE},
        ("int8_mask", "density", "rescale"),
        {"rule": "mergekit"},
    ),
    "ties": _sparse("ties", signs=True, normalize=True, rescales=False, constants={"trim": "tensor"}),
    "dare_linear": _sparse("dare_linear", signs=False, normalize=False, rescales=True, constants={}),
    "dare_ties": _sparse("dare_ties", signs=True, normalize=False, rescales=True, constants={"trim_after": False}),
    "breadcrumbs": _sparse(
        "breadcrumbs",
        signs=False,
        normalize=False,
        rescales=False,
        constants={"elect_sign": False},
        gamma=Parameter("gamma", number, 0.01, per_model=True),
    ),
    "breadcrumbs_ties": _sparse(
        "breadcrumbs",
        signs=False,
        normalize=False,
        rescales=False,
        constants={"elect_sign": True},
        gamma=Parameter("gamma", number, 0.01, per_model=True),
    ),
    "model_stock": Port(
        "model_stock", {"filter_wise": Parameter(None, truth, False)}, _FAMILY, {"rule": "mergekit"}, min_others=2
    ),
}
