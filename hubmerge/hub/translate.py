"""Turns whatever huggingface_hub and its HTTP client raise into hubmerge's errors, without a credential in any text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import errors as hf

from hubmerge.errors import AccessError, HubMergeError, PublishError, SourceError, TransportError, UsageError
from hubmerge.io.http import is_retryable

_QUERY = re.compile(r"""(https?://[^\s?'"<>]+)\?[^\s'"<>]*""")
_BEARER = re.compile(r"(?i)(bearer\s+)[^\s'\",]+")
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that has access."


@dataclass(frozen=True, slots=True)
class Request:
    """What was being done when an error came up."""

    what: str
    """Continues "cannot": ``list the files of org/model at 1a2b3c4``."""
    repo: str
    endpoint: str
    writing: bool = False
    token: str | None = field(default=None, repr=False)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, hf.HfHubHTTPError):
        return is_retryable(error.response.status_code)
    if isinstance(error, hf.LocalEntryNotFoundError | RuntimeError) and error.__cause__ is not None:
        return is_transient(error.__cause__)  # how failed downloads and uploads are wrapped
    return isinstance(error, httpx2.TimeoutException | httpx2.NetworkError | httpx2.RemoteProtocolError)


def is_refused_by_storage(error: BaseException, endpoint: str) -> bool:
    """Whether a server that is not the Hub refused a signed address, or what came to it: the Hub signs new ones."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return is_refused_by_storage(error.__cause__, endpoint)
    return isinstance(error, hf.HfHubHTTPError) and _host(error) != urlsplit(endpoint).netloc


def scrub(text: str, token: str | None) -> str:
    """The text without the token, without bearer values and without the query part (the signature) of any URL."""
    if token:
        text = text.replace(token, "***")
    return _BEARER.sub(r"\1***", _QUERY.sub(r"\1", text))


def scrub_chain(error: BaseException, token: str | None) -> None:
    """Scrub the texts of an exception and of all it was raised from: a traceback prints every one of them."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        current.args = tuple(scrub(arg, token) if isinstance(arg, str) else arg for arg in current.args)
        pending += [current.__cause__, current.__context__]


def translate(error: Exception, request: Request) -> HubMergeError | None:
    """The error to raise instead; None for one that is not about the Hub, i.e. a bug."""
    scrub_chain(error, request.token)
    found = _access(error, request) or _other(error, request)
    if found is None:
        return None
    kind, reason, hint = found
    return kind(f"cannot {request.what}: {scrub(reason, request.token)}", hint=hint)


_Found = tuple[type[HubMergeError], str, str]


def _access(error: Exception, request: Request) -> _Found | None:
    """Everything a person settles with accounts, tokens and names."""
    page = f"{request.endpoint}/{request.repo}"
    anonymous = request.token is None
    if isinstance(error, hf.GatedRepoError):
        ask = _LOG_IN if anonymous else "Use a token of the account that was granted access."
        return AccessError, f"{request.repo} is gated", f"Ask for access at {page}. {ask}"
    if isinstance(error, hf.RepositoryNotFoundError):
        whom = "without a token" if anonymous else "with this token"
        hint = f"Check the spelling of {request.repo}. If it is private: " + (
            _LOG_IN if anonymous else "use a token of an account that may see it."
        )
        return AccessError, f"{page} does not exist, or is private and not visible {whom}", hint
    if isinstance(error, hf.DisabledRepoError):
        return AccessError, f"{page} was disabled by the Hub", "Choose another repository; this one cannot be used."
    if isinstance(error, hf.RevisionNotFoundError):
        return (
            AccessError,
            f"{page} has no such branch, tag or commit",
            f"Look up the revisions at {page}/commits/main.",
        )
    if isinstance(error, hf.LocalTokenNotFoundError | hf.OIDCError):
        return AccessError, f"no token: {error}", _LOG_IN
    if isinstance(error, hf.HFValidationError):
        return UsageError, str(error), "A repository is named `namespace/name`."
    if type(error).__name__ == "XetAuthenticationError":  # of hf_xet, which need not be installed
        return AccessError, "the storage did not accept the access it was given", _LOG_IN
    if not isinstance(error, hf.HfHubHTTPError) or _host(error) != urlsplit(request.endpoint).netloc:
        return None  # a storage server knows nothing of accounts: what it refuses is a signed address
    if urlsplit(str(error.response.url)).path == "/oauth/token":
        hint = "Add this job's repository, branch and workflow to the Trusted Publishers of the repository or user."
        return AccessError, f"the Hub does not trust this job ({_server_words(error)})", hint
    if error.response.status_code == 401:
        return AccessError, "the Hub did not accept the token" if not anonymous else "a token is needed", _LOG_IN
    if error.response.status_code == 403:
        need = "a token with write permission for" if request.writing else "a token that may read"
        return AccessError, f"permission denied ({_server_words(error)})", f"Use {need} {request.repo}."
    return None


def _other(error: Exception, request: Request) -> _Found | None:
    """Connections, refusals, and answers that make no sense."""
    failed = PublishError if request.writing else SourceError
    again = "Check the connection and run the same command again."
    if isinstance(error, hf.OfflineModeIsEnabled):
        return TransportError, "offline mode is on", "Unset HF_HUB_OFFLINE."
    if is_transient(error):
        cause = error.__cause__ if isinstance(error, hf.LocalEntryNotFoundError | RuntimeError) else error
        status = f"HTTP {cause.response.status_code}, " if isinstance(cause, hf.HfHubHTTPError) else ""
        return TransportError, f"{request.endpoint} failed ({status}{_first_line(cause)})", again
    if isinstance(error, hf.LocalEntryNotFoundError):
        return TransportError, f"{request.endpoint} could not be reached", again
    if isinstance(error, hf.EntryNotFoundError):
        words = _server_words(error) if isinstance(error, hf.HfHubHTTPError) else _first_line(error)
        return failed, f"no such file in the repository ({words})", "Check the repository's list of files."
    if isinstance(error, hf.HfHubHTTPError):
        reason = f"{_host(error)} refused (HTTP {error.response.status_code}: {_server_words(error)})"
        return failed, reason, "Correct what it names; if it names nothing, run the same command again."
    if isinstance(error, httpx2.HTTPError | httpx2.InvalidURL | ConnectionError):
        return TransportError, f"{request.endpoint} could not be reached ({_first_line(error)})", again
    if error.__cause__ is not None and isinstance(error.__cause__, Exception):
        inner = _access(error.__cause__, request) or _other(error.__cause__, request)
        if inner is not None:
            return inner
    if isinstance(error, OSError | ValueError | RuntimeError | KeyError):
        return failed, _first_line(error), "If the server is not the Hugging Face Hub, check that it is compatible."
    return None


def _host(error: hf.HfHubHTTPError) -> str:
    return urlsplit(str(error.response.url)).netloc


def _server_words(error: hf.HfHubHTTPError) -> str:
    """What the server said, or the first line of the client's text."""
    return " ".join(error.server_message.split()) if error.server_message else _first_line(error)


def _first_line(error: BaseException | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
