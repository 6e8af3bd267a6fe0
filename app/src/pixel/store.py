"""The canvas in Redis: group-committed writes, reads, and the stream of events."""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Container, Sequence
from time import perf_counter
from typing import Any, NamedTuple

from pixel import metrics
from pixel.canvas import TILE_BYTES, Canvas, locate, tile_key
from pixel.pixel import Change, pack
from pixel.problems import Problem
from pixel.resp import Command, Connection, ReplyError, Server
from pixel.settings import MAX_BATCH, Settings

EVENTS = "pixel:events"
"""The stream of changes. Field ``c`` of an entry holds changes, as ``pixel.pack`` makes them."""

EVENT_CHANGES = 1024
"""Most changes in one entry, so that the stream's length bounds its memory."""

EVENTS_AT_ONCE = 1000
"""Most entries that are read together."""

VIEWERS_PERIOD = 10
"""Seconds within which a worker says again how many viewers it has, or they count no longer."""

# Makes a tile as long as it has to be, or leaves it alone: it adds nothing to its last byte.
_GROW = ("INCRBY", "u8", (TILE_BYTES - 1) * 8, 0)

# Pauses between attempts to connect, in seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5

_SAMPLING = 1.0  # seconds from one look at the queue's length to the next

_NEWEST = ("XREVRANGE", EVENTS, "+", "-", "COUNT", 1)

log = logging.getLogger(__name__)


class EventId(NamedTuple):
    """The name of an event, and the moment at which the canvas stood as it left it."""

    milliseconds: int
    sequence: int

    @classmethod
    def parse(cls, text: bytes) -> "EventId":
        """From its text, as in 1795225898442-0. Raises ValueError."""
        milliseconds, dash, sequence = text.partition(b"-")
        if not dash or len(text) > 41 or not (milliseconds + sequence).isdigit():
            raise ValueError("an event id looks like 1795225898442-0")
        return cls(int(milliseconds), int(sequence))

    def text(self) -> bytes:
        """As Redis, and a viewer, write it."""
        return b"%d-%d" % self


NO_EVENT = EventId(0, 0)


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


_Request = tuple[Sequence[Change], asyncio.Future[EventId]]


class _Health:
    """Logs when something begins to fail and when it works again, and nothing in between."""

    def __init__(self, operation: str) -> None:
        self._what = {"read": "reading from Redis", "write": "writing to Redis"}[operation]
        self._failing = False
        self._errors = metrics.REDIS_ERRORS.labels(operation)

    def fails(self, reason: object) -> None:
        """It has failed."""
        self._errors.inc()
        if not self._failing:
            log.warning("%s fails: %s", self._what, str(reason) or "no answer")
        self._failing = True

    def works(self) -> None:
        """It has worked."""
        if self._failing:
            log.info("%s works again", self._what)
        self._failing = False


class _Batch:
    """Requests that go to Redis together, and are answered before the timer runs out."""

    def __init__(self) -> None:
        self.timer: asyncio.TimerHandle
        self.size = 0
        self.requests: list[_Request] = []

    def fail(self, detail: str) -> None:
        """Answer whoever still waits with a 503."""
        for _, future in self.requests:
            if not future.done():
                future.set_exception(Problem.unavailable(detail))


class GroupCommit:
    """Writes that arrive while others are on their way to Redis go together, as the next batch.

    One transaction is in flight at a time. It holds a BITFIELD for each tile that is written to,
    and the event, so that the events stand in the order in which the canvas changed. There is no
    timer that collects writes: one that finds nothing in flight leaves at once.

    A request is answered once Redis has acknowledged its own tiles. When the connection is lost,
    those in flight fail: nobody knows what became of them, and nothing is sent a second time.
    Those behind them wait for the next connection until their own time is up.
    """

    def __init__(self, server: Server, settings: Settings) -> None:
        self._server = server
        self._timeout = settings.redis_timeout
        self._limit = settings.write_queue
        self._event = ("XADD", EVENTS, "MAXLEN", "~", settings.events_maxlen, "*", "c")
        self._loop = asyncio.get_running_loop()
        self._health = _Health("write")
        self._connection: Connection | None = None
        self._grown: set[str] = set()
        self._queue: deque[_Batch] = deque()
        self._depth = 0
        self._arrival = asyncio.Event()
        self._task = self._loop.create_task(self._run(), name="group commit")
        self._count_queue()

    def write(self, changes: Sequence[Change]) -> asyncio.Future[EventId]:
        """Done when Redis has acknowledged the changes, which are made in their order.

        The result is an event: whoever has heard up to it has heard of the changes.
        No changes at all ask whether Redis can be written to.
        Raises a 503 ``Problem`` if the queue is full, Redis refuses, or time is up.
        """
        if self._depth + len(changes) > self._limit:
            raise Problem.unavailable("Too many writes are waiting; nothing was written.")
        if not self._queue or self._queue[-1].size + len(changes) > MAX_BATCH:
            self._open_batch()
        batch = self._queue[-1]
        future: asyncio.Future[EventId] = self._loop.create_future()
        batch.requests.append((changes, future))
        batch.size += len(changes)
        self._depth += len(changes)
        return future

    def close(self) -> None:
        """Stop. To be called when nobody waits any more."""
        self._task.cancel()
        self._sampling.cancel()
        if self._connection:
            self._connection.close()

    def _open_batch(self) -> None:
        batch = _Batch()
        batch.timer = self._loop.call_later(self._timeout, self._expire, batch)
        self._queue.append(batch)
        self._arrival.set()

    def _count_queue(self) -> None:
        """Once a second, not at every write: it costs nothing, and goes on while Redis hangs."""
        metrics.QUEUED_WRITES.set(self._depth)
        self._sampling = self._loop.call_later(_SAMPLING, self._count_queue)

    def _expire(self, batch: _Batch) -> None:
        """Answer those whose time is up; a batch in flight ends with its connection."""
        if batch in self._queue:
            self._queue.remove(batch)
            self._depth -= batch.size
            batch.fail("Redis can't be reached; nothing was written.")
        elif self._connection:
            self._connection.close("no answer in time")

    async def _run(self) -> None:
        while True:
            # What woke it may have expired by now: a process that was stopped has late timers.
            while not self._queue:
                self._arrival.clear()
                await self._arrival.wait()
            connection = self._connection
            if connection is None or connection.closed:
                await self._connect()
            else:
                batch = self._queue.popleft()
                try:
                    await self._commit(connection, batch)
                except Exception:
                    # A fault of ours: these requests get an answer, and the next their turn.
                    log.exception("%d writes are in doubt", batch.size)
                    connection.close()
                    batch.fail("The write may have been made.")
                batch.timer.cancel()
                self._depth -= batch.size

    async def _connect(self) -> None:
        """Connect, however long it takes; meanwhile batches expire."""
        anew = self._connection is not None
        pause = _FIRST_PAUSE
        while True:
            try:
                async with asyncio.timeout(self._timeout):
                    self._connection = await Connection.open(self._server)
            except (OSError, ReplyError) as error:
                self._health.fails(error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                log.info("connected to Redis")
                metrics.RECONNECTS.inc(anew)
                self._grown.clear()
                return

    async def _commit(self, connection: Connection, batch: _Batch) -> None:
        """Send a batch and answer its requests; returns when all of them are answered."""
        requests = [request for request in batch.requests if not request[1].done()]
        commands = self._commands([change for changes, _ in requests for change in changes])
        started = perf_counter()
        try:
            *queued, results = await connection.execute(commands)
        except ConnectionError as error:
            log.warning("%d writes are in doubt: %s", batch.size, error)
            self._health.fails(error)
            batch.fail("Redis didn't answer; the write may have been made.")
            return
        metrics.COMMIT_SECONDS.observe(perf_counter() - started)
        metrics.BATCH_WRITES.observe(batch.size)
        if isinstance(results, ReplyError):
            # Redis wouldn't queue a command (it's out of memory, say), and dropped them all.
            reasons = [reply for reply in queued if isinstance(reply, ReplyError)]
            self._health.fails(reasons[0] if reasons else results)
            self._grown.clear()
            batch.fail("Redis refuses writes; nothing was written.")
            return
        # A tile can fail by itself: somebody has put something else under its key.
        refused = {
            command[1]: result
            for command, result in zip(commands[1:-1], results, strict=True)
            if isinstance(result, ReplyError)
        }
        if refused:
            self._health.fails(refused)
            self._grown.clear()
        else:
            self._health.works()
        newest = results[-1]
        event = EventId.parse(newest) if isinstance(newest, bytes) else NO_EVENT
        self._answer(requests, refused, event)

    def _answer(self, requests: list[_Request], refused: Container[object], event: EventId) -> None:
        written = 0
        for changes, future in requests:
            if refused and any(locate(x, y)[0] in refused for x, y, _, _ in changes):
                if not future.done():
                    future.set_exception(Problem.unavailable("Redis refuses writes to this tile."))
            else:
                written += len(changes)
                if not future.done():
                    future.set_result(event)
        metrics.WRITES.inc(written)

    def _commands(self, changes: list[Change]) -> list[Command]:
        tiles: dict[str, list[str | bytes | int]] = {}
        for x, y, channel, value in changes:
            key, place = locate(x, y)
            command = tiles.get(key)
            if command is None:
                command = tiles[key] = ["BITFIELD", key]
                if key not in self._grown:
                    command += _GROW
                    self._grown.add(key)
            command += ("SET", "u8", (place + channel) * 8, value)
        if not changes:
            return [("MULTI",), ("BITFIELD", tile_key(0, 0), *_GROW), ("EXEC",)]
        events = [
            (*self._event, pack(changes[start : start + EVENT_CHANGES]))
            for start in range(0, len(changes), EVENT_CHANGES)
        ]
        return [("MULTI",), *map(tuple, tiles.values()), *events, ("EXEC",)]


class _Link:
    """A connection for questions, opened when there is one, and anew after it was lost."""

    def __init__(self, server: Server, timeout: float) -> None:
        self._server = server
        self._timeout = timeout
        self._health = _Health("read")
        self._connection: Connection | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    async def ask(self, *commands: Command, patience: float = 0) -> list[Any]:
        """The replies; ``patience`` is for commands that wait by themselves, in seconds.

        Raises a 503 ``Problem`` if Redis doesn't answer all of it in time.
        """
        try:
            async with asyncio.timeout(self._timeout + patience):
                connection = await self._connected()
                started = perf_counter()
                replies: list[Any] = await connection.execute(commands)
        except (OSError, ReplyError) as error:
            self._drop()
            self._health.fails(error)
            raise Problem.unavailable("Redis can't be read.") from error
        if not patience:
            metrics.READ_SECONDS.observe(perf_counter() - started)
        for reply in replies:
            if isinstance(reply, ReplyError):
                self._health.fails(reply)
                raise Problem.unavailable("Redis refuses to be read.")
        self._health.works()
        return replies

    async def ask_at_once(self, *commands: Command) -> list[Any]:
        """The replies to commands between which nothing changes; errors are among them."""
        *_, results = await self.ask(("MULTI",), *commands, ("EXEC",))
        return list(results)

    def close(self) -> None:
        """Let go of the connection, for good."""
        self._closed = True
        self._drop()

    def _drop(self) -> None:
        if self._connection:
            self._connection.close()

    async def _connected(self) -> Connection:
        if self._closed:
            raise ConnectionError("closed")
        async with self._opening:
            if self._connection is None or self._connection.closed:
                anew = self._connection is not None
                self._connection = await Connection.open(self._server)
                metrics.RECONNECTS.inc(anew)
            return self._connection


class Store:
    """What the application asks of Redis. Made inside the event loop that uses it.

    Every method raises a 503 ``Problem`` if Redis doesn't do what it is asked for in time.
    """

    def __init__(self, settings: Settings) -> None:
        server = Server.of(settings)
        self._worker = f"{settings.instance}/{os.getpid()}"
        self.canvas = Canvas(settings.canvas_width, settings.canvas_height)
        self._commits = GroupCommit(server, settings)
        # Pictures are megabytes, and waiting is waiting: neither is to hold up a small question.
        self._questions, self._pictures, self._waiting = (
            _Link(server, settings.redis_timeout) for _ in range(3)
        )
        self.write = self._commits.write

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
