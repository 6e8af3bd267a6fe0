"""Group commit: waiting writes are sent to Redis in one transaction, within its lease."""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Container, Sequence
from math import inf
from time import monotonic, perf_counter
from typing import Any

import msgspec

from pixel import metrics
from pixel.budgets import Budgets, Charge, Writer
from pixel.canvas import CHANNELS, TILE_BYTES, locate
from pixel.cluster import Redis, Replicas
from pixel.lifetime import RedisClock
from pixel.link import Health
from pixel.names import EVENTS, lease_key, tile_key
from pixel.pixel import Change, pack
from pixel.problems import Answer, Problem
from pixel.resp import Command, Connection, NotMasterError, ReplyError
from pixel.settings import MAX_BATCH, Settings
from pixel.stream import EVENT_CHANGES, NO_EVENT, EventId, epoch_fields

# Extends a tile to its full length by adding 0 to its last byte; a full tile stays unchanged.
_GROW = ("INCRBY", "u8", (TILE_BYTES - 1) * 8, 0)

# Pauses between attempts to connect, in seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5

_RESTART = 2.0
"""Seconds that a restart of Redis may take; meanwhile, writes wait for it."""

# Errors of a Redis that is starting, on a host that answers.
_RESTARTING = (ConnectionRefusedError, ConnectionResetError, FileNotFoundError, ReplyError)

# Parts of the Redis timeout: the length of a lease, and the remaining time below which it is renewed.
_LEASE, _RENEWAL = 0.75, 0.5

# In a cluster: seconds that a write which begins as late as possible leaves to the replicas, and the pause
# between two checks of replicas that don't acknowledge.
_LEAST_WAIT, _REPLICAS_PAUSE = 0.15, 0.1

_SET_BACK = "Redis's clock was set back"

_SAMPLING = 1.0  # seconds between two measurements of the queue's length

log = logging.getLogger(__name__)


# The changes, who gets the outcome, the Redis time until which they may be sent, and the writer.
_Request = tuple[Sequence[Change], Answer[EventId], float, Writer | None]


def _fail(request: _Request, problem: Problem) -> None:
    if not request[1].done():
        try:
            request[1].set_exception(problem)
        except Exception:
            log.exception("a write was refused, but not answered")


class _Batch:
    """Requests that are sent to Redis together."""

    def __init__(self) -> None:
        self.timer: asyncio.TimerHandle
        self.opened = asyncio.get_running_loop().time()
        self.size = 0  # channel writes
        self.begin_by = inf  # the earliest of its requests
        self.signed = False  # whether the author of a request is known
        self.charged = True  # whether all budgets have been charged
        self.requests: list[_Request] = []

    def refuse(self, reason: str) -> None:
        """Answer 503: nothing was written."""
        for request in self.requests:
            _fail(request, Problem.not_written(reason))

    def doubt(self, reason: str) -> None:
        """Answer 503: the writes may have been made."""
        for request in self.requests:
            _fail(request, Problem.in_doubt(reason))


class _Lease:
    """A key that expires by Redis's clock. Redis executes a transaction only while the key exists.

    The transaction watches the key. EXEC does nothing if the key has expired, or is missing: SET NX
    then creates it, which counts as a change. This covers a transaction that was delayed anywhere:
    in this process, in a socket buffer, in the network or in Redis.
    """

    def __init__(self, name: str, seconds: float, renewal: float) -> None:
        # Each connection has its own key: a renewal must not make transactions of an earlier one valid.
        self._key = lease_key(f"{name}:{secrets.token_hex(4)}")
        self._seconds = seconds
        self._renewal = renewal
        self.end = 0.0
        """Redis's time at which the lease expires."""
        self.conditions: tuple[Command, ...] = (
            ("WATCH", self._key),
            ("SET", self._key, 0, "NX", "PX", 1),
        )

    def renew(self, now: float) -> list[Command]:
        """Commands that renew the lease, to send before a transaction; empty if no renewal is due."""
        if self.end - now >= self._renewal:
            return []
        self.end = now + self._seconds
        return [("TIME",), ("SET", self._key, 1, "PXAT", int(self.end * 1000))]

    def charge(self, charge: Charge) -> list[Command]:
        """Commands that replace the lease by one that exists only if the charge is accepted as a whole."""
        return [("EXPIRE", self._key, 0), charge.command(self._key, self.end or 1)]


class GroupCommit:
    """Writes that arrive while a transaction is in flight form the next batch.

    One transaction is in flight at a time. It contains one BITFIELD for each changed tile, and the
    event, so events are in the order of the changes. No timer collects writes: if no transaction is
    in flight, a write is sent at once.

    A request is answered when Redis has acknowledged its own tiles. If the connection is lost or
    Redis doesn't answer in time, the writes in flight are in doubt. They are answered when their lease
    has expired, because they can't be executed after that. Later requests wait while Redis restarts.
    While Redis doesn't answer at all, new requests are refused at once.

    Budgets are charged in the same pipeline, just before the transaction. If a request is over its
    budget, nothing is written, and the others are sent again without a second charge.

    In a cluster, a request is answered when the replicas have acknowledged it too (``Replicas``). If too
    few do, the requests are in doubt, and new ones are refused until they do. A batch that reaches a node
    that is not the master any more was not written, and is sent to the new one.
    """

    def __init__(self, redis: Redis, settings: Settings, clock: RedisClock, worker: str) -> None:
        self._redis = redis
        self._replicas = Replicas(redis) if redis.is_cluster else None
        self._timeout = settings.redis_timeout
        self._patience = settings.start_limit
        self._limit = settings.write_queue
        # Single pixels get more room, so that batches can't fill the queue.
        self._pixel_limit = self._limit + self._limit // 10
        self._event = ("XADD", EVENTS, "MAXLEN", "~", settings.events_maxlen, "*", "c")
        self._event_end: tuple[str | int, ...] = ()
        self._has_budgets = settings.anonymous_budget is not None
        self._clock = clock
        clock.on_setback.append(self._refuse_for_setback)
        self._setbacks = 0
        self.budgets = Budgets(clock)
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._health = Health("write")
        self._connection: Connection | None = None
        self._lease = self._new_lease()
        self._grown: set[str] = set()
        self._queue: deque[_Batch] = deque()
        self._depth = 0
        self._unreachable = ""
        self._arrival = asyncio.Event()
        self._task = self._loop.create_task(self._run(), name="group commit")
        self._count_queue()

    def submit(
        self,
        answer: Answer[EventId],
        changes: Sequence[Change],
        begin_by: float | None = None,
        writer: Writer | None = None,
    ) -> None:
        """Queue changes, to be written in their order.

        Args:
            answer: gets the event that contains the changes, or a later one, when Redis has
                acknowledged them; or a ``Problem``, 429 if the writer's budget is exceeded.
            changes: channel writes; an empty sequence probes whether Redis accepts writes.
            begin_by: the Redis time until which they may be sent (``StartLimit.begin_by``).
            writer: who writes, if that is to be recorded or has a budget.

        Raises:
            Problem: 503, if the queue is full or Redis can't be reached; the answer gets nothing.
        """
        if self._unreachable:
            raise Problem.not_written(self._unreachable)
        depth = self._depth + len(changes)
        if depth > self._limit and (len(changes) > len(CHANNELS) or depth > self._pixel_limit):
            raise Problem.not_written("Too many writes are waiting")
        if writer is not None and (problem := self.budgets.exceeded(writer, len(changes))):
            answer.set_exception(problem)
            return
        if not self._queue or self._queue[-1].size + len(changes) > MAX_BATCH:
            self._open_batch()
        batch = self._queue[-1]
        if begin_by is None:
            begin_by = self._clock.now() + self._patience
        if begin_by < batch.begin_by:
            batch.begin_by = begin_by
        batch.requests.append((changes, answer, begin_by, writer))
        batch.size += len(changes)
        self._depth += len(changes)
        if writer is not None:
            batch.signed = batch.signed or writer.author != ""
            batch.charged = batch.charged and writer.budget is None

    @property
    def replicas(self) -> int | None:
        """How many replicas have acknowledged the last write; None if there is no cluster."""
        return self._replicas.acknowledged if self._replicas else None

    def close(self) -> None:
        """Stop. Call this when no request is waiting."""
        self._task.cancel()
        self._sampling.cancel()
        if self._connection:
            self._connection.close()

    def _new_lease(self) -> _Lease:
        return _Lease(self._worker, _LEASE * self._timeout, _RENEWAL * self._timeout)

    def _open_batch(self) -> None:
        batch = _Batch()
        batch.timer = self._loop.call_later(self._patience, self._expire, batch)
        self._queue.append(batch)
        self._arrival.set()

    def _count_queue(self) -> None:
        """Sample the queue's length once a second: costs less than per write, and works while Redis hangs."""
        metrics.QUEUED_WRITES.set(self._depth)
        self._sampling = self._loop.call_later(_SAMPLING, self._count_queue)

    def _expire(self, batch: _Batch) -> None:
        """Refuse a batch that has waited too long to be sent."""
        if batch in self._queue:
            self._queue.remove(batch)
            self._depth -= batch.size
            batch.refuse("Redis can't be reached")

    async def _run(self) -> None:
        while True:
            if self._connection is None or self._connection.closed:
                await self._connect()
            # The batch that set the event may have expired, if the process was suspended for a time.
            while not self._queue:
                self._arrival.clear()
                await self._arrival.wait()
            connection = self._connection
            if self._replicas and connection and self._replicas.is_due:
                await self._check_replicas(connection, self._replicas)
            if connection is None or connection.closed or not self._queue:
                continue
            batch = self._queue.popleft()
            batch.timer.cancel()
            size = batch.size  # it grows if it is put back
            try:
                await self._commit(connection, batch)
            except Exception:
                # An internal error: answer these requests, and continue with the next batch.
                log.exception("%d writes are in doubt", batch.size)
                connection.close()
                batch.doubt("This is a fault of the server, and it is logged")
            self._depth -= size

    async def _connect(self) -> None:
        """Try to connect until it succeeds; meanwhile batches expire, or are refused at once."""
        reconnecting = self._connection is not None
        since = monotonic()
        pause = _FIRST_PAUSE
        while True:
            try:
                async with asyncio.timeout(self._timeout):
                    self._connection = connection = await self._redis.open(Connection)
                    if self._replicas:
                        self._replicas = Replicas(self._redis)
                    self._lease = self._new_lease()
                    self._event_end = epoch_fields(connection.epoch)
                    await self._ask_time(connection)
            except (OSError, ReplyError) as error:
                self._health.fails(error)
                if not isinstance(error, _RESTARTING) or monotonic() - since > _RESTART:
                    self._refuse("Redis can't be reached")
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                log.info("connected to Redis")
                metrics.RECONNECTS.inc(reconnecting)
                self._grown.clear()
                self._unreachable = ""
                return

    async def _check_replicas(self, connection: Connection, replicas: Replicas) -> None:
        """Check the replicas; while too few acknowledge, writes wait, and later are refused."""
        since = monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                await replicas.check(connection)
            while replicas.are_short:
                async with asyncio.timeout(self._timeout):
                    # Until the next write, this asks for the last one again.
                    acknowledged = await connection.ask(*replicas.wait(_REPLICAS_PAUSE))
                if replicas.suffice(*acknowledged):
                    break
                self._health.fails(f"{acknowledged[-1]} replicas acknowledge writes")
                if monotonic() - since > _RESTART:
                    self._refuse("Too few replicas of Redis acknowledge writes")
                if (await self._redis.find()).epoch > connection.epoch:
                    raise NotMasterError("the canvas has another master")
                await asyncio.sleep(_REPLICAS_PAUSE)
                async with asyncio.timeout(self._timeout):
                    await replicas.check(connection)
            self._unreachable = ""
        except (OSError, ReplyError) as error:
            metrics.REPLICAS.set(0)
            self._health.fails(error)
            connection.close(str(error) or "no answer in time")

    async def _ask_time(self, connection: Connection) -> None:
        """Read Redis's time for the first lease; also check that budgets can be charged, if there are any."""
        asked = monotonic()
        commands: list[Command] = [("TIME",)]
        if self._has_budgets:
            commands += self._lease.charge(Charge([]))
        try:
            redis_time, *_ = await connection.ask(*commands)
        except BaseException:
            connection.close()
            raise
        self._learn_time(asked, redis_time)

    def _learn_time(self, asked: float, redis_time: Sequence[bytes]) -> None:
        seconds, microseconds = map(int, redis_time)
        self._clock.learn(asked, seconds + microseconds / 1e6, monotonic())

    def _refuse(self, reason: str) -> None:
        """Refuse all waiting requests and, until the next connection, new ones."""
        self._unreachable = reason
        self._refuse_waiting(reason)

    def _refuse_for_setback(self) -> None:
        """Refuse all waiting requests: they may begin later than their time by the former clock."""
        self._setbacks += 1
        self._refuse_waiting(_SET_BACK)

    def _refuse_waiting(self, reason: str) -> None:
        while self._queue:
            batch = self._queue.popleft()
            batch.timer.cancel()
            self._depth -= batch.size
            batch.refuse(reason)

    async def _commit(self, connection: Connection, batch: _Batch) -> None:
        """Send a batch and answer its requests; returns when all of them are answered."""
        setbacks = self._setbacks
        while requests := self._in_time(batch):
            batch.requests = requests
            changes = [change for request in requests for change in request[0]]
            commands = self._commands(changes, _authors(requests) if batch.signed else ())
            before = renewal = self._lease.renew(self._clock.now())
            charge = None
            if not batch.charged:
                charge = Charge([(writer, len(changes)) for changes, _, _, writer in requests])
                before = [*renewal, *self._lease.charge(charge)]
            confirmation: list[Command] = []
            if self._replicas:
                rest = self._rest(batch)
                if rest < _LEAST_WAIT:
                    batch.refuse("Redis was too slow for this write to begin")
                    return
                seconds = min(rest, _LEASE * self._timeout)
                # A spare replica may have gone: then there is time for a second look.
                confirmation = self._replicas.wait(seconds / 2 if self._replicas.has_spare else seconds)
            asked, started = monotonic(), perf_counter()
            replies = connection.execute([*before, *self._lease.conditions, *commands, *confirmation])
            timer = self._loop.call_later(self._timeout, connection.close, "no answer in time")
            try:
                answers = await replies
            except ConnectionError as error:
                self._doubt(batch, error)
                return
            finally:
                timer.cancel()
            end = len(answers) - len(confirmation)
            *queued, results = answers[:end]
            if self._replicas:
                if (
                    isinstance(results, list)
                    and not self._replicas.suffice(*answers[end:])
                    and not await self._suffice_now(answers[-1], results[-1], connection, batch)
                ):
                    batch.doubt("Too few replicas of Redis have acknowledged it")
                    return
                if not isinstance(results, list) and (moved := _moved(*queued, results)):
                    self._put_back(batch)
                    connection.close(str(moved))
                    await asyncio.sleep(_FIRST_PAUSE)
                    return
            if renewal and not isinstance(queued[0], ReplyError):
                self._learn_time(asked, queued[0])
            refused = charge is not None and self._refuse_expensive(batch, charge, queued[len(before) - 1])
            if results is not None:
                metrics.COMMIT_SECONDS.observe(perf_counter() - started)
                metrics.BATCH_WRITES.observe(batch.size)
                self._settle(batch, commands, queued, results, connection.epoch)
                return
            # There was no lease, so nothing was written. Its renewal also reads Redis's time.
            metrics.LAPSED_LEASES.inc(not refused)
            self._grown.clear()
            self._lease.end = 0
            if self._setbacks != setbacks:
                batch.refuse(_SET_BACK)
                return

    async def _suffice_now(
        self, acknowledged: object, last: object, connection: Connection, batch: _Batch
    ) -> bool:
        """Whether the replicas suffice at a second look, after a planned switch or a resynchronisation."""
        assert self._replicas
        if isinstance(acknowledged, ReplyError):
            # It is a replica now, which ends WAIT, or refuses it.
            return await self._has_new_master(last, connection, batch)
        if not self._replicas.may_suffice:
            return False
        try:
            async with asyncio.timeout(self._rest(batch)):
                await self._replicas.check(connection)
                # By the reply before, one that has gone since may have acknowledged, and another one not.
                seconds = self._rest(batch) / 2
                return self._replicas.suffice(*await connection.ask(*self._replicas.wait(seconds)))
        except (OSError, ReplyError):
            return False

    async def _has_new_master(self, last: object, former: Connection, batch: _Batch) -> bool:
        """Whether the new master and its replicas have a batch's last event, after a planned switch.

        The former master has given it all writes, and can't wait for replicas any more.
        """
        seconds = self._rest(batch)
        wanted = [EventId.parse(last)._replace(epoch=former.epoch)] if isinstance(last, bytes) else []
        looks = [("XRANGE", EVENTS, event.in_redis(), event.in_redis()) for event in wanted]
        try:
            async with asyncio.timeout(seconds):
                connection = await self._redis.open(Connection)
                try:
                    replicas = Replicas(self._redis)
                    await replicas.check(connection)
                    # WAIT refers to the last write of its connection, and so to all that was written before.
                    mark: Command = ("SET", lease_key(f"{self._worker}:look"), 0, "PX", 1)
                    transaction: list[Command] = [("MULTI",), *looks, mark, ("EXEC",)]
                    replies = await connection.ask(*transaction, *replicas.wait(seconds))
                finally:
                    connection.close()
        except (OSError, ReplyError):
            return False
        results, acknowledged = replies[len(transaction) - 1], replies[len(transaction) :]
        found = [EventId.of(entry) for entries in results[:-1] for entry in entries]
        return found == wanted and replicas.suffice(*acknowledged)

    def _rest(self, batch: _Batch) -> float:
        """Seconds within which a batch has to be answered."""
        return batch.opened + self._patience + _LEAST_WAIT - self._loop.time()

    def _put_back(self, batch: _Batch) -> None:
        """Queue a batch again that was not written."""
        rest = batch.opened + self._patience - self._loop.time()
        batch.timer = self._loop.call_later(max(rest, 0), self._expire, batch)
        self._queue.appendleft(batch)
        self._depth += batch.size

    def _refuse_expensive(self, batch: _Batch, charge: Charge, reply: object) -> bool:
        """Refuse the requests that are over their budget; the others have paid. Whether there are any."""
        batch.charged = True
        problems = charge.problems(reply, self.budgets)
        for request, problem in zip(batch.requests, problems, strict=True):
            if problem:
                _fail(request, problem)
        return any(problems)

    def _in_time(self, batch: _Batch) -> list[_Request]:
        """Return the requests that may still be sent; refuse the others."""
        now = self._clock.now()
        if batch.begin_by >= now:
            return [request for request in batch.requests if not request[1].done()]
        requests = []
        for request in batch.requests:
            if request[2] < now:
                _fail(request, Problem.not_written("Redis was too slow for this write to begin"))
            elif not request[1].done():
                requests.append(request)
        return requests

    def _doubt(self, batch: _Batch, error: ConnectionError) -> None:
        """Answer a batch whose connection was lost, when its lease has expired."""
        log.warning("%d writes are in doubt: %s", batch.size, error)
        self._health.fails(error)
        if isinstance(error, ConnectionAbortedError):
            self._refuse("Redis can't be reached")
        rest = self._lease.end - self._clock.now()
        self._loop.call_later(max(rest, 0), batch.doubt, "Redis didn't answer")

    def _settle(
        self, batch: _Batch, commands: list[Command], queued: list[object], results: object, epoch: int
    ) -> None:
        """Answer a batch according to the replies of Redis, or of a master with this configuration epoch."""
        if isinstance(results, ReplyError):
            # Redis refused to queue a command (out of memory, for example) and dropped the transaction.
            reasons = [reply for reply in queued if isinstance(reply, ReplyError)]
            self._health.fails(reasons[0] if reasons else results)
            self._grown.clear()
            for request in batch.requests:
                _fail(request, Problem.unavailable("Redis refuses writes", "no"))
            return
        assert isinstance(results, list)
        # A single tile fails if its key holds another type.
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
        event = EventId.parse(newest)._replace(epoch=epoch) if isinstance(newest, bytes) else NO_EVENT
        # The next batch is on its way before.
        self._loop.call_soon(self._answer, batch.requests, refused, event)

    def _answer(self, requests: list[_Request], refused: Container[object], event: EventId) -> None:
        written = 0
        for request in requests:
            changes, answer, _, _ = request
            if refused and any(locate(x, y)[0] in refused for x, y, _, _ in changes):
                _fail(request, Problem.unavailable("Redis refuses writes to this tile."))
            else:
                written += len(changes)
                try:
                    answer.set_result(event)
                except asyncio.InvalidStateError:
                    pass  # who waited for it has gone
                except Exception:
                    log.exception("a write was made, but not answered")
        metrics.WRITES.inc(written)

    def _commands(self, changes: list[Change], authors: Sequence[bytes]) -> list[Command]:
        """The transaction; ``authors`` has a value for each of its events, or none."""
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
        events: list[Command] = [
            (*self._event, pack(changes[start : start + EVENT_CHANGES]))
            for start in range(0, len(changes), EVENT_CHANGES)
        ]
        if authors:
            events = [
                (*event, "a", author) if author else event
                for event, author in zip(events, authors, strict=True)
            ]
        if self._event_end:
            events = [(*event, *self._event_end) for event in events]
        return [("MULTI",), *map(tuple, tiles.values()), *events, ("EXEC",)]


def _moved(*replies: object) -> NotMasterError | None:
    """The refusal of a node that is not the master of the canvas, if there is one."""
    return next((reply for reply in replies if isinstance(reply, NotMasterError)), None)


def _authors(requests: Sequence[_Request]) -> list[bytes]:
    """Field ``a`` of each event of these requests; empty if no author of the event is known."""
    events: list[list[list[str | int]]] = []
    room = 0  # changes for which the last event has room
    for changes, _, _, writer in requests:
        author = writer.author if writer else ""
        rest = len(changes)
        while rest:
            if not room:
                events.append([])
                room = EVENT_CHANGES
                run: list[Any] = ["", 0]
            part = rest if rest < room else room
            if run[1] and run[0] == author:
                run[1] += part
            else:
                run = [author, part]
                events[-1].append(run)
            room -= part
            rest -= part
    return [b"" if runs[0][0] == "" and len(runs) == 1 else msgspec.json.encode(runs) for runs in events]
