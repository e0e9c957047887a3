"""What a merge is asked to make, and what it and its plan answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hubmerge.devices import DeviceMap
from hubmerge.footprint import Footprint
from hubmerge.journal import TAG_LENGTH
from hubmerge.licenses import Decision
from hubmerge.output import Written
from hubmerge.quantities import size as size_of
from hubmerge.spec import Plan, Truncation


@dataclass(frozen=True, slots=True)
class Result:
    """What a merge produced."""

    plan: Plan
    files: tuple[Written, ...]
    timings: Mapping[str, float]
    """Seconds: plan_s, merge_s, publish_s, total_s."""
    path: Path | None = None
    url: str | None = None
    commit: str | None = None
    truncation: Truncation | None = None
    """What a merged adapter lost to its rank."""
    license: Decision | None = None
    """What the check of the parents' licences says."""
    peaks: Mapping[str, int] = field(default_factory=dict)
    """The most that was held at a time: peak_rss_bytes, and peak_disk_bytes beside what a folder holds in the end."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "path": str(self.path) if self.path else None,
            "url": self.url,
            "commit": self.commit,
            "plan_sha256": self.plan.digest,
            "files": [asdict(f) for f in self.files],
            "timings": dict(self.timings),
            **self.peaks,
            "truncation": asdict(self.truncation) if self.truncation else None,
            "license_check": self.license.to_json() if self.license else None,
            "problems": [asdict(p) for p in self.plan.problems],
        }

    def summary(self) -> str:
        """One line for a person."""
        size = sum(f.size_bytes for f in self.files)
        where = f"{self.url} (commit {self.commit[:TAG_LENGTH]})" if self.url and self.commit else str(self.path)
        lost = f"\n{self.truncation}" if self.truncation else ""
        shown = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
        held = f"{size_of(self.peaks['peak_rss_bytes'])} of memory and {size_of(self.peaks['peak_disk_bytes'])} of disk"
        return f"{where}: {shown} in {self.timings['total_s']:.1f} s, with at most {held} at a time{lost}"


@dataclass(frozen=True, slots=True)
class PlanReport:
    """A plan and what running it takes."""

    plan: Plan
    footprint: Footprint
    license: Decision
    parameters: str
    devices: DeviceMap

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        plan = self.plan
        return {
            "method": plan.method,
            "plan_sha256": plan.digest,
            "sources": [
                {"role": m.role, "name": m.name, "repo": m.repo, "commit": m.commit, "adapter": m.adapter is not None}
                for m in (plan.base, *plan.models)
            ],
            "outputs": [{"path": o.path, "size_bytes": o.size_bytes} for o in plan.outputs],
            "merged_tensors": sum(j.action == "merge" for j in plan.jobs),
            "copied_tensors": sum(j.action == "copy" for j in plan.jobs),
            **asdict(self.footprint),
            "matrices": {d: {"tensors": n, "elements": size} for d, (n, size) in self.devices.shares(plan).items()},
            "device_notes": list(self.devices.notes),
            "license": self.license.license,
            "license_check": self.license.to_json(),
            "problems": [asdict(p) for p in plan.problems],
        }
