"""Changes on their way to viewers; one reader of Redis serves all viewers of a worker.

A viewer is sent all events after the one that it knows: first from Redis, by catching up, then
what the worker's reader finds. They are coalesced: of a channel that changed several times only
the last value is sent. A viewer may therefore be sent events that it already knows, provided that
one message contains everything up to the last of them.

What viewers may cost a worker is bounded (see docs/security.md): changes in a message, changes
that are replayed to one viewer, replays at a time, and the share of time for encoding. A viewer
that would exceed a bound is sent ``resync`` and fetches the canvas, which is cheaper for all.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from typing import NamedTuple

import msgspec

from pixel import metrics
from pixel.pixel import RECORD_BYTES, coalesce
from pixel.problems import Problem
from pixel.store import EVENTS_AT_ONCE, Events, Store
from pixel.stream import EVENT_CHANGES, EventId

PAUSE = 0.05
"""Least seconds between two reads of the stream."""

HEARTBEAT = 15.0
"""Seconds after which a quiet stream sends a comment."""

STATUS = 2.0
"""Seconds between two ``status`` events."""

QUEUE_MESSAGES = 20
QUEUE_BYTES = 1024 * 1024
"""Most that waits for a slow viewer. Beyond that it is dropped, and the viewer catches up."""

FRAME_CHANGES = 4096
"""Most changes in one message: 90 kB, and 4 ms to encode."""

REPLAY_CHANGES = 4 * FRAME_CHANGES
"""Most changes that are replayed; beyond that the canvas itself is cheaper."""

REPLAYS = 1
"""Replays at the same time."""

REPLAYS_WAITING = 64
"""Most positions in the stream from which a replay is wanted at the same time."""

RESYNC_PAUSE = 2.0
"""Least seconds between two ``resync`` events that the reader sends to all viewers."""

_ENCODING_SHARE = 0.25  # of a worker's time, at most, for encoding changes
_FIRST_EVENTS = REPLAY_CHANGES // EVENT_CHANGES + 1  # so many full ones are too many to be replayed
_CHECK = 1.0  # seconds after which the reader checks whether it still has viewers
_RETRY, _LONGEST_RETRY = 0.5, 4.0  # seconds until Redis is asked again after a failure


class _Message(NamedTuple):
    """A server-sent event, and the last event of the stream that it contains."""

    last: EventId
    complete: bool
    frame: bytes


def _resync(last: EventId) -> _Message:
    """Tells viewers to fetch the canvas; what follows comes after ``last``."""
    return _Message(last, False, b"event: resync\nid: %b\ndata: []\n\n" % last.text())


def _message(last: EventId, records: list[bytes]) -> _Message:
    frame = b"id: %b\ndata: %b\n\n" % (last.text(), msgspec.json.encode(coalesce(records)))
    return _Message(last, True, frame)


async def _messages(events: Events) -> AsyncIterator[_Message]:
    """Events as messages of bounded size.

    Others have the worker's time between two messages, three times as long as one took: until it
    was made, and sent to those who were waiting for it.
    """
    if not events.complete:
        yield _resync(events.last)
        return
    loop = asyncio.get_running_loop()
    records: list[bytes] = []
    size = 0
    for event, record in events.records:
        records.append(record)
        size += len(record)
        if size >= (FRAME_CHANGES - EVENT_CHANGES) * RECORD_BYTES or event == events.last:
            started = loop.time()
            yield _message(event, records)
            records, size = [], 0
            await asyncio.sleep(0)
            await asyncio.sleep(min((loop.time() - started) * (1 / _ENCODING_SHARE - 1), 1.0))


class _Wanted(NamedTuple):
    """What a viewer that catches up needs next: so many events, if they have no more changes."""

    after: EventId
    events: int
    changes: int


class _Replay(NamedTuple):
    """Messages for viewers that catch up, and the number of changes that they were made from."""

    messages: list[_Message]
    changes: int = 0


class _Viewer:
    """An open stream, and the messages that wait for it."""

    def __init__(self, position: EventId, *, behind: bool) -> None:
        self.position = position
        self.behind = behind
        self.arrival = asyncio.Event()
        self.waiting: deque[_Message] = deque()
        self.status = b""
        self._size = 0

    def send_status(self, frame: bytes) -> None:
        """Queue the newest status, in place of an older one."""
        self.status = frame
        self.arrival.set()

    def send(self, message: _Message) -> None:
        """Queue a message."""
        self.waiting.append(message)
        self._size += len(message.frame)
        if len(self.waiting) > QUEUE_MESSAGES or self._size > QUEUE_BYTES:
            self.waiting.clear()
            self._size = 0
            self.behind = True
        self.arrival.set()

    def take(self) -> _Message:
        """The message that has waited longest."""
        message = self.waiting.popleft()
        self._size -= len(message.frame)
        return message


class Hub:
    """Reads the event stream while there are viewers, and sends it to them."""

    def __init__(self, store: Store, instance: str, release: str) -> None:
        self._store = store
        self._name = {"instance": instance, "release": release}
        self._viewers: set[_Viewer] = set()
        self._reading: asyncio.Task[None] | None = None
        self._replays: dict[_Wanted, asyncio.Task[_Replay | None]] = {}
        self._replaying = asyncio.Semaphore(REPLAYS)
        self._last: EventId
        self._closed = False

    async def prepare(self) -> None:
        """Find the end of the stream, if nobody reads it yet. Raises a 503 ``Problem``."""
        if self._reading is None:
            self._last = await self._store.last_event()

    async def stream(self, after: EventId | None) -> AsyncIterator[bytes]:
        """The frames for a viewer that knows the canvas as of an event, or from now on.

        It ends when the viewer disconnects or the worker stops.
        """
        viewer = _Viewer(after or self._last, behind=after is not None)
        self._viewers.add(viewer)
        self._reading = self._reading or asyncio.create_task(self._read())
        metrics.VIEWERS.inc()
        try:
            yield b"retry: 1000\nid: %b\ndata: []\n\n" % viewer.position.text()
            while not self._closed:
                if viewer.behind:
                    # What the reader finds from now on is queued; what came before is in Redis.
                    viewer.behind = False
                    async for frame in self._catch_up(viewer, self._last):
                        yield frame
                elif viewer.status:
                    frame, viewer.status = viewer.status, b""
                    yield frame
                elif viewer.waiting:
                    message = viewer.take()
                    if message.last > viewer.position or not message.complete:
                        viewer.position = message.last
                        yield message.frame
                elif not await self._wait(viewer):
                    yield b":\n\n"
        finally:
            metrics.VIEWERS.dec()
            self._viewers.discard(viewer)

    def close(self) -> None:
        """End all streams, so that their viewers connect to another worker."""
        self._closed = True
        if self._reading:
            self._reading.cancel()
        for task in self._replays.values():
            task.cancel()
        for viewer in self._viewers:
            viewer.arrival.set()

    async def _catch_up(self, viewer: _Viewer, last: EventId) -> AsyncIterator[bytes]:
        """The frames that a viewer needs until it knows ``last`` or a later event."""
        retry = _RETRY
        events, changes = _FIRST_EVENTS, REPLAY_CHANGES
        while not self._closed:
            try:
                replay = await self._replay(_Wanted(viewer.position, events, changes))
            except asyncio.CancelledError:
                if self._closed:
                    return
                raise
            if replay is None:
                yield b":\n\n"
                await asyncio.sleep(retry)
                retry = min(2 * retry, _LONGEST_RETRY)
                continue
            for message in replay.messages:
                viewer.position = message.last
                yield message.frame
                await asyncio.sleep(0)
            if not replay.messages or viewer.position >= last:
                return
            # As many more as will do, if they are like these.
            if 4 * replay.changes <= changes:
                events = min(4 * events, EVENTS_AT_ONCE)
            changes -= replay.changes
            await asyncio.sleep(PAUSE)

    async def _replay(self, wanted: _Wanted) -> _Replay | None:
        """What comes next after an event, from Redis; None if Redis can't be read.

        Viewers that want the same share one replay.
        """
        task = self._replays.get(wanted)
        if task is None:
            if len(self._replays) >= REPLAYS_WAITING:
                return _Replay([_resync(max(self._last, wanted.after))])
            task = self._replays[wanted] = asyncio.create_task(self._read_replay(wanted))
            task.add_done_callback(lambda _: self._replays.pop(wanted))
        return await asyncio.shield(task)

    async def _read_replay(self, wanted: _Wanted) -> _Replay | None:
        try:
            async with self._replaying:
                events = await self._store.events(wanted.after, most=wanted.events, replay=True)
                if events.changes > wanted.changes:
                    return _Replay([_resync(max(self._last, events.last))])
                return _Replay([message async for message in _messages(events)], events.changes)
        except Problem:
            return None

    async def _wait(self, viewer: _Viewer) -> bool:
        """Whether something arrives for the viewer before a heartbeat is due."""
        viewer.arrival.clear()
        try:
            async with asyncio.timeout(HEARTBEAT):
                return await viewer.arrival.wait()
        except TimeoutError:
            return False

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        writes, since = 0, loop.time()
        try:
            while self._viewers:
                if (seconds := loop.time() - since) >= STATUS:
                    status = await self._status(writes / seconds)
                    writes, since = 0, loop.time()
                    for viewer in self._viewers:
                        viewer.send_status(status)
                    await asyncio.sleep(PAUSE)
                    continue
                try:
                    await self._store.wait_for_event(self._last, _CHECK)
                    events = await self._store.events(self._last)
                    writes += events.changes
                    if events.changes > REPLAY_CHANGES:
                        events = Events(await self._store.last_event(), [], complete=False)
                except Problem:
                    await asyncio.sleep(_RETRY)
                    continue
                await self._send(events)
                if not events.complete:
                    await asyncio.sleep(RESYNC_PAUSE)
                elif 0 < len(events.records) < EVENTS_AT_ONCE:  # otherwise there is more to read
                    await asyncio.sleep(PAUSE)
        finally:
            self._reading = None
            with contextlib.suppress(Problem):
                await self._store.count_viewers(0)

    async def _send(self, events: Events) -> None:
        """Queue events for all viewers."""
        async for message in _messages(events):
            self._last = message.last
            for viewer in self._viewers:
                viewer.send(message)

    async def _status(self, rate: float) -> bytes:
        """A ``status`` event: viewers and writes per second of the fleet, and who reports them.

        The figures are null while Redis can't be asked.
        """
        status: dict[str, float | None]
        try:
            viewers = await self._store.count_viewers(len(self._viewers))
            status = {"viewers": viewers, "writes": round(rate, 1)}
        except Problem:
            status = {"viewers": None, "writes": None}
        return b"event: status\ndata: %b\n\n" % msgspec.json.encode(status | self._name)
