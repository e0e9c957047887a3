"""Visitors of the running form without a browser: they ask its server for what a page asks for.

As a program (``python -m tests.space.visiting URL NAME``) it visits until its standard input ends, and prints what each
answer took.
"""

from __future__ import annotations

import html
import json
import re
import secrets
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

EVERY_S = 0.5
_PATIENCE_S = 120.0


class Visitor:
    """Somebody who has signed in.

    Args:
        url: Of the form's server.
        name: Of a user of the local Hub.
    """

    def __init__(self, url: str, name: str) -> None:
        self._client = httpx2.Client(base_url=url, timeout=_PATIENCE_S, headers={"origin": url})
        self.name = name
        asked = self._client.get("/login")
        consent = self._client.get(asked.headers["location"])
        fields = {
            k: html.unescape(v) for k, v in re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', consent.text)
        }
        agreed = self._client.post(
            str(consent.url.copy_with(query=None)), data={**fields, "user": name, "decision": "approve"}
        )
        entered = self._client.get(agreed.headers["location"])
        assert entered.status_code == 303, entered.text
        self.config: dict[str, Any] = self._client.get("/config").json()
        self._session = secrets.token_hex(8)

    def get(self, path: str) -> httpx2.Response:
        return self._client.get(path)

    def press(self, button: str, values: Mapping[str, Any]) -> str:
        """What comes back when a button is pressed and these texts stand in the boxes of these names."""
        return self.trigger(self._component("value", button), "click", values)

    def tick(self) -> str:
        """What comes back when the page asks how its jobs are."""
        (timer,) = (c["id"] for c in self.config["components"] if c["type"] == "timer")
        return self.trigger(timer, "tick", {})

    def _component(self, prop: str, text: str) -> int:
        (found,) = (c["id"] for c in self.config["components"] if c["props"].get(prop) == text)
        return int(found)

    def trigger(self, component: int, event: str, values: Mapping[str, Any]) -> str:
        """Cause an event of a component's and what follows it; returns what the server says at their ends."""
        steps = self.config["dependencies"]
        due = [d for d in steps if [component, event] in d["targets"]]
        given = {self._component("label", label): value for label, value in values.items()}
        said = []
        while due:
            one = due.pop(0)
            due += [d for d in steps if d["trigger_after"] == one["id"]]
            if one["backend_fn"]:
                said.append(self._run(one, component, given))
        assert said
        return "\n".join(said)

    def _run(self, step: Mapping[str, Any], component: int, given: Mapping[int, Any]) -> str:
        shown = {c["id"]: c["props"].get("value") for c in self.config["components"]}
        data = [given.get(i, shown.get(i)) for i in step["inputs"]]
        asked = {"data": data, "fn_index": step["id"], "session_hash": self._session, "trigger_id": component}
        joined = self._client.post("/gradio_api/queue/join", json=asked)
        assert joined.status_code == 200, joined.text
        with self._client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self._session}) as answer:
            for line in answer.iter_lines():
                if line.startswith("data:") and json.loads(line[5:])["msg"] in (
                    "process_completed",
                    "unexpected_error",
                ):
                    return line
        raise AssertionError("the server has said nothing to the end")


@dataclass
class Waited:
    """Seconds that answers took."""

    page: list[float] = field(default_factory=list)
    jobs: list[float] = field(default_factory=list)


def main(url: str, name: str) -> None:
    """Look at the page and at the jobs until nobody listens any more."""
    visitor, waited = Visitor(url, name), Waited()
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    print("ready", flush=True)
    while not over.wait(EVERY_S):
        begun = time.perf_counter()
        assert visitor.get("/").status_code == 200
        seen = time.perf_counter()
        visitor.tick()
        waited.page.append(seen - begun)
        waited.jobs.append(time.perf_counter() - seen)
    print(json.dumps({"page": waited.page, "jobs": waited.jobs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
