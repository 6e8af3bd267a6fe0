"""Changes on their way to viewers; one reader of Redis serves all viewers of a worker.

The reader decodes, coalesces and encodes changes once, and writes the same bytes to all viewers that
follow it. Of a channel that changed several times only the last value is sent. A viewer that knows
an earlier event, or was too slow, first catches up: from Redis, until it has come to where the
reader is. A viewer may therefore be sent events that it already knows, provided that one message
contains everything up to the last of them.

What viewers may cost a worker is bounded (see docs/security.md): the share of time for them, changes
in a message, changes that are replayed to one viewer, and replays at a time. A viewer that would
exceed a bound is sent ``resync`` and fetches the canvas, which is cheaper for all.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import msgspec

from pixel import metrics
from pixel.canvas import CHANNELS
from pixel.pixel import RECORD_BYTES, unpack
from pixel.problems import Problem
from pixel.settings import Settings
from pixel.store import EVENTS_AT_ONCE, Events, Store
from pixel.stream import EventId

PAUSE = 0.05
"""Seconds between two replays for one viewer."""

STATUS = 2.0
"""Seconds between two ``status`` events, which also show that a quiet stream is alive."""

STATUS_PAUSES = 8
"""Pauses of the reader between two ``status`` events, if that is longer."""

QUEUE_BYTES = 256 * 1024
"""Bytes that wait for a viewer, beyond which it is too slow: it catches up when it has them all."""

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

_ENCODING_SHARE = 0.25  # of a worker's time, at most, for encoding changes and writing them
_FRAME_SECONDS = 25e-6  # processor time that a frame takes for one viewer, in the worker and in Nginx
_FRAME_SHARE = 0.2  # of a processor, at most, for the frames of a worker's viewers
_TURN = 200  # viewers that are written to before others get a turn: 1 ms
_CHECK = 1.0  # seconds after which the reader checks whether it still has viewers
_RETRY, _LONGEST_RETRY = 0.5, 4.0  # seconds until Redis is asked again after a failure

log = logging.getLogger(__name__)


class _Message(NamedTuple):
    """A server-sent event, and the last event of the stream that it contains."""

    last: EventId
    complete: bool
    frame: bytes


def _resync(last: EventId) -> _Message:
    """Tells viewers to fetch the canvas; what follows comes after ``last``."""
    return _Message(last, False, b"event: resync\nid: %b\ndata: []\n\n" % last.text())


def _message(last: EventId, records: list[bytes]) -> _Message:
    cells = {change[:3]: change.value for record in records for change in unpack(record)}
    changes = [(x, y, CHANNELS[channel], value) for (x, y, channel), value in cells.items()]
    frame = b"id: %b\ndata: %b\n\n" % (last.text(), msgspec.json.encode(changes))
    return _Message(last, True, frame)


async def _messages(events: Events) -> list[_Message]:
    """Events as messages of bounded size; gives others a turn after each."""
    if not events.complete:
        return [_resync(events.last)]
    messages = []
    records: list[bytes] = []
    size = 0
    for event, record in events.records:
        records.append(record)
        size += len(record)
        if size >= (FRAME_CHANGES - 1024) * RECORD_BYTES or event == events.last:
            messages.append(_message(event, records))
            records, size = [], 0
            await asyncio.sleep(0)
    return messages


class _Replay(NamedTuple):
    """Messages for viewers that catch up, and the number of changes that they were made from."""

    messages: list[_Message]
    changes: int = 0


class Viewer:
    """An open stream: what it knows, and how to write to it.

    Args:
        write: sends bytes, or queues them. Whoever owns the stream tells the hub when too many wait
            (``Hub.pause``), and when none do any more (``Hub.resume``).
        end: ends the stream, as the worker stops.
    """

    __slots__ = ("end", "paused", "position", "replayed", "task", "write")

    def __init__(self, write: Callable[[bytes], object], end: Callable[[], object]) -> None:
        self.write = write
        self.end = end
        self.position: EventId
        """The last event that it has been sent; while it follows the reader, the reader's is."""
        self.paused = False
        self.replayed = 0
        """Changes, since it last followed the reader."""
        self.task: asyncio.Task[None] | None = None


class Hub:
    """Reads the event stream while there are viewers, and sends it to them."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._name = {"instance": settings.instance, "release": settings.release}
        self._pause = self._least_pause = settings.frame_pause_min
        self._longest_pause = settings.frame_pause_max
        self._viewers: set[Viewer] = set()
        # Those that follow the reader, and those that will when it has come to where they are.
        self._following: set[Viewer] = set()
        self._ahead: set[Viewer] = set()
        self._reading: asyncio.Task[None] | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._replays: dict[EventId, asyncio.Task[_Replay | None]] = {}
        self._replaying = asyncio.Semaphore(REPLAYS)
        self._last: EventId
        self._writes = 0
        self._closed = False

    def prepare(self) -> asyncio.Future[None]:
        """Done when streams can be opened. Raises a 503 ``Problem``; must not be cancelled."""
        if self._reading is not None:
            ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            ready.set_result(None)
            return ready
        if self._preparing is None:
            self._preparing = asyncio.create_task(self._find_end())
        return self._preparing

    def open(self, viewer: Viewer, after: EventId | None) -> None:
        """Begin a stream for a viewer that knows the canvas as of an event, or from now on."""
        viewer.position = after or self._last
        self._viewers.add(viewer)
        metrics.VIEWERS.inc()
        viewer.write(b"retry: 1000\nid: %b\ndata: []\n\n" % viewer.position.text())
        if self._closed:
            viewer.end()
            return
        if after is None:
            self._following.add(viewer)
        else:
            self._start_catching_up(viewer)
        self._reading = self._reading or asyncio.create_task(self._read())

    def remove(self, viewer: Viewer) -> None:
        """Forget a viewer whose stream has ended."""
        if viewer in self._viewers:
            metrics.VIEWERS.dec()
            self._viewers.discard(viewer)
            self._leave(viewer)
            viewer.write = _discard
            if viewer.task:
                viewer.task.cancel()

    def pause(self, viewer: Viewer) -> None:
        """Write no more to a viewer, which has too much to take."""
        if not viewer.paused:
            viewer.paused = True
            self._leave(viewer)
            metrics.SLOW_VIEWERS.inc()

    def resume(self, viewer: Viewer) -> None:
        """Write to a viewer again, which has taken everything."""
        if viewer.paused:
            viewer.paused = False
            if viewer.task is None and not self._closed:
                self._start_catching_up(viewer)

    async def stream(self, after: EventId | None) -> AsyncIterator[bytes]:
        """A stream as an iterator over its bytes. It ends when the worker stops."""
        waiting: deque[bytes] = deque()
        arrival = asyncio.Event()

        def write(frames: bytes) -> None:
            waiting.append(frames)
            arrival.set()
            if sum(map(len, waiting)) > QUEUE_BYTES:
                self.pause(viewer)

        viewer = Viewer(write, arrival.set)
        self.open(viewer, after)
        try:
            while waiting or not self._closed:
                if waiting:
                    yield waiting.popleft()
                else:
                    self.resume(viewer)
                    arrival.clear()
                    await arrival.wait()
        finally:
            self.remove(viewer)

    def close(self) -> None:
        """End all streams, so that their viewers connect to another worker."""
        self._closed = True
        if self._reading:
            self._reading.cancel()
        for replay in self._replays.values():
            replay.cancel()
        for viewer in list(self._viewers):
            viewer.end()

    async def _find_end(self) -> None:
        try:
            last = await self._store.last_event()
            if self._reading is None:
                self._last = last
        finally:
            self._preparing = None

    def _leave(self, viewer: Viewer) -> None:
        if viewer in self._following:
            self._following.discard(viewer)
            viewer.position = self._last
        self._ahead.discard(viewer)

    def _start_catching_up(self, viewer: Viewer) -> None:
        viewer.task = asyncio.create_task(self._catch_up(viewer))

    async def _catch_up(self, viewer: Viewer) -> None:
        """Send a viewer what it needs to follow the reader; stop when it has too much to take."""
        try:
            retry = _RETRY
            while not viewer.paused:
                replay = await self._replay(viewer.position)
                if replay is None:
                    viewer.write(b":\n\n")
                    await asyncio.sleep(retry)
                    retry = min(2 * retry, _LONGEST_RETRY)
                elif self._send_replay(viewer, replay):
                    return
                else:
                    await asyncio.sleep(PAUSE)
        except Exception:
            log.exception("a viewer could not catch up")
            viewer.end()
        finally:
            viewer.task = None

    def _send_replay(self, viewer: Viewer, replay: _Replay) -> bool:
        """Send a replay; returns whether the viewer knows all that the reader does, and follows it."""
        messages = replay.messages
        viewer.replayed += replay.changes
        if viewer.replayed > REPLAY_CHANGES:
            messages = [_resync(max(self._last, viewer.position))]
        for message in messages:
            viewer.position = message.last
            viewer.write(message.frame)
            if viewer.paused:
                return False
        if messages and viewer.position < self._last:
            return False
        viewer.replayed = 0
        (self._ahead if viewer.position > self._last else self._following).add(viewer)
        return True

    async def _replay(self, after: EventId) -> _Replay | None:
        """What comes next after an event, from Redis; None if Redis can't be read.

        Viewers at the same position share one replay.
        """
        task = self._replays.get(after)
        if task is None:
            if len(self._replays) >= REPLAYS_WAITING:
                return _Replay([_resync(max(self._last, after))])
            task = self._replays[after] = asyncio.create_task(self._read_replay(after))
            task.add_done_callback(lambda _: self._replays.pop(after))
        return await asyncio.shield(task)

    async def _read_replay(self, after: EventId) -> _Replay | None:
        await self._replaying.acquire()
        loop = asyncio.get_running_loop()
        pause = 0.0
        try:
            events = await self._store.events(after, replay=True)
            if events.changes > REPLAY_CHANGES:
                return _Replay([_resync(max(self._last, events.last))])
            started = loop.time()
            messages = await _messages(events)
            pause = _pause(loop.time() - started)
        except Problem:
            return None
        finally:
            loop.call_later(pause, self._replaying.release)
        return _Replay(messages, events.changes)

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        self._writes, since = 0, loop.time()
        try:
            while self._viewers:
                due = since + max(STATUS, STATUS_PAUSES * self._pause)
                events = await self._next(due - loop.time())
                status = b""
                if (now := loop.time()) >= due:
                    status = await self._status(self._writes / (now - since))
                    self._writes, since = 0, now
                pause = await self._send(events or Events(self._last, [], complete=True), status)
                await asyncio.sleep(pause if events else _RETRY)
        finally:
            self._reading = None
            with contextlib.suppress(Problem):
                await self._store.count_viewers(0)

    async def _next(self, seconds: float) -> Events | None:
        """What happens within some seconds; None if Redis can't be read."""
        try:
            await self._store.wait_for_event(self._last, min(max(seconds, 0.01), _CHECK))
            events = await self._store.events(self._last)
            # All of it is coalesced and sent together, unless it is too much.
            while events.records and len(events.records) % EVENTS_AT_ONCE == 0:
                more = await self._store.events(events.last)
                if not more.records or events.changes > REPLAY_CHANGES:
                    break
                events = Events(more.last, events.records + more.records, complete=True)
            self._writes += events.changes
            if events.changes > REPLAY_CHANGES:
                events = Events(await self._store.last_event(), [], complete=False)
        except Problem:
            return None
        return events

    async def _send(self, events: Events, status: bytes) -> float:
        """Send events and the status to all that follow; returns for how many seconds to pause."""
        if events.complete and not events.records and not status:
            return 0
        started = asyncio.get_running_loop().time()
        messages = await _messages(events)
        frames = b"".join([*(message.frame for message in messages), status])
        # From now on, those that follow are those that get these frames.
        self._last = events.last
        viewers = list(self._following)
        for viewer in list(self._ahead):
            if viewer.position > self._last and events.complete:
                continue
            self._ahead.discard(viewer)
            self._following.add(viewer)
            news = [m.frame for m in messages if m.last > viewer.position or not m.complete]
            viewer.write(b"".join(news))
        for start in range(0, len(viewers), _TURN):
            for viewer in viewers[start : start + _TURN]:
                viewer.write(frames)
            await asyncio.sleep(0)
        metrics.VIEWER_FRAMES.inc(len(viewers))
        self._pause = self._choose_pause(asyncio.get_running_loop().time() - started)
        metrics.FRAME_PAUSE.set(self._pause)
        return self._pause if events.complete else RESYNC_PAUSE

    def _choose_pause(self, spent: float) -> float:
        """The pause after some seconds of encoding and writing: longer with viewers and load."""
        share = len(self._following) * _FRAME_SECONDS / _FRAME_SHARE
        return min(max(self._least_pause, share, _pause(spent)), self._longest_pause)

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


def _pause(spent: float) -> float:
    """The pause after encoding for some seconds that keeps it to its share of the time."""
    return min(spent * (1 / _ENCODING_SHARE - 1), 1.0)


def _discard(frames: bytes) -> None:
    """Take the place of a stream that has ended."""
