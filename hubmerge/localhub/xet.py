"""Xet storage, for clients in the server's own process: hf_xet's local store, in a folder that both of them open.

Large files come in without a request to this server, which takes them from there when a commit names them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from hubmerge.localhub.objects import ObjectStore

# The format of a shard, https://huggingface.co/docs/xet/shard: a header of 48 bytes, then records of the same length.
_RECORD_BYTES = 48
_HASH_BYTES = 32
_END = b"\xff" * _HASH_BYTES
_WITH_VERIFICATION, _WITH_SHA256 = 1 << 31, 1 << 30


class XetStore:
    """The storage below a folder."""

    def __init__(self, root: Path) -> None:
        root.mkdir(exist_ok=True)
        self.url = f"local://{root.absolute()}"
        self._shards = root / "xet" / "xorbs" / "shards"

    def bring(self, sha256: str, objects: ObjectStore) -> bool:
        """Copy a file into the object store; whether a client has put it here."""
        found = next((file for file in self._files() if file[0] == sha256), None)
        if found is None:
            return False
        import hf_xet

        _, xet_hash, size_bytes = found
        group = hf_xet.XetSession().new_download_stream_group(endpoint=self.url)
        writer = objects.writer()
        try:
            for chunk in group.download_stream(hf_xet.XetFileInfo(xet_hash, size_bytes)):
                writer.write(chunk)
        except BaseException:
            writer.abort()
            raise
        writer.commit(sha256=sha256, size_bytes=size_bytes)
        return True

    def _files(self) -> Iterator[tuple[str, str, int]]:
        """SHA-256, xet hash and size of every file."""
        for path in self._shards.glob("*.mdb"):
            yield from _files_of(path.read_bytes())


def _files_of(shard: bytes) -> Iterator[tuple[str, str, int]]:
    position = _RECORD_BYTES
    while (xet_hash := shard[position : position + _HASH_BYTES]) != _END:
        flags, count = struct.unpack_from("<II", shard, position + _HASH_BYTES)
        position += _RECORD_BYTES
        ranges = struct.iter_unpack("<32sIIII", shard[position : position + count * _RECORD_BYTES])
        size_bytes = sum(record[2] for record in ranges)
        position += count * _RECORD_BYTES * (2 if flags & _WITH_VERIFICATION else 1)
        if flags & _WITH_SHA256:
            yield _hex(shard[position : position + _HASH_BYTES]), _hex(xet_hash), size_bytes
            position += _RECORD_BYTES


def _hex(digest: bytes) -> str:
    """A digest as xet writes it: four numbers of 64 bits, each of which lies with its last byte first."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))
