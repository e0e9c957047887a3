"""Who is using the form: a name that the Hub vouches for, and the token that everything is done with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hubmerge.errors import AccessError
from hubmerge.hub import Hub

NO_CACHE = Path("/nonexistent")
"""A cache would give one visitor the files that another one has access to."""


@dataclass(frozen=True, slots=True)
class Visitor:
    """Somebody who has signed in."""

    name: str
    token: str = field(repr=False)
    endpoint: str | None = None

    def hub(self, cache_dir: Path = NO_CACHE) -> Hub:
        """The Hub as this visitor sees it, with no other token and nobody's cache."""
        return Hub(self.endpoint, self.token, cache_dir=cache_dir)


def sign_in(token: str | None, endpoint: str | None = None) -> Visitor:
    """The visitor whose token this is, by the Hub's word alone.

    Raises:
        AccessError: No token, or one that the Hub does not know.
        SourceError: The Hub could not be reached, or what it said makes no sense.
    """
    if not token:
        raise AccessError("you are not signed in", hint="Sign in with Hugging Face first.")
    hub = Hub(endpoint, token)
    name = hub.call("sign in", "", lambda: str(hub.api.whoami()["name"]))
    return Visitor(name, token, endpoint)
