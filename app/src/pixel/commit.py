"""Group commit: writes that wait together go to Redis in one transaction."""

import asyncio
import logging
from collections import deque
from collections.abc import Container, Sequence
from time import perf_counter

from pixel import metrics
from pixel.canvas import TILE_BYTES, locate, tile_key
from pixel.link import Health
from pixel.pixel import Change, pack
from pixel.problems import Problem
from pixel.resp import Command, Connection, ReplyError, Server
from pixel.settings import MAX_BATCH, Settings
from pixel.stream import EVENT_CHANGES, EVENTS, NO_EVENT, EventId

# Makes a tile as long as it has to be, or leaves it alone: it adds nothing to its last byte.
_GROW = ("INCRBY", "u8", (TILE_BYTES - 1) * 8, 0)

# Pauses between attempts to connect, in seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5

_SAMPLING = 1.0  # seconds from one look at the queue's length to the next

log = logging.getLogger(__name__)

_Request = tuple[Sequence[Change], asyncio.Future[EventId]]


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
        self._health = Health("write")
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
