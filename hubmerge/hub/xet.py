"""Streams into the Hub's xet storage: the only place that knows hf_xet, and what the client library keeps private.

A file goes there as it is made, and never lies on the disk. The client library uploads files only; its way to name one
in a commit that is there already has no public form. Where any of this is missing, ``unusable`` says so.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn, Self

from hubmerge.errors import IntegrityError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_NEEDED = (
    ("hf_xet", "XetSession.new_upload_commit"),
    ("hf_xet", "XetUploadCommit.start_upload_stream"),
    ("hf_xet", "XetConfig.with_config"),
    ("hf_xet", "COMPUTE_SHA256"),
    ("huggingface_hub.lfs", "UploadInfo"),
    ("huggingface_hub", "CommitOperationAdd._upload_mode"),
    ("huggingface_hub", "CommitOperationAdd._is_uploaded"),
    ("huggingface_hub", "CommitOperationAdd._should_ignore"),
)
# A block on the way takes 64 MB; hf_xet would have up to 64 of them where the connection is good.
_SETTINGS = {"client.ac_max_upload_concurrency": 4}


def unusable() -> str | None:
    """Why nothing can be streamed from this process; None if it can."""
    from huggingface_hub import constants

    if constants.HF_HUB_DISABLE_XET:
        return "xet storage is switched off (HF_HUB_DISABLE_XET)"
    for module, name in _NEEDED:
        try:
            attrgetter(name)(import_module(module))
        except ImportError:
            return f"{module} is not installed"
        except AttributeError:
            return f"this version of {module} has no {name}"
    try:
        _session(os.getpid())
    except Exception as error:
        return f"hf_xet cannot be set up as needed: {error}"
    return None


@dataclass(frozen=True, slots=True)
class Access:
    """Where the storage is, and leave to write there for a while."""

    endpoint: str
    token: str = field(repr=False)
    expires_s: int

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Self:
        """As the Hub says it.

        Raises:
            KeyError, ValueError: Another server's answer.
        """
        return cls(str(answer["casUrl"]), str(answer["accessToken"]), int(answer["exp"]))


class XetStream:
    """One file on its way into the storage, which takes it when ``finish`` was called.

    Args:
        path: Name of the file in the repository.
        access: To begin with.
        token_url: Where the Hub gives it anew.
        headers: For requests to that address, with the Hub's token.
        fail: Raises hubmerge's error for one of hf_xet's.
    """

    def __init__(
        self,
        path: str,
        access: Access,
        token_url: str,
        headers: Mapping[str, str],
        fail: Callable[[Exception], NoReturn],
    ) -> None:
        import hf_xet

        self.size_bytes = 0
        """How much has been written."""
        self._path = path
        self._fail = fail
        try:
            # The storage is another server: the Hub's token is not for it.
            self._commit = _session(os.getpid()).new_upload_commit(
                endpoint=access.endpoint,
                token=access.token,
                token_expiry_unix_secs=access.expires_s,
                token_refresh_url=token_url,
                token_refresh_headers=dict(headers),
                custom_headers={k: v for k, v in headers.items() if k.lower() != "authorization"},
            )
            self._stream = self._commit.start_upload_stream(name=path, sha256=hf_xet.COMPUTE_SHA256)
        except Exception as error:
            fail(error)

    def write(self, data: bytes) -> None:
        """Take the next bytes; waits while the storage is slow.

        Raises:
            TransportError: The connection failed for good; hf_xet has tried again by itself.
            PublishError: The storage refused.
        """
        try:
            self._stream.write(data)
        except Exception as error:
            self._fail(error)
        self.size_bytes += len(data)

    def finish(self, sha256: str) -> CommitOperationAdd:
        """Wait until the storage has everything; returns what a commit needs to name the file.

        Args:
            sha256: What the digest of all bytes should be, in hex.

        Raises:
            IntegrityError: hf_xet has got other bytes; the storage does not get to know them as a file.
            TransportError: The connection failed for good.
            PublishError: The storage refused.
        """
        try:
            info = self._stream.finish().xet_info
            if (info.sha256, info.file_size) == (sha256, self.size_bytes):
                self._commit.wait_to_finish()
        except Exception as error:
            self._fail(error)
        if (info.sha256, info.file_size) != (sha256, self.size_bytes):
            self.abort()
            raise IntegrityError(
                f"{self._path}: {self.size_bytes} bytes of digest {sha256} were sent, hf_xet has taken "
                f"{info.file_size} of digest {info.sha256}",
                hint="run the same command again, with --upload file",
            )
        return _operation(self._path, sha256, self.size_bytes)

    def abort(self) -> None:
        """Forget what was written; ends a ``write`` that waits, and may be called again, and after ``finish``."""
        for part in (self._stream, self._commit):
            with contextlib.suppress(Exception):  # it has ended already
                part.abort()


@cache
def _session(process: int) -> Any:
    """The connections of this process; one that was forked needs its own."""
    import hf_xet

    return hf_xet.XetSession(hf_xet.XetConfig().with_config(_SETTINGS))


def _operation(path: str, sha256: str, size_bytes: int) -> CommitOperationAdd:
    """What the client library makes of a file that it has uploaded."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    operation = CommitOperationAdd(path, b"")
    operation.upload_info = UploadInfo(size=size_bytes, sample=b"", sha256=bytes.fromhex(sha256))
    operation._upload_mode, operation._is_uploaded, operation._should_ignore = "lfs", True, False
    return operation
