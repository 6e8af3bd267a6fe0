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

REGIONS = 128
"""Most different parts of the canvas that are watched; further ones are sent all changes."""

RESYNC_PAUSE = 2.0
"""Least seconds between two ``resync`` events that the reader sends to all viewers."""

_ENCODING_SHARE = 0.25  # of a worker's time, at most, for encoding changes and writing them
_FIRST_EVENTS = REPLAY_CHANGES // EVENT_CHANGES + 1  # so many full ones are too many to be replayed
_FRAME_SECONDS = 25e-6  # processor time that a frame takes for one viewer, in the worker and in Nginx
_FRAME_SHARE = 0.2  # of a processor, at most, for the frames of a worker's viewers
_TURN = 100  # viewers that are written to at once: half a millisecond here, two in Nginx
_CHECK = 1.0  # seconds after which the reader checks whether it still has viewers
_RETRY, _LONGEST_RETRY = 0.5, 4.0  # seconds until Redis is asked again after a failure

log = logging.getLogger(__name__)


class _Message:
    """Changes, as a server-sent event for those who watch all of the canvas or a part.

    Args:
        last: the last event of the stream that it contains.
        changes: none at all tell viewers to fetch the canvas; what follows comes after ``last``.
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
        """It for those who watch a region, or all; empty if nothing of the region has changed."""
        if region is None or not self.complete:
            return self._whole
        if region not in self._parts:
            self._parts[region] = self._select(region)
        return self._parts[region]

    def _select(self, region: Region) -> bytes:
        left, top = region.x, region.y
        right, bottom = left + region.w, top + region.h
        # What is encoded already is cut, so that a region costs a tenth of all of it.
        texts = zip(self._changes, self._data[2:-2].split(b"],["), strict=True)
        chosen = [text for (x, y, _, _), text in texts if left <= x < right and top <= y < bottom]
        return b"%bdata: [[%b]]\n\n" % (self._start, b"],[".join(chosen)) if chosen else b""


async def _messages(events: Events) -> AsyncIterator[_Message]:
    """Events as messages of bounded size.

    Others have the worker's time between two messages, three times as long as one took to encode.
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
    """The pause after some seconds of work for viewers that keeps it to its share of the worker's time."""
    return min(spent * (1 / _ENCODING_SHARE - 1), 1.0)


class _Wanted(NamedTuple):
    """What a viewer that catches up needs next: so many events, if they have no more changes."""

    after: EventId
    events: int
    changes: int

    @classmethod
    def first(cls, after: EventId) -> "_Wanted":
        """What it needs when it begins to catch up."""
        return cls(after, _FIRST_EVENTS, REPLAY_CHANGES)


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
        region: the part of the canvas that it is about; None for all of it.
    """

    __slots__ = ("end", "paused", "position", "region", "task", "wanted", "write")

    def __init__(
        self, write: Callable[[bytes], object], end: Callable[[], object], region: Region | None = None
    ) -> None:
        self.write = write
        self.end = end
        self.region = region
        self.position: EventId
        """The last event that it has been sent; while it follows the reader, the reader's is."""
        self.paused = False
        self.wanted: _Wanted | None = None
        """What it needs next, while it catches up."""
        self.task: asyncio.Task[None] | None = None


class Hub:
    """Reads the event stream while there are viewers, and sends it to them."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._name = {"instance": settings.instance, "release": settings.release}
        self._pause = self._least_pause = settings.frame_pause_min
        self._longest_pause = settings.frame_pause_max
        self._whole = Region(0, 0, store.canvas.width, store.canvas.height)
        self._regions: Counter[Region] = Counter()
        self._viewers: set[Viewer] = set()
        # Those that follow the reader, and those that will when it has come to where they are.
        self._following: set[Viewer] = set()
        self._ahead: set[Viewer] = set()
        self._reading: asyncio.Task[None] | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._replays: dict[_Wanted, asyncio.Task[_Replay | None]] = {}
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
        """Forget a viewer whose stream has ended."""
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

    async def stream(self, after: EventId | None, region: Region | None = None) -> AsyncIterator[bytes]:
        """A stream as an iterator over its bytes. It ends when the worker stops."""
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
        """Send a replay; returns what the viewer needs next, None if it follows the reader now."""
        for message in replay.messages:
            viewer.position = message.last
            viewer.write(message.frame(viewer.region))
            if viewer.paused:
                break
        if not viewer.paused and (not replay.messages or viewer.position >= self._last):
            (self._ahead if viewer.position > self._last else self._following).add(viewer)
            return None
        if replay.messages and not replay.messages[-1].complete:
            return _Wanted.first(viewer.position)
        # As many more as will do, if they are like these.
        few = 4 * replay.changes <= wanted.changes
        events = min(4 * wanted.events, EVENTS_AT_ONCE) if few else wanted.events
        return _Wanted(viewer.position, events, wanted.changes - replay.changes)

    async def _replay(self, wanted: _Wanted) -> _Replay | None:
        """What comes next after an event, from Redis; None if Redis can't be read.

        Viewers that want the same share one replay.
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
        """What happens within some seconds; None if Redis can't be read."""
        try:
            await self._store.wait_for_event(self._last, min(max(seconds, 0.01), _CHECK))
            events = await self._store.events(self._last)
            # All of it is coalesced and sent together, unless it is too much.
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
        """Send events and the status to all viewers that follow."""
        async for message in _messages(events):
            # From now on, those that follow are those that get this message.
            self._last = message.last
            reached = {v for v in self._ahead if v.position <= message.last or not message.complete}
            self._ahead -= reached
            self._following |= reached
            await self._write(message, status)
            status = b""
        await self._write(None, status)

    async def _write(self, message: _Message | None, status: bytes) -> None:
        """Write to all viewers that follow, spread over the pause: in a burst they delay writes in Nginx."""
        frames: dict[Region | None, bytes] = {}
        viewers = list(self._following) if message or status else []
        gap = self._pause * _TURN / max(len(viewers), _TURN)
        for start in range(0, len(viewers), _TURN):
            started = thread_time()  # the worker's own: it doesn't write less because others are busy
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
        """What those who watch a region, or all, are sent at once."""
        if status and region:
            # It tells how far the stream is: a viewer of a quiet part would resume too early.
            status = b"id: %b\n%b" % (self._last.text(), status)
        return (message.frame(region) if message else b"") + status

    def _choose_pause(self) -> float:
        """The pause after a message, which grows with the viewers that follow."""
        wanted = len(self._following) * _FRAME_SECONDS / _FRAME_SHARE
        self._pause = min(max(self._least_pause, wanted), self._longest_pause)
        metrics.FRAME_PAUSE.set(self._pause)
        return self._pause

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


def _discard(frames: bytes) -> None:
    """Take the place of a stream that has ended."""
