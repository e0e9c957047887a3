"""Whose results a file has: the merged model's or a parent's, by the name in the file or the one given with it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hubmerge.errors import UsageError
from hubmerge.evaluation import harness, lighteval, plain
from hubmerge.evaluation.scores import Evaluation
from hubmerge.spec import PinnedModel

MERGED = "merged"
MAX_BYTES = 10_000_000
_REPO = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FORMATS = (
    "read are results_*.json of lm-evaluation-harness and of lighteval; for other programs there is a plain format "
    "(docs/evaluation.md)"
)


@dataclass(frozen=True, slots=True)
class Model:
    """The merged model, or a parent of it."""

    label: str
    """How people call it: its repository, or a local folder's name."""
    names: tuple[str, ...]
    """Its repository, its folder, its name in the recipe."""
    commit: str | None = None

    @property
    def spellings(self) -> frozenset[str]:
        """Its names as evaluations write them: also with slashes replaced, as in names of folders."""
        plain = [_trimmed(n) for n in self.names]
        return frozenset(n.replace("/", s) for n in plain for s in ("/", "__", "_"))

    @property
    def last_parts(self) -> frozenset[str]:
        """The last part of each of its names."""
        return frozenset(_trimmed(n).rpartition("/")[2] for n in self.names)


def parent(model: PinnedModel) -> Model:
    """A parent, from what is known of it."""
    places = (model.repo, model.root) if model.root else (model.repo,)
    return Model(model.name if model.is_local else model.repo, (*places, model.name), model.commit)


def assigned(given: Sequence[str], merged: Model, parents: Sequence[Model]) -> list[tuple[Model, Evaluation]]:
    """Read the files, and find out whose each is.

    Args:
        given: ``FILE``, or ``NAME=FILE`` with ``merged`` or a parent's name or repository.
        merged: The merged model.
        parents: The models it is made of.

    Raises:
        UsageError: A file that cannot be read, or that belongs to none of them, or to several.
    """
    found = []
    for one in given:
        named, path = _split(one, merged, parents)
        evaluation = read(path)
        found.append((named or _owner(evaluation, merged, parents), evaluation))
    return found


def read(path: Path) -> Evaluation:
    """A file of results.

    Raises:
        UsageError: It is missing, too large, damaged, something else, or without results.
    """
    label = f"--eval {path}"
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UsageError(
                f"{label}: {size} bytes; a file of results has at most {MAX_BYTES}",
                hint="give the file with the aggregated results (results_*.json), not the samples",
            )
        data = json.loads(path.read_bytes())
    except OSError as e:
        raise UsageError(f"{label}: {e.strerror or e}", hint="check the path; NAME=FILE says whose it is") from e
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{label}: not valid JSON: {str(e)[:200]}", hint="copy the file again; it is damaged") from e
    if not isinstance(data, dict) or not isinstance(data.get("results"), dict | list):
        raise UsageError(f"{label}: no results of an evaluation", hint=_FORMATS)
    if isinstance(data["results"], list):
        found = plain.parse(data, label)
    elif "config_general" in data:
        found = lighteval.parse(data, label)
    elif isinstance(data.get("config"), dict) or isinstance(data.get("versions"), dict):
        found = harness.parse(data, label)
    else:
        raise UsageError(f"{label}: results of a program that is not known", hint=_FORMATS)
    if not found.scores:
        raise UsageError(f"{label}: it holds no scores", hint="evaluate at least one task with a metric")
    return found


def _split(one: str, merged: Model, parents: Sequence[Model]) -> tuple[Model | None, Path]:
    """The model that is named, if one is, and the file."""
    name, equals, rest = one.partition("=")
    if not equals:
        return None, Path(one)
    if name == MERGED:
        return merged, Path(rest)
    matches = _closest(name, parents)
    if len(matches) == 1:
        return matches[0], Path(rest)
    if Path(one).is_file():
        return None, Path(one)
    problem = "names several models" if matches else "names none of the models"
    raise UsageError(f"--eval {one}: {name!r} {problem}", hint=f"NAME is {_choices(parents)}")


def _owner(evaluation: Evaluation, merged: Model, parents: Sequence[Model]) -> Model:
    for name in evaluation.models:
        matches = _closest(name, (merged, *parents))
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise UsageError(
                f"{evaluation.label}: its model {name!r} may be {' or '.join(m.label for m in matches)}",
                hint=f"say whose results these are, as NAME=FILE; NAME is {_choices(parents)}",
            )
    called = f"its model is {evaluation.models[0]!r}" if evaluation.models else "it names no model"
    raise UsageError(
        f"{evaluation.label}: {called}, which is neither the merged model ({merged.label}) nor a parent",
        hint=f"say whose results these are, as NAME=FILE; NAME is {_choices(parents)}",
    )


def _closest(name: str, models: Sequence[Model]) -> list[Model]:
    """The models with that name; if there are none, those whose name ends like it.

    What may be a repository is taken as a whole: ``else/math`` is not ``org/math``; ``./else/math`` is a folder.
    """
    wanted = _trimmed(name)
    whole = [m for m in models if wanted in m.spellings]
    if whole or _REPO.fullmatch(name):
        return whole
    return [m for m in models if wanted.rpartition("/")[2] in m.last_parts]


def _trimmed(name: str) -> str:
    return name.removeprefix("./").rstrip("/") or name


def _choices(parents: Sequence[Model]) -> str:
    return ", ".join([MERGED, *(p.label for p in parents)])


def other_commit(model: Model, evaluation: Evaluation) -> str | None:
    """The commit that was evaluated, if it is surely another one than was merged."""
    seen = evaluation.commit
    if model.commit is None or seen is None or not _COMMIT.fullmatch(seen) or seen == model.commit:
        return None
    return seen
