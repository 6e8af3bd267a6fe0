"""Follows the event stream and archives it."""

import asyncio
import logging
from collections.abc import Sequence
from time import monotonic, time
from typing import Any

import msgspec

from pixel.canvas import Region
from pixel.history.archive import Archive, Entry
from pixel.link import Link
from pixel.names import EVENTS
from pixel.pixel import unpack
from pixel.problems import Problem
from pixel.resp import ReplyError
from pixel.stream import NO_EVENT, EventId

EVENTS_AT_ONCE = 256
"""Most events in one transaction: 1.5 MB, as an event holds at most 1,024 changes of six bytes."""

PAUSE = 0.1
"""Seconds between two transactions, once the end of the stream is reached."""

WAIT = 2.0
"""Longest wait for the next event, in seconds."""

TRIM_PAUSE = 10.0
"""Seconds between two checks of age and size."""

_RETRY = 0.5  # seconds

_RUNS = msgspec.json.Decoder(list[tuple[str, int]])

log = logging.getLogger(__name__)


class _Stream:
    """State of the stream, from XINFO STREAM."""

    def __init__(self, reply: Any) -> None:
        self.last = NO_EVENT
        self.added = self.trimmed = 0
        if not isinstance(reply, ReplyError):  # otherwise there is no stream
            facts = dict(zip(reply[::2], reply[1::2], strict=True))
            last = facts[b"last-entry"]
            self.last = EventId.of(last) if last else EventId.parse(facts[b"last-generated-id"])
            self.added = facts[b"entries-added"]
            self.trimmed = self.added - facts[b"length"]


def entry(event: bytes, fields: Sequence[bytes]) -> Entry:
    """An event of the stream. Its field ``a`` has runs of authors; without it they are unknown."""
    content = dict(zip(fields[::2], fields[1::2], strict=True))
    changes = unpack(content[b"c"])
    authors: list[str | None] = []
    for name, count in _RUNS.decode(content.get(b"a", b"[]")):
        authors += [name or None] * count
    if len(authors) != len(changes):
        authors = [None] * len(changes)
    return Entry(EventId.of((event, fields)), changes, authors)


class Follower:
    """Archives the stream's events in their order.

    A transaction of SQLite contains events and the position after them, so that a killed process
    neither skips nor repeats one. Gaps are found by the number of events ever added to the stream.
    """

    def __init__(self, archive: Archive, link: Link, canvas: Region) -> None:
        self._archive = archive
        self._link = link
        self._tiles = canvas.tile_keys()
        self._turn = asyncio.Lock()
        self.current = monotonic()
        """Monotonic time at which the archive was last up to date."""
        self.changes = 0
        """Number of changes archived by this process."""

    @property
    def lag(self) -> float:
        """Seconds since the archive was last up to date."""
        return monotonic() - self.current

    async def run(self) -> None:
        """Follow the stream until cancelled."""
        while True:
            try:
                complete = await self._step()
                if complete:
                    self.current = monotonic()
                    if self._archive.position.due:
                        await self._take_snapshot()
                    await self._wait()
                    await asyncio.sleep(PAUSE)
            except Problem:  # the link has logged it
                await asyncio.sleep(_RETRY)

    async def keep_size(self, days: int, most_bytes: int) -> None:
        """Remove changes that are too old or too many, until cancelled."""
        while True:
            before = int((time() - days * 86_400) * 1000)
            removed = 1
            while removed:
                async with self._turn:
                    removed = await asyncio.to_thread(self._archive.trim, before, most_bytes)
                await asyncio.sleep(PAUSE)
            await asyncio.sleep(TRIM_PAUSE)

    async def _step(self, until: EventId | None = None) -> bool:
        """Archive the next events; returns whether there are no more."""
        position = self._archive.position
        # In a cluster, the first event is the last archived one, if the canvas has it.
        is_checked = position.event.epoch > 0
        start = b"" if is_checked else b"("
        found, facts = await self._link.ask_at_once(
            ("XRANGE", EVENTS, start + position.event.in_redis(), until.in_redis() if until else "+",
             "COUNT", EVENTS_AT_ONCE + is_checked),
            ("XINFO", "STREAM", EVENTS),
        )  # fmt: skip
        stream = _Stream(facts)
        if position.entries < 0:
            async with self._turn:
                self._archive.begin(stream.trimmed)
            return False
        if (lost := stream.trimmed - position.entries) > 0:
            await self._skip(position.event, stream.trimmed, lost, "trimmed")
            return False
        is_reached = until is None or position.event <= until
        if is_checked and is_reached and stream.trimmed < position.entries:
            if not found or EventId.of(found[0]) != position.event:
                # A deposed master wrote it, or Redis was restored.
                await self._skip(stream.last, stream.added, None, "diverged")
                return False
            found = found[1:]
        complete = len(found) < EVENTS_AT_ONCE
        if complete and until is None and position.entries + len(found) != stream.added:
            # Redis has an earlier state than the history, and perhaps newer events.
            to = min(stream.last, position.event)
            await self._skip(to, stream.added - len(found), None, "restored")
            return False
        if found:
            entries = [entry(event, fields) for event, fields in found]
            count = position.entries + len(entries)
            async with self._turn:
                self.changes += await asyncio.to_thread(
                    self._archive.append, entries, entries[-1].event, count
                )
        return complete

    async def _skip(self, to: EventId, count: int, missing: int | None, reason: str) -> None:
        log.error("the history has a gap (%s), %s events are missing", reason, missing or "unknown")
        async with self._turn:
            self._archive.skip(to, count, missing=missing, reason=reason)

    async def _take_snapshot(self) -> None:
        """Read the canvas, archive all events that it contains, and store it.

        If they are others, the canvas was a deposed master's, and the snapshot stays due.
        """
        facts, *tiles = await self._link.ask_at_once(
            ("XINFO", "STREAM", EVENTS), *(("GET", key) for key in self._tiles)
        )
        end = _Stream(facts).last
        while not await self._step(end):
            pass
        last = self._archive.position.event
        # Outside clusters, there may be no event of the canvas any more.
        is_of_canvas = last == end or (not end.epoch and last <= end)
        if is_of_canvas and not any(isinstance(tile, ReplyError) for tile in tiles):
            async with self._turn:
                await asyncio.to_thread(
                    self._archive.add_snapshot, dict(zip(self._tiles, tiles, strict=True))
                )
            log.info("a snapshot of the canvas is part of the history")

    async def _wait(self) -> None:
        """Return when there is another event, or after a time."""
        await self._link.ask(
            ("XREAD", "COUNT", 1, "BLOCK", round(WAIT * 1000), "STREAMS", EVENTS,
             self._archive.position.event.in_redis()),
            blocking=WAIT,
        )  # fmt: skip
