"""A connection to Redis: sends pipelines and receives replies; nothing is sent a second time.

hiredis packs and parses. This module is small and knows the outcome of each command when the
connection is lost. redis-py could do this too, but its import alone takes 18 MB of each worker, a
third of its memory.
"""

import asyncio
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self, cast
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis

from pixel.settings import Settings

Command = tuple[str | bytes | int, ...]

# The function's real type; its annotation allows tuples of one element only.
_pack: Callable[[Command], bytes] = hiredis.pack_command  # type: ignore[assignment]

_INCOMPLETE = object()

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


_NOT_MASTER = ("MOVED ", "ASK ", "CLUSTERDOWN ", "TRYAGAIN ", "READONLY ", "MASTERDOWN ", "UNBLOCKED ")


class ReplyError(Exception):
    """An error reply of Redis; in the reply to a transaction, it stands for its command's result."""


class NotMasterError(ReplyError):
    """A node of a cluster is not the master of the canvas, or no longer; it has executed nothing."""


def _error(text: str) -> ReplyError:
    return NotMasterError(text) if text.startswith(_NOT_MASTER) else ReplyError(text)


@cache
def _tls_context(ca: str) -> ssl.SSLContext:
    """Reading the system's certificates takes 26 ms, so it is done once."""
    return ssl.create_default_context(cadata=ca or None)


@dataclass(frozen=True, slots=True)
class Server:
    """Address, database and user of Redis, and the certificates of its authorities (PEM)."""

    host: str
    port: int
    path: str
    tls: bool
    ca: str = field(repr=False)
    database: int
    username: str | None
    password: str | None = field(repr=False)

    @classmethod
    def of(cls, settings: Settings, address: str = "") -> Self:
        """The server at an address, by default ``PIXEL_REDIS_URL``: redis://, rediss:// (TLS) or unix://."""
        url = urlsplit(address or settings.redis_url)
        local = url.scheme == "unix"
        password = settings.redis_password
        database = parse_qs(url.query).get("db", ["0"])[0] if local else url.path.strip("/")
        return cls(
            host=url.hostname or "",
            port=url.port or 6379,
            path=unquote(url.path) if local else "",
            tls=url.scheme == "rediss",
            ca=settings.redis_ca,
            database=int(database or 0),
            username=settings.redis_username or (url.username and unquote(url.username)),
            password=password.get_secret_value() if password else None,
        )


class Connection(asyncio.Protocol):
    """One connection. Several pipelines may be in flight; they are answered in their order."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader(replyError=_error, notEnoughData=_INCOMPLETE)
        self._waiting: deque[tuple[int, list[Any], asyncio.Future[list[Any]]]] = deque()
        self._transport: asyncio.Transport
        self.closed = True
        self.epoch = 0
        """Configuration epoch of the master in a cluster; 0 if there is no cluster."""

    @classmethod
    async def open(cls, server: Server) -> Self:
        """Connect and log in.

        Raises OSError if the server can't be reached, ReplyError if it refuses the login or isn't
        ready yet (it loads its data after a start).
        """
        loop = asyncio.get_running_loop()
        if server.path:
            _, connection = await loop.create_unix_connection(cls, server.path)
        else:
            tls = _tls_context(server.ca) if server.tls else None
            _, connection = await loop.create_connection(cls, server.host, server.port, ssl=tls)
        greeting: list[Command] = [("SELECT", server.database), ("PING",)]
        if server.password is not None:
            greeting.insert(0, ("AUTH", server.username or "default", server.password))
        try:
            await connection.ask(*greeting)
        except BaseException:
            connection.close()
            raise
        return connection

    def execute(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """Send the commands at once; the future holds a reply for each.

        Errors of single commands are among the replies. The future raises ConnectionError when
        the connection is lost: the outcome of the commands is then unknown.
        """
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        if self.closed:
            future.set_exception(ConnectionError("the connection is closed"))
        else:
            self._waiting.append((len(commands), [], future))
            self._transport.write(b"".join(map(_pack, commands)))
        return future

    async def ask(self, *commands: Command) -> list[Any]:
        """As ``execute``; raises the ReplyError of the first command that is refused."""
        replies = await self.execute(commands)
        for reply in replies:
            if isinstance(reply, ReplyError):
                raise reply
        return replies

    def close(self, reason: str = "the connection was closed") -> None:
        """Close at once; waiting futures raise ConnectionError with the reason."""
        self._transport.abort()
        self._lose(ConnectionAbortedError(reason))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # When the connection ends, the kernel discards unsent data instead of sending it later.
        self._transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE
        )
        self.closed = False

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not _INCOMPLETE:
                count, replies, future = self._waiting[0]
                replies.append(reply)
                if len(replies) == count:
                    self._waiting.popleft()
                    if not future.done():
                        future.set_result(replies)
        except (hiredis.ProtocolError, IndexError):
            self.close("that is not Redis")

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(ConnectionResetError("the connection was lost"))

    def _lose(self, error: ConnectionError) -> None:
        self.closed = True
        while self._waiting:
            _, _, future = self._waiting.popleft()
            if not future.done():
                future.set_exception(error)
