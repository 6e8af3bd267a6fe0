"""Questions to the history file. Each function opens the file for reading, in any process or thread.

The work of one question is bounded: a page examines SCANNED changes at most, and the next page goes
on from there. Times are milliseconds since the epoch.
"""

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pixel.canvas import CHANNELS, Region
from pixel.history.archive import content_bytes, first_from, read_position
from pixel.stream import EventId

SCANNED = 100_000
"""Most changes that are examined for one page."""

MOST_PAINTERS = 100
"""Most authors in one answer."""

EXPORTED_AT_ONCE = 10_000
"""Changes that an export reads at once."""

CURSOR = r"^[0-9]{1,15}-[0-9]{1,15}\.[0-9]{1,4}$"
"""Regular expression of a cursor: the ID of an event and a place in it. All hosts have the same."""


class Record(NamedTuple):
    """A change with its time and author; ``author`` is None if it is unknown."""

    event: EventId
    number: int
    x: int
    y: int
    channel: str
    value: int
    author: str | None

    @property
    def cursor(self) -> str:
        """Names this change in a request for those before it."""
        return f"{self.event.text().decode()}.{self.number}"


class Selection(NamedTuple):
    """Changes in a region, by authors and in a time, ``until`` excluded. None selects all."""

    region: Region | None = None
    authors: Sequence[str] | None = None
    since: int | None = None
    until: int | None = None


class Page(NamedTuple):
    """Changes, the newest first; ``next`` is the cursor of the rest, or None if there is none."""

    records: list[Record]
    next: str | None


_COLUMNS = """SELECT changes.id, time, sequence, number, x, y, channel, value, name
    FROM changes LEFT JOIN authors ON authors.id = author"""


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that can only read. All its reads see the same state of the file."""
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        database.isolation_level = None
        database.execute("BEGIN")
        yield database


def conditions(
    database: sqlite3.Connection, selection: Selection, table: str = "changes"
) -> tuple[str, list[int]]:
    """A condition of SQL for selected changes, and its parameters. It is null for unknown authors."""
    terms: list[str] = ["1"]
    values: list[int] = []
    if selection.region is not None:
        x, y, w, h = selection.region
        terms.append(f"{table}.y BETWEEN ? AND ? AND {table}.x BETWEEN ? AND ?")
        values += [y, y + h - 1, x, x + w - 1]
    if selection.authors is not None:
        marks = ", ".join("?" * len(selection.authors))
        known = database.execute(
            f"SELECT id FROM authors WHERE name IN ({marks})", selection.authors
        ).fetchall()
        terms.append(f"{table}.author IN ({', '.join('?' * len(known))})")
        values += [row[0] for row in known]
    if selection.since is not None:
        terms.append(f"{table}.id >= ?")
        values.append(first_from(database, (selection.since,)))
    if selection.until is not None:
        terms.append(f"{table}.id < ?")
        values.append(first_from(database, (selection.until,)))
    return " AND ".join(terms), values


def page(path: Path, selection: Selection, after: str | None, limit: int) -> Page:
    """Selected changes before a cursor, the newest first."""
    with reading(path) as database:
        before = _before(database, after)
        condition, values = conditions(database, selection)
        if selection.authors is None:
            examined, parameters = "SELECT id FROM changes WHERE id < ?", [before]
        else:
            examined = f"SELECT id FROM changes WHERE {condition} AND id < ?"
            parameters = [*values, before]
        oldest, count = database.execute(
            f"SELECT min(id), count(*) FROM ({examined} ORDER BY id DESC LIMIT {SCANNED})", parameters
        ).fetchone()
        rows = database.execute(
            f"{_COLUMNS} WHERE changes.id >= ? AND changes.id < ? AND {condition}"
            " ORDER BY changes.id DESC LIMIT ?",
            (oldest, before, *values, limit + 1),
        ).fetchall()
        records = [_record(row) for row in rows[:limit]]
        if len(rows) > limit:
            return Page(records, records[-1].cursor)
        if count < SCANNED or oldest <= first_from(database, (selection.since or 0,)):
            return Page(records, None)
        row = database.execute(f"{_COLUMNS} WHERE changes.id = ?", (oldest,)).fetchone()
        return Page(records, _record(row).cursor)


class Painter(NamedTuple):
    """An author's changes among those examined: their number, and the times of the first and the last."""

    author: str | None
    changes: int
    first: int
    last: int


def painters(path: Path, selection: Selection) -> tuple[list[Painter], int | None]:
    """The authors of selected changes, the busiest and then the latest first.

    Only the newest SCANNED changes in the time are examined. The second value is the time of the oldest of
    them, if there are older ones in the time.
    """
    with reading(path) as database:
        since = first_from(database, (selection.since or 0,))
        until = (
            read_position(database).next
            if selection.until is None
            else first_from(database, (selection.until,))
        )
        oldest = max(since, until - SCANNED)
        condition, values = conditions(database, selection)
        rows = database.execute(
            "SELECT name, count(*) AS number, min(time), max(time)"
            " FROM changes NOT INDEXED LEFT JOIN authors ON authors.id = author"
            f" WHERE changes.id >= ? AND changes.id < ? AND {condition}"
            " GROUP BY author ORDER BY number DESC, max(changes.id) DESC LIMIT ?",
            (oldest, until, *values, MOST_PAINTERS),
        ).fetchall()
        examined = None
        if oldest > since:
            [examined] = database.execute("SELECT time FROM changes WHERE id = ?", (oldest,)).fetchone()
        return [Painter(*row) for row in rows], examined


def pixel_page(path: Path, x: int, y: int, after: str | None, limit: int) -> Page:
    """Changes of one pixel before a cursor, the newest first."""
    with reading(path) as database:
        before = _before(database, after)
        # Each of the three is in the order of the index.
        channels = " UNION ALL ".join(
            f"SELECT * FROM (SELECT id FROM changes WHERE y = :y AND x = :x AND channel = {channel}"
            " AND id < :before ORDER BY id DESC LIMIT :most)"
            for channel in range(len(CHANNELS))
        )
        rows = database.execute(
            f"{_COLUMNS} WHERE changes.id IN ({channels}) ORDER BY changes.id DESC LIMIT :most",
            {"x": x, "y": y, "before": before, "most": limit + 1},
        ).fetchall()
    records = [_record(row) for row in rows[:limit]]
    return Page(records, records[-1].cursor if len(rows) > limit else None)


def export(path: Path, since: int | None, until: int | None) -> Iterator[list[Record]]:
    """Changes in a time, the oldest first. Each list is read at once; the file may change between them."""
    place: tuple[int, ...] = (since or 0,)
    while True:
        with reading(path) as database:
            first = first_from(database, place)
            end = read_position(database).next if until is None else first_from(database, (until,))
            rows = database.execute(
                f"{_COLUMNS} WHERE changes.id >= ? AND changes.id < ? ORDER BY changes.id",
                (first, min(end, first + EXPORTED_AT_ONCE)),
            ).fetchall()
        if not rows:
            return
        records = [_record(row) for row in rows]
        yield records
        place = (*records[-1].event[:2], records[-1].number + 1)


class Gap(NamedTuple):
    """Events that are missing in the history, after one of them; ``events`` is None if unknown."""

    after: str
    events: int | None
    reason: str
    time: int


def gaps(path: Path) -> list[Gap]:
    """All gaps, the newest first."""
    with reading(path) as database:
        rows = database.execute("SELECT after, events, reason, time FROM gaps ORDER BY rowid DESC")
        return [Gap(*row) for row in rows]


class State(NamedTuple):
    """How much there is: changes, gaps, the time of the oldest change, and the size in bytes."""

    changes: int
    gaps: int
    oldest: int | None
    size: int


def state(path: Path) -> State:
    """The state of the history."""
    with reading(path) as database:
        changes, gap_count, oldest = database.execute(
            "SELECT ifnull(max(id) - min(id) + 1, 0), (SELECT count(*) FROM gaps),"
            " (SELECT time FROM changes WHERE id = (SELECT min(id) FROM changes)) FROM changes"
        ).fetchone()
        return State(changes, gap_count, oldest, content_bytes(database))


def _before(database: sqlite3.Connection, after: str | None) -> int:
    if after is None:
        return read_position(database).next
    return first_from(database, tuple(map(int, re.split(r"[-.]", after))))


def _record(row: Sequence[Any]) -> Record:
    _, milliseconds, sequence, number, x, y, channel, value, author = row
    return Record(EventId(milliseconds, sequence), number, x, y, CHANNELS[channel], value, author)
