"""uvicorn's HTTP/1.1 protocol with two additions: zero-copy file bodies and deliberate connection resets."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, BinaryIO, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]

ZEROCOPY = "http.response.zerocopysend"
CONNECTION = "localhub.connection"


class _Span:
    """Stands in for bytes that the kernel will send, so that h11 can count them against Content-Length."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


class HubProtocol(H11Protocol):
    """One client connection.

    Offers applications the ASGI extension ``http.response.zerocopysend`` and, under ``localhub.connection``, the
    protocol itself, through which the fault middleware resets or closes the socket.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._lost = asyncio.Event()
        inner = cast("Callable[[Scope, Receive, Send], Awaitable[None]]", self.app)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async def extended_send(message: Message) -> None:
                if message["type"] == ZEROCOPY:
                    await self._send_file(message, send)
                else:
                    await send(message)

            scope["extensions"] = {ZEROCOPY: {}, CONNECTION: self}
            try:
                await inner(scope, receive, extended_send)
            except asyncio.CancelledError:  # the server stops and has no more time for this request
                self.transport.abort()
                self.cycle.disconnected = True

        self.app = cast("Any", app)

    async def _send_file(self, message: Message, send: Send) -> None:
        file: BinaryIO = message["file"]
        offset: int = message["offset"]
        count: int = message["count"]
        if self.cycle.disconnected or self.transport.is_closing():
            return
        if count and self.cycle.scope["method"] != "HEAD":
            self.conn.send_with_data_passthrough(h11.Data(data=cast("bytes", _Span(count))))
            try:
                sent = await self.loop.sendfile(self.transport, file, offset, count)
            except (OSError, RuntimeError):  # the client went away; asyncio says RuntimeError if it saw that first
                sent = -1
            if sent != count:  # or the file is shorter than promised: only a broken connection says so honestly
                self.transport.abort()
                await self.gone()
                return
        if not message.get("more_body", False):
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end of the connection."""
        super().connection_lost(exc)
        self._lost.set()

    async def gone(self, timeout_s: float | None = None) -> bool:
        """Wait until the connection has ended, at most ``timeout_s``, and say whether it has."""
        try:
            await asyncio.wait_for(self._lost.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def reset(self) -> None:
        """Drop the connection with a TCP RST, as a crashed server or a broken middlebox would."""
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def close(self) -> None:
        """Flush what was written, then close cleanly (FIN), however much body is still owed."""
        self.transport.close()
