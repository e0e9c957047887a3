"""Agreement with numbers that released implementations computed; the rules compared are stated per case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from hubmerge.memory import merge_tensors

ORACLES = Path(__file__).parent.parent / "data" / "oracles"


def _cases(file: str) -> list[Any]:
    with safe_open(ORACLES / f"{file}.safetensors", "pt") as opened:
        cases = json.loads(opened.metadata()["hubmerge_oracle"])["cases"]
    return [pytest.param(case, id=case["id"]) for case in cases]


def _tensors(file: str, case: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    key = case["key"]
    with safe_open(ORACLES / f"{file}.safetensors", "pt") as opened:
        models = [opened.get_tensor(f"{key}/task.{i}") for i in range(case["tasks"])]
        return opened.get_tensor(f"{key}/base"), models, opened.get_tensor(f"{key}/expected")


def _translated(method: str, params: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """mergekit's method and parameters in our words; None for a method that hubmerge does not have."""
    scale = {"scale": params["lambda"]} if "lambda" in params else {}
    if method in {"linear", "task_arithmetic"}:
        return method, {"normalize": params["normalize"], **scale}
    if method == "ties":
        aggregate = "weighted" if params["normalize"] else "sum"
        shared = {"trim": "tensor", "rule": "mergekit", "aggregate": aggregate}
        return method, {"density": params["density"], **shared, **scale}
    if method in {"breadcrumbs", "breadcrumbs_ties"}:
        shared = {"scale": 1.0, "rule": "mergekit", "elect_sign": method.endswith("ties")}
        return "breadcrumbs", {"density": params["density"], "gamma": params["gamma"], **shared}
    if method == "model_stock":
        return method, {"rule": "mergekit"}
    return (method, {"t": params["t"]}) if method == "slerp" else None


@pytest.mark.parametrize(
    "case", [c for c in _cases("mergekit") if _translated(c.values[0]["method"], c.values[0]["params"])]
)
def test_mergekit(case: dict[str, Any]) -> None:
    params = dict(case["params"])
    weights = params.pop("weight", None)
    translated = _translated(case["method"], params)
    assert translated is not None
    base, models, expected = _tensors("mergekit", case)
    merged = merge_tensors(translated[0], base, models, weights=weights, parameters=translated[1])
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=5e-7)


@pytest.mark.parametrize("case", _cases("ties_global"))
def test_released_ties(case: dict[str, Any]) -> None:
    params = case["params"]
    base, models, expected = _tensors("ties_global", case)
    parameters = {k: params[k] for k in ("density", "scale", "aggregate")} | {"rule": "published"}
    merged = merge_tensors("ties", base, models, parameters=parameters)
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-14)
