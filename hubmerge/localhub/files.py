"""Downloading: resolve addresses, byte ranges, and the signed addresses of large files."""

from __future__ import annotations

import mimetypes
import re
from pathlib import Path
from urllib.parse import quote

from starlette.responses import Response

from hubmerge.localhub.errors import HubError
from hubmerge.localhub.http import Call, FileResponse
from hubmerge.localhub.trees import Entry

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def parse_range(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """Half-open byte range of a ``Range`` header; ``None`` if the whole file is to be sent.

    Several ranges, other units and nonsense are answered with the whole file, as RFC 9110 allows.

    Raises:
        HubError: 416 if the range lies outside the file.
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        start, end = max(0, size_bytes - int(last)), size_bytes
    else:
        start, end = int(first), min(size_bytes, int(last) + 1) if last else size_bytes
        if last and int(last) < start:
            return None
    if start >= end:
        raise HubError(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size_bytes}"})
    return start, end


def file_response(call: Call, path: Path, size_bytes: int, headers: dict[str, str]) -> Response:
    """The file or the part of it that the request asks for."""
    headers["Accept-Ranges"] = "bytes"
    span = parse_range(call.request.headers.get("range"), size_bytes)
    if span is None:
        return FileResponse(path, 0, size_bytes, 200, headers)
    headers["Content-Range"] = f"bytes {span[0]}-{span[1] - 1}/{size_bytes}"
    return FileResponse(path, span[0], span[1], 206, headers)


def resolve(call: Call) -> Response:
    """``GET|HEAD /{repo}/resolve/{rev}/{path}``: small files at once, large ones by redirect."""
    core = call.core
    repo = core.repos.readable(call.kind, call.params["repo"], call.identity)
    commit = core.history.resolve(repo, call.params["rev"])
    entry = core.history.entry(repo, commit, call.params["path"])
    headers = {"X-Repo-Commit": commit, "ETag": f'"{entry.etag}"', "Content-Disposition": _disposition(entry)}
    if not entry.lfs:
        headers["Content-Type"] = mimetypes.guess_type(entry.path)[0] or "text/plain; charset=utf-8"
        return file_response(call, core.blob_path(entry), entry.size_bytes, headers)
    parameters = {"name": entry.path.rpartition("/")[2], "commit": commit}
    headers["Location"] = call.cdn_url + core.signer.sign(f"/_cdn/{entry.sha256}", parameters)
    headers["X-Linked-Etag"] = f'"{entry.sha256}"'
    headers["X-Linked-Size"] = str(entry.size_bytes)
    headers["Accept-Ranges"] = "bytes"
    return Response(status_code=302, headers=headers)


def cdn(call: Call) -> Response:
    """``GET|HEAD /_cdn/{sha256}``: a large file, to whoever has the signed address."""
    query = call.core.signer.check(call.path, call.request.url.query)
    sha256 = call.params["sha256"]
    size_bytes = call.core.objects.size_bytes(sha256)
    if size_bytes is None:
        raise HubError(404, "The object is gone from the server")
    # On the same origin the client follows a HEAD up to here and expects the file's metadata on this answer.
    headers = {
        "ETag": f'"{sha256}"',
        "X-Repo-Commit": query["commit"],
        "X-Linked-Etag": f'"{sha256}"',
        "X-Linked-Size": str(size_bytes),
        "Content-Type": "application/octet-stream",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(query['name'])}",
    }
    return file_response(call, call.core.objects.path(sha256), size_bytes, headers)


def _disposition(entry: Entry) -> str:
    return f"inline; filename*=UTF-8''{quote(entry.path.rpartition('/')[2])}"
