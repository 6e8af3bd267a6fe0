"""The canvas in Redis: what the application reads and writes there."""

import os
import time
from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

from pixel.canvas import Canvas, locate
from pixel.commit import GroupCommit
from pixel.lifetime import RedisClock, StartLimit
from pixel.link import Link
from pixel.problems import Problem
from pixel.resp import ReplyError, Server
from pixel.settings import Settings
from pixel.stream import EVENTS, NO_EVENT, EventId

EVENTS_AT_ONCE = 1000
"""Most entries that are read together."""

VIEWERS_PERIOD = 10
"""Seconds within which a worker says again how many viewers it has, or they count no longer."""

_NEWEST = ("XREVRANGE", EVENTS, "+", "-", "COUNT", 1)


class Events(NamedTuple):
    """Records of changes, as ``pixel.pack`` makes them, and the last event that is among them.

    If they aren't complete, the canvas has to be fetched anew, and what follows is what comes
    after ``last``.
    """

    last: EventId
    records: list[bytes]
    complete: bool


def _only_id(entries: list[Any]) -> EventId:
    return EventId.parse(entries[0][0]) if entries and entries[0] else NO_EVENT


class Store:
    """What the application asks of Redis. Made inside the event loop that uses it.

    Every method raises a 503 ``Problem`` if Redis doesn't do what it is asked for in time.
    """

    def __init__(self, settings: Settings) -> None:
        server = Server.of(settings)
        self._worker = f"{settings.instance}/{os.getpid()}"
        self.canvas = Canvas(settings.canvas_width, settings.canvas_height)
        self._clock = RedisClock()
        self._commits = GroupCommit(server, settings, self._clock, self._worker)
        # Pictures are megabytes, and waiting is waiting: neither is to hold up a small question.
        self._questions, self._pictures, self._waiting = (
            Link(server, settings.redis_timeout) for _ in range(3)
        )
        self.write = self._commits.write
        self.start_limit = StartLimit(self._clock, settings)

    def close(self) -> None:
        """Let go of Redis."""
        self._commits.close()
        for link in (self._questions, self._pictures, self._waiting):
            link.close()

    async def probe(self) -> float:
        """How long a write takes now, in seconds, by one that changes nothing."""
        started = perf_counter()
        await self.write(())
        return perf_counter() - started

    async def colour(self, x: int, y: int) -> tuple[int, int, int]:
        """Red, green and blue of a pixel, 0-255 each."""
        key, place = locate(x, y)
        [found] = await self._questions.ask(("GETRANGE", key, place, place + 2))
        red, green, blue = found.ljust(3, b"\0")
        return red, green, blue

    async def count_viewers(self, viewers: int) -> int:
        """Say how many viewers this worker has; returns how many all workers together have."""
        period = int(time.time()) // VIEWERS_PERIOD
        former, current = (f"pixel:{{viewers}}:{n}" for n in (period - 1, period))
        _, _, *said = await self._questions.ask_at_once(
            ("HSET", current, self._worker, viewers),
            ("EXPIRE", current, 2 * VIEWERS_PERIOD),
            ("HGETALL", former),
            ("HGETALL", current),
        )
        counts: dict[bytes, bytes] = {}
        for pairs in said:
            counts |= dict(zip(pairs[::2], pairs[1::2], strict=True))
        return sum(map(int, counts.values()))

    async def last_event(self) -> EventId:
        """The newest event; ``NO_EVENT`` if there was none yet."""
        [newest] = await self._questions.ask(_NEWEST)
        return _only_id(newest)

    async def snapshot(self, keys: Sequence[str]) -> tuple[EventId, list[bytes | None]]:
        """Tiles, and the event at which they stand: with the events after it they are today's."""
        newest, *tiles = await self._pictures.ask_at_once(_NEWEST, *(("GET", key) for key in keys))
        if any(isinstance(tile, ReplyError) for tile in tiles):
            raise Problem.unavailable("Redis refuses to be read.")
        return _only_id(newest), tiles

    async def events(self, after: EventId) -> Events:
        """The next events, some hundred at most, or the news that some of them are gone."""
        found, stream = await self._questions.ask_at_once(
            ("XRANGE", EVENTS, b"(" + after.text(), "+", "COUNT", EVENTS_AT_ONCE),
            ("XINFO", "STREAM", EVENTS),
        )
        if isinstance(stream, ReplyError):  # There is no stream yet, or no longer.
            return Events(NO_EVENT, [], complete=after == NO_EVENT)
        facts = dict(zip(stream[::2], stream[1::2], strict=True))
        last = EventId.parse(facts[b"last-generated-id"])
        trimmed = facts[b"entries-added"] > facts[b"length"]
        # ``after`` may lie ahead, when Redis has come back with less than it had.
        if after > last or (trimmed and after < _only_id([facts[b"first-entry"]])):
            return Events(last, [], complete=False)
        records = [record for _, (_, record) in found]
        return Events(_only_id(found[-1:]) if found else after, records, complete=True)

    async def wait_for_event(self, after: EventId, seconds: float) -> None:
        """Return when there is an event after the one given, or after some seconds."""
        await self._waiting.ask(
            ("XREAD", "COUNT", 1, "BLOCK", round(seconds * 1000), "STREAMS", EVENTS,
             after.text()),
            patience=seconds,
        )  # fmt: skip
