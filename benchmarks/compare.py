"""Compares two checkpoints tensor by tensor, in float64, and prints what differs as JSON.

``python benchmarks/compare.py DIR DIR``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file each tensor lies in.

    Raises:
        SystemExit: A tensor lies in two files, or there is none.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name in found:
                    raise SystemExit(f"{folder}: {name} lies in {found[name].name} and in {path.name}")
                found[name] = path
    if not found:
        raise SystemExit(f"{folder}: no tensors")
    return found


def compare(a: Path, b: Path) -> dict[str, object]:
    """Fraction of equal elements and the largest difference, over the tensors that both have."""
    in_a, in_b = tensor_files(a), tensor_files(b)
    elements = equal = 0
    largest, where = 0.0, ""
    dtypes: set[str] = set()
    for name in sorted(in_a.keys() & in_b.keys()):
        x, y = _load(in_a[name], name), _load(in_b[name], name)
        if x.shape != y.shape:
            raise SystemExit(f"{name}: {tuple(x.shape)} in {a}, {tuple(y.shape)} in {b}")
        dtypes.add(f"{x.dtype}/{y.dtype}".replace("torch.", ""))
        elements += x.numel()
        equal += int((x == y).sum())
        if x.numel() and (difference := float((x.double() - y.double()).abs().max())) > largest:
            largest, where = difference, name
    return {
        "tensors": len(in_a.keys() & in_b.keys()),
        "only_in_one": sorted(in_a.keys() ^ in_b.keys()),
        "dtypes": sorted(dtypes),
        "elements": elements,
        "equal_fraction": equal / max(elements, 1),
        "max_abs_difference": largest,
        "worst_tensor": where,
    }


def _load(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    args = parser.parse_args()
    print(json.dumps(compare(args.a, args.b)))


if __name__ == "__main__":
    main()
