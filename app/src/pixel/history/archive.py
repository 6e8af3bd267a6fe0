"""The file of the history: its tables, and the only code that writes to it.

A change is a row. A snapshot is the canvas at a point of the history: with the changes after it, it
is the canvas at any later time. There is one at the beginning and one after each gap. Old changes
are removed by painting them into the first snapshot.

Rows have consecutive IDs in the order of the stream, and their times never decrease. Other
processes read the file while the service writes to it (SQLite's write-ahead log).
"""

import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pixel.canvas import TILE_BYTES, locate
from pixel.pixel import Change
from pixel.stream import NO_EVENT, EventId

VERSION = 2
"""``user_version`` of the file."""

# Version 1 had other names of tiles, and no epoch.
_UPDATE = """
UPDATE tiles SET key = 'pixel:{0}:tile:' || substr(key, 8, length(key) - 8);
ALTER TABLE position ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0;
PRAGMA user_version = 2;
"""

TRIMMED_AT_ONCE = 20_000
"""Changes removed in one transaction: readers and the follower wait for at most one."""

_SCHEMA = f"""
CREATE TABLE authors (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE changes (
    id INTEGER PRIMARY KEY,
    time INTEGER NOT NULL,      -- milliseconds and sequence of the event's ID
    sequence INTEGER NOT NULL,
    number INTEGER NOT NULL,    -- place in the event
    x INTEGER NOT NULL,
    y INTEGER NOT NULL,
    channel INTEGER NOT NULL,
    value INTEGER NOT NULL,
    author INTEGER REFERENCES authors
) STRICT;
CREATE INDEX changes_of_channel ON changes (y, x, channel);
CREATE INDEX changes_of_author ON changes (author) WHERE author IS NOT NULL;
CREATE TABLE snapshots (first INTEGER PRIMARY KEY) STRICT;  -- ID of the first change after it
CREATE TABLE tiles (
    first INTEGER NOT NULL REFERENCES snapshots ON DELETE CASCADE ON UPDATE CASCADE,
    key TEXT NOT NULL,
    data BLOB NOT NULL,         -- compressed
    PRIMARY KEY (first, key)
) STRICT, WITHOUT ROWID;
CREATE TABLE gaps (
    first INTEGER NOT NULL,     -- ID of the first change after the gap
    time INTEGER NOT NULL,      -- when it was detected, in milliseconds
    after TEXT NOT NULL,        -- the last event before the gap
    events INTEGER,             -- number of missing events, if known
    reason TEXT NOT NULL
) STRICT;
CREATE TABLE position (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    time INTEGER NOT NULL,      -- the last archived event
    sequence INTEGER NOT NULL,
    entries INTEGER NOT NULL,   -- number of events ever added to the stream, up to that one
    next INTEGER NOT NULL,      -- ID of the next change
    due INTEGER NOT NULL,       -- whether a snapshot has to be taken
    epoch INTEGER NOT NULL      -- of the last archived event; 0 outside clusters
) STRICT;
INSERT INTO position VALUES (1, 0, 0, -1, 1, 0, 0);
PRAGMA user_version = {VERSION};
"""


class Entry(NamedTuple):
    """An event of the stream; ``authors`` has one item for each change."""

    event: EventId
    changes: Sequence[Change]
    authors: Sequence[str | None]


class Position(NamedTuple):
    """How much of the stream is archived.

    ``entries`` is the number of events ever added to the stream up to ``event``, or -1 in a new
    archive; ``due`` is whether a snapshot has to be taken.
    """

    event: EventId
    entries: int
    next: int
    due: bool


def read_position(database: sqlite3.Connection) -> Position:
    """The position of a history file."""
    row = database.execute("SELECT time, sequence, epoch, entries, next, due FROM position").fetchone()
    return Position(EventId(*row[:3]), row[3], row[4], bool(row[5]))


def content_bytes(database: sqlite3.Connection) -> int:
    """Bytes that the content of a history file occupies in it."""
    pages, free, size = (
        database.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def first_from(database: sqlite3.Connection, event: tuple[int, ...]) -> int:
    """ID of the first change at or after (milliseconds[, sequence[, number]]); may be the next ID."""
    first, last = database.execute(
        "SELECT ifnull(min(id), (SELECT next FROM position)), (SELECT next FROM position) FROM changes"
    ).fetchone()
    columns = ", ".join(("time", "sequence", "number")[: len(event)])
    # IDs are consecutive and in the order of time, so that no index is needed.
    while first < last:
        middle = (first + last) // 2
        row = database.execute(f"SELECT {columns} FROM changes WHERE id = ?", (middle,)).fetchone()
        if row < event:
            first = middle + 1
        else:
            last = middle
    return int(first)


class Archive:
    """The history file, open for writing. One process writes; calls must not overlap."""

    def __init__(self, path: Path) -> None:
        # Used by the follower's and retention's threads in turn.
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        [version] = self._database.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise ValueError(f"{path} was written by a newer release: deploy that one, or move the file away")
        self._database.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA foreign_keys = ON;"
        )
        if version == 0:
            self._database.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        elif version == 1:
            self._database.executescript(f"BEGIN IMMEDIATE; {_UPDATE} COMMIT;")
        self._authors: dict[str, int] = {}
        self.position = read_position(self._database)
        """How much of the stream is archived."""

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def append(self, entries: Iterable[Entry], position: EventId, count: int) -> int:
        """Add events and the new position in one transaction; returns the number of changes."""
        with self._transaction():
            following = first = self.position.next
            rows = []
            for event, changes, authors in entries:
                for number, (change, author) in enumerate(zip(changes, authors, strict=True)):
                    rows.append((following, *event[:2], number, *change, author and self._author(author)))
                    following += 1
            self._database.executemany("INSERT INTO changes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            self._database.execute(
                "UPDATE position SET time = ?, sequence = ?, epoch = ?, entries = ?, next = ?",
                (*position, count, following),
            )
        return following - first

    def begin(self, count: int) -> None:
        """Start an empty history before the stream's first event; ``count`` earlier ones are gone."""
        with self._transaction():
            self._move(NO_EVENT, count, due=count > 0)
            if count == 0:
                self._database.execute("INSERT INTO snapshots VALUES (1)")  # black: no tiles

    def skip(self, to: EventId, count: int, *, missing: int | None, reason: str) -> None:
        """Record a gap after the position, and continue after ``to``. A snapshot is then due."""
        with self._transaction():
            position = self.position
            self._database.execute(
                "INSERT INTO gaps VALUES (?, ?, ?, ?, ?)",
                (position.next, int(time.time() * 1000), position.event.text().decode(), missing, reason),
            )
            self._move(to, count, due=True)

    def add_snapshot(self, tiles: Mapping[str, bytes | None]) -> None:
        """Add the canvas at the position, by the keys of its tiles."""
        with self._transaction():
            following = self.position.next
            self._database.execute("INSERT OR REPLACE INTO snapshots VALUES (?)", (following,))
            self._database.executemany(
                "INSERT INTO tiles VALUES (?, ?, ?)",
                [(following, key, _compress(data)) for key, data in tiles.items() if data],
            )
            self._database.execute("UPDATE position SET due = 0")

    def trim(self, before: int, most_bytes: int) -> int:
        """Remove the oldest changes that are too old or too many, if any.

        Args:
            before: milliseconds since the epoch; older changes are removed.
            most_bytes: the size of the file's content from which changes are removed.

        Returns:
            The number of removed changes: call again if it is TRIMMED_AT_ONCE.
        """
        [first] = self._database.execute("SELECT min(id) FROM changes").fetchone()
        if first is None:
            return 0
        until = first_from(self._database, (before,))
        if content_bytes(self._database) > most_bytes:
            until = max(until, first + TRIMMED_AT_ONCE)
        until = min(until, first + TRIMMED_AT_ONCE, self.position.next)
        if until > first:
            with self._transaction():
                self._remove(first, until)
        return int(until - first)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
            self.position = read_position(self._database)
        except BaseException:
            self._database.execute("ROLLBACK")
            self._authors.clear()  # some may have been added in this transaction
            raise

    def _move(self, event: EventId, count: int, *, due: bool) -> None:
        self._database.execute(
            "UPDATE position SET time = ?, sequence = ?, epoch = ?, entries = ?, due = ?",
            (*event, count, due),
        )

    def _author(self, name: str) -> int:
        if name not in self._authors:
            self._database.execute("INSERT OR IGNORE INTO authors (name) VALUES (?)", (name,))
            [self._authors[name]] = self._database.execute(
                "SELECT id FROM authors WHERE name = ?", (name,)
            ).fetchone()
        return self._authors[name]

    def _remove(self, first: int, until: int) -> None:
        """Remove changes, after painting them into the snapshot before them."""
        snapshots = [row[0] for row in self._database.execute("SELECT first FROM snapshots ORDER BY first")]
        base = max((start for start in snapshots if start <= first), default=None)
        if any(first < start <= until for start in snapshots):
            # A later snapshot replaces this one.
            self._database.execute("DELETE FROM snapshots WHERE first <= ?", (first,))
        elif base is not None:
            self._paint(base, first, until)
            self._database.execute("UPDATE snapshots SET first = ? WHERE first = ?", (until, base))
        self._database.execute("DELETE FROM changes WHERE id < ?", (until,))
        self._database.execute("DELETE FROM gaps WHERE first < ?", (until,))
        self._database.execute(
            "DELETE FROM authors WHERE NOT EXISTS (SELECT 1 FROM changes WHERE author = authors.id)"
        )
        self._authors.clear()

    def _paint(self, base: int, first: int, until: int) -> None:
        tiles: dict[str, bytearray] = {}
        for x, y, channel, value in self._database.execute(
            "SELECT x, y, channel, value FROM changes WHERE id >= ? AND id < ? ORDER BY id", (first, until)
        ):
            key, place = locate(x, y)
            if key not in tiles:
                tiles[key] = bytearray(read_tile(self._database, base, key))
            tiles[key][place + channel] = value
        self._database.executemany(
            "INSERT OR REPLACE INTO tiles VALUES (?, ?, ?)",
            [(base, key, _compress(data)) for key, data in tiles.items()],
        )


def read_tile(database: sqlite3.Connection, snapshot: int, key: str) -> bytes:
    """A tile of a snapshot; black if the snapshot doesn't have it."""
    row = database.execute("SELECT data FROM tiles WHERE first = ? AND key = ?", (snapshot, key)).fetchone()
    return zlib.decompress(row[0]) if row else bytes(TILE_BYTES)


def _compress(tile: bytes | bytearray) -> bytes:
    return zlib.compress(tile.ljust(TILE_BYTES, b"\0"), level=1)
