"""An endpoint, a token, and the one way to call the Hub: with timeouts, retries and translated errors."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self, TypeVar
from urllib.parse import urlsplit

from hubmerge import __version__
from hubmerge.errors import AccessError, HubMergeError
from hubmerge.hub.identity import JobToken
from hubmerge.io.http import RetryPolicy, Traffic, server_wait_s

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)
T = TypeVar("T")
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Connection:
    """The base of ``Hub``.

    Args:
        endpoint: Address of the Hub; default: HF_ENDPOINT, else huggingface.co.
        token: A token; None takes it from HF_TOKEN, a login or the CI's identity at every call, so that short-lived
            ones are renewed; False sends none; a ``JobToken`` is asked at every call.
        cache_dir: The Hugging Face cache; default: HF_HUB_CACHE.
        policy: Timeouts and retries.

    Raises:
        AccessError: The token has characters that cannot be sent.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        token: str | bool | JobToken | None = None,
        *,
        cache_dir: Path | None = None,
        policy: RetryPolicy | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._token = _checked(token.strip()) if isinstance(token, str) else token
        self._client: HfApi | None = None
        self._cache_dir = cache_dir
        self.policy = policy or RetryPolicy()
        self.traffic = Traffic()
        """Requests and bytes of all files opened so far."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.endpoint!r})"

    @cached_property
    def endpoint(self) -> str:
        """Address of the Hub, without a slash at the end."""
        from huggingface_hub import constants

        return (self._endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")

    @property
    def api(self) -> HfApi:
        """The client library, set to this endpoint and token."""
        from huggingface_hub import HfApi

        token = self.given_token()
        if self._client is None or self._client.token != token:
            self._client = HfApi(
                endpoint=self.endpoint, token=token, library_name="hubmerge", library_version=__version__
            )
        return self._client

    def given_token(self) -> str | bool | None:
        """The token as huggingface_hub takes it: None if it is to look for one itself."""
        return self._token() if isinstance(self._token, JobToken) else self._token

    def reader(self) -> Self:
        """What reads inputs: this, unless there is another identity for that.

        ``HUBMERGE_READ_TOKEN`` is a token, and ``HUBMERGE_READ_AS`` names a user who trusts the CI job to read.
        """
        token: str | JobToken | None = os.environ.get("HUBMERGE_READ_TOKEN")
        user = os.environ.get("HUBMERGE_READ_AS")
        if not token and user and self.is_job:
            token = JobToken(user, self.endpoint)
        if not token or self._token is not None:
            return self
        return type(self)(self._endpoint, token, cache_dir=self._cache_dir, policy=self.policy)

    @property
    def cache_dir(self) -> Path:
        """The Hugging Face cache."""
        from huggingface_hub import constants

        return self._cache_dir or Path(constants.HF_HUB_CACHE)

    def token(self) -> str | None:
        """The token that calls send at this moment; None for anonymous ones. Never print it."""
        from huggingface_hub import constants, get_token

        if isinstance(self._token, str | JobToken):
            return str(self.given_token())
        if self._token is False or (self._token is None and constants.HF_HUB_DISABLE_IMPLICIT_TOKEN):
            return None
        return get_token()

    @property
    def is_job(self) -> bool:
        """Whether a CI job's identity stands in for a token (``HF_OIDC_RESOURCE`` says for what)."""
        return self._token is None and bool(os.environ.get("HF_OIDC_RESOURCE"))

    def headers(self, *, authorized: bool = True) -> dict[str, str]:
        """Headers for a request of our own; with the token only if ``authorized``."""
        token = self.token() if authorized else None
        agent = {"User-Agent": f"hubmerge/{__version__}"}
        return agent if token is None else {**agent, "Authorization": f"Bearer {token}"}

    def is_own_origin(self, url: str) -> bool:
        """Whether the token may be sent to this address: same scheme, host and port as the endpoint."""
        return _origin(url) == _origin(self.endpoint)

    def session(self) -> httpx2.Client:
        """The HTTP client that huggingface_hub shares in this process.

        It comes without any timeout, so that a silent server would stop a run for good; one that a program configured
        itself (``set_client_factory``) is left as it is.
        """
        from huggingface_hub import get_session

        # After a lost connection the library drops its client, perhaps between its check and its return.
        session: httpx2.Client | None = None
        while session is None:
            session = get_session()
        if all(value is None for value in session.timeout.as_dict().values()):
            session.timeout = self.policy.timeout()
        return session

    def call(self, what: str, repo: str, action: Callable[[], T], *, writing: bool = False) -> T:
        """Run a call to the Hub.

        What a storage server refuses, as it does with an address that has expired, is tried once more at once: the
        call then asks for another address.

        Args:
            what: Continues "cannot" in messages.
            repo: The repository it is about.
            action: The call; it is repeated after time-outs, lost connections and overload.
            writing: Whether it changes something; decides the kind of error.

        Raises:
            AccessError: Missing, private, gated or disabled repository; token missing, wrong or insufficient.
            TransportError: The Hub could not be reached, or kept failing.
            SourceError: Any other refusal of a read.
            PublishError: Any other refusal of a write.
            UsageError: Not a repository id.
        """
        from hubmerge.hub.translate import is_refused_by_storage, is_transient

        failures, refused = 0, False
        while True:
            self.session()
            try:
                return action()
            except HubMergeError:
                raise
            except Exception as error:
                if not refused and not is_transient(error) and is_refused_by_storage(error, self.endpoint):
                    refused = True
                    continue
                failures += 1
                wait_s = self.wait_s(error, failures)
                if not is_transient(error) or failures >= self.policy.attempts or wait_s is None:
                    self.fail(error, what, repo, writing=writing)
                log.info("cannot %s yet: %s; next attempt in %.1f s", what, type(error).__name__, wait_s)
                time.sleep(wait_s)

    def fail(self, error: Exception, what: str, repo: str, *, writing: bool = False) -> NoReturn:
        """Raise hubmerge's error for ``error``, or ``error`` itself if it is not about the Hub."""
        from hubmerge.hub.translate import Request, translate

        try:
            token = self.token()
        except Exception:
            # The token provider itself failed, and that is most likely the error being reported.
            token = None
        translated = translate(error, Request(what, repo, self.endpoint, writing, token))
        if translated is None:
            raise error
        raise translated from error

    def wait_s(self, error: Exception, failures: int) -> float | None:
        """Seconds until the next attempt; None if the server wants more patience than the policy has."""
        from huggingface_hub.errors import HfHubHTTPError

        asked = None
        if isinstance(error, HfHubHTTPError):
            asked = server_wait_s(error.response.status_code, error.response.headers)
        if asked is None:
            return self.policy.wait_s(failures)
        return asked if asked <= self.policy.max_server_wait_s else None


def _checked(token: str) -> str:
    # The HTTP client would refuse such a header with a message that repeats it.
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise AccessError(
            "the token is empty or has characters that no Hugging Face token has",
            hint="Copy it again from https://huggingface.co/settings/tokens.",
        )
    return token


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
