"""The fault matrix: what can go wrong between hubmerge and a Hub, on the way in and on the way out, and what is seen.

Each cell brings its fault about at a running local Hub while models are pushed. docs/reliability.md shows the table.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal

from hubmerge.localhub import Fault
from hubmerge.localhub.faults import EXPIRED_BODY
from tests.end_to_end.support import Town

TARGET = "local/merged"
MODELS = ("local/base", "local/a", "mallory/b")
MOVING = "work"  # the branch of local/a that is merged
WEIGHTS = "^/_cdn/"
HEADERS = len(MODELS)  # requests for weights that a plan makes: one for each file's header
UPLOAD = "^/_lfs/"
STAGE = "/commit/hubmerge/stage-"
COMMIT = "/commit/main"
ALWAYS = None
_SHOWN_ELSEWHERE = {
    "reading-429-with-RateLimit,-longer-than-330-s",
    "reading-500,-502,-503,-passing",
    "reading-503,-for-good",
    "reading-reset-before-headers",
    "reading-short-read",
    "reading-slow-drip",
    "reading-403-on-every-address",
    "reading-416",
    "reading-gzip'd-body",
    "uploading-416",
    "uploading-slow-drip",
    "uploading-wrong-ETag",
    "uploading-gzip'd-body",
}


@dataclass
class Stage:
    """A Hub with models on it, and what runs beside the push."""

    town: Town
    stack: ExitStack = field(default_factory=ExitStack)

    def add(self, *faults: Fault) -> None:
        for fault in faults:
            self.town.hub.faults.add(fault)

    def meanwhile(self, method: str, path: str, act: Callable[[], object]) -> None:
        """Do something at the first request of a kind, which is kept waiting until it is done."""
        rule = self.town.hub.faults.add(Fault(method, path, delay_s=0.5))

        def run() -> None:
            deadline = time.monotonic() + 60
            while not rule.hits and time.monotonic() < deadline:
                time.sleep(0.005)
            act()

        thread = threading.Thread(target=run)
        thread.start()
        self.stack.callback(thread.join)


@dataclass(frozen=True)
class Cell:
    """One fault, at one place.

    Attributes:
        fault: The row of the table.
        way: The column of the table.
        arrange: Brings the fault about.
        seen: What hubmerge does, as the table says it.
        code: The exit code.
        says: Parts of the message.
        keeps: Whether shards are staged when the run has ended with an error.
        name: Tells cells apart that stand in one place of the table.
    """

    fault: str
    way: Literal["reading", "uploading"]
    arrange: Callable[[Stage], object]
    seen: str
    code: int = 0
    says: tuple[str, ...] = ()
    keeps: bool = False
    name: str = ""

    @property
    def id(self) -> str:
        return f"{self.way}-{self.name or self.fault}".replace(" ", "-").replace("`", "")

    @property
    def slow(self) -> bool:
        """Left to long runs of the tests: tests of a single read or upload show it, too."""
        return self.id in _SHOWN_ELSEWHERE


def faults(*given: Fault) -> Callable[[Stage], object]:
    return lambda stage: stage.add(*given)


def reads(fault: Fault, **more: object) -> Callable[[Stage], object]:
    """Strike when weights are read, after the headers."""
    return faults(replace(fault, method="GET", path=WEIGHTS, skip=HEADERS, **more))  # type: ignore[arg-type]


def uploads(*given: Fault, times: int | None = 1) -> Callable[[Stage], object]:
    """Strike when a shard is sent, when it is staged, and at the final commit."""
    places = (("PUT", UPLOAD), ("POST", STAGE), ("POST", COMMIT))
    return faults(*(replace(f, method=method, path=path, times=times) for f in given for method, path in places))


def sending(fault: Fault, **more: object) -> Callable[[Stage], object]:
    """Strike when a shard is sent, not the first one."""
    return faults(replace(fault, method="PUT", path=UPLOAD, skip=1, **more))  # type: ignore[arg-type]


def target_moves(method: str, path: str) -> Callable[[Stage], object]:
    """Somebody commits to the target at the first request of a kind."""
    return lambda stage: stage.meanwhile(method, path, lambda: stage.town.commit(TARGET, "theirs.txt", b"1"))


def model_moves(stage: Stage) -> None:
    """The branch of a model gets other weights, which cannot be read, while it is read."""

    def act() -> None:
        stage.town.api.upload_file(
            path_or_fileobj=b"others", path_in_repo="model.safetensors", repo_id="local/a", revision=MOVING
        )

    stage.meanwhile("GET", WEIGHTS, act)


def withdrawn(stage: Stage) -> None:
    """A model of somebody else is made private while it is read, and addresses expire."""
    stage.meanwhile("GET", WEIGHTS, lambda: stage.town.hub.set_private("mallory/b", True))
    stage.add(Fault.expired_url(times=ALWAYS, skip=HEADERS))


def busy(stage: Stage) -> None:
    """The repository and its branch are there, and a branch that only looks like one of ours."""
    stage.town.api.create_repo(TARGET, private=True)
    stage.town.api.create_branch(TARGET, branch="hubmerge/stage-by-hand")


LOGIN_PAGE = "<html>Please log in to the network</html>"
RATE_LIMIT = Fault.rate_limited(reset_s=0)
CELLS = [
    Cell("429 with `RateLimit`", "reading", reads(RATE_LIMIT), "waits as long as it is asked to, then reads on"),
    Cell("429 with `RateLimit`", "uploading", uploads(RATE_LIMIT), "waits as long as it is asked to, then sends again"),
    Cell(
        "429 with `RateLimit`, longer than 330 s",
        "reading",
        reads(Fault.rate_limited(reset_s=3000), times=ALWAYS),
        "ends at once and says how long",
        1,
        ("asks to wait 3001 s",),
    ),
    Cell(
        "429 with `RateLimit`, longer than 330 s",
        "uploading",
        faults(replace(Fault.rate_limited(reset_s=3000, times=ALWAYS), method="POST", path=COMMIT)),
        "ends at once; the shards are staged",
        1,
        (f"cannot commit to {TARGET}@main", "HTTP 429"),
        keeps=True,
    ),
    Cell(
        "500, 502, 503, passing",
        "reading",
        faults(*(Fault("GET", WEIGHTS, skip=HEADERS, status=status) for status in (500, 502, 503))),
        "tries again, with longer and longer pauses",
    ),
    Cell(
        "500, 502, 503, passing",
        "uploading",
        uploads(*(Fault(status=status) for status in (500, 502, 503))),
        "tries again, with longer and longer pauses",
    ),
    Cell(
        "503, for good",
        "reading",
        reads(Fault(status=503), times=ALWAYS),
        "ends after six attempts without progress",
        1,
        ("could not be read from 127.0.0.1", "HTTP 503"),
    ),
    Cell(
        "503, for good",
        "uploading",
        sending(Fault(status=503), times=ALWAYS),
        "ends after six attempts; finished shards are staged",
        1,
        ("cannot upload", "HTTP 503"),
        keeps=True,
    ),
    Cell("reset before headers", "reading", reads(Fault(reset=True), times=2), "tries again"),
    Cell(
        "reset before headers",
        "uploading",
        uploads(Fault(reset=True)),
        "tries again; before the final commit is sent again, looks whether it has landed",
    ),
    Cell(
        "reset mid-body",
        "reading",
        reads(Fault(reset_after_bytes=30_000), times=2),
        "goes on at the byte where it broke off",
    ),
    Cell("reset mid-body", "uploading", sending(Fault(reset_upload_after_bytes=30_000)), "sends the shard again"),
    Cell(
        "short read",
        "reading",
        reads(Fault(truncate_after_bytes=30_000), times=2),
        "goes on at the byte where it broke off",
    ),
    Cell(
        "short read",
        "uploading",
        faults(*(Fault("POST", path, truncate_after_bytes=5) for path in (STAGE, COMMIT))),
        "the reply is cut: stages again; finds the final commit in the history, and does not send it twice",
    ),
    Cell(
        "stall",
        "reading",
        reads(Fault(stall_after_bytes=30_000), times=2),
        "gives up the connection after 60 s of silence and goes on at that byte",
    ),
    Cell(
        "stall",
        "uploading",
        sending(Fault(stall_upload_after_bytes=30_000)),
        "gives up the connection after 60 s of silence and sends again",
    ),
    Cell(
        "stall",
        "uploading",
        uploads(Fault(stall_after_bytes=0)),
        "the same when only the reply does not come; looks whether the final commit has landed",
        name="stalled reply",
    ),
    Cell("slow drip", "reading", reads(Fault(rate_bytes_s=200_000), times=ALWAYS), "reads as slowly as bytes come"),
    Cell("slow drip", "uploading", sending(Fault(upload_rate_bytes_s=200_000), times=ALWAYS), "sends as slowly"),
    Cell(
        "403 on an expired address",
        "reading",
        reads(Fault.expired_url()),
        "asks the Hub for a new address, once for all readers of the file",
    ),
    Cell(
        "403 on an expired address",
        "uploading",
        sending(Fault(status=403, body=EXPIRED_BODY)),
        "asks the Hub for a new address",
    ),
    Cell(
        "403 on every address",
        "reading",
        reads(Fault.expired_url(), times=ALWAYS),
        "ends after six attempts",
        1,
        ("the download address is no longer valid",),
    ),
    Cell(
        "403 on every address",
        "uploading",
        sending(Fault(status=403, body=EXPIRED_BODY), times=ALWAYS),
        "ends after the second; finished shards are staged",
        1,
        ("cannot upload", "HTTP 403"),
        keeps=True,
    ),
    Cell(
        "416",
        "reading",
        reads(Fault(status=416), times=ALWAYS),
        "ends at once: the file is not what its listing says",
        1,
        ("HTTP 416", "The file on the server is not what its listing says"),
    ),
    Cell(
        "416",
        "uploading",
        sending(Fault(status=416), times=ALWAYS),
        "no upload names a range; whatever storage refuses twice ends the run",
        1,
        ("cannot upload", "HTTP 416"),
        keeps=True,
    ),
    Cell(
        "200 instead of 206",
        "reading",
        reads(Fault(ignore_range=True), times=2),
        "takes nothing of it and tries again; ends after six attempts",
    ),
    Cell(
        "200 instead of 206",
        "uploading",
        faults(Fault("POST", COMMIT, status=200, body=LOGIN_PAGE, times=ALWAYS)),
        "an answer that is not the Hub's (a login page): looks whether the commit has landed, and ends",
        1,
        (f"cannot commit to {TARGET}@main",),
        keeps=True,
    ),
    Cell("gzip'd body", "reading", reads(Fault(gzip=True), times=2), "takes nothing of it and tries again"),
    Cell("gzip'd body", "uploading", faults(Fault("POST", "/commit/", gzip=True, times=ALWAYS)), "reads the reply"),
    Cell(
        "wrong bytes",
        "reading",
        faults(Fault("GET", "/local/a/resolve/.*/config.json", corrupt_at=3, times=ALWAYS)),
        "small files: ends, their digest is in the commit",
        1,
        ("config.json", "do not have the digest of the commit"),
        name="wrong bytes in a small file",
    ),
    Cell(
        "wrong bytes",
        "reading",
        faults(Fault("GET", WEIGHTS, corrupt_at=8, times=ALWAYS)),
        "headers: ends, they are checked before anything is allocated",
        1,
        ("not a sound safetensors file",),
        name="wrong bytes in a header",
    ),
    Cell(
        "wrong bytes",
        "reading",
        reads(Fault(corrupt_at=40_000)),
        "weights: ends when the file has come by and does not have its digest, and keeps nothing of that run",
        1,
        ("the bytes received do not have the digest of the commit", "nothing made of them is kept"),
        name="wrong bytes in weights",
    ),
    Cell(
        "wrong bytes",
        "uploading",
        sending(Fault(corrupt_upload_at=30_000)),
        "storage refuses what has not its digest: sends again",
    ),
    Cell(
        "wrong ETag",
        "reading",
        faults(Fault("HEAD", "/resolve/.*safetensors", etag="f" * 64, times=ALWAYS)),
        "ends: the server contradicts its listing",
        1,
        ("but served with", "etag ffff"),
    ),
    Cell("wrong ETag", "uploading", sending(Fault(etag="f" * 64), times=ALWAYS), "is not used: the digest decides"),
    Cell(
        "a revision that moves while reading",
        "reading",
        model_moves,
        "reads the commit that was pinned at the start",
    ),
    Cell(
        "a revision that moves while reading",
        "uploading",
        target_moves("PUT", UPLOAD),
        "of the target: see the next row",
        1,
        (f"{TARGET}@main moved from",),
        keeps=True,
    ),
    Cell(
        "stale parent",
        "uploading",
        target_moves("POST", STAGE),
        "ends, nothing is committed; the same command, given again, publishes on top of the new commit",
        1,
        (f"{TARGET}@main moved from", "nothing was committed"),
        keeps=True,
    ),
    Cell("a branch that already exists", "uploading", busy, "is published to; other branches are left alone"),
    Cell(
        "lost permission mid-run",
        "reading",
        withdrawn,
        "ends when the next address is asked for",
        4,
        ("mallory/b does not exist, or is private",),
    ),
    Cell(
        "lost permission mid-run",
        "uploading",
        faults(Fault("POST", STAGE, status=403, skip=2, times=ALWAYS, body='{"error": "read-only token"}')),
        "ends; what is staged waits until the permission is back",
        4,
        ("permission denied", "a token with write permission"),
        keeps=True,
    ),
]

# Rows of the table with tests of their own, in test_fault_matrix.py.
OTHERS = (
    ("any one request", "–", "tries again, each kind of request that a push makes"),
    (
        "two pushers to one target",
        "–",
        "of one plan: they share the work, and there is one commit; "
        "of different ones: the first to commit wins, the other ends (exit 1) with its shards staged",
    ),
    (
        "no room on the temporary disk",
        "–",
        "room for one shard is looked for before anything is read, and reserved before it is written; ends (exit 1)",
    ),
    ("no room for the output", "–", "the same for a folder; ends (exit 1), finished files are kept beside it"),
)


def table() -> str:
    """The matrix, in Markdown."""
    rows: dict[str, dict[str, list[str]]] = {}
    for cell in CELLS:
        code = f" (exit {cell.code})" if cell.code else ""
        rows.setdefault(cell.fault, {}).setdefault(cell.way, []).append(cell.seen + code)
    lines = [
        (fault, *("; ".join(ways.get(way, "–")) for way in ("reading", "uploading"))) for fault, ways in rows.items()
    ]
    head = (("fault", "while reading", "while uploading and publishing"), ("---",) * 3)
    return "".join(f"| {' | '.join(line)} |\n" for line in (*head, *lines, *OTHERS))
