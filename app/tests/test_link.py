"""Links to Redis, against a server that answers slowly."""

import asyncio

import pytest

from pixel.cluster import Redis
from pixel.link import Link
from pixel.problems import Problem
from pixel.settings import Settings

REPLY = b"$200\r\n" + b"x" * 200 + b"\r\n"


class SlowServer:
    """Answers a greeting at once, and every other command within a second, piece by piece."""

    def __init__(self, *, silent: bool = False) -> None:
        self.silent = silent
        self.drops = 0
        """How many of the next commands break their connections."""
        self.connections = 0

    async def __aenter__(self) -> "SlowServer":
        self._server = await asyncio.get_running_loop().create_server(lambda: _Client(self), "127.0.0.1", 0)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await asyncio.sleep(0.05)

    def link(self, timeout: float) -> Link:
        return Link(Redis(Settings(redis_url=f"redis://127.0.0.1:{self._port}")), timeout)


class _Client(asyncio.Protocol):
    def __init__(self, server: SlowServer) -> None:
        self._server = server
        self._busy_until = 0.0

    def connection_made(self, transport: asyncio.WriteTransport) -> None:  # type: ignore[override]
        self._transport = transport
        self._server.connections += 1

    def data_received(self, data: bytes) -> None:
        if b"PING" in data:
            self._transport.write(b"+OK\r\n+PONG\r\n")
        elif self._server.drops:
            self._server.drops -= 1
            self._transport.abort()
        elif not self._server.silent:
            loop = asyncio.get_running_loop()
            at = max(self._busy_until, loop.time())
            for start in range(0, len(REPLY), 20):
                at += 0.1
                loop.call_at(at, self._transport.write, REPLY[start : start + 20])
            self._busy_until = at


async def test_a_late_reply_does_not_close_the_link_for_others() -> None:
    async with SlowServer() as server:
        link = server.link(0.3)
        large = asyncio.create_task(link.ask(("GET", "large"), blocking=5))
        await asyncio.sleep(0.2)
        with pytest.raises(Problem) as caught:
            await link.ask(("GET", "late"))
        assert caught.value.status == 503
        assert await large == [b"x" * 200]
        assert await link.ask(("GET", "next"), blocking=5) == [b"x" * 200]
        assert server.connections == 1
        link.close()


async def test_a_link_that_is_silent_is_opened_again() -> None:
    async with SlowServer(silent=True) as server:
        link = server.link(0.3)
        with pytest.raises(Problem):
            await link.ask(("GET", "lost"))
        server.silent = False
        assert await link.ask(("GET", "next"), blocking=5) == [b"x" * 200]
        assert server.connections == 2
        link.close()


async def test_a_read_is_repeated_if_its_connection_was_lost_before() -> None:
    async with SlowServer() as server:
        link = server.link(3)
        await link.ask(("GET", "a"))
        server.drops = 1
        assert await link.ask(("GET", "a")) == [b"x" * 200]
        assert server.connections == 2
        server.drops = 2
        with pytest.raises(Problem):
            await link.ask(("GET", "a"))
        link.close()
