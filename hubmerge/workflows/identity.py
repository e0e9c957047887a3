"""As whom a step reads and publishes: a secret token if there is one, else the job itself, as far as it is trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hubmerge.errors import AccessError
from hubmerge.workflows.inputs import PREFIX, Inputs

_TOKENS = (f"{PREFIX}HF_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_READ_TOKENS = (f"{PREFIX}HF_READ_TOKEN", "HUBMERGE_READ_TOKEN")
_IDENTITIES = ("HF_OIDC_RESOURCE", "HUBMERGE_READ_AS")
_ASKING = "ACTIONS_ID_TOKEN_REQUEST_URL"


def for_reading(inputs: Inputs, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of a command that publishes nothing: nobody in particular reads, unless something else is asked for.

    Raises:
        AccessError: It is to read as a user, but the job has no identity.
    """
    token = _first(_READ_TOKENS, environment) or _first(_TOKENS, environment)
    if token:
        return {"HF_TOKEN": token}
    if inputs.read_as is None:
        return {}
    _check_identity(environment, f"read as {inputs.read_as}")
    return {"HF_OIDC_RESOURCE": inputs.read_as}


def for_publishing(inputs: Inputs, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of a command that publishes, where reading may have an identity of its own.

    Raises:
        AccessError: There is neither a token nor an identity.
    """
    read_token, token = _first(_READ_TOKENS, environment), _first(_TOKENS, environment)
    reading = {"HUBMERGE_READ_TOKEN": read_token} if read_token else {}
    if token:
        return {"HF_TOKEN": token, **reading}
    assert inputs.repo is not None
    _check_identity(environment, f"publish to {inputs.repo}")
    if not reading and inputs.read_as:
        reading = {"HUBMERGE_READ_AS": inputs.read_as}
    return {"HF_OIDC_RESOURCE": inputs.repo, **reading}


def without_identity(environment: Mapping[str, str]) -> dict[str, str]:
    """The other variables: of those that say who a command is, it gets what the two functions above decide."""
    ours = (*_TOKENS, *_READ_TOKENS, *_IDENTITIES)
    return {name: value for name, value in environment.items() if name not in ours}


def _first(names: Sequence[str], environment: Mapping[str, str]) -> str | None:
    return next((value for name in names if (value := environment.get(name, "").strip())), None)


def _check_identity(environment: Mapping[str, str], what: str) -> None:
    if not environment.get(_ASKING):
        raise AccessError(
            f"cannot {what}: the job has no identity, and there is no token",
            hint="give the job `permissions: id-token: write` and add a trusted publisher on the Hub, "
            "or set the secret HF_TOKEN; docs/actions.md describes both",
        )
