"""The way of a change to its viewers, with one reader of Redis for all that a worker has.

A viewer is told of every event after the one that it knows: first of those that Redis still has,
then of those that the worker's reader finds. They are coalesced: a viewer hears what a cell is in
the end, not how it came to be. To hear of events again that one knew already does no harm then,
as long as everything up to the last of them is in the same message.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from typing import NamedTuple

import msgspec

from pixel import metrics
from pixel.canvas import CHANNELS
from pixel.pixel import RECORD_BYTES, unpack
from pixel.problems import Problem
from pixel.store import Events, Store
from pixel.stream import EventId

PAUSE = 0.05
"""Seconds from one message to a viewer to the next, at least."""

HEARTBEAT = 15.0
"""Seconds after which a viewer hears something, even if nothing happens."""

STATUS = 2.0
"""Seconds from one word on viewers and writes to the next."""

QUEUE_MESSAGES = 20
QUEUE_BYTES = 1024 * 1024
"""What may wait for a slow viewer. Beyond that it is dropped, and the viewer asks Redis."""

_LOOK = 1.0  # seconds after which the reader looks whether it still has viewers
_RETRY = 0.5  # seconds until it asks a Redis again that didn't answer


class _Message(NamedTuple):
    """A server-sent event, and the event of the canvas up to which it tells."""

    last: EventId
    complete: bool
    frame: bytes


def _message(events: Events) -> _Message:
    """What a viewer is told of events: the changes, or to fetch the canvas anew."""
    cells = {change[:3]: change.value for record in events.records for change in unpack(record)}
    changes = [(x, y, CHANNELS[channel], value) for (x, y, channel), value in cells.items()]
    name = b"" if events.complete else b"event: resync\n"
    frame = b"%bid: %b\ndata: %b\n\n" % (name, events.last.text(), msgspec.json.encode(changes))
    return _Message(events.last, events.complete, frame)


class _Viewer:
    """Somebody who is told, and what waits for them."""

    def __init__(self, position: EventId, *, behind: bool) -> None:
        self.position = position
        self.behind = behind
        self.arrival = asyncio.Event()
        self.waiting: deque[_Message] = deque()
        self.status = b""
        self._size = 0

    def tell_status(self, frame: bytes) -> None:
        """Let the newest status wait for the viewer."""
        self.status = frame
        self.arrival.set()

    def tell(self, message: _Message) -> None:
        """Let a message wait for the viewer."""
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
    """Reads the stream of events while there are viewers, and tells them."""

    def __init__(self, store: Store, instance: str, release: str) -> None:
        self._store = store
        self._name = {"instance": instance, "release": release}
        self._viewers: set[_Viewer] = set()
        self._reading: asyncio.Task[None] | None = None
        self._last: EventId
        self._closed = False

    async def prepare(self) -> None:
        """Find out where the stream ends, if nobody reads it. Raises a 503 ``Problem``."""
        if self._reading is None:
            self._last = await self._store.last_event()

    async def stream(self, after: EventId | None) -> AsyncIterator[bytes]:
        """What a viewer is told who knows the canvas as it stood after an event, or from now on.

        It goes on until the viewer goes, or the worker.
        """
        viewer = _Viewer(after or self._last, behind=after is not None)
        self._viewers.add(viewer)
        self._reading = self._reading or asyncio.create_task(self._read())
        metrics.VIEWERS.inc()
        try:
            yield b"retry: 1000\nid: %b\ndata: []\n\n" % viewer.position.text()
            while not self._closed:
                if viewer.behind:
                    # What is read from now on reaches the queue, what came before is in Redis.
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
        """End all streams, so that their viewers find another worker."""
        self._closed = True
        if self._reading:
            self._reading.cancel()
        for viewer in self._viewers:
            viewer.arrival.set()

    async def _catch_up(self, viewer: _Viewer, last: EventId) -> AsyncIterator[bytes]:
        """What a viewer has to hear until it knows of an event that is the last, or later."""
        while not self._closed:
            try:
                events = await self._store.events(viewer.position)
            except Problem:
                await asyncio.sleep(_RETRY)
                continue
            if events.complete and not events.records:
                return
            viewer.position = events.last
            yield _message(events).frame
            await asyncio.sleep(PAUSE)
            if viewer.position >= last:
                return

    async def _wait(self, viewer: _Viewer) -> bool:
        """Whether something has come for the viewer before a heartbeat is due."""
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
                        viewer.tell_status(status)
                    await asyncio.sleep(PAUSE)
                    continue
                try:
                    await self._store.wait_for_event(self._last, _LOOK)
                    events = await self._store.events(self._last)
                except Problem:
                    await asyncio.sleep(_RETRY)
                    continue
                if events.records or not events.complete:
                    self._last = events.last
                    writes += sum(map(len, events.records)) // RECORD_BYTES
                    message = _message(events)
                    for viewer in self._viewers:
                        viewer.tell(message)
                    await asyncio.sleep(PAUSE)
        finally:
            self._reading = None
            with contextlib.suppress(Problem):
                await self._store.count_viewers(0)

    async def _status(self, rate: float) -> bytes:
        """Viewers and writes a second, of the whole fleet, and who says so.

        The figures are unknown while Redis can't be asked.
        """
        status: dict[str, float | None]
        try:
            viewers = await self._store.count_viewers(len(self._viewers))
            status = {"viewers": viewers, "writes": round(rate, 1)}
        except Problem:
            status = {"viewers": None, "writes": None}
        return b"event: status\ndata: %b\n\n" % msgspec.json.encode(status | self._name)
