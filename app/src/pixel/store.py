"""The canvas in Redis: group-committed writes, reads, and the stream of events."""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import Any

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

# Makes a tile as long as it has to be, or leaves it alone: it adds nothing to its last byte.
_GROW = ("INCRBY", "u8", (TILE_BYTES - 1) * 8, 0)

# Pauses between attempts to connect, in seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5

log = logging.getLogger(__name__)


class _Batch:
    """Requests that go to Redis together, and are answered by their deadline (loop time)."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.timer: asyncio.TimerHandle
        self.size = 0
        self.requests: list[tuple[Sequence[Change], asyncio.Future[None]]] = []

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
        self._connection: Connection | None = None
        self._grown: set[str] = set()
        self._queue: deque[_Batch] = deque()
        self._depth = 0
        self._arrival = asyncio.Event()
        self._task = self._loop.create_task(self._run(), name="group commit")

    async def write(self, changes: Sequence[Change]) -> None:
        """Return when Redis has acknowledged the changes, which are made in their order.

        No changes at all ask whether Redis can be written to.
        Raises a 503 ``Problem`` if the queue is full, Redis refuses, or time is up.
        """
        if self._depth + len(changes) > self._limit:
            raise Problem.unavailable("Too many writes are waiting; nothing was written.")
        if not self._queue or self._queue[-1].size + len(changes) > MAX_BATCH:
            self._open_batch()
        batch = self._queue[-1]
        future = self._loop.create_future()
        batch.requests.append((changes, future))
        batch.size += len(changes)
        self._depth += len(changes)
        try:
            await future
        finally:
            self._depth -= len(changes)

    def close(self) -> None:
        """Stop. To be called when nobody waits any more."""
        self._task.cancel()
        if self._connection:
            self._connection.close()

    def _open_batch(self) -> None:
        batch = _Batch(self._loop.time() + self._timeout)
        batch.timer = self._loop.call_at(batch.deadline, self._expire, batch)
        self._queue.append(batch)
        self._arrival.set()

    def _expire(self, batch: _Batch) -> None:
        self._queue.remove(batch)
        batch.fail("Redis can't be reached; nothing was written.")

    async def _run(self) -> None:
        while True:
            if not self._queue:
                self._arrival.clear()
                await self._arrival.wait()
            connection = self._connection
            if connection is None or connection.closed:
                await self._connect()
            else:
                batch = self._queue.popleft()
                batch.timer.cancel()
                await self._commit(connection, batch)

    async def _connect(self) -> None:
        """Connect, however long it takes; meanwhile batches expire."""
        pause = _FIRST_PAUSE
        while True:
            try:
                async with asyncio.timeout(self._timeout):
                    self._connection = await Connection.open(self._server)
            except (OSError, ReplyError) as error:
                if pause == _FIRST_PAUSE:
                    log.warning("Redis can't be written to: %s", error or "no answer")
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                log.info("connected to Redis")
                self._grown.clear()
                return

    async def _commit(self, connection: Connection, batch: _Batch) -> None:
        """Send a batch and answer its requests; returns when all of them are answered."""
        requests = [request for request in batch.requests if not request[1].done()]
        commands = self._commands([change for changes, _ in requests for change in changes])
        started = perf_counter()
        try:
            async with asyncio.timeout_at(batch.deadline):
                *queued, results = await connection.execute(commands)
        except Exception as error:
            # Even if the fault is ours, these requests get an answer, and the next their turn.
            connection.close()
            ours = not isinstance(error, OSError)
            log.warning(
                "%d writes are in doubt: %s", batch.size, error or "no answer", exc_info=ours
            )
            batch.fail("Redis didn't answer; the write may have been made.")
            return
        metrics.COMMIT_SECONDS.observe(perf_counter() - started)
        if isinstance(results, ReplyError):
            # Redis wouldn't queue a command (it's out of memory, say), and dropped them all.
            self._grown.clear()
            reason = next((reply for reply in queued if isinstance(reply, ReplyError)), results)
            log.warning("Redis refused %d writes: %s", batch.size, reason)
            batch.fail("Redis refuses writes; nothing was written.")
            return
        metrics.WRITES.inc(sum(len(changes) for changes, _ in requests))
        # A tile can fail by itself: somebody has put something else under its key.
        refused = {
            command[1]: result
            for command, result in zip(commands[1:-1], results, strict=True)
            if isinstance(result, ReplyError)
        }
        if refused:
            self._grown.clear()
            log.error("Redis refused writes: %s", refused)
        for changes, future in requests:
            if future.done():
                continue
            if refused and any(locate(x, y)[0] in refused for x, y, _, _ in changes):
                future.set_exception(Problem.unavailable("Redis refuses writes to this tile."))
            else:
                future.set_result(None)

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


class Store:
    """What the application asks of Redis. Made inside the event loop that uses it."""

    def __init__(self, settings: Settings) -> None:
        self.canvas = Canvas(settings.canvas_width, settings.canvas_height)
        self._server = Server.of(settings)
        self._timeout = settings.redis_timeout
        self._commits = GroupCommit(self._server, settings)
        self.write = self._commits.write
        self._reader: Connection | None = None
        self._opening = asyncio.Lock()

    def close(self) -> None:
        """Let go of Redis."""
        self._commits.close()
        if self._reader:
            self._reader.close()

    async def probe(self) -> float:
        """How long a write takes now, in seconds, by one that changes nothing."""
        started = perf_counter()
        await self.write(())
        return perf_counter() - started

    async def colour(self, x: int, y: int) -> tuple[int, int, int]:
        """Red, green and blue of a pixel, 0-255 each."""
        key, place = locate(x, y)
        [found] = await self._read([("GETRANGE", key, place, place + 2)])
        red, green, blue = found.ljust(3, b"\0")
        return red, green, blue

    async def _read(self, commands: list[Command]) -> list[Any]:
        """Ask Redis; a 503 ``Problem`` if it doesn't answer all of it in time."""
        try:
            async with asyncio.timeout(self._timeout):
                replies = await (await self._connected()).execute(commands)
        except (OSError, ReplyError) as error:
            if self._reader:
                self._reader.close()
            log.warning("Redis can't be read: %s", error or "no answer")
            raise Problem.unavailable("Redis can't be read.") from error
        for reply in replies:
            if isinstance(reply, ReplyError):
                log.error("Redis refused to read: %s", reply)
                raise Problem.unavailable("Redis refuses to read.")
        return replies

    async def _connected(self) -> Connection:
        async with self._opening:
            if self._reader is None or self._reader.closed:
                self._reader = await Connection.open(self._server)
            return self._reader
