"""Is this machine, and this token, ready to merge and publish?"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from hubmerge import __version__
from hubmerge.errors import HubMergeError
from hubmerge.hub import Hub
from hubmerge.lock import environment
from hubmerge.tuning import cores


def examine(repo: str | None = None, *, hub: Hub | None = None) -> dict[str, Any]:
    """Facts about this machine and token, and the first problem found, if any."""
    import torch

    hub = hub or Hub()
    disk = Path(hub.cache_dir)
    while not disk.exists():
        disk = disk.parent
    facts: dict[str, Any] = {
        "hubmerge": __version__,
        **environment(),
        "cores": cores(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "disk free": shutil.disk_usage(disk).free,
        "cache": str(hub.cache_dir),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "hub": hub.endpoint,
        "token": "found" if hub.token() else "none",
    }
    try:
        facts["user"] = (
            hub.call("find out whose token this is", "", hub.api.whoami)["name"] if hub.token() else "anonymous"
        )
        if repo is not None:
            target = hub.check_write(repo)
            facts["may publish to"] = f"{target.repo} ({'exists' if target.exists else 'will be created'})"
    except HubMergeError as e:
        facts["problem"], facts["next"] = e.message, e.hint
    return facts
