"""The answers a Hub gives when it says no: status, error code and message, as the client expects them."""

from __future__ import annotations

from collections.abc import Mapping


class HubError(Exception):
    """A request that ends in an error response.

    The client chooses its exception class from the status, the ``X-Error-Code`` and the ``X-Error-Message``, so all
    three belong together.

    Attributes:
        status: HTTP status.
        code: Value of ``X-Error-Code``, or ``None`` when the Hub sends none.
        message: Human-readable reason, sent as ``X-Error-Message`` and as ``{"error": …}``.
        headers: Further response headers.
        payload: Further members of the JSON body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        payload: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = dict(headers or {})
        self.payload = dict(payload or {})


def bad_request(message: str) -> HubError:
    """400: the request itself is malformed."""
    return HubError(400, message, code="BadRequest")


def invalid_token() -> HubError:
    """401: a token was sent that no user of this hub owns."""
    return HubError(401, "Invalid credentials in Authorization header")


def login_required() -> HubError:
    """401: the endpoint needs a user and none was given."""
    return HubError(401, "Invalid username or password.")


def forbidden(message: str) -> HubError:
    """403: known user, not allowed."""
    return HubError(403, message)


def repo_not_found(*, anonymous: bool) -> HubError:
    """The repository is absent, or private and not the caller's: the two are indistinguishable on purpose."""
    # Over plain http the client needs the code on a 401 too: its bare-401 rule only looks at https addresses.
    return HubError(401 if anonymous else 404, "Repository not found", code="RepoNotFound")


def revision_not_found(revision: str) -> HubError:
    """404: no branch, tag, pull request or commit of that name."""
    return HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")


def entry_not_found(message: str, *, commit: str | None = None) -> HubError:
    """404: the revision exists, the file does not; ``commit`` lets the client cache the absence."""
    headers = {"X-Repo-Commit": commit} if commit else None
    return HubError(404, message, code="EntryNotFound", headers=headers)


def gated_repo(repo: str, *, anonymous: bool) -> HubError:
    """401 or 403: the repository's files need an accepted access request."""
    reason = "You must have access to it and be authenticated" if anonymous else "You are not in the authorized list"
    return HubError(401 if anonymous else 403, f"Access to {repo} is restricted. {reason}.", code="GatedRepo")


def disabled_repo() -> HubError:
    """403: switched off by an administrator; the client recognises exactly this message."""
    return HubError(403, "Access to this resource is disabled.")


def conflict(message: str, *, payload: Mapping[str, object] | None = None) -> HubError:
    """409: the thing to be created exists, or two changes contradict each other."""
    return HubError(409, message, payload=payload)


def stale_parent() -> HubError:
    """412: the branch moved since the commit's parent was read."""
    return HubError(412, "A commit has happened since. Please refresh and try again.")
