"""Uploading: how each file is to be sent, the git-lfs batch protocol, receiving the bytes, and the way to xet."""

from __future__ import annotations

import asyncio
import math
import re
import time
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from hubmerge.localhub.errors import HubError, bad_request
from hubmerge.localhub.http import Call
from hubmerge.localhub.objects import DigestMismatchError, ObjectWriter
from hubmerge.localhub.patterns import IgnoreRules, LfsRules
from hubmerge.localhub.repos import Repo

WRITE_BYTES = 4 << 20
MAX_PARTS = 10_000
XET_TTL_S = 3600
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _target(call: Call, revision: str | None, *, pull_request: bool) -> Repo:
    """The repository, if the caller may upload towards ``revision``."""
    repos, name = call.core.repos, call.params["repo"]
    if pull_request or revision is None or revision.startswith("refs/pr/"):
        return repos.contributable(call.kind, name, call.identity)[0]
    return repos.writable(call.kind, name, call.identity)[0]


def _sized(items: Any, key: str) -> list[tuple[str, int]]:
    """Names and sizes from a request's list of objects."""
    try:
        return [(str(item[key]), int(item["size"])) for item in items]
    except (KeyError, TypeError, ValueError) as error:
        raise bad_request(f"Expected a list of objects with {key} and size: {error!r}") from error


def preupload(call: Call) -> Response:
    """``POST …/preupload/{rev}``: which files are large, which are ignored, which are there already."""
    core, revision, body = call.core, call.params["rev"], call.json()
    repo = _target(call, revision, pull_request=call.flag("create_pr"))
    commit = core.history.resolve(repo, revision)
    ignore_text = body.get("gitIgnore")
    if ignore_text is None:
        ignore_text = core.text(repo, commit, ".gitignore") or ""
    ignored = IgnoreRules(ignore_text)
    large = LfsRules(core.text(repo, commit, ".gitattributes") or "")
    answers: list[dict[str, Any]] = []
    for path, size_bytes in _sized(body.get("files"), "path"):
        lfs = size_bytes > 0 and (size_bytes >= core.config.lfs_threshold_bytes or large.matches(path))
        current = core.history.find(repo, commit, path)
        answers.append(
            {
                "path": path,
                "uploadMode": "lfs" if lfs else "regular",
                "shouldIgnore": ignored.matches(path),
                "oid": current.etag if current else None,
            }
        )
    return JSONResponse({"files": answers, "commitOid": commit})


def batch(call: Call) -> Response:
    """``POST /{repo}.git/info/lfs/objects/batch``: where to send, or fetch, each object."""
    body = call.json()
    revision = str((body.get("ref") or {}).get("name") or "") or None
    if body.get("operation") != "upload":
        raise bad_request(f"Unsupported LFS operation: {body.get('operation')!r}")
    repo = _target(call, revision, pull_request=False)
    objects = _sized(body.get("objects"), "oid")
    parts_allowed = "multipart" in body.get("transfers", ["basic"])
    part_size = call.core.config.part_size_bytes
    parts = parts_allowed and any(size > part_size for _, size in objects)
    answers = [_instructions(call, repo, oid, size, parts_allowed=parts_allowed) for oid, size in objects]
    return JSONResponse({"transfer": "multipart" if parts else "basic", "objects": answers})


def _instructions(call: Call, repo: Repo, oid: str, size_bytes: int, *, parts_allowed: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"oid": oid, "size": size_bytes}
    if not _SHA256.fullmatch(oid) or size_bytes < 0:
        return answer | {"error": {"code": 422, "message": f"Invalid object: {oid[:64]!r}, {size_bytes} bytes"}}
    if call.core.history.has_object(repo, oid) and call.core.objects.size_bytes(oid) == size_bytes:
        return answer
    path, signer, base = f"/_lfs/{repo.key}/{oid}", call.core.signer, call.cdn_url
    part_size = call.core.config.part_size_bytes
    if not parts_allowed or size_bytes <= part_size:
        upload: dict[str, Any] = {"href": base + signer.sign(path, {"size": size_bytes})}
    else:
        count = math.ceil(size_bytes / part_size)
        if count > MAX_PARTS:
            message = f"{size_bytes} bytes need {count} parts of {part_size} bytes; at most {MAX_PARTS} are possible"
            return answer | {"error": {"code": 422, "message": message}}
        header = {"chunk_size": str(part_size)}
        for number in range(1, count + 1):
            length = min(part_size, size_bytes - (number - 1) * part_size)
            header[f"{number:05d}"] = base + signer.sign(f"{path}/{number}", {"length": length})
        href = call.base_url + signer.sign(f"{path}/complete", {"size": size_bytes, "part_size": part_size})
        upload = {"href": href, "header": header}
    verify = {"href": f"{call.base_url}/{repo.url_path}.git/info/lfs/verify"}
    return answer | {"actions": {"upload": upload, "verify": verify}}


def verify(call: Call) -> Response:
    """``POST /{repo}.git/info/lfs/verify``: whether an object arrived."""
    body = call.json()
    repo = call.core.repos.contributable(call.kind, call.params["repo"], call.identity)[0]
    sha256, size_bytes = str(body.get("oid")), body.get("size")
    if not call.core.history.has_object(repo, sha256) or call.core.objects.size_bytes(sha256) != size_bytes:
        raise HubError(404, f"Object {sha256[:64]} of {size_bytes} bytes is not in the store")
    return JSONResponse({"oid": sha256, "size": size_bytes})


def xet_token(call: Call) -> Response:
    """``GET …/xet-write-token/{rev}[?create_pr=1]``: where the xet storage is, and access to it."""
    _target(call, None if call.flag("create_pr") else call.params["rev"], pull_request=False)
    store = call.core.xet
    if store is None:
        raise HubError(404, "This server has no xet storage")
    expires = int(time.time()) + XET_TTL_S
    headers = {"X-Xet-Cas-Url": store.url, "X-Xet-Access-Token": "local", "X-Xet-Token-Expiration": str(expires)}
    return JSONResponse({"casUrl": store.url, "accessToken": "local", "exp": expires}, headers=headers)


async def _receive(call: Call, writer: ObjectWriter, limit_bytes: int) -> None:
    """Stream the body into ``writer``; a thread hashes and writes one block while the next one arrives."""
    pending: asyncio.Task[None] | None = None
    block = bytearray()
    try:
        async for chunk in call.request.stream():
            block += chunk
            if len(block) < WRITE_BYTES:
                continue
            if pending is not None:
                await pending
            if writer.size_bytes + len(block) > limit_bytes:
                raise bad_request(f"More than the announced {limit_bytes} bytes were sent")
            pending = asyncio.create_task(asyncio.to_thread(writer.write, block))
            block = bytearray()
    finally:
        if pending is not None:
            await pending  # the file must not be closed under the thread that writes to it
    await asyncio.to_thread(writer.write, block)


async def upload(call: Call) -> Response:
    """``PUT /_lfs/{key}/{sha256}``: a whole object."""
    core = call.core
    size_bytes = int(core.signer.check(call.path, call.request.url.query)["size"])
    writer = core.objects.writer()
    try:
        await _receive(call, writer, size_bytes)
    except (ClientDisconnect, HubError, OSError, asyncio.CancelledError):
        writer.abort()
        raise

    def finish() -> None:
        try:
            writer.commit(sha256=call.params["sha256"], size_bytes=size_bytes)
        except DigestMismatchError as error:
            raise bad_request(f"The content does not match its announced hash: {error}") from error
        core.history.add_object(int(call.params["key"]), call.params["sha256"])

    await asyncio.to_thread(finish)
    return Response(status_code=200, headers={"ETag": f'"{call.params["sha256"]}"'})


async def upload_part(call: Call) -> Response:
    """``PUT /_lfs/{key}/{sha256}/{number}``: one part of an object."""
    core = call.core
    length = int(core.signer.check(call.path, call.request.url.query)["length"])
    writer = core.objects.writer()
    try:
        await _receive(call, writer, length)
        if writer.size_bytes != length:
            raise bad_request(f"A part of {length} bytes was announced, {writer.size_bytes} bytes came")
    except (ClientDisconnect, HubError, OSError, asyncio.CancelledError):
        writer.abort()
        raise
    etag = writer.sha256
    await asyncio.to_thread(writer.keep_part, call.params["sha256"], int(call.params["number"]))
    return Response(status_code=200, headers={"ETag": f'"{etag}"'})


def complete(call: Call) -> Response:
    """``POST /_lfs/{key}/{sha256}/complete``: join the parts."""
    core, sha256 = call.core, call.params["sha256"]
    query = core.signer.check(call.path, call.request.url.query)
    size_bytes, part_size = int(query["size"]), int(query["part_size"])
    count = math.ceil(size_bytes / part_size)
    numbers = [part.get("partNumber") for part in call.json().get("parts", []) if isinstance(part, dict)]
    if numbers != list(range(1, count + 1)):
        raise bad_request(f"Parts 1 to {count} are expected, got {numbers[:20]}")
    parts = [
        core.objects.part_path(sha256, number, min(part_size, size_bytes - (number - 1) * part_size))
        for number in range(1, count + 1)
    ]
    if core.objects.size_bytes(sha256) is None:
        try:
            core.objects.assemble(sha256, size_bytes, parts)
        except FileNotFoundError as error:
            raise bad_request("A part was never uploaded") from error
        except DigestMismatchError as error:
            raise bad_request(f"The content does not match its announced hash: {error}") from error
    core.history.add_object(int(call.params["key"]), sha256)
    return JSONResponse({"success": True})
