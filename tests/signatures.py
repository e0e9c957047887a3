"""Keys and certificates for tests of signatures, and the command that the public checks them with."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

_PEM = serialization.Encoding.PEM
_DAY = dt.timedelta(days=1)
_START = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)


@dataclass(frozen=True)
class KeyPair:
    """The files of a key."""

    private: Path
    public: Path


def make_key(folder: Path, name: str = "key", *, curve: ec.EllipticCurve | None = None, phrase: str = "") -> KeyPair:
    """A new key on a curve, encrypted if there is a passphrase."""
    return _write(ec.generate_private_key(curve or ec.SECP256R1()), folder, name, phrase)


def make_rsa_key(folder: Path) -> KeyPair:
    """A key that is on no curve."""
    return _write(rsa.generate_private_key(65537, 2048), folder, "rsa", "")


def _write(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, folder: Path, name: str, phrase: str) -> KeyPair:
    pair = KeyPair(folder / f"{name}.pem", folder / f"{name}.pub")
    locked = serialization.BestAvailableEncryption(phrase.encode()) if phrase else serialization.NoEncryption()
    pair.private.write_bytes(key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, locked))
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    pair.public.write_bytes(key.public_key().public_bytes(_PEM, spki))
    return pair


@dataclass(frozen=True)
class Chain:
    """A key with a certificate, which a root vouches for."""

    private: Path
    certificate: Path
    """The key's own certificate, then the root's."""
    root: Path


def make_chain(folder: Path, name: str = "chain") -> Chain:
    """A root that vouches for a key, which may sign."""
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = _certificate(f"{name} root", f"{name} root", root_key, root_key, is_root=True)
    own = _certificate(f"{name} signer", f"{name} root", key, root_key, is_root=False)
    chain = Chain(folder / f"{name}.pem", folder / f"{name}.crt", folder / f"{name}-root.crt")
    raw = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    chain.private.write_bytes(key.private_bytes(_PEM, *raw))
    chain.certificate.write_bytes(own.public_bytes(_PEM) + root.public_bytes(_PEM))
    chain.root.write_bytes(root.public_bytes(_PEM))
    return chain


def _certificate(
    subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, by: ec.EllipticCurvePrivateKey, *, is_root: bool
) -> x509.Certificate:
    name, of = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)]) for text in (subject, issuer))
    others = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    usage = x509.KeyUsage(digital_signature=not is_root, key_cert_sign=is_root, crl_sign=is_root, **others)
    made = x509.CertificateBuilder(of, name, key.public_key(), 1 if is_root else 2, _START, _START + 36500 * _DAY)
    made = made.add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
    return made.add_extension(usage, critical=True).sign(by, hashes.SHA256())


def public_command(folder: Path, key: Path, *flags: str, signature: Path | None = None) -> tuple[int, str]:
    """The library's own command, as anybody runs it; returns its exit code and what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "model_signing", "verify", "key", folder,
         "--signature", signature or folder / "model.sig", "--public_key", key, *flags],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr
