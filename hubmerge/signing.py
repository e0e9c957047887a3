"""``model.sig``: a signature over every file of a result, in the format of OpenSSF Model Signing.

It is made of the digests that were computed while the files were written: nothing is read a second time.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hubmerge.errors import HubMergeError, UsageError
from hubmerge.lock import Digested
from hubmerge.markdown import one_line

SIGNATURE_NAME = "model.sig"
KEYLESS = "sigstore"
"""In place of a key: whoever the environment (of a CI job) or a browser proves to be there, by way of Sigstore."""
UNLOCKING = "HUBMERGE_SIGN_PASSPHRASE"
"""The variable with the passphrase of an encrypted key."""
# What lies beside a model without being part of it: the signature itself, and what git and `hf download` note down.
_UNSIGNED = (SIGNATURE_NAME, ".cache/huggingface", ".git", ".gitattributes", ".github", ".gitignore")
_MAX_NAMED = 3
_MAX_REASON = 300


@dataclass(frozen=True, slots=True)
class Signing:
    """With what a result is signed."""

    key: str
    """A file (PEM) with a private key on one of the curves P-256, P-384 and P-521; or ``sigstore``."""
    certificate: Path | None = None
    """A file (PEM) with the key's certificate, and behind it those that vouch for it."""


class Signer:
    """Makes signatures; ``open_signer`` is how to get one."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def sign(self, name: str, files: Iterable[Digested]) -> bytes:
        """A signature over these files.

        Args:
            name: What the signature calls the model; informative only.
            files: All files of the result with their digests, but for the signature.

        Returns:
            The content of ``model.sig``.

        Raises:
            HubMergeError: The key's own device or Sigstore refused.
        """
        known = _Known(name, {f.path: f.sha256 or "" for f in files})
        with tempfile.TemporaryDirectory(prefix="hubmerge-") as folder:
            path = Path(folder, SIGNATURE_NAME)
            try:
                self._config.set_hashing_config(known).sign(folder, path)
            except Exception as e:  # what the library and those below it raise is not documented
                raise HubMergeError(
                    f"the result could not be signed: {_reason(e)}",
                    hint="run the same command again: it continues with what is finished",
                ) from e
            return path.read_bytes()


class Verifier:
    """Checks signatures; ``open_verifier`` is how to get one."""

    def __init__(self, config: Any, trusted: Path) -> None:
        self._config = config
        self.trusted = trusted
        """The file with the key or the certificates that are trusted."""

    def problem(self, signature: bytes, digests: Mapping[str, str]) -> str | None:
        """What is wrong with a signature, as a sentence; None if it holds.

        Args:
            signature: The content of ``model.sig``; it may be anything.
            digests: sha256 of every file that must be signed, and of no other, by path.
        """
        known = _Known("", digests)
        with tempfile.TemporaryDirectory(prefix="hubmerge-") as folder:
            path = Path(folder, SIGNATURE_NAME)
            path.write_bytes(signature)
            try:
                # The library prints a warning about signatures of before its version 1.0.
                with redirect_stdout(sys.stderr):
                    self._config.set_hashing_config(known).verify(folder, path)
            except Exception as e:  # as many kinds as there are ways to damage a file; whatever fails does not hold
                if known.was_asked:
                    return f"{SIGNATURE_NAME} is of other files: {_differences(signature, digests)}"
                shapeless = isinstance(e, LookupError | AttributeError | TypeError)
                why = "it is damaged, or was not made with such a key" if shapeless else _reason(e)
                return f"{SIGNATURE_NAME} does not hold under {self.trusted}: {why}"
        return None


def open_signer(signing: Signing) -> Signer:
    """What signs with a key, a certificate, or by way of Sigstore.

    Raises:
        UsageError: The library is missing, or the key or the certificate cannot be used.
        HubMergeError: Sigstore cannot be reached.
    """
    config = _library("signing").Config()
    if signing.key == KEYLESS:
        if signing.certificate is not None:
            raise UsageError(f"a certificate goes with a key, not with {KEYLESS}", hint="leave one of them out")
        try:
            return Signer(config.use_sigstore_signer(use_ambient_credentials=True))
        except Exception as e:
            raise HubMergeError(f"Sigstore cannot be reached: {_reason(e)}", hint="check the connection") from e
    try:
        if signing.certificate is None:
            phrase = os.environ.get(UNLOCKING)
            config.use_elliptic_key_signer(private_key=signing.key, password=phrase.encode() if phrase else None)
        else:
            # One file is both: the library takes its first certificate for the key's own, and all as the chain.
            chain = [signing.certificate]
            config.use_certificate_signer(
                private_key=signing.key, signing_certificate=signing.certificate, certificate_chain=chain
            )
    except Exception as e:
        raise UsageError(
            f"cannot sign with {signing.key}: {_unusable(e)}",
            hint="give a private key on an elliptic curve, such as `openssl ecparam -name prime256v1 -genkey -noout "
            f"-out key.pem` makes; {UNLOCKING} holds the passphrase of an encrypted one",
        ) from e
    return Signer(config)


def open_verifier(*, public_key: Path | None = None, certificate: Path | None = None) -> Verifier | None:
    """What checks signatures by a public key, or by certificates of whom to trust (PEM); None if neither is given.

    Raises:
        UsageError: Both are given, the library is missing, or the file cannot be used.
    """
    if public_key is not None and certificate is not None:
        raise UsageError("a signature is checked by a public key or by a certificate", hint="give one of them")
    trusted = public_key or certificate
    if trusted is None:
        return None
    config = _library("verifying").Config()
    try:
        if public_key is not None:
            return Verifier(config.use_elliptic_key_verifier(public_key=public_key), trusted)
        return Verifier(config.use_certificate_verifier(certificate_chain=[trusted]), trusted)
    except Exception as e:
        raise UsageError(
            f"cannot check signatures with {trusted}: {_unusable(e)}",
            hint="give the public half of the key, such as `openssl ec -in key.pem -pubout -out key.pub` writes",
        ) from e


# --- the library ------------------------------------------------------------------------------------------------


class _Known:
    """Stands where the library would hash a folder: the digests are known."""

    def __init__(self, name: str, digests: Mapping[str, str]) -> None:
        self._name = name
        self._digests = digests
        self.was_asked = False
        """The library asks for digests to compare only after the signature itself has held."""

    def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
        """The manifest of all files."""
        self.was_asked = True
        manifest, digest = _library("manifest"), _library("_hashing.hashing").Digest
        kind = manifest.SerializationType.from_args(
            {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": _UNSIGNED}
        )
        items = [
            manifest.FileManifestItem(path=PurePosixPath(path), digest=digest("sha256", bytes.fromhex(sha256)))
            for path, sha256 in self._digests.items()
        ]
        return manifest.Manifest(self._name, items, kind)

    def add_ignored_paths(self, *, model_path: Any, paths: Any) -> None:
        """Nothing is walked through, so there is nothing to ignore."""


def _library(part: str) -> Any:
    """A module of ``model_signing``, which takes long to import and which few runs need.

    Raises:
        UsageError: It is not installed. Its version 1.1.1 imports OpenSSL without asking for the package that has it.
    """
    try:
        return importlib.import_module(f"model_signing.{part}")
    except ImportError as e:
        raise UsageError(
            f"signatures need the Python module {(e.name or 'model_signing').partition('.')[0]}, which is not there",
            hint="pip install model-signing pyOpenSSL (they are what hubmerge[sign] asks for)",
        ) from e


def _reason(error: Exception) -> str:
    """What an error of the library says, on one line: a signature may come from anybody."""
    text = error.strerror if isinstance(error, OSError) else str(error)
    return one_line(text or type(error).__name__)[:_MAX_REASON].rstrip(". ")


def _unusable(error: Exception) -> str:
    """Why a key is none; the library looks for the curve of whatever it is given."""
    return "not a key on an elliptic curve" if isinstance(error, AttributeError) else _reason(error)


def _differences(signature: bytes, digests: Mapping[str, str]) -> str:
    """How the files of a signature that holds differ from those that are there."""
    payload = json.loads(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"]))
    signed = {r["name"]: r["digest"] for r in payload["predicate"]["resources"]}
    kinds = {
        "is another one": [path for path in signed.keys() & digests.keys() if signed[path] != digests[path]],
        "is missing": signed.keys() - digests.keys(),
        "is not signed": digests.keys() - signed.keys(),
    }
    named = [f"{one_line(path)} {what}" for what, paths in kinds.items() for path in sorted(paths)]
    more = f", and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
    return ", ".join(named[:_MAX_NAMED]) + more
