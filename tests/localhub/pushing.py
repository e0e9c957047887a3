"""Short ways to push to, and look at, the repository `local/m`."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi


def add(path: str, content: bytes | str) -> CommitOperationAdd:
    return CommitOperationAdd(path, content.encode() if isinstance(content, str) else content)


def put(api: HfApi, files: dict[str, bytes | str], *, message: str = "change", **options: object) -> str:
    return api.create_commit("local/m", [add(*item) for item in files.items()], commit_message=message, **options).oid  # type: ignore[arg-type]


def paths(api: HfApi, revision: str | None = None) -> set[str]:
    return set(api.list_repo_files("local/m", revision=revision)) - {".gitattributes"}


def text(api: HfApi, path: str, revision: str | None = None) -> str:
    return Path(api.hf_hub_download("local/m", path, revision=revision)).read_text()


def blob(size: int, seed: int = 0) -> bytes:
    return bytes((i * 31 + seed) % 251 for i in range(4096)) * (size // 4096) + b"x" * (size % 4096)
