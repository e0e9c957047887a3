"""Reading from the Hub: commits, file lists, small files, ranged sources, the local cache."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from hubmerge.errors import AccessError, IntegrityError, SourceError
from hubmerge.hub.connection import Connection
from hubmerge.hub.identity import JobToken
from hubmerge.io.http import HttpSource, Location, RetryPolicy
from hubmerge.io.local import sha256_of
from hubmerge.spec import FileSpec

SMALL_FILE_BYTES = 32_000_000
_SHORT = 7


class Reader(Connection):
    """The reading half of ``Hub``; every method is safe to call from several threads."""

    def __init__(
        self,
        endpoint: str | None = None,
        token: str | bool | JobToken | None = None,
        *,
        cache_dir: Path | None = None,
        policy: RetryPolicy | None = None,
    ) -> None:
        super().__init__(endpoint, token, cache_dir=cache_dir, policy=policy)
        self._lock = threading.Lock()
        self._listings: dict[tuple[str, str], tuple[FileSpec, ...]] = {}
        self._locators: dict[tuple[str, str, str], _Locator] = {}

    def pin(self, repo: str, revision: str | None = None) -> str:
        """The commit that a branch, tag or abbreviated commit stands for now.

        Raises:
            AccessError: The repository or the revision is missing or not accessible.
            TransportError: The Hub could not be reached; a stale answer from the cache is never used.
        """
        named = f"{repo}@{revision}" if revision else repo
        timeout_s = self.policy.read_timeout_s
        sha = self.call(
            f"find {named}", repo, lambda: self.api.model_info(repo, revision=revision, timeout=timeout_s).sha
        )
        if not sha:
            raise AccessError(f"cannot find {named}: the repository has no commit", hint="Push something to it first.")
        return sha

    def list_files(self, repo: str, commit: str) -> tuple[FileSpec, ...]:
        """All files of a commit, in the Hub's order; sha256 is known for large files, the git blob id for the others.

        Raises:
            AccessError: The repository or the commit is missing or not accessible.
            IntegrityError: A path that would leave the folder it is saved to.
        """
        key = (repo, commit)
        with self._lock:
            known = self._listings.get(key)
        if known is None:
            entries = self._tree(repo, commit)
            known = tuple(_file_spec(repo, entry) for entry in entries if entry.get("type") == "file")
            with self._lock:
                self._listings[key] = known
        return known

    def read_small(self, repo: str, commit: str, path: str, max_bytes: int = SMALL_FILE_BYTES) -> bytes:
        """The whole of a small file, checked against its digest; from the cache if it is there.

        Raises:
            SourceError: No such file, or more than ``max_bytes``.
            IntegrityError: The bytes do not have the digest in the commit.
        """
        file = self.file(repo, commit, path)
        if file.size_bytes > max_bytes:
            raise SourceError(
                f"{_label(repo, commit, path)} has {file.size_bytes} bytes; at most {max_bytes} are read at once",
                hint="A configuration, tokenizer or card file is never that large; check the repository.",
            )
        cached = self.cached_path(repo, commit, path)
        if cached is not None:
            content = cached.read_bytes()
            if _has_digest(content, file):
                return content
        buffer = bytearray(file.size_bytes)
        self.open(repo, commit, file).read_into(0, memoryview(buffer))
        content = bytes(buffer)
        if not _has_digest(content, file):
            raise IntegrityError(
                f"{_label(repo, commit, path)}: the bytes received do not have the digest of the commit",
                hint="A proxy may have changed them; try another network or endpoint.",
            )
        return content

    def sha256(self, repo: str, commit: str, file: FileSpec) -> str:
        """Digest of a file's content; only of a small one is the content read for it."""
        return file.sha256 or hashlib.sha256(self.read_small(repo, commit, file.path)).hexdigest()

    def open(self, repo: str, commit: str, file: FileSpec) -> HttpSource:
        """A source for ranged reads; the Hub is asked for the file's location once, at the first read."""
        key = (repo, commit, file.path)
        with self._lock:
            locator = self._locators.get(key)
            if locator is None:
                locator = self._locators[key] = _Locator(lambda: self._locate(repo, commit, file))
        return HttpSource(
            locator,
            self.session,
            label=_label(repo, commit, file.path),
            size_bytes=file.size_bytes,
            policy=self.policy,
            traffic=self.traffic,
        )

    def cached_path(self, repo: str, commit: str, path: str) -> Path | None:
        """The file in the Hugging Face cache; None if it is not there."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(repo, path, cache_dir=self.cache_dir, revision=commit)
        return Path(found) if isinstance(found, str) else None

    def download(self, repo: str, commit: str, path: str) -> Path:
        """Store a file in the Hugging Face cache, unless it is there, and return where.

        Raises:
            SourceError: No such file, or the disk is full.
            IntegrityError: The stored file has another size or digest than the commit says.
        """
        file = self.file(repo, commit, path)
        there = self.cached_path(repo, commit, path) is not None
        what = f"download {_label(repo, commit, path)}"
        stored = self.call(
            what, repo, lambda: Path(self.api.hf_hub_download(repo, path, revision=commit, cache_dir=self.cache_dir))
        )
        if stored.stat().st_size != file.size_bytes:
            raise IntegrityError(
                f"{stored} has {stored.stat().st_size} bytes, {repo} says {file.size_bytes}",
                hint="Delete the file and run again.",
            )
        # The client library compares sizes only. What was there before has been used before, and is not read again.
        if not there and file.sha256 is not None and sha256_of(stored) != file.sha256:
            for path_to_it in (stored.resolve(), stored):
                path_to_it.unlink(missing_ok=True)
            raise IntegrityError(
                f"{_label(repo, commit, path)}: the bytes received do not have the digest of the commit",
                hint="A proxy may have changed them; run the same command again, or try another network or endpoint.",
            )
        return stored

    def file(self, repo: str, commit: str, path: str) -> FileSpec:
        """The entry of one file.

        Raises:
            SourceError: No such file.
        """
        for file in self.list_files(repo, commit):
            if file.path == path:
                return file
        raise SourceError(
            f"{_label(repo, commit, path)} does not exist", hint=f"See {self.endpoint}/{repo}/tree/{commit}."
        )

    def _tree(self, repo: str, commit: str) -> list[dict[str, Any]]:
        """The commit's tree, page by page; each page is retried by itself."""
        what = f"list the files of {repo} at {commit[:_SHORT]}"
        url = f"{self.endpoint}/api/models/{repo}/tree/{quote(commit, safe='')}?recursive=true&expand=false"
        entries: list[dict[str, Any]] = []
        while url:
            page, url = self.call(what, repo, partial(self._page, url))
            entries += page
        return entries

    def _page(self, url: str) -> tuple[list[dict[str, Any]], str]:
        """One page of a listing, and the address of the next one, if any."""
        from huggingface_hub import hf_raise_for_status

        response = self.session().get(url, headers=self.headers())
        hf_raise_for_status(response)
        following = urlsplit(response.links.get("next", {}).get("url", ""))
        # Only path and query are taken over: a mirror may name the original host, and the token must not go there.
        return response.json(), urljoin(url, f"{following.path}?{following.query}") if following.path else ""

    def _locate(self, repo: str, commit: str, file: FileSpec) -> Location:
        """Ask where the file's bytes are; for a large file that is a signed address elsewhere."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(repo, file.path, revision=commit, endpoint=self.endpoint)
        timeout_s = self.policy.connect_timeout_s
        found = self.call(
            f"locate {_label(repo, commit, file.path)}",
            repo,
            lambda: get_hf_file_metadata(url, token=self.given_token(), timeout=timeout_s, endpoint=self.endpoint),
        )
        if found.size != file.size_bytes or (file.sha256 and found.etag != file.sha256):
            raise IntegrityError(
                f"{_label(repo, commit, file.path)}: listed with {file.size_bytes} bytes, sha256 {file.sha256}, "
                f"but served with {found.size} bytes, etag {found.etag}",
                hint="The server contradicts itself; if it is a mirror, try the Hub directly.",
            )
        headers = self.headers(authorized=self.is_own_origin(found.location))
        return Location(found.location, file.size_bytes, found.etag, headers)


class _Locator:
    """One file's current location, shared by all its readers: fetched once, and again only when it went stale."""

    def __init__(self, fetch: Callable[[], Location]) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()
        self._current: Location | None = None

    def __call__(self, stale: Location | None) -> Location:
        with self._lock:
            # Several readers may find the same address expired; the first one replaces it for all.
            if self._current is None or self._current is stale:
                self._current = self._fetch()
            return self._current


def _file_spec(repo: str, entry: dict[str, Any]) -> FileSpec:
    path = str(entry["path"])
    if not _is_safe(path):
        raise IntegrityError(
            f"{repo} has a file named {path!r}, which would lie outside the folder it is saved to",
            hint="Do not use this repository.",
        )
    lfs = entry.get("lfs")
    if lfs:
        return FileSpec(path, int(lfs["size"]), sha256=str(lfs["oid"]))
    return FileSpec(path, int(entry["size"]), git_sha1=str(entry["oid"]))


def _is_safe(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and not any(c in path for c in "\\\0:")


def _has_digest(content: bytes, file: FileSpec) -> bool:
    if len(content) != file.size_bytes:
        return False
    if file.sha256:
        return hashlib.sha256(content).hexdigest() == file.sha256
    blob = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
    blob.update(content)
    return blob.hexdigest() == file.git_sha1


def _label(repo: str, commit: str, path: str) -> str:
    return f"{repo}@{commit[:_SHORT]}/{path}"
