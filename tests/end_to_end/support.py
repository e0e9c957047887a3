"""What the end-to-end tests share: tiny checkpoints, commands in this process, pictures of folders and repositories."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from hubmerge.cli import main
from hubmerge.localhub import LocalHub, User

OWNER = User("local", "hf_writeTokenOfTheOwner")
READER = User("local", "hf_readTokenOfTheOwner", "read")
STRANGER = User("mallory", "hf_writeTokenOfSomebodyElse")
USERS = (OWNER, READER, STRANGER)
SECRETS = tuple(user.token for user in USERS)

CONFIG: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 12}
SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 16),
    "model.layers.1.mlp.up_proj.weight": (16, 8),
    "model.layers.1.mlp.down_proj.weight": (8, 16),
    "model.norm.weight": (8,),
    "lm_head.weight": (12, 8),
}
UP = "model.layers.1.mlp.up_proj.weight"
CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n# a model\n"
Tensors = dict[str, torch.Tensor]


# --- checkpoints ------------------------------------------------------------------------------------------------


def tensors(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Tensors:
    """Random values: seed 0 is the base, others lie near it."""
    made = {n: torch.randn(s, generator=_generator(0, n)) for n, s in shapes.items()}
    if seed:
        made = {n: t + 0.1 * torch.randn(t.shape, generator=_generator(seed, n)) for n, t in made.items()}
    return made


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1000 + int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))


def save(folder: Path, values: Tensors, *, config: Mapping[str, Any] | None = CONFIG, shards: int = 1) -> Path:
    """A checkpoint with a config, a card and the beginnings of a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(CARD)
    (folder / "tokenizer_config.json").write_text("{}")
    names = list(values)
    if shards == 1:
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
    for file in files:
        save_file({n: values[n] for n in names if where[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def save_adapter(folder: Path, *, base: str | None, rank: int = 2, **config: Any) -> Path:
    """A LoRA adapter of every up_proj."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {}
    for layer in range(2):
        module = f"base_model.model.model.layers.{layer}.mlp.up_proj"
        values[f"{module}.lora_A.weight"] = torch.randn((rank, 8), generator=_generator(layer, "A"))
        values[f"{module}.lora_B.weight"] = torch.randn((16, rank), generator=_generator(layer, "B"))
    save_file(values, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    described = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 4,
        "target_modules": ["up_proj"],
        "base_model_name_or_path": base,
    }
    (folder / "adapter_config.json").write_text(json.dumps(described | config))
    (folder / "README.md").write_text(CARD)
    return folder


# --- commands ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


def hubmerge(*arguments: str | Path) -> Outcome:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in arguments])
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        else:
            raise AssertionError("main always exits")
    return Outcome(code, out.getvalue(), err.getvalue())


# --- pictures ---------------------------------------------------------------------------------------------------


def folder_state(folder: Path) -> dict[str, str] | None:
    """Digests of all files below a folder (or of a file); None if there is nothing of that name."""
    if folder.is_file():
        return {"": hashlib.sha256(folder.read_bytes()).hexdigest()}
    if not folder.is_dir():
        return None
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@dataclass(frozen=True)
class RepoState:
    """Everything that a failed push must not have changed."""

    private: bool
    branches: Mapping[str, str]
    tags: Mapping[str, str]
    pull_requests: tuple[str, ...]
    files: tuple[str, ...]


@dataclass
class Town:
    """A local Hub with its people, and what they do without hubmerge."""

    hub: LocalHub
    api: HfApi = field(init=False)

    def __post_init__(self) -> None:
        self.api = HfApi(endpoint=self.hub.endpoint, token=OWNER.token)

    def publish(self, repo: str, folder: Path, *, private: bool = False) -> str:
        """A repository with a folder's files; returns the commit."""
        self.api.create_repo(repo, private=private, exist_ok=True)
        return str(self.api.upload_folder(repo_id=repo, folder_path=folder, commit_message="a model").oid)

    def commit(self, repo: str, path: str, content: bytes) -> str:
        """One more file; returns the commit."""
        return str(self.api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo).oid)

    def state(self, repo: str) -> RepoState | None:
        """A picture of a repository; None if it does not exist."""
        if not self.api.repo_exists(repo):
            return None
        refs = self.api.list_repo_refs(repo, include_pull_requests=True)
        return RepoState(
            private=bool(self.api.model_info(repo, expand=["private"]).private),
            branches={r.name: r.target_commit for r in refs.branches},
            tags={r.name: r.target_commit for r in refs.tags},
            pull_requests=tuple(r.ref for r in refs.pull_requests or ()),
            files=tuple(self.api.list_repo_files(repo)),
        )


def with_stage(before: RepoState | None, town: Town, repo: str, *names: str) -> RepoState:
    """What a run leaves that ended early: everything as before, and a branch with these finished files.

    A repository that was not there before is private, and has nothing in its own branch.
    """
    now = town.state(repo)
    assert now is not None
    (stage,) = (name for name in now.branches if name.startswith("hubmerge/stage-"))
    staged = {f for f in town.api.list_repo_files(repo, revision=stage) if f.startswith(stage)}
    assert staged == {f"{stage}/{name}" for name in ("plan.json", *names)}
    empty = RepoState(True, {"main": now.branches["main"]}, {}, (), (".gitattributes",))
    before = before or empty
    return replace(before, branches={**before.branches, stage: now.branches[stage]})


def open_town(start_hub: Callable[..., LocalHub], **options: Any) -> Town:
    """Start a Hub where three tokens are known; this process uses the owner's."""
    return Town(start_hub(**{"users": USERS, **options}))
