"""A Hub and the form's server, each in a process of its own, as people meet them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from huggingface_hub import HfApi

from hubmerge.localhub import OAuthApp, User
from hubmerge.localhub.process import HubProcess
from tests.end_to_end import support
from tests.end_to_end.support import save, tensors
from tests.space.scene import PUBLISHER

APP = OAuthApp("the-form", "secret-of-the-form", ("http://127.0.0.1/login/callback",), "The form")
HOSTILE = '<script>window.caught = 1</script><img src=x onerror="window.caught = 2"> "\' &amp; \u202egnorw'
"""Text of a card that must be shown as it is."""


class Town:
    """A Hub in a process of its own, with small models."""

    def __init__(self, root: Path, users: Sequence[User]) -> None:
        self.hub = HubProcess(root / "hub", users=(PUBLISHER, *users), apps=(APP,), separate_cdn=True)
        self.endpoint = self.hub.endpoint
        self.api = HfApi(endpoint=self.endpoint, token=PUBLISHER.token)
        self._root, self._tokens = root, {user.name: user.token for user in users}

    def furnish(self) -> None:
        """A base, two models, an adapter, a model that not everybody may read, and one whose card is hostile."""
        root = self._root
        for i, name in enumerate(("base", "a", "b")):
            self.publish(name, save(root / "in" / name, tensors(i)))
        self.publish("adapter", support.save_adapter(root / "in" / "adapter", base="local/base"))
        self.publish("gated", save(root / "in" / "gated", tensors(3)))
        self.api.update_repo_settings("local/gated", gated="auto")
        hostile = save(root / "in" / "hostile", tensors(4))
        card = {
            "license": "other",
            "license_name": HOSTILE,
            "license_link": "javascript:window.caught=3",
            "title": HOSTILE,
        }
        (hostile / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n# {HOSTILE}\n{HOSTILE}\n", encoding="utf-8")
        self.publish("hostile", hostile)

    def publish(self, name: str, folder: Path) -> None:
        self.api.create_repo(f"local/{name}")
        self.api.upload_folder(repo_id=f"local/{name}", folder_path=folder)

    def _ask(self, method: str, what: str, payload: Mapping[str, Any] | None = None) -> Any:
        data = json.dumps(payload).encode() if payload is not None else None
        with urlopen(Request(f"{self.endpoint}/_admin/{what}", data, method=method)) as answer:
            return json.load(answer)

    def stall_uploads(self, after: int = 0) -> None:
        """Let so many large files come, and no more."""
        fault = {"method": "PUT", "path": "^/_lfs/", "skip": after, "times": None, "stall_upload_after_bytes": 0}
        self._ask("POST", "faults", fault)

    def stalled(self) -> int:
        """How many uploads have been stopped so."""
        return sum(rule["hits"] for rule in self._ask("GET", "faults"))

    def behave(self) -> None:
        """End all faults."""
        self._ask("DELETE", "faults")

    def files(self, repo: str) -> list[str]:
        """What is in a repository, as its owner sees it."""
        return list(self.api.list_repo_files(repo, token=self._tokens[repo.partition("/")[0]]))


@dataclass
class Server:
    """``hubmerge space serve``."""

    town: Town
    folder: Path
    limits: Sequence[str]
    """Flags of the command."""
    threads: int | None = 1
    """Of each job; None for what it takes by itself."""
    port: int = 0
    url: str = ""
    process: subprocess.Popen[str] = field(init=False)

    def start(self) -> None:
        """Serve, under the same address as before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = ["space", "serve", "--port", str(self.port), "--data", str(self.folder / "data")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hubmerge", *command, *self.limits],
                env=self._environment(), stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url, (self.folder / "server.log").read_text()
        self.port = int(self.url.rpartition(":")[2])

    def _environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "OAUTH_"))}
        home = self.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        few = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        return kept | few | {
            "HF_ENDPOINT": self.town.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OAUTH_CLIENT_ID": APP.client_id, "OAUTH_CLIENT_SECRET": APP.client_secret,
            "OAUTH_SCOPES": "openid profile contribute-repos gated-repos jobs",
            "OPENID_PROVIDER_URL": self.town.endpoint,
        }  # fmt: skip

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def restart_after_kill(self) -> None:
        """As after a power cut, and with nobody at the door meanwhile."""
        self.end(signal.SIGKILL)
        self.start()
