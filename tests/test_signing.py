"""Signatures: made of digests alone, checked by anybody, and void as soon as anything is another one."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.errors import UsageError
from hubmerge.output import Written
from hubmerge.signing import SIGNATURE_NAME, UNLOCKING, Signing, Verifier, open_signer, open_verifier
from tests.signatures import KeyPair, make_chain, make_key, make_rsa_key, public_command

FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "heads/a.safetensors": b"\x08" * 99,
    "hubmerge.lock.json": b"{}\n",
    "model.safetensors": bytes(range(256)) * 300,
    "empty.txt": b"",
}
DIGESTS = {path: hashlib.sha256(content).hexdigest() for path, content in FILES.items()}
WRITTEN = [Written(path, len(content), DIGESTS[path]) for path, content in FILES.items()]
PROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_key(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def signature(key: KeyPair) -> bytes:
    return open_signer(Signing(str(key.private))).sign("org/merged", WRITTEN)


@pytest.fixture(scope="module")
def verifier(key: KeyPair) -> Verifier:
    found = open_verifier(public_key=key.public)
    assert found is not None
    return found


@pytest.fixture
def folder(tmp_path: Path, signature: bytes) -> Path:
    folder = tmp_path / "merged"
    for path, content in {**FILES, SIGNATURE_NAME: signature}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


# --- the format -------------------------------------------------------------------------------------------------


def test_the_public_command_takes_it_and_finds_one_flipped_bit(folder: Path, key: KeyPair) -> None:
    assert public_command(folder, key.public) == (0, "Verification succeeded\n")
    flipped = bytearray(FILES["model.safetensors"])
    flipped[-1] ^= 1
    (folder / "model.safetensors").write_bytes(flipped)
    code, text = public_command(folder, key.public)
    assert code == 1
    assert "Hash mismatch for 'model.safetensors'" in text


def test_it_is_what_the_library_makes_of_the_same_folder(folder: Path, signature: bytes) -> None:
    """Our list of digests is the library's own, without its reading of the files."""
    from model_signing import hashing

    config = hashing.Config().set_ignored_paths(paths=[SIGNATURE_NAME])
    theirs = {d.identifier: d.digest.digest_hex for d in config.hash(folder).resource_descriptors()}
    statement = payload(signature)
    assert {r["name"]: r["digest"] for r in statement["predicate"]["resources"]} == theirs == DIGESTS
    assert statement["subject"][0]["name"] == "org/merged"
    kept = statement["predicate"]["serialization"]["ignore_paths"]
    assert kept == [SIGNATURE_NAME, ".cache/huggingface", ".git", ".gitattributes", ".github", ".gitignore"]


def payload(signature: bytes) -> dict[str, dict[str, dict[str, list[str]]]]:
    found: dict[str, dict[str, dict[str, list[str]]]] = json.loads(
        base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"])
    )
    return found


def test_what_git_and_downloads_note_down_beside_it_does_no_harm(folder: Path, key: KeyPair) -> None:
    from model_signing import verifying

    for path in (".gitattributes", ".git/HEAD", ".cache/huggingface/download/x.metadata"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"x")
    verifying.Config().use_elliptic_key_verifier(public_key=key.public).verify(folder, folder / SIGNATURE_NAME)
    (folder / "extra.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"Extra files found in model 'merged': extra\.bin"):
        verifying.Config().use_elliptic_key_verifier(public_key=key.public).verify(folder, folder / SIGNATURE_NAME)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda c: c.name)
def test_every_curve(curve: ec.EllipticCurve, tmp_path: Path) -> None:
    own = make_key(tmp_path, curve=curve)
    signature = open_signer(Signing(str(own.private))).sign("m", WRITTEN)
    assert problem(signature, own.public) is None


def problem(signature: bytes, public: Path, digests: dict[str, str] = DIGESTS) -> str | None:
    verifier = open_verifier(public_key=public)
    assert verifier is not None
    return verifier.problem(signature, digests)


def test_an_encrypted_key_is_opened_by_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = make_key(tmp_path, phrase="open sesame")
    with pytest.raises(UsageError, match=f"(?s)cannot sign with .*key\\.pem.*{UNLOCKING}"):
        open_signer(Signing(str(locked.private)))
    monkeypatch.setenv(UNLOCKING, "open barley")
    with pytest.raises(UsageError) as caught:
        open_signer(Signing(str(locked.private)))
    assert "barley" not in str(caught.value)
    monkeypatch.setenv(UNLOCKING, "open sesame")
    assert problem(open_signer(Signing(str(locked.private))).sign("m", WRITTEN), locked.public) is None


def test_a_chain_of_certificates(tmp_path: Path) -> None:
    chain, other = make_chain(tmp_path), make_chain(tmp_path, "other")
    signature = open_signer(Signing(str(chain.private), chain.certificate)).sign("m", WRITTEN)
    roots, wrong = open_verifier(certificate=chain.root), open_verifier(certificate=other.root)
    assert roots is not None
    assert wrong is not None
    assert roots.problem(signature, DIGESTS) is None
    assert "does not hold under" in (wrong.problem(signature, DIGESTS) or "")
    assert "README.md is another one" in (roots.problem(signature, {**DIGESTS, "README.md": "0" * 64}) or "")
    with pytest.raises(UsageError, match="does not match"):
        open_signer(Signing(str(chain.private), other.certificate))


# --- what does not hold -----------------------------------------------------------------------------------------


def test_it_holds_for_these_files_and_no_others(signature: bytes, verifier: Verifier) -> None:
    assert verifier.problem(signature, DIGESTS) is None
    for digests, says in (
        ({**DIGESTS, "README.md": "0" * 64}, "README.md is another one"),
        ({p: d for p, d in DIGESTS.items() if p != "README.md"}, "README.md is missing"),
        ({**DIGESTS, "new.bin": "0" * 64}, "new.bin is not signed"),
        ({}, "README.md is missing, empty.txt is missing, heads/a.safetensors is missing, and 2 more"),
    ):
        assert verifier.problem(signature, digests) == f"model.sig is of other files: {says}"


def test_another_key_is_told_apart(signature: bytes, tmp_path: Path) -> None:
    other = make_key(tmp_path, "other")
    assert (problem(signature, other.public) or "").startswith(f"model.sig does not hold under {other.public}: ")


@settings(deadline=None, derandomize=True, max_examples=60)
@given(at=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_one_flipped_bit_of_the_signature(at: int, bit: int, signature: bytes, verifier: Verifier) -> None:
    """It is found wherever it is, unless it changes nothing that is signed: a space, or unused bits of base64."""
    flipped = bytearray(signature)
    flipped[at % len(flipped)] ^= 1 << bit
    found = verifier.problem(bytes(flipped), DIGESTS)
    if found is None:
        assert payload(bytes(flipped)) == payload(signature)
    else:
        assert "\n" not in found
        assert found.isprintable()


def test_every_bit_of_what_is_signed_counts(signature: bytes, verifier: Verifier) -> None:
    raw = bytearray(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"]))
    for at in range(0, len(raw), 7):
        changed = bytearray(raw)
        changed[at] ^= 1
        data = json.loads(signature)
        data["dsseEnvelope"]["payload"] = base64.b64encode(bytes(changed)).decode()
        assert verifier.problem(json.dumps(data).encode(), DIGESTS) is not None, at


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"verificationMaterial": {}}', b"[" * 10**5, b"x" * 10**6,
     b'{"mediaType": "\x1b[2J\\nOK: fine"}', b'{"dsseEnvelope": 1, "verificationMaterial": {"publicKey": {}}}'],
)  # fmt: skip
def test_whatever_stands_in_its_place_is_a_signature_that_does_not_hold(text: bytes, verifier: Verifier) -> None:
    found = verifier.problem(text, DIGESTS)
    assert found is not None
    assert found.startswith("model.sig does not hold under ")
    assert found.isprintable()


def test_an_old_signature_prints_nothing_on_stdout(
    signature: bytes, verifier: Verifier, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library warns about those that do not name their key, on stdout, where ``--json`` writes."""
    data = json.loads(signature)
    data["verificationMaterial"]["publicKey"] = {}
    assert verifier.problem(json.dumps(data).encode(), DIGESTS) is None
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "older" in captured.err


# --- what cannot be used ----------------------------------------------------------------------------------------


def test_keys_that_cannot_sign(tmp_path: Path, key: KeyPair) -> None:
    (tmp_path / "noise.pem").write_bytes(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    for bad in (tmp_path / "nowhere.pem", tmp_path / "noise.pem", tmp_path, key.public, make_rsa_key(tmp_path).private):
        with pytest.raises(UsageError, match=f"cannot sign with {re.escape(str(bad))}: "):
            open_signer(Signing(str(bad)))
    with pytest.raises(UsageError, match="a certificate goes with a key"):
        open_signer(Signing("sigstore", key.public))


def test_keys_that_cannot_check(tmp_path: Path, key: KeyPair) -> None:
    for bad in (tmp_path / "nowhere.pub", key.private, make_rsa_key(tmp_path).public):
        with pytest.raises(UsageError, match=f"cannot check signatures with {re.escape(str(bad))}: "):
            open_verifier(public_key=bad)
    with pytest.raises(UsageError, match="cannot check signatures with"):
        open_verifier(certificate=key.public)
    with pytest.raises(UsageError, match="give one of them"):
        open_verifier(public_key=key.public, certificate=key.public)
    assert open_verifier() is None


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Python as it is before anybody has imported the library."""
    for name in [n for n in sys.modules if n.partition(".")[0] in ("model_signing", "OpenSSL")]:
        monkeypatch.delitem(sys.modules, name)
    return monkeypatch


@pytest.mark.parametrize("module", ["model_signing", "OpenSSL"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    module: str, forgotten: pytest.MonkeyPatch, key: KeyPair
) -> None:
    forgotten.setitem(sys.modules, module, None)
    for attempt in (lambda: open_signer(Signing(str(key.private))), lambda: open_verifier(public_key=key.public)):
        with pytest.raises(UsageError, match=f"signatures need the Python module {module}, which is not there") as e:
            attempt()
        assert e.value.hint.startswith("pip install model-signing pyOpenSSL")


def test_the_extra_brings_what_the_library_imports_without_asking_for_it() -> None:
    """model-signing 1.1.1 imports OpenSSL, and none of its requirements brings it."""
    extra = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]["sign"]
    asked = {normal(line) for line in [*extra, *(importlib.metadata.requires("model-signing") or ())]}
    assert {normal(name) for name in importlib.metadata.packages_distributions()["OpenSSL"]} & asked


def normal(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()
