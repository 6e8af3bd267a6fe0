"""The canvas in Redis: the application's reads and writes."""

import asyncio
import os
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

from pixel.budgets import Writer
from pixel.canvas import Canvas
from pixel.cluster import Redis
from pixel.commit import GroupCommit
from pixel.keys import Key, decode
from pixel.lifetime import RedisClock, StartLimit
from pixel.link import Link
from pixel.names import EVENTS, KEYS, KEYS_VERSION, MAINTENANCE, RESTRICTIONS, viewers_key
from pixel.pixel import RECORD_BYTES, Change
from pixel.problems import Answer, Problem
from pixel.reads import Colour, PixelReads
from pixel.resp import ReplyError
from pixel.settings import Settings
from pixel.stream import NO_EVENT, EventId

EVENTS_AT_ONCE = 256
"""Most events in one reply: 1.5 MB, as an event holds at most 1,024 changes of six bytes."""

VIEWERS_PERIOD = 10
"""Seconds within which a worker reports its viewers again; later they no longer count."""

_NEWEST = ("XREVRANGE", EVENTS, "+", "-", "COUNT", 1)


Submit = Callable[[Answer[EventId], Sequence[Change], float | None, Writer | None], None]
"""``GroupCommit.submit``, or checks before it."""

Check = Callable[[Sequence[Change], Writer | None], None]
"""Raises a ``Problem`` if a writer may not make changes; a readiness probe has none."""


class Events(NamedTuple):
    """Records of changes, as ``pixel.pack`` makes them, each with the ID of its event.

    ``last`` is the last event that they contain. If they are not complete, some events are no
    longer in the stream: fetch the canvas, and continue after ``last``.
    """

    last: EventId
    records: list[tuple[EventId, bytes]]
    complete: bool

    @property
    def changes(self) -> int:
        """The number of changes in all records."""
        return sum(len(record) for _, record in self.records) // RECORD_BYTES


def _only_id(entries: list[Any]) -> EventId:
    return EventId.of(entries[0]) if entries and entries[0] else NO_EVENT


class Store:
    """All Redis operations of the application. Create it inside the event loop that uses it.

    Every method raises a 503 ``Problem`` if Redis doesn't answer in time.
    """

    def __init__(self, settings: Settings) -> None:
        redis = Redis(settings)
        self._worker = f"{settings.instance}/{os.getpid()}"
        self.canvas = Canvas(settings.canvas_width, settings.canvas_height)
        self._clock = RedisClock()
        self._commits = GroupCommit(redis, settings, self._clock, self._worker)
        # Separate connections keep large and blocking reads from delaying small ones.
        self._questions, self._pictures, self._following, self._replays, self._keys = self._links = [
            *(Link(redis, settings.redis_timeout) for _ in range(4)),
            Link(redis, settings.redis_timeout, "keys"),
        ]
        self.submit: Submit = self._commits.submit
        """Writes changes, after the checks that there are (``check_writes``)."""
        self._checks: dict[str, Check] = {}
        self.budgets = self._commits.budgets
        self.now = self._clock.now
        self.read = PixelReads(self._questions).submit
        self.start_limit = StartLimit(self._clock, settings)

    def close(self) -> None:
        """Close all connections."""
        self._commits.close()
        for link in self._links:
            link.close()

    def check_writes(self, name: str, check: Check | None) -> None:
        """Set or remove the check of this name, which each write has to pass: it raises a ``Problem``.

        Without checks, a write costs what it costs without this method.
        """
        checks = {**self._checks, name: check}
        self._checks = {name: check for name, check in checks.items() if check}
        self.submit = self._submit_checked if self._checks else self._commits.submit

    def _submit_checked(
        self,
        answer: Answer[EventId],
        changes: Sequence[Change],
        begin_by: float | None,
        writer: Writer | None,
    ) -> None:
        for check in self._checks.values():
            check(changes, writer)
        self._commits.submit(answer, changes, begin_by, writer)

    def write(
        self, changes: Sequence[Change], begin_by: float | None = None, writer: Writer | None = None
    ) -> asyncio.Future[EventId]:
        """As ``submit``; the future is the answer."""
        answer: asyncio.Future[EventId] = asyncio.get_running_loop().create_future()
        self.submit(answer, changes, begin_by, writer)
        return answer

    def colour(self, x: int, y: int) -> asyncio.Future[Colour]:
        """As ``read``; the future is the answer."""
        answer: asyncio.Future[Colour] = asyncio.get_running_loop().create_future()
        self.read(answer, x, y)
        return answer

    async def probe(self) -> float:
        """Measure the seconds that a write takes now, with one that changes nothing."""
        started = perf_counter()
        await self.write(())
        return perf_counter() - started

    @property
    def replicas(self) -> int | None:
        """How many replicas have acknowledged this worker's last write; None if there is no cluster."""
        return self._commits.replicas

    async def maintenance(self) -> bytes | None:
        """The value of the key ``MAINTENANCE``."""
        [value] = await self._questions.ask(("GET", MAINTENANCE))
        return value  # type: ignore[no-any-return]

    async def count_viewers(self, viewers: int) -> int:
        """Report this worker's number of viewers; return the number of all workers."""
        # Redis' clock, as the hosts' clocks may differ.
        [(now, _)] = await self._questions.ask(("TIME",))
        period = int(now) // VIEWERS_PERIOD
        former, current = viewers_key(period - 1), viewers_key(period)
        _, _, *reported = await self._questions.ask_at_once(
            ("HSET", current, self._worker, viewers),
            ("EXPIRE", current, 2 * VIEWERS_PERIOD),
            ("HGETALL", former),
            ("HGETALL", current),
        )
        counts: dict[bytes, bytes] = {}
        for pairs in reported:
            counts |= dict(zip(pairs[::2], pairs[1::2], strict=True))
        return sum(map(int, counts.values()))

    async def keys_version(self) -> bytes | None:
        """A value that differs after each change of a key or a restriction; None before the first one."""
        [version] = await self._keys.ask(("GET", KEYS_VERSION))
        return version  # type: ignore[no-any-return]

    async def keys(self) -> tuple[bytes | None, dict[str, Key], bytes | None]:
        """The version, the keys by name, and the value of the key ``RESTRICTIONS``."""
        version, pairs, restrictions = await self._keys.ask_at_once(
            ("GET", KEYS_VERSION), ("HGETALL", KEYS), ("GET", RESTRICTIONS)
        )
        return version, decode(pairs), restrictions

    async def last_event(self) -> EventId:
        """The newest event; ``NO_EVENT`` if there is none yet."""
        [newest] = await self._questions.ask(_NEWEST)
        return _only_id(newest)

    async def snapshot(self, keys: Sequence[str]) -> tuple[EventId, list[bytes | None]]:
        """Some tiles and the event of this snapshot; apply later events to it."""
        newest, *tiles = await self._pictures.ask_at_once(_NEWEST, *(("GET", key) for key in keys))
        if any(isinstance(tile, ReplyError) for tile in tiles):
            raise Problem.unavailable("Redis refuses to be read.")
        return _only_id(newest), tiles

    async def events(self, after: EventId, *, most: int = EVENTS_AT_ONCE, replay: bool = False) -> Events:
        """The next events, so many at most; not complete if some of them are gone.

        ``replay`` is for a viewer that catches up; it doesn't delay the worker's reader.
        """
        link = self._replays if replay else self._following
        # In a cluster, the first event is ``after`` itself, if the canvas has it.
        start, most = (after.in_redis(), most + 1) if after.epoch else (b"(" + after.in_redis(), most)
        found, stream = await link.ask_at_once(
            ("XRANGE", EVENTS, start, "+", "COUNT", most),
            ("XINFO", "STREAM", EVENTS),
        )
        if isinstance(stream, ReplyError):  # The stream doesn't exist, or no longer.
            return Events(NO_EVENT, [], complete=after == NO_EVENT)
        facts = dict(zip(stream[::2], stream[1::2], strict=True))
        last = _only_id([facts[b"last-entry"]])
        if last == NO_EVENT:
            last = EventId.parse(facts[b"last-generated-id"])
        trimmed = facts[b"entries-added"] > facts[b"length"]
        # ``after`` may be later than ``last`` if Redis was restored to an earlier state.
        if after > last or (trimmed and after < _only_id([facts[b"first-entry"]])):
            return Events(last, [], complete=False)
        if after.epoch:
            if not found or EventId.of(found[0]) != after:
                return Events(last, [], complete=False)
            found = found[1:]
        # Field c comes first; an entry may have others.
        records = [(EventId.of(entry), entry[1][1]) for entry in found]
        return Events(records[-1][0] if records else after, records, complete=True)

    async def wait_for_event(self, after: EventId, seconds: float) -> None:
        """Return when there is an event after the given one, or after some seconds."""
        await self._following.ask(
            ("XREAD", "COUNT", 1, "BLOCK", round(seconds * 1000), "STREAMS", EVENTS,
             after.in_redis()),
            blocking=seconds,
        )  # fmt: skip
