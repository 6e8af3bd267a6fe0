"""Reads of single pixels that go to Redis together."""

import asyncio
from typing import Any

import pytest
from conftest import RedisServer

from pixel.cluster import Redis
from pixel.link import Link
from pixel.names import tile_key
from pixel.pixel import Change
from pixel.problems import Problem
from pixel.reads import Colour, PixelReads
from pixel.resp import Command
from pixel.store import Store


class CountingLink(Link):
    """Records the number of commands of each pipeline."""

    def __init__(self, redis_server: RedisServer) -> None:
        settings = redis_server.settings()
        super().__init__(Redis(settings), settings.redis_timeout)
        self.pipelines: list[int] = []

    async def ask_each(self, *commands: Command, blocking: float = 0) -> list[Any]:
        self.pipelines.append(len(commands))
        return await super().ask_each(*commands, blocking=blocking)


def ask(reads: PixelReads, x: int, y: int) -> asyncio.Future[Colour]:
    answer: asyncio.Future[Colour] = asyncio.get_running_loop().create_future()
    reads.submit(answer, x, y)
    return answer


async def test_reads_that_wait_together_go_together(redis_server: RedisServer) -> None:
    store = Store(redis_server.settings())
    await store.write([Change(x, x, 1, x) for x in range(200)])
    link = CountingLink(redis_server)
    reads = PixelReads(link)
    assert await ask(reads, 0, 0) == (0, 0, 0)
    assert link.pipelines == [1]
    first = [ask(reads, x, x) for x in range(100)]
    await asyncio.sleep(0)  # the first reads are in flight; the next ones wait for them
    await asyncio.sleep(0)
    others = [ask(reads, x, x) for x in range(100, 200)]
    assert await asyncio.gather(*first, *others) == [(0, x, 0) for x in range(200)]
    assert link.pipelines == [1, 100, 100]
    link.close()
    store.close()


async def test_a_tile_that_is_none_fails_by_itself(redis_server: RedisServer) -> None:
    store = Store(redis_server.settings())
    await store.write([Change(1, 1, 0, 7)])
    with redis_server.admin() as admin:
        admin.rpush(tile_key(1, 0), "not a tile")
    good, bad = store.colour(1, 1), store.colour(300, 1)
    assert await good == (7, 0, 0)
    with pytest.raises(Problem, match="refuses"):
        await bad
    store.close()


async def test_who_leaves_takes_nobody_along(redis_server: RedisServer) -> None:
    store = Store(redis_server.settings())
    await store.write([Change(1, 1, 0, 7)])
    leaving, staying = store.colour(1, 1), store.colour(1, 1)
    leaving.cancel()
    assert await staying == (7, 0, 0)
    store.close()


async def test_a_fault_of_ours_is_answered_and_the_next_has_its_turn(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    link = CountingLink(redis_server)
    reads = PixelReads(link)
    with monkeypatch.context() as patch:
        patch.setattr(link, "ask_each", lambda *_: 1 / 0)
        with pytest.raises(Problem, match="our fault"):
            await ask(reads, 1, 1)
    assert "reads failed" in caplog.text
    assert await ask(reads, 1, 1) == (0, 0, 0)
    link.close()
