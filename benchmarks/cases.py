"""What is merged: the recipes of the benchmark, and what is promised of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FINE_TUNES = {"ft-a": 0.5, "ft-b": 0.3, "ft-c": 0.2}
"""The models that are merged, in order, each with its weight."""


@dataclass(frozen=True, slots=True)
class Case:
    """One recipe, and which figures it is to reach."""

    name: str
    method: str
    settings: str = ""
    """Lines under ``parameters:``."""
    native: bool = False
    """In hubmerge's own format, for hubmerge only: a default that mergekit does not have."""
    against: str = ""
    """For a native case: the case whose mergekit runs it is compared with."""
    uses_base: bool = True
    random: bool = False
    """The tools draw other numbers, so their outputs are not compared."""
    min_speedup: float = 0.0
    max_rss_mb: float = 0.0
    max_floor_ratio: float = 0.0

    def recipe(self, models: Path, *, dtype: str = "") -> str:
        """The recipe file over models in a folder, for both tools unless native."""
        lines = self._own(models) if self.native else self._shared(models)
        lines += ["parameters:", *(f"  {line}" for line in self.settings.splitlines())] if self.settings else []
        lines += [f"dtype: {dtype}"] if dtype else []
        return "\n".join(lines) + "\n"

    def _shared(self, models: Path) -> list[str]:
        lines = [f"merge_method: {self.method}", "models:"]
        for name, weight in FINE_TUNES.items():
            lines += [f"  - model: {models / name}", f"    parameters: {{weight: {weight}}}"]
        return lines + ([f"base_model: {models / 'base'}"] if self.uses_base else [])

    def _own(self, models: Path) -> list[str]:
        lines = [f"method: {self.method}", f"base: {models / 'base'}", "models:"]
        return lines + [f"  - {{repo: {models / name}, weight: {w}}}" for name, w in FINE_TUNES.items()]

    def inputs(self, models: Path) -> list[Path]:
        """The weight files that have to be read."""
        names = (*(("base",) if self.uses_base else ()), *FINE_TUNES)
        return [file for name in names for file in sorted((models / name).glob("*.safetensors"))]


CASES: Sequence[Case] = (
    Case("linear", "linear", uses_base=False, min_speedup=2.5, max_rss_mb=500),
    Case("task_arithmetic", "task_arithmetic", min_speedup=2.5, max_rss_mb=500, max_floor_ratio=1.5),
    Case("ties", "ties", "density: 0.2", min_speedup=10, max_rss_mb=800),
    Case("ties_model", "ties", "density: 0.2", native=True, against="ties", min_speedup=10, max_rss_mb=800),
    Case("dare_ties", "dare_ties", "density: 0.5", random=True, min_speedup=5, max_rss_mb=800),
    Case(
        "dare_ties_own",
        "dare_ties",
        "density: 0.5",
        native=True,
        against="dare_ties",
        random=True,
        min_speedup=5,
        max_rss_mb=800,
    ),
)
