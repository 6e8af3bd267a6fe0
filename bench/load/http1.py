"""A minimal HTTP/1.1 client for load generators: one request in flight per connection, no retries.

Answers are read by Content-Length, in chunks, or until the connection closes.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast
from urllib.parse import urlsplit

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: discard what was not sent yet


class BadAnswerError(Exception):
    """The answer is not HTTP/1.1."""


class ConnectError(OSError):
    """No connection could be made."""


class Answer(NamedTuple):
    status: int
    body: bytes
    reusable: bool
    instance: str = ""  # X-Pixel-Instance


@dataclass(frozen=True)
class Target:
    """The service under load: its address, and headers for every request."""

    host: str
    port: int
    base: str
    authority: str
    tls: ssl.SSLContext | None = None
    headers: Sequence[str] = ()

    @classmethod
    def parse(cls, url: str, headers: Sequence[str] = (), insecure: bool = False) -> Target:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not an http:// or https:// address")
        tls = None
        if parts.scheme == "https":
            tls = ssl.create_default_context()
            if insecure:
                tls.check_hostname = False
                tls.verify_mode = ssl.CERT_NONE
        for header in headers:
            if not header.partition(":")[1] or "\r" in header or "\n" in header:
                raise ValueError(f"{header!r} is not a header: write 'Name: value'")
        port = parts.port or (443 if tls else 80)
        base = parts.path.rstrip("/")
        authority = parts.netloc.rpartition("@")[2]
        return cls(parts.hostname, port, base, authority, tls, tuple(headers))

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.base}"

    def head(self, method: str, path: str) -> bytes:
        """Returns the request line and the headers that don't depend on the body."""
        lines = [f"{method} {self.base}{path} HTTP/1.1", f"Host: {self.authority}", *self.headers]
        return "".join(f"{line}\r\n" for line in lines).encode("latin-1")

    async def connect(
        self,
        answered: Callable[[Connection, Answer], None],
        lost: Callable[[Connection, Exception | None], None],
    ) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: Connection(answered, lost), self.host, self.port, ssl=self.tls
        )
        if connection.closed:
            raise ConnectionResetError("closed at once")
        return connection


class AnswerReader:
    """Parses answers from a stream of bytes."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._body = bytearray()
        self._in_head = True
        self._status = 0
        self._reusable = True
        self._instance = ""
        self._chunked = False
        self._wanted: int | None = 0  # None: until the connection closes

    def feed(self, data: bytes) -> Answer | None:
        self._data += data
        while self._in_head:
            if not self._read_head():
                return None
        if self._chunked:
            return self._complete() if self._read_chunks() else None
        if self._wanted is None or len(self._data) < self._wanted:
            return None
        self._body += self._data[: self._wanted]
        del self._data[: self._wanted]
        return self._complete()

    def end(self) -> Answer | None:
        """Returns the answer that ends with the connection, as it has no length; None if there is none."""
        if self._in_head or self._chunked or self._wanted is not None:
            return None
        self._body += self._data
        self._data.clear()
        return self._complete()

    def _complete(self) -> Answer:
        if self._data:
            raise BadAnswerError("more than one answer")
        answer = Answer(self._status, bytes(self._body), self._reusable, self._instance)
        self._body.clear()
        self._in_head = True
        return answer

    def _read_head(self) -> bool:
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            if len(self._data) > 65536:
                raise BadAnswerError("header too long")
            return False
        first, *fields = bytes(self._data[:end]).split(b"\r\n")
        del self._data[: end + 4]
        version, _, rest = first.partition(b" ")
        if version not in (b"HTTP/1.1", b"HTTP/1.0") or not rest[:3].isdigit():
            raise BadAnswerError(f"not an HTTP/1.1 answer: {first[:60]!r}")
        self._status = int(rest[:3])
        self._reusable = version == b"HTTP/1.1"
        self._instance = ""
        self._chunked = False
        self._wanted = 0 if self._status in (204, 304) else None
        for line in fields:
            name, _, value = line.partition(b":")
            match name.lower():
                case b"content-length":
                    if self._status not in (204, 304):
                        self._wanted = int(value)
                case b"transfer-encoding":
                    self._chunked = b"chunked" in value.lower()
                case b"connection":
                    self._reusable = value.strip().lower() != b"close"
                case b"x-pixel-instance":
                    self._instance = value.strip().decode("latin-1")
        if self._wanted is None and not self._chunked:
            self._reusable = False
        self._in_head = 100 <= self._status < 200  # an interim answer: the final one follows
        return True

    def _read_chunks(self) -> bool:
        while (end := self._data.find(b"\r\n")) >= 0:
            try:
                size = int(self._data[:end].partition(b";")[0], 16)
            except ValueError:
                raise BadAnswerError("a chunk without a size") from None
            if len(self._data) < end + 2 + size + 2:
                return False
            self._body += self._data[end + 2 : end + 2 + size]
            del self._data[: end + 2 + size + 2]
            if size == 0:
                return True
        return False


class Connection(asyncio.Protocol):
    """One connection. It calls its owner for each answer, and once when the connection is lost."""

    def __init__(
        self,
        answered: Callable[[Connection, Answer], None],
        lost: Callable[[Connection, Exception | None], None],
    ) -> None:
        self._answered = answered
        self._lost = lost
        self._reader = AnswerReader()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    @property
    def closed(self) -> bool:
        return self._transport is None

    def send(self, request: bytes) -> None:
        if self._transport is not None:  # else `lost` has been called
            self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        try:
            answer = self._reader.feed(data)
        except (BadAnswerError, ValueError) as error:
            self._end(error)
            return
        if answer is not None:
            self._answered(self, answer)

    def connection_lost(self, error: Exception | None) -> None:
        last = self._reader.end() if error is None else None
        if last is not None:
            self._answered(self, last)
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        if not self.closed:
            self.close()
            self._lost(self, error)

    def close(self) -> None:
        """Resets the connection without calling `lost`.

        Closed otherwise, it would still deliver a request that was given up, even minutes later when the
        network works again.
        """
        if self._transport is not None:
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self._transport.abort()
            self._transport = None


class Client:
    """Sends requests one at a time on a persistent connection."""

    def __init__(self, target: Target, timeout: float = 30.0) -> None:
        self._target = target
        self._timeout = timeout
        self._connection: Connection | None = None
        self._waiting: asyncio.Future[Answer] | None = None

    async def get(self, path: str) -> Answer:
        return await self.request("GET", path)

    async def request(self, method: str, path: str, body: bytes | None = None) -> Answer:
        """Sends one request and returns its answer.

        Args:
            method: the HTTP method.
            path: the path below the target's URL.
            body: a JSON document, or None.

        Raises:
            ConnectError: no connection was made, so nothing was sent.
            OSError: the connection was lost before the answer was complete.
            BadAnswerError, ValueError: the answer is not HTTP/1.1.
            TimeoutError: no answer within the client's timeout.
        """
        head = self._target.head(method, path)
        if body is not None:
            head += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
        deadline = asyncio.get_running_loop().time() + self._timeout
        try:
            connection = self._connection or await self._connect(deadline)
            async with asyncio.timeout_at(deadline):
                self._waiting = asyncio.get_running_loop().create_future()
                connection.send(head + b"\r\n" + (body or b""))
                answer = await self._waiting
        except BaseException:
            self.close()  # a late answer must not be read as the next one
            raise
        if not answer.reusable:
            self.close()
        return answer

    async def _connect(self, deadline: float) -> Connection:
        try:
            async with asyncio.timeout_at(deadline):
                self._connection = await self._target.connect(self._answered, self._lost)
        except OSError as error:  # includes TimeoutError
            raise ConnectError(*error.args) from error
        return self._connection

    def _answered(self, _: Connection, answer: Answer) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(answer)

    def _lost(self, _: Connection, error: Exception | None) -> None:
        self._connection = None
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error or ConnectionResetError("closed before it answered"))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
