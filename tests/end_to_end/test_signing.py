"""Signed merges, pushes and bundles: what anybody can check, what is found, and what becomes of an old signature."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from model_signing import verifying

from hubmerge.aibom import AIBOM_NAME
from hubmerge.localhub import LocalHub
from hubmerge.lock import LOCK_NAME
from hubmerge.signing import SIGNATURE_NAME
from tests.bundles import scene
from tests.end_to_end import support
from tests.end_to_end.support import OWNER, Town, hubmerge, save, tensors
from tests.signatures import KeyPair, make_chain, make_key, public_command

TARGET = "local/merged"
MODELS = ("--base", "local/base", "--model", "local/a")


@pytest.fixture
def key(tmp_path: Path) -> KeyPair:
    return make_key(tmp_path)


@pytest.fixture
def town(start_hub: Callable[..., LocalHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Town:
    monkeypatch.setenv("HF_TOKEN", OWNER.token)
    monkeypatch.chdir(tmp_path)
    made = support.open_town(start_hub)
    for seed, name in enumerate(("base", "a")):
        made.publish(f"local/{name}", save(tmp_path / "in" / name, tensors(seed)))
    return made


def push(*flags: str | Path, method: str = "linear") -> dict[str, object]:
    done = hubmerge("push", "--method", method, *MODELS, "--to", TARGET, "--shard-size", "700B", "--json", *flags)
    assert done.code == 0, done.text
    answer: dict[str, object] = json.loads(done.out)
    return answer


def merged(out: Path, *flags: str | Path) -> Path:
    done = hubmerge("merge", "--method", "linear", *MODELS, "--out", out, *flags)
    assert done.code == 0, done.text
    return out


def test_a_signed_push_is_checked_by_anybody(town: Town, key: KeyPair, tmp_path: Path) -> None:
    """Its shards were gone from this machine when it was signed: the digests come from when they were written."""
    answer = push("--sign", key.private, "--diagnostics")
    listed = {f["path"] for f in answer["files"]}  # type: ignore[attr-defined]
    assert {SIGNATURE_NAME, AIBOM_NAME, LOCK_NAME} <= listed
    assert set(town.api.list_repo_files(TARGET)) == listed | {".gitattributes"}
    folder = Path(snapshot_download(TARGET, local_dir=tmp_path / "copy"))
    assert (folder / ".cache" / "huggingface").is_dir()
    assert public_command(folder, key.public) == (0, "Verification succeeded\n")
    for place in (TARGET, folder):
        found = hubmerge("verify", place, "--public-key", key.public)
        assert found.code == 0, found.text
        assert found.out.startswith("OK: ")
        assert found.out.endswith(f"\n  signed   model.sig holds under {key.public}\n")
    assert SIGNATURE_NAME not in {f["path"] for f in json.loads((folder / LOCK_NAME).read_text())["outputs"]}


def test_one_flipped_bit_of_any_file_is_found_by_both(town: Town, key: KeyPair, tmp_path: Path) -> None:
    folder = merged(tmp_path / "out", "--sign", key.private, "--diagnostics", "--shard-size", "700B")
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    assert len(paths) > 12
    for path in paths:
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        at = content.index(b"payload") + 40 if name == SIGNATURE_NAME else len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        found = hubmerge("verify", folder, "--public-key", key.public)
        assert found.code == 3, (name, found.text)
        assert name in found.text
        path.write_bytes(content)
    assert hubmerge("verify", folder, "--public-key", key.public).code == 0
    verify = verifying.Config().use_elliptic_key_verifier(public_key=key.public).verify
    verify(folder, folder / SIGNATURE_NAME)
    weights = min(folder.glob("model-*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"Hash mismatch for '{weights.name}'"):
        verify(folder, folder / SIGNATURE_NAME)


def test_a_lock_that_vouches_for_what_was_changed_is_found_by_the_signature(
    town: Town, key: KeyPair, tmp_path: Path
) -> None:
    """The card's licence is another one, and the lock says so: without the signature, nothing is wrong."""
    folder = merged(tmp_path / "out", "--sign", key.private)
    card = folder / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: mit"))
    found = hubmerge("verify", folder)
    assert found.code == 3
    assert "changed  README.md" in found.out
    lock = json.loads((folder / LOCK_NAME).read_text())
    (entry,) = (f for f in lock["outputs"] if f["path"] == "README.md")
    (digest,) = support.folder_state(card).values()  # type: ignore[union-attr]
    entry |= {"sha256": digest, "size_bytes": card.stat().st_size}
    (folder / LOCK_NAME).write_text(json.dumps(lock))
    unchecked = hubmerge("verify", folder)
    assert unchecked.code == 0
    assert "  note     model.sig: a signature that was not checked; --public-key FILE does it\n" in unchecked.out
    found = hubmerge("verify", folder, "--public-key", key.public)
    assert found.code == 3
    assert "MISMATCH" in found.out
    assert "model.sig is of other files: README.md is another one, hubmerge.lock.json is another one" in found.err
    told = json.loads(hubmerge("verify", folder, "--public-key", key.public, "--json").out)
    assert not told["ok"]
    assert told["mismatches"] == []
    assert told["signature"]["state"] == "fails"


def test_a_wrong_key_and_a_missing_signature(town: Town, key: KeyPair, tmp_path: Path) -> None:
    folder = merged(tmp_path / "out", "--sign", key.private)
    other = make_key(tmp_path, "other")
    found = hubmerge("verify", folder, "--public-key", other.public)
    assert found.code == 3
    assert f"model.sig does not hold under {other.public}" in found.err
    (folder / SIGNATURE_NAME).unlink()
    found = hubmerge("verify", folder, "--public-key", key.public)
    assert found.code == 3
    assert "there is no model.sig" in found.err
    assert hubmerge("verify", folder).code == 0
    assert hubmerge("verify", folder, "--public-key", key.private).code == 2


def test_a_chain_of_certificates(town: Town, tmp_path: Path) -> None:
    chain = make_chain(tmp_path)
    folder = merged(tmp_path / "out", "--sign", chain.private, "--certificate", chain.certificate)
    assert hubmerge("verify", folder, "--certificate", chain.root).code == 0
    assert hubmerge("verify", folder, "--certificate", make_chain(tmp_path, "other").root).code == 3


def test_a_bad_key_ends_it_before_anything_is_read_or_made(town: Town, key: KeyPair, tmp_path: Path) -> None:
    town.hub.requests.clear()
    for flags in (("--sign", "nowhere.pem"), ("--sign", str(key.public)), ("--certificate", str(key.public))):
        for command in (("push", "--to", TARGET), ("merge", "--out", "out")):
            done = hubmerge(*command, "--method", "linear", *MODELS, *flags)
            assert done.code == 2, done.text
    done = hubmerge("push", "--to", TARGET, "--method", "linear", *MODELS, "--sign", key.private, "--on", "jobs")
    assert done.code == 2
    assert "a key does not leave this machine" in done.err
    assert not list(town.hub.requests)
    assert not (tmp_path / "out").exists()


def test_another_card_is_signed_anew_and_no_weight_is_sent_again(town: Town, key: KeyPair, tmp_path: Path) -> None:
    recipe = tmp_path / "merge.yaml"
    data = {"method": "linear", "base": "local/base", "models": ["local/a"]}
    for title in ("First", "Second"):
        recipe.write_text(json.dumps(data | {"card": {"title": title}}))
        town.hub.requests.clear()
        done = hubmerge("push", recipe, "--to", TARGET, "--sign", key.private)
        assert done.code == 0, done.text
    assert not town.hub.requests.find("PUT", "^/_lfs/")
    assert "# Second" in Path(town.api.hf_hub_download(TARGET, "README.md")).read_text()
    assert hubmerge("verify", TARGET, "--public-key", key.public).code == 0
    before = blobs(town)
    assert hubmerge("push", recipe, "--to", TARGET, "--sign", key.private).code == 0
    assert {p for p, blob in blobs(town).items() if before[p] != blob} == {SIGNATURE_NAME}  # it has a random part
    assert hubmerge("verify", TARGET, "--public-key", key.public).code == 0


def blobs(town: Town) -> dict[str, str]:
    return {f.path: f.blob_id for f in town.api.list_repo_tree(TARGET, recursive=True) if hasattr(f, "blob_id")}


def test_an_old_signature_does_not_outlive_what_it_is_of(town: Town, key: KeyPair) -> None:
    push("--sign", key.private)
    push(method="task_arithmetic")
    assert SIGNATURE_NAME not in town.api.list_repo_files(TARGET)
    assert hubmerge("verify", TARGET).out.count("\n") == 1
    assert hubmerge("verify", TARGET, "--public-key", key.public).code == 3


def test_a_bundle_is_signed_whenever_it_changes(town: Town, key: KeyPair, tmp_path: Path) -> None:
    models = tmp_path / "models"
    for seed, name in enumerate(("base", "a", "b")):
        town.publish(f"local/{name}", scene.save(models / name, seed))
    recipe = scene.recipe_file(tmp_path / "bundle.yaml", "magnitude_mask", "local/base", ["local/a"])
    place = tmp_path / "bundle"
    for where in (("--out", place), ("--to", TARGET)):
        done = hubmerge("bundle", "create", recipe, *where, "--sign", key.private)
        assert done.code == 0, done.text
    for target in (place, TARGET):
        assert hubmerge("verify", target, "--public-key", key.public).code == 0
        assert hubmerge("bundle", "add", target, "--model", "local/b").code == 0
        assert hubmerge("verify", target).out.count("\n") == 1  # no signature is left
        assert hubmerge("bundle", "remove", target, "--task", "b", "--sign", key.private).code == 0
        assert hubmerge("verify", target, "--public-key", key.public).code == 0
    folder = Path(snapshot_download(TARGET, local_dir=tmp_path / "copy"))
    verifying.Config().use_elliptic_key_verifier(public_key=key.public).verify(folder, folder / SIGNATURE_NAME)
