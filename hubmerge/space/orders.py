"""What a visitor asks for: a merge, or one of the things that are done with a bundle."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal, Self, get_args

Kind = Literal["merge", "bundle create", "bundle add", "bundle remove", "bundle retrieve"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Order:
    """One job, as plain data. It holds no secret, so that it can be written down and run again."""

    kind: Kind
    target: str
    """The repository that is published to; of ``bundle add`` and ``bundle remove``, the bundle itself."""
    recipe: str = ""
    """YAML, of a merge and of a new bundle."""
    bundle: str = ""
    """The bundle that a task is retrieved from: ``repo`` or ``repo@revision``."""
    model: str = ""
    """The model that is added: ``repo`` or ``repo@revision``."""
    task: str = ""
    """The name of the task that is added, removed or retrieved."""
    public: bool = False
    """Make the repository public when all is there; otherwise a new one is private, an old one stays as it is."""
    create_pr: bool = False
    """Open a pull request instead of committing; of a merge only."""
    license: str = ""
    """What the card states, instead of what the recipe says; of bundles only."""
    accept_license_risk: bool = False

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    @classmethod
    def loads(cls, text: str) -> Self:
        """What ``dumps`` wrote."""
        return cls(**json.loads(text))
