"""One job in a process of its own, which ``forge`` has made.

The first line of stdin says what to do, with the visitor's token, which is nowhere else. Stdin stays open as long as
the server lives. What happens is told on stdout, a JSON object a line. SIGTERM ends the job in an orderly way.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from hubmerge.errors import HubMergeError, LicenseError
from hubmerge.space.orders import Order
from hubmerge.space.safety import Limits, check_recipe, check_report, check_sizes
from hubmerge.space.visitors import Visitor

if TYPE_CHECKING:
    from hubmerge.engine import Progress
    from hubmerge.hub import Hub

Tell = Callable[[Mapping[str, Any]], None]
_EVERY_S = 0.25
_PATIENCE_S = 6.0
"""From SIGTERM on, for what waits for a silent server; less than the runner's."""
_CANCELLED = {"end": "cancelled", "message": "It was stopped. What is finished stays staged."}


def main() -> None:
    """Do what stdin says."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no message
    asked = json.loads(sys.stdin.readline())
    visitor = Visitor(asked["name"], asked["token"], asked["endpoint"])
    limits = Limits(**asked["limits"])
    lock = threading.Lock()

    def tell(facts: Mapping[str, Any]) -> None:
        with lock:
            out.write(json.dumps(facts) + "\n")
            out.flush()

    signal.signal(signal.SIGTERM, lambda *_: _interrupt(tell))
    threading.Thread(target=_end_with_server, name="watch the server", daemon=True).start()
    try:
        end = perform(Order(**asked["order"]), visitor, limits, tell)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        tell({"end": "done", **end})
    except KeyboardInterrupt:
        tell(_CANCELLED)
    except HubMergeError as error:
        tell({"end": "failed", "message": _said(error, visitor.token)})
    except Exception as error:  # a fault of ours; the server goes on, and the visitor is to know
        tell({"end": "failed", "message": _said(error, visitor.token, f"{type(error).__name__}: ")})
    _leave(out)


def _interrupt(tell: Tell) -> None:
    """Unwind; but not for as long as threads may wait that read from a silent server."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def give_up() -> None:
        time.sleep(_PATIENCE_S)
        tell(_CANCELLED)
        os._exit(0)

    threading.Thread(target=give_up, name="give up", daemon=True).start()
    raise KeyboardInterrupt


def _end_with_server() -> None:
    """Nobody may be left to speak for a job whose server is gone: it has another one started when it comes back."""
    sys.stdin.read()
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)  # which may be waiting in a system call


def _leave(out: TextIO) -> None:
    """End at once: threads that still wait for a silent server are daemons, and have nothing to say any more."""
    out.close()
    sys.stderr.flush()
    os._exit(0)


def _said(error: Exception, token: str, before: str = "") -> str:
    from hubmerge.hub.translate import scrub

    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    return scrub(before + text, token)


def perform(order: Order, visitor: Visitor, limits: Limits, tell: Tell) -> dict[str, Any]:
    """Do what was asked for.

    Returns:
        Facts for the job table: ``url`` and ``commit_id`` of what was published.

    Raises:
        HubMergeError: What went wrong; what is finished is staged.
    """
    hub = visitor.hub(Path(tempfile.mkdtemp(prefix="cache-")))
    tell({"state": "planning", "stage": "reading headers"})
    return _merge(order, hub, limits, tell) if order.kind == "merge" else _bundle(order, hub, limits, tell)


class _Telling:
    """Progress of the engine as messages, not more than a few a second."""

    def __init__(self, tell: Tell, shards_total: int = 0, shards_done: int = 0) -> None:
        self._tell, self._total, self._done = tell, shards_total, shards_done
        self._last = 0.0
        self._lock = threading.Lock()

    def __call__(self, p: Progress) -> None:
        with self._lock:
            self._done += p.finished is not None
            ended = p.done_bytes >= p.total_bytes
            now = time.monotonic()
            if not (p.finished or ended) and now - self._last < _EVERY_S:
                return
            self._last = now
            state = "publishing" if ended else "running"
            facts = {"shards_done": self._done, "shards_total": max(self._total, self._done)}
            size = {"bytes_done": p.done_bytes, "bytes_total": p.total_bytes}
            self._tell({"state": state, "stage": "publishing" if ended else "merging", **facts, **size})


def _merge(order: Order, hub: Hub, limits: Limits, tell: Tell) -> dict[str, Any]:
    from hubmerge import api
    from hubmerge.space.plan import staged

    recipe = check_recipe(order.recipe, limits)
    options = api.RunOptions(
        workers=None, fetch="stream", device="cpu",
        max_memory_bytes=limits.memory_per_job_bytes, max_disk_bytes=limits.disk_per_job_bytes,
    )  # fmt: skip
    report = api.report(recipe, options=options, hub=hub)
    check_report(report, limits)
    shards = len(report.plan.outputs)
    done = staged(report.plan, recipe, order.target, hub)
    tell({"state": "running", "stage": "merging", "shards_done": done, "shards_total": shards})
    target = api.PushTarget(
        repo=order.target, private=False if order.public else None, create_pr=order.create_pr,
        accept_license_risk=order.accept_license_risk,
    )  # fmt: skip
    made = api.push(recipe, target, options=options, hub=hub, progress=_Telling(tell, shards, done))
    return {"url": made.url or "", "commit_id": made.commit or "", "shards_done": shards}


def _bundle(order: Order, hub: Hub, limits: Limits, tell: Tell) -> dict[str, Any]:
    from hubmerge.bundles import api
    from hubmerge.publish import PublishOptions

    running = api.Running(fetch="stream", max_disk_bytes=limits.disk_per_job_bytes, progress=_Telling(tell))
    terms: dict[str, Any] = {"license": order.license or None, "accept_license_risk": order.accept_license_risk}
    recipe = check_recipe(order.recipe, limits) if order.kind == "bundle create" else None
    refs = (
        [order.model, order.bundle]
        if recipe is None
        else [str(recipe.base or ""), *(str(m.ref) for m in recipe.models)]
    )
    check_sizes(sum(_weights_bytes(ref, hub) for ref in refs if ref), 0, 0, limits)
    if recipe is not None:
        publish = PublishOptions(
            message="Publish a bundle made with hubmerge", public=True if order.public else None
        )  # fmt: skip
        made = api.create_bundle(recipe, to=order.target, publish=publish, running=running, hub=hub, **terms)
    elif order.kind == "bundle add":
        made = api.add_task(order.target, order.model, name=order.task or None, running=running, hub=hub, **terms)
    elif order.kind == "bundle remove":
        made = api.remove_task(order.target, order.task, running=running, hub=hub)
    else:
        return _retrieve(order, hub, running, tell)
    return {"url": made.url or "", "commit_id": made.commit or ""}


def _weights_bytes(ref: str, hub: Hub) -> int:
    repo, _, revision = ref.partition("@")
    files = hub.list_files(repo, hub.pin(repo, revision or None))
    return sum(f.size_bytes for f in files if f.path.endswith(".safetensors"))


def _retrieve(order: Order, hub: Hub, running: Any, tell: Tell) -> dict[str, Any]:
    """A task's model, in a repository of its own, under the terms that the bundle's card states."""
    from hubmerge.bundles import api
    from hubmerge.bundles.terms import bundle_license
    from hubmerge.publish import Publisher, PublishOptions

    with api.opened(order.bundle, hub) as bundle:
        terms = bundle_license(bundle.manifest, order.target)
        commit = bundle.commit
    if terms.verdict == "blocked":
        raise LicenseError(terms.headline, hint="Retrieve it on a machine of your own: hubmerge bundle retrieve.")
    out = Path(tempfile.mkdtemp(prefix="task-")) / "model"
    place = f"{order.bundle.partition('@')[0]}@{commit}"
    written = {w.path: w for w in api.retrieve_task(place, order.task, out, running=running, hub=hub)}
    tell({"state": "publishing", "stage": "uploading", "shards_total": len(written)})
    message = f"Publish task {order.task} of {order.bundle}, retrieved with hubmerge"
    with Publisher(hub, order.target, PublishOptions(message=message)) as publisher:
        for n, (path, file) in enumerate(written.items(), 1):
            publisher.shard_done(out / path, path, file.sha256, file.size_bytes)
            tell({"state": "publishing", "stage": "uploading", "shards_done": n, "shards_total": len(written)})
        small = {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
        published = publisher.finish(small)
    return {"url": published.url, "commit_id": published.commit}


def asked_of(order: Order, visitor: Visitor, limits: Limits) -> str:
    """The first line of stdin."""
    return json.dumps({
        "name": visitor.name, "token": visitor.token, "endpoint": visitor.endpoint,
        "order": asdict(order), "limits": asdict(limits),
    }) + "\n"  # fmt: skip
