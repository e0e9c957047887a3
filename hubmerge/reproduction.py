"""A published model made again from its lock, and compared with what was published."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

import hubmerge
from hubmerge import api
from hubmerge.aibom import AIBOM_NAME
from hubmerge.errors import PlanError, UsageError, VerificationError
from hubmerge.evaluation import RESULTS_FOLDER
from hubmerge.hub import Hub
from hubmerge.io.header import read_header
from hubmerge.io.local import FileSource, sha256_of
from hubmerge.lock import LOCK_NAME, Lock, Source, environment
from hubmerge.markdown import one_line
from hubmerge.places import Place, lock_of, open_place
from hubmerge.plots import FIGURES_NAME
from hubmerge.recipe import Recipe
from hubmerge.spec import ByteSource, TensorSpec

if TYPE_CHECKING:
    from hubmerge.engine import Progress
    from hubmerge.spec import Plan

TOLERANCES = {"F64": 1e-4, "F32": 1e-4, "BF16": 1e-3, "F16": 1e-3}
"""Largest relative difference, in the Frobenius norm of a tensor, that counts as the same result.

Matrix decompositions differ in their last bits between processors and libraries; methods promise 1e-4. In half
precision a value on the edge between two numbers may be rounded to either of them, which are up to 2⁻⁷ apart.
"""
_ABOUT_ITSELF = ("README.md", "hubmerge.yaml", AIBOM_NAME)
"""Written for one place and its recipe: card and bill of materials name the repository and the digests, the recipe the
revisions as they were given."""
_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Compared:
    """One file of both results."""

    path: str
    outcome: Literal["identical", "within tolerance", "different", "missing", "extra"]
    difference: float | None = None
    """The largest relative difference of a tensor, where tensors were compared."""

    @property
    def ok(self) -> bool:
        """Whether it is what it should be."""
        return self.outcome in {"identical", "within tolerance"}

    def __str__(self) -> str:
        measured = f" (a tensor differs by {self.difference:.1e} of its norm)" if self.difference is not None else ""
        return f"{self.outcome}: {one_line(self.path)}{measured}"


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What came of making a model again."""

    target: str
    commit: str | None
    numerics: Literal["exact", "tolerance"]
    """What the methods promise."""
    files: tuple[Compared, ...]
    other_versions: Mapping[str, tuple[str, str]]
    """Programs of which the lock names another version: that one, and the one that ran now."""
    path: Path | None = None
    """Where the new one lies, if it was kept."""

    @property
    def ok(self) -> bool:
        """Whether every file is what it should be."""
        return all(f.ok for f in self.files)

    @property
    def identical(self) -> bool:
        """Whether every file is the same, bit for bit."""
        return all(f.outcome == "identical" for f in self.files)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        plain = asdict(self) | {"path": str(self.path) if self.path else None}
        return {"ok": self.ok, "identical": self.identical, **plain}

    def text(self) -> str:
        """The verdict, one line; then what is worth knowing."""
        where = f"{self.target} at {self.commit[:12]}" if self.commit else self.target
        count = f"{len(self.files)} files"
        if self.identical:
            lines = [f"REPRODUCED: {where}: {count}, bit for bit"]
        elif self.ok:
            near = sum(f.outcome == "within tolerance" for f in self.files)
            lines = [f"REPRODUCED: {where}: {count}, {near} of them within the tolerance of matrix methods"]
        else:
            lines = [f"NOT REPRODUCED: {where}: {sum(not f.ok for f in self.files)} of {count} are not the same"]
        lines += [f"  {f}" for f in self.files if f.outcome != "identical"]
        lines += [f"  note: {n} {was} then, {now} now" for n, (was, now) in self.other_versions.items()]
        lines += [f"  not compared: {', '.join((*_ABOUT_ITSELF, LOCK_NAME))}, diagnostics"]
        return "\n".join(lines)


def reproduce(
    target: str | Path, *, out: str | Path | None = None, options: api.RunOptions | None = None, hub: Hub | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Reproduction:  # fmt: skip
    """Run a lock's recipe again, from the commits it names, and compare the result with what was published.

    Weights, configs and tokenizers are compared with the digests in the lock. Where a method promises its result up to
    a tolerance only, the tensors of weight files that differ are compared with the published ones.

    Args:
        target: A folder, or ``repo`` or ``repo@revision``, with a ``hubmerge.lock.json``.
        out: Keep the new result in this folder.
        options: How to run.
        hub: Where the inputs are.
        progress: Is told what is done.

    Raises:
        VerificationError: There is no lock.
        UsageError: An input was a local folder that is not in the current one.
        PlanError: A local input is another one now.
        AccessError: An input is gone, or not accessible.
        HubMergeError: As ``merge``.
    """
    hub = hub or Hub()
    place = open_place(target, hub)
    lock = lock_of(place)
    recipe = pinned_recipe(lock)
    _check_inputs(lock, api.plan(recipe, hub=hub))
    with ExitStack() as stack:
        folder = (
            Path(out) if out else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hubmerge-"))) / "new"
        )
        api.merge(recipe, folder, options=options, hub=hub, progress=progress)
        files = tuple(_compare(lock, place, folder))
    return Reproduction(place.name, place.commit, lock.numerics, files, _versions(lock), folder if out else None)


def pinned_recipe(lock: Lock) -> Recipe:
    """The lock's recipe, with every repository at the commit that was used.

    Raises:
        UsageError: A local folder is not in the current one.
    """
    data = json.loads(json.dumps(lock.recipe))
    base, *models = lock.sources
    if data.get("base") is not None:
        data["base"] = _place_of(base)
    for entry, source in zip(data["models"], models, strict=True):
        entry["repo"] = _place_of(source)
    return Recipe.from_data(data, LOCK_NAME)


def _place_of(source: Source) -> str:
    if source.repo is not None:
        return f"{source.repo}@{source.commit}"
    if not Path(source.name).is_dir():
        raise UsageError(
            f"the model {source.name!r} was merged from a local folder, and ./{source.name} is not here",
            hint=f"put the folder, or a link to it, here as ./{source.name}; `hubmerge verify` needs no inputs",
        )
    return f"./{source.name}"


def _check_inputs(lock: Lock, plan: Plan) -> None:
    """Local folders have no commit; what their headers say must be the same, at least."""
    for source, model in zip(lock.sources, (plan.base, *plan.models), strict=True):
        if source.header_sha256 and source.header_sha256 != model.header_sha256:
            raise PlanError(
                f"{source.name}: its tensors have other names, types, shapes or places than those that were merged",
                hint="find the folder that was merged then",
            )


def _versions(lock: Lock) -> dict[str, tuple[str, str]]:
    then, now = ({"hubmerge": v, **e} for v, e in (
        (lock.hubmerge_version, lock.environment), (hubmerge.__version__, environment())
    ))  # fmt: skip
    return {name: (then[name], now.get(name, "none")) for name in then if then[name] != now.get(name)}


# --- comparing --------------------------------------------------------------------------------------------------


def _compare(lock: Lock, place: Place, folder: Path) -> Iterator[Compared]:
    new = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    for file in lock.outputs:
        path = new.pop(file.path, None)
        if file.path in _ABOUT_ITSELF or _is_diagnostic(file.path):
            continue
        if path is None:
            yield Compared(file.path, "missing")
        elif path.stat().st_size == file.size_bytes and sha256_of(path) == file.sha256:
            yield Compared(file.path, "identical")
        elif lock.numerics == "tolerance" and file.path.endswith(".safetensors"):
            yield _compare_tensors(file.path, place, path)
        else:
            yield Compared(file.path, "different")
    yield from (Compared(path, "extra") for path in sorted(new.keys() - {LOCK_NAME, *_ABOUT_ITSELF}))


def _is_diagnostic(path: str) -> bool:
    """Figures about the merge, and their plots: no part of the model, and not made again."""
    plot = path.startswith("assets/") and path.endswith(".svg")
    return path == FIGURES_NAME or plot or path.startswith(f"{RESULTS_FOLDER}/")


def _compare_tensors(path: str, place: Place, new: Path) -> Compared:
    """Tensor by tensor, in blocks."""
    if path not in place.sizes:
        raise VerificationError(f"{place.name}: {path} is gone", hint="`hubmerge verify` shows what else is")
    with closing(place.open(path)) as there, closing(FileSource(new)) as here:
        expected, found = (_tensors(source, path) for source in (there, here))
        if {n: (t.dtype, t.shape) for n, t in expected.items()} != {n: (t.dtype, t.shape) for n, t in found.items()}:
            return Compared(path, "different")
        worst, same = 0.0, True
        for name, spec in expected.items():
            difference = _difference(there, spec, here, found[name])
            worst, same = max(worst, difference), same and difference <= TOLERANCES.get(spec.dtype.name, 0.0)
    return Compared(path, "within tolerance" if same else "different", worst)


def _tensors(source: ByteSource, path: str) -> Mapping[str, TensorSpec]:
    def read(start: int, end: int) -> bytes:
        buffer = bytearray(end - start)
        source.read_into(start, memoryview(buffer))
        return bytes(buffer)

    return read_header(read, source.size_bytes, path, path).tensors


def _difference(there: ByteSource, expected: TensorSpec, here: ByteSource, found: TensorSpec) -> float:
    """‖new - published‖ / ‖published‖, in blocks; infinite if one has what is no number and the other has not."""
    wrong = total = 0.0
    for first in range(0, expected.numel, _BLOCK_ELEMENTS):
        count = min(_BLOCK_ELEMENTS, expected.numel - first)
        a, b = (_values(source, spec, first, count) for source, spec in ((there, expected), (here, found)))
        wrong += float((b - a).square().sum())
        total += float(a.square().sum())
    if not (wrong < float("inf") and total < float("inf")):
        return float("inf")
    return (wrong / total) ** 0.5 if total else (0.0 if wrong == 0 else float("inf"))


def _values(source: ByteSource, spec: TensorSpec, first: int, count: int) -> torch.Tensor:
    width = spec.size_bytes // max(spec.numel, 1)
    buffer = bytearray(count * width)
    source.read_into(spec.start_byte + first * width, memoryview(buffer))
    return torch.frombuffer(buffer, dtype=spec.dtype.torch).double()
