"""Event streams to viewers. One reader of Redis serves all viewers of a worker.

The reader decodes, coalesces and encodes changes once, and writes the same bytes to all viewers that
follow it. If a channel changed several times, only its last value is sent. A viewer that resumes
from an earlier event, or was too slow, first catches up: events are replayed from Redis until the
viewer has reached the reader's position. A viewer may receive an event twice, but each message
contains all changes up to its event ID.

The cost of viewers is bounded (see docs/security.md): share of the worker's time, changes in a
message, changes replayed to one viewer, concurrent replays. A viewer that would exceed a bound is
sent ``resync`` and fetches the canvas, which costs less.
"""

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from time import thread_time
from typing import NamedTuple

import msgspec

from pixel import metrics
from pixel.canvas import Region
from pixel.pixel import RECORD_BYTES, coalesce
from pixel.problems import Problem
from pixel.settings import Settings
from pixel.store import EVENTS_AT_ONCE, Events, Store
from pixel.stream import EVENT_CHANGES, EventId

PAUSE = 0.05
"""Seconds between two replays for one viewer."""

STATUS = 2.0
"""Seconds between two ``status`` events, which also show that a quiet stream is alive."""

STATUS_PAUSES = 8
"""Least number of the reader's pauses between two ``status`` events."""

QUEUE_BYTES = 256 * 1024
"""Most bytes queued for a viewer. Beyond that, it is paused until it has received all of them."""

FRAME_CHANGES = 4096
"""Most changes in one message: 90 kB, encoded in 4 ms."""

REPLAY_CHANGES = 4 * FRAME_CHANGES
"""Most changes replayed to one viewer. Beyond that, fetching the canvas costs less."""

REPLAYS = 1
"""Most concurrent replays."""

REPLAYS_WAITING = 64
"""Most replays that run or wait, each for one position in the stream."""

REGIONS = 128
"""Most different regions. Viewers of further regions are sent the changes of the whole canvas."""

RESYNC_PAUSE = 2.0
"""Least seconds between two ``resync`` events that the reader sends to all viewers."""

_ENCODING_SHARE = 0.25  # largest share of a worker's time for encoding and writing changes
_FIRST_EVENTS = REPLAY_CHANGES // EVENT_CHANGES + 1  # if full, they exceed REPLAY_CHANGES
_FRAME_SECONDS = 25e-6  # CPU time of one frame to one viewer, in the worker and in Nginx
_FRAME_SHARE = 0.2  # largest share of a CPU for the frames of a worker's viewers
_TURN = 100  # viewers written to without a pause: 0.5 ms in the worker, 2 ms in Nginx
_CHECK = 1.0  # seconds between two checks of whether there are still viewers
_RETRY, _LONGEST_RETRY = 0.5, 4.0  # seconds before a read that failed is retried

log = logging.getLogger(__name__)


class _Message:
    """Changes as a server-sent event, for the whole canvas and for regions.

    Args:
        last: ID of the last stream event in the message.
        changes: (x, y, channel, value) each. If empty, the message is a ``resync``: viewers fetch
            the canvas, and later messages contain the events after ``last``.
    """

    def __init__(self, last: EventId, changes: Sequence[tuple[int, int, str, int]] = ()) -> None:
        self.last = last
        self.complete = bool(changes)
        self._changes = changes
        self._data = msgspec.json.encode(changes)
        start = b"id: %b\n" if changes else b"event: resync\nid: %b\n"
        self._start = start % last.text()
        self._parts: dict[Region, bytes] = {}
        self._whole = b"%bdata: %b\n\n" % (self._start, self._data)

    def frame(self, region: Region | None) -> bytes:
        """The bytes for a region, or for the whole canvas; empty if no pixel of the region has changed."""
        if region is None or not self.complete:
            return self._whole
        if region not in self._parts:
            self._parts[region] = self._select(region)
        return self._parts[region]

    def _select(self, region: Region) -> bytes:
        left, top = region.x, region.y
        right, bottom = left + region.w, top + region.h
        # Select from the encoded changes: this takes a tenth of the time of encoding them again.
        texts = zip(self._changes, self._data[2:-2].split(b"],["), strict=True)
        chosen = [text for (x, y, _, _), text in texts if left <= x < right and top <= y < bottom]
        return b"%bdata: [[%b]]\n\n" % (self._start, b"],[".join(chosen)) if chosen else b""


async def _messages(events: Events) -> AsyncIterator[_Message]:
    """Events as messages of bounded size.

    After each message it sleeps three times as long as the message took to encode.
    """
    if not events.complete:
        yield _Message(events.last)
        return
    loop = asyncio.get_running_loop()
    records: list[bytes] = []
    size = 0
    for event, record in events.records:
        records.append(record)
        size += len(record)
        if size >= (FRAME_CHANGES - EVENT_CHANGES) * RECORD_BYTES or event == events.last:
            started = loop.time()
            message = _Message(event, coalesce(records))
            rest = _rest(loop.time() - started)
            yield message
            records, size = [], 0
            await asyncio.sleep(rest)


def _rest(spent: float) -> float:
    """Seconds to sleep after ``spent`` seconds of work, to stay within ``_ENCODING_SHARE``."""
    return min(spent * (1 / _ENCODING_SHARE - 1), 1.0)


class _Wanted(NamedTuple):
    """The next replay for a viewer: events after an ID, at most so many, with at most so many changes."""

    after: EventId
    events: int
    changes: int

    @classmethod
    def first(cls, after: EventId) -> "_Wanted":
        """The first replay of a viewer that starts to catch up."""
        return cls(after, _FIRST_EVENTS, REPLAY_CHANGES)


class _Replay(NamedTuple):
    """Messages for viewers that catch up, and the number of changes before coalescing."""

    messages: list[_Message]
    changes: int = 0


class Viewer:
    """An open stream: its position, and how to write to it.

    Args:
        write: sends or queues bytes. The owner of the stream calls ``Hub.pause`` when the queue is
            too long, and ``Hub.resume`` when it is empty.
        end: ends the stream when the worker stops.
        region: the region whose changes are sent; None for the whole canvas.
    """

    __slots__ = ("end", "paused", "position", "region", "task", "wanted", "write")

    def __init__(
        self, write: Callable[[bytes], object], end: Callable[[], object], region: Region | None = None
    ) -> None:
        self.write = write
        self.end = end
        self.region = region
        self.position: EventId
        """Last event that was sent. While the viewer follows the reader, ``Hub._last`` is valid instead."""
        self.paused = False
        self.wanted: _Wanted | None = None
        """The next replay, while the viewer catches up."""
        self.task: asyncio.Task[None] | None = None


class Hub:
    """Reads the event stream while there are viewers, and sends its changes to them."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._name = {"instance": settings.instance, "release": settings.release}
        self._pause = self._least_pause = settings.frame_pause_min
        self._longest_pause = settings.frame_pause_max
        self._whole = Region(0, 0, store.canvas.width, store.canvas.height)
        self._regions: Counter[Region] = Counter()
        self._viewers: set[Viewer] = set()
        # Viewers that follow the reader, and viewers that will when the reader reaches their position.
        self._following: set[Viewer] = set()
        self._ahead: set[Viewer] = set()
        self._reading: asyncio.Task[None] | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._replays: dict[_Wanted, asyncio.Task[_Replay | None]] = {}
        self._replaying = asyncio.Semaphore(REPLAYS)
        self._last: EventId
        self._writes = 0
        self._closed = False
        self.notice: str | None = None
        """Message of the maintenance in progress, if any; the ``status`` event contains it."""

    def prepare(self) -> asyncio.Future[None]:
        """A future that is done when streams can be opened. Don't cancel it. Raises a 503 ``Problem``."""
        if self._reading is not None:
            ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            ready.set_result(None)
            return ready
        if self._preparing is None:
            self._preparing = asyncio.create_task(self._find_end())
        return self._preparing

    def open(self, viewer: Viewer, after: EventId | None) -> None:
        """Start a stream with the events after ``after``, or with new events if it is None."""
        viewer.position = after or self._last
        if viewer.region:
            further = viewer.region not in self._regions and len(self._regions) >= REGIONS
            if viewer.region == self._whole or further:
                viewer.region = None
            else:
                self._regions[viewer.region] += 1
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
        """Remove a viewer whose stream has ended."""
        if viewer in self._viewers:
            metrics.VIEWERS.dec()
            self._viewers.discard(viewer)
            self._leave(viewer)
            if viewer.region:
                self._regions -= Counter([viewer.region])
            viewer.write = _discard
            if viewer.task:
                viewer.task.cancel()

    def pause(self, viewer: Viewer) -> None:
        """Stop writing to a viewer whose queue is too long."""
        if not viewer.paused:
            viewer.paused = True
            self._leave(viewer)
            metrics.SLOW_VIEWERS.inc()

    def resume(self, viewer: Viewer) -> None:
        """Resume writing to a viewer whose queue is empty; it catches up first."""
        if viewer.paused:
            viewer.paused = False
            if viewer.task is None and not self._closed:
                self._start_catching_up(viewer)

    async def stream(self, after: EventId | None, region: Region | None = None) -> AsyncIterator[bytes]:
        """Yield the bytes of a stream until the worker stops."""
        waiting: deque[bytes] = deque()
        arrival = asyncio.Event()

        def write(frames: bytes) -> None:
            waiting.append(frames)
            arrival.set()
            if sum(map(len, waiting)) > QUEUE_BYTES:
                self.pause(viewer)

        viewer = Viewer(write, arrival.set, region)
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
        """End all streams; their viewers reconnect to another worker."""
        self._closed = True
        if self._reading:
            self._reading.cancel()
        for replay in self._replays.values():
            replay.cancel()
        for viewer in list(self._viewers):
            viewer.end()

    def reopen(self) -> None:
        """Accept streams again."""
        self._closed = False

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
        """Replay events to a viewer until it follows the reader or is paused."""
        try:
            retry = _RETRY
            wanted = viewer.wanted or _Wanted.first(viewer.position)
            while not viewer.paused:
                replay = await self._replay(wanted)
                if replay is None:
                    viewer.write(b":\n\n")
                    await asyncio.sleep(retry)
                    retry = min(2 * retry, _LONGEST_RETRY)
                    continue
                viewer.wanted = self._send_replay(viewer, wanted, replay)
                if viewer.wanted is None:
                    return
                wanted = viewer.wanted
                await asyncio.sleep(PAUSE)
        except Exception:
            log.exception("a viewer could not catch up")
            viewer.end()
        finally:
            viewer.task = None

    def _send_replay(self, viewer: Viewer, wanted: _Wanted, replay: _Replay) -> _Wanted | None:
        """Send a replay. Returns the next one, or None if the viewer now follows the reader."""
        for message in replay.messages:
            viewer.position = message.last
            viewer.write(message.frame(viewer.region))
            if viewer.paused:
                break
        # Without an epoch, as a client may leave it out. An empty replay may be older than the reader's
        # position: then there is more to replay.
        if not viewer.paused and viewer.position[:2] >= self._last[:2]:
            (self._ahead if viewer.position > self._last else self._following).add(viewer)
            return None
        if replay.messages and not replay.messages[-1].complete:
            return _Wanted.first(viewer.position)
        # Read more at once if the events so far have few changes.
        few = 4 * replay.changes <= wanted.changes
        events = min(4 * wanted.events, EVENTS_AT_ONCE) if few else wanted.events
        return _Wanted(viewer.position, events, wanted.changes - replay.changes)

    async def _replay(self, wanted: _Wanted) -> _Replay | None:
        """Read a replay from Redis; None if Redis can't be read.

        Viewers that need the same replay share it.
        """
        task = self._replays.get(wanted)
        if task is None:
            if len(self._replays) >= REPLAYS_WAITING:
                return _Replay([_Message(max(self._last, wanted.after))])
            task = self._replays[wanted] = asyncio.create_task(self._read_replay(wanted))
            task.add_done_callback(lambda _: self._replays.pop(wanted))
        return await asyncio.shield(task)

    async def _read_replay(self, wanted: _Wanted) -> _Replay | None:
        try:
            async with self._replaying:
                events = await self._store.events(wanted.after, most=wanted.events, replay=True)
                if events.changes > wanted.changes:
                    return _Replay([_Message(max(self._last, events.last))])
                return _Replay([message async for message in _messages(events)], events.changes)
        except Problem:
            return None

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
                if events is None:
                    await self._write(None, status)
                    await asyncio.sleep(_RETRY)
                elif events.records or status or not events.complete:
                    pause = self._choose_pause() if events.complete else RESYNC_PAUSE
                    began = loop.time()
                    await self._send(events, status)
                    await asyncio.sleep(max(began + pause - loop.time(), self._least_pause))
        finally:
            self._reading = None
            with contextlib.suppress(Problem):
                await self._store.count_viewers(0)

    async def _next(self, seconds: float) -> Events | None:
        """Wait up to ``seconds`` for new events and return them; None if Redis can't be read."""
        try:
            await self._store.wait_for_event(self._last, min(max(seconds, 0.01), _CHECK))
            events = await self._store.events(self._last)
            # Read all new events, to coalesce and send them together, up to the limit.
            while len(events.records) % EVENTS_AT_ONCE == 0 and 0 < events.changes <= REPLAY_CHANGES:
                more = await self._store.events(events.last)
                if not more.records:
                    break
                events = Events(more.last, events.records + more.records, complete=True)
            self._writes += events.changes
            if events.changes > REPLAY_CHANGES:
                events = Events(await self._store.last_event(), [], complete=False)
        except Problem:
            return None
        return events

    async def _send(self, events: Events, status: bytes) -> None:
        """Send events and the status to all viewers that follow the reader."""
        async for message in _messages(events):
            # Viewers whose position the reader has reached get this message too.
            self._last = message.last
            reached = {v for v in self._ahead if v.position <= message.last or not message.complete}
            self._ahead -= reached
            self._following |= reached
            await self._write(message, status)
            status = b""
        await self._write(None, status)

    async def _write(self, message: _Message | None, status: bytes) -> None:
        """Write to all following viewers, spread over the pause: a burst would delay writes in Nginx."""
        frames: dict[Region | None, bytes] = {}
        viewers = list(self._following) if message or status else []
        gap = self._pause * _TURN / max(len(viewers), _TURN)
        for start in range(0, len(viewers), _TURN):
            started = thread_time()  # CPU time: other processes must not lower the rate
            for viewer in viewers[start : start + _TURN]:
                frame = frames.get(viewer.region)
                if frame is None:
                    frame = frames[viewer.region] = self._frame(message, status, viewer.region)
                if frame:
                    viewer.write(frame)
            rest = _rest(thread_time() - started)
            await asyncio.sleep(max(rest, gap) if start + _TURN < len(viewers) else rest)
        metrics.VIEWER_FRAMES.inc(len(viewers))

    def _frame(self, message: _Message | None, status: bytes, region: Region | None) -> bytes:
        """The bytes of a message and the status, for a region or for the whole canvas."""
        if status and region:
            # Without this ID, a viewer of a region without changes would resume from an old event.
            status = b"id: %b\n%b" % (self._last.text(), status)
        return (message.frame(region) if message else b"") + status

    def _choose_pause(self) -> float:
        """Set and return the seconds between two messages; they grow with the number of viewers."""
        wanted = len(self._following) * _FRAME_SECONDS / _FRAME_SHARE
        self._pause = min(max(self._least_pause, wanted), self._longest_pause)
        metrics.FRAME_PAUSE.set(self._pause)
        return self._pause

    async def _status(self, rate: float) -> bytes:
        """A ``status`` event: the fleet's viewers and writes per second, this instance and release,
        and the message of a maintenance.

        Viewers and writes are null while Redis can't be read.
        """
        status: dict[str, float | str | None]
        try:
            viewers = await self._store.count_viewers(len(self._viewers))
            status = {"viewers": viewers, "writes": round(rate, 1)}
        except Problem:
            status = {"viewers": None, "writes": None}
        status["maintenance"] = self.notice
        return b"event: status\ndata: %b\n\n" % msgspec.json.encode(status | self._name)


def _discard(frames: bytes) -> None:
    """Discard frames for a viewer that was removed."""
