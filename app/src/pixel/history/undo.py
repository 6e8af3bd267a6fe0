"""Undo: cells (a channel of a pixel each) are given the value that they would have without some changes.

A cell is changed only if its last change is one of those to undo, and the canvas still shows it. Each
transaction watches its tile, so that nothing painted meanwhile is overwritten: if the tile changes
between the check and the write, Redis executes nothing, and the cells are checked again. A
transaction that is delayed does the same, so it needs no lease (compare ``pixel.commit``).
"""

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from pixel.canvas import TILE, TILE_BYTES, Canvas, Region, locate
from pixel.history.archive import read_position, read_tile
from pixel.history.queries import Selection, conditions, reading
from pixel.names import EVENTS
from pixel.pixel import Change, pack, unpack
from pixel.resp import Command, Connection, ReplyError
from pixel.stream import EVENT_CHANGES, EventId, epoch_fields

TRIES = 200
"""Attempts at a transaction on a tile that others change at the same time."""

PAUSES = 2
"""Length of the pause after a transaction, in lengths of the transaction; other writes have this time."""

STRIP = 16
"""Rows of a tile that are planned and changed together: 12 transactions at most."""

_EVENTS_AT_ONCE = 256
_TIMEOUT = 10.0  # seconds


class Cell(NamedTuple):
    """A cell to restore: what it showed after the change to undo, and its value without it."""

    x: int
    y: int
    channel: int
    shown: int
    former: int

    @property
    def place(self) -> tuple[int, int, int]:
        """Which cell it is."""
        return self.x, self.y, self.channel


class Outcome(msgspec.Struct):
    """Number of cells by what was done with them."""

    changed: int = 0
    """They were given their former value, or would be."""
    equal: int = 0
    """Their former value is the one that they show."""
    painted_over: int = 0
    """Others have painted them later."""
    unknown: int = 0
    """Their former value is older than the history."""
    busy: int = 0
    """Their tile was changed by others too often."""

    def __add__(self, other: "Outcome") -> "Outcome":
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        return Outcome(*(one + another for one, another in pairs))


class Part(NamedTuple):
    """What was done in a strip of the canvas: the outcome, and the new values of the changed cells."""

    outcome: Outcome
    values: list[Change]


class Undo:
    """Undoes selected changes, or counts them.

    Args:
        path: the history file.
        connection: to Redis.
        canvas: the canvas.
        selection: the changes to undo.
        author: the author of the new changes.
        most_events: length of the stream, as the application has it.
    """

    def __init__(
        self,
        path: Path,
        connection: Connection,
        canvas: Canvas,
        selection: Selection,
        author: str,
        most_events: int,
    ) -> None:
        self._path = path
        self._connection = connection
        self._canvas = canvas
        self._selection = selection
        self._author = author
        self._event = ("XADD", EVENTS, "MAXLEN", "~", most_events, "*", "c")
        self._end = epoch_fields(connection.epoch)

    async def run(self, *, apply: bool) -> Outcome:
        """Undo the changes if ``apply``; otherwise count only."""
        outcome = Outcome()
        async for part in self.parts(apply=apply):
            outcome += part.outcome
        return outcome

    async def parts(self, *, apply: bool, start: int = 0) -> AsyncGenerator[Part]:
        """The same strip by strip, from the strip with this number on. Each strip is independent."""
        for strip in islice(_strips(self._canvas, self._selection.region), start, None):
            outcome, values = Outcome(), list[Change]()
            position, cells = await asyncio.to_thread(self._plan, strip, outcome)
            # Changes that are not yet in the history are in the stream.
            later = _Tail(position)
            for first in range(0, len(cells), EVENT_CHANGES):
                some = cells[first : first + EVENT_CHANGES]
                values += await self._restore(some, later, outcome, apply=apply)
            yield Part(outcome, values)

    def _plan(self, strip: Region, outcome: Outcome) -> tuple[EventId, list[Cell]]:
        """The cells of a strip to restore, by the history up to an event."""
        with reading(self._path) as database:
            selection = self._selection._replace(region=strip)
            return read_position(database).event, list(_cells(database, selection, outcome))

    async def _restore(
        self, cells: Sequence[Cell], later: "_Tail", outcome: Outcome, *, apply: bool
    ) -> list[Change]:
        """Give cells of a strip their former values, or count them; returns the new values."""
        loop = asyncio.get_running_loop()
        key, _ = locate(cells[0].x, cells[0].y)
        for _ in range(TRIES):
            started = loop.time()
            tile = await self._read(key, later)
            chosen = [
                cell
                for cell in cells
                if cell.place not in later.places
                and tile[locate(cell.x, cell.y)[1] + cell.channel] == cell.shown
            ]
            values = [Change(cell.x, cell.y, cell.channel, cell.former) for cell in chosen]
            if not apply or await self._write(key, values):
                outcome.changed += len(values)
                outcome.painted_over += len(cells) - len(values)
                await asyncio.sleep(PAUSES * (loop.time() - started) if apply else 0)
                return values
        outcome.busy += len(cells)
        return []

    async def _read(self, key: str, later: "_Tail") -> bytes:
        """Watch and read a tile, and all changes that are not yet in the history."""
        _, tile, found = await self._ask(("WATCH", key), ("GET", key), later.command)
        while later.add(found):
            [found] = await self._ask(later.command)
        return bytes(tile or b"").ljust(TILE_BYTES, b"\0")

    async def _write(self, key: str, values: Sequence[Change]) -> bool:
        """Write values; returns whether Redis has, or the tile was changed in between."""
        commands: list[Command] = []
        if values:
            fields: list[str | int] = []
            for x, y, channel, value in values:
                fields += ("SET", "u8", (locate(x, y)[1] + channel) * 8, value)
            author = msgspec.json.encode([(self._author, len(values))])
            commands = [("BITFIELD", key, *fields), (*self._event, pack(values), "a", author, *self._end)]
        *_, results = await self._ask(("MULTI",), *commands, ("EXEC",))
        return results is not None

    async def _ask(self, *commands: Command) -> list[Any]:
        """Replies to commands. Raises OSError if Redis doesn't answer, ReplyError if it refuses one."""
        async with asyncio.timeout(_TIMEOUT):
            replies = await self._connection.execute(commands)
        for reply in (*replies, *(replies[-1] or () if commands[-1] == ("EXEC",) else ())):
            if isinstance(reply, ReplyError):
                raise reply
        return replies


class _Tail:
    """The cells that were painted after an event, by the stream."""

    def __init__(self, after: EventId) -> None:
        self._after = after.in_redis()
        self.places: set[tuple[int, int, int]] = set()

    @property
    def command(self) -> Command:
        """Reads the next events."""
        return "XRANGE", EVENTS, b"(" + self._after, "+", "COUNT", _EVENTS_AT_ONCE

    def add(self, found: Sequence[tuple[bytes, Sequence[bytes]]]) -> bool:
        """Add events; returns whether there may be more."""
        for event, fields in found:
            self._after = event
            record = dict(zip(fields[::2], fields[1::2], strict=True))[b"c"]
            self.places |= {change[:3] for change in unpack(record)}
        return len(found) == _EVENTS_AT_ONCE


def _strips(canvas: Canvas, region: Region | None) -> Iterator[Region]:
    """A region of the canvas, or all of it, in parts that are each within one tile, and STRIP rows high."""
    x, y, w, h = region or Region(0, 0, canvas.width, canvas.height)
    for top in range(y - y % STRIP, y + h, STRIP):
        for left in range(x - x % TILE, x + w, TILE):
            start = max(left, x), max(top, y)
            yield Region(*start, min(left + TILE, x + w) - start[0], min(top + STRIP, y + h) - start[1])


def _cells(database: sqlite3.Connection, selection: Selection, outcome: Outcome) -> Iterator[Cell]:
    """The cells in a strip whose last change is one of those to undo; the others are counted."""
    condition, values = conditions(database, selection)
    other, other_values = conditions(database, selection, "other")
    snapshots = _Snapshots(database)
    rows = database.execute(
        f"""
        WITH undone AS (
            SELECT x, y, channel, min(id) AS first, max(id) AS last FROM changes
            WHERE {condition} GROUP BY y, x, channel
        )
        SELECT x, y, channel, first, last,
            (SELECT max(id) FROM changes AS later
                WHERE (later.y, later.x, later.channel) = (undone.y, undone.x, undone.channel)),
            (SELECT value FROM changes WHERE id = last),
            (SELECT id FROM changes AS other
                WHERE (other.y, other.x, other.channel) = (undone.y, undone.x, undone.channel)
                AND NOT ifnull({other}, 0) ORDER BY id DESC LIMIT 1)
        FROM undone
        """,
        (*values, *other_values),
    )
    for x, y, channel, first, last, newest, shown, other_id in rows:
        if newest != last:
            outcome.painted_over += 1
            continue
        former = snapshots.value_without((x, y, channel), other_id, first, last)
        if former is None:
            outcome.unknown += 1
        elif former == shown:
            outcome.equal += 1
        else:
            yield Cell(x, y, channel, shown, former)


class _Snapshots:
    """The snapshots of a history file, for the cells of one strip."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._firsts = [row[0] for row in database.execute("SELECT first FROM snapshots ORDER BY first")]
        self._tiles: dict[int, bytes] = {}

    def value_without(
        self, cell: tuple[int, int, int], other: int | None, first: int, last: int
    ) -> int | None:
        """The value of a cell without the changes to undo; None if it is older than the history.

        Args:
            cell: x, y and channel.
            other: ID of the last other change, if there is one.
            first: ID of the first change to undo.
            last: ID of the last one, which is the cell's last change.
        """
        value = None if other is None else self._change(other)
        for snapshot in self._firsts:
            if (other or 0) < snapshot <= last:
                shown = self._value(snapshot, cell)
                # It shows an undone change, unless somebody painted the cell in the gap before it.
                if snapshot <= first or shown != self._before(snapshot, cell):
                    value = shown
        return value

    def _value(self, snapshot: int, cell: tuple[int, int, int]) -> int:
        key, place = locate(*cell[:2])
        if snapshot not in self._tiles:
            self._tiles[snapshot] = read_tile(self._database, snapshot, key)
        return self._tiles[snapshot][place + cell[2]]

    def _change(self, number: int) -> int:
        return int(self._database.execute("SELECT value FROM changes WHERE id = ?", (number,)).fetchone()[0])

    def _before(self, snapshot: int, cell: tuple[int, int, int]) -> int:
        """The value of the cell's last change before a snapshot."""
        x, y, channel = cell
        row = self._database.execute(
            "SELECT value FROM changes WHERE y = ? AND x = ? AND channel = ? AND id < ?"
            " ORDER BY id DESC LIMIT 1",
            (y, x, channel, snapshot),
        ).fetchone()
        return int(row[0])
