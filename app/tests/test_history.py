"""The history: following the stream, gaps, retention, questions over HTTP, undo."""

import asyncio
import csv
import gzip
import io
import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import PASSWORD, RedisServer, free_ports, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from pixel import keys, moderation
from pixel.canvas import Canvas, Region, locate
from pixel.cluster import Redis
from pixel.history import __main__ as commands
from pixel.history import moderation as moderators
from pixel.history import queries
from pixel.history.archive import Archive, Entry, read_tile
from pixel.history.follower import Follower
from pixel.history.parameters import Slots, moment
from pixel.history.queries import Selection
from pixel.history.service import create_app
from pixel.history.settings import HistorySettings
from pixel.history.timelapse import Film
from pixel.history.undo import Outcome, Undo
from pixel.link import Link
from pixel.maintenance import Maintenance
from pixel.names import EVENTS, MAINTENANCE, tile_key
from pixel.pixel import Change, pack
from pixel.problems import Problem
from pixel.resp import Command, Connection, Server
from pixel.store import Store
from pixel.stream import EventId

ALL = Region(0, 0, 1024, 1024)


def paint(server: RedisServer, changes: Sequence[Change], *authors: tuple[str, int]) -> str:
    """Change the canvas as the application does; returns the event's ID."""
    with server.admin() as admin, admin.pipeline() as pipeline:
        for change in changes:
            key, place = locate(change.x, change.y)
            pipeline.bitfield(key).set("u8", (place + change.channel) * 8, change.value).execute()
        fields: dict[str, str | bytes] = {"c": pack(changes)}
        if authors:
            fields["a"] = json.dumps(authors)
        pipeline.xadd(EVENTS, fields)
        return pipeline.execute()[-1].decode()


def shown(server: RedisServer, x: int, y: int, channel: int) -> int:
    key, place = locate(x, y)
    with server.admin() as admin:
        return int((admin.getrange(key, place + channel, place + channel) or b"\0")[0])


EVERYTHING = Selection()


def records(path: Path, selection: Selection = EVERYTHING) -> list[queries.Record]:
    """All selected changes, the newest first, read in small pages."""
    found: list[queries.Record] = []
    after = None
    while True:
        page = queries.page(path, selection, after, 7)
        found += page.records
        after = page.next
        if after is None:
            return found


class Following:
    """A follower that works in steps, on a new file."""

    def __init__(self, server: RedisServer, path: Path) -> None:
        self.archive = Archive(path)
        self.link = Link(Redis(server.settings()), 2)
        self.follower = Follower(self.archive, self.link, ALL)

    async def catch_up(self) -> None:
        """Follow to the end of the stream."""
        task = asyncio.create_task(self.follower.run())
        started = time.monotonic()
        while self.follower.current < started or self.archive.position.due:
            assert not task.done(), task.exception()
            await asyncio.sleep(0.01)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    def close(self) -> None:
        self.link.close()
        self.archive.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.sqlite"


@pytest.fixture
async def following(redis_server: RedisServer, path: Path) -> AsyncIterator[Following]:
    following = Following(redis_server, path)
    yield following
    following.close()


async def test_every_change_is_archived_with_its_event_and_author(
    following: Following, redis_server: RedisServer, path: Path
) -> None:
    first = paint(
        redis_server, [Change(1, 2, 0, 3), Change(1, 2, 1, 4), Change(5, 6, 2, 7)], ("key:a", 2), ("", 1)
    )
    second = paint(redis_server, [Change(1, 2, 0, 9)])
    await following.catch_up()
    found = [(record.event.text().decode(), record.number, *record[2:]) for record in reversed(records(path))]
    assert found == [
        (first, 0, 1, 2, "R", 3, "key:a"),
        (first, 1, 1, 2, "G", 4, "key:a"),
        (first, 2, 5, 6, "B", 7, None),
        (second, 0, 1, 2, "R", 9, None),
    ]
    assert queries.state(path).gaps == 0


async def test_events_of_the_application_can_be_followed(
    following: Following, redis_server: RedisServer, path: Path
) -> None:
    store = Store(redis_server.settings())
    await asyncio.gather(*(store.write([Change(n % 50, n // 50, n % 3, n % 256)]) for n in range(2000)))
    store.close()
    await following.catch_up()
    assert sorted((r.x + 50 * r.y, r.value) for r in records(path)) == [(n, n % 256) for n in range(2000)]


async def test_a_list_of_authors_of_the_wrong_length_is_ignored(
    following: Following, redis_server: RedisServer, path: Path
) -> None:
    paint(redis_server, [Change(1, 2, 0, 3)], ("key:a", 2))
    await following.catch_up()
    assert [record.author for record in records(path)] == [None]


async def test_a_canvas_that_is_older_than_the_history_is_its_first_snapshot(
    following: Following, redis_server: RedisServer, path: Path
) -> None:
    paint(redis_server, [Change(300, 2, 0, 3)])
    with redis_server.admin() as admin:
        admin.xtrim(EVENTS, 0, approximate=False)
    paint(redis_server, [Change(301, 2, 0, 4)])
    await following.catch_up()
    assert queries.state(path)[:2] == (1, 0)
    with queries.reading(path) as database:
        [(first,)] = database.execute("SELECT first FROM snapshots").fetchall()
        tile = read_tile(database, first, tile_key(1, 0))
    assert first == 2
    assert (tile[(2 * 256 + 44) * 3], tile[(2 * 256 + 45) * 3]) == (3, 4)


async def test_trimmed_events_are_a_gap_with_their_number_and_a_new_snapshot(
    following: Following, redis_server: RedisServer, path: Path
) -> None:
    before = paint(redis_server, [Change(0, 0, 0, 1)])
    await following.catch_up()
    for value in range(2, 8):
        paint(redis_server, [Change(0, 0, 0, value)])
    with redis_server.admin() as admin:
        admin.xtrim(EVENTS, 2, approximate=False)
    await following.catch_up()
    assert [record.value for record in records(path)] == [7, 6, 1]
    assert [gap[:3] for gap in queries.gaps(path)] == [(before, 4, "trimmed")]
    with queries.reading(path) as database:
        assert read_tile(database, 4, tile_key(0, 0))[0] == 7
    # The same gap is not reported again.
    paint(redis_server, [Change(0, 0, 0, 8)])
    await following.catch_up()
    assert len(queries.gaps(path)) == 1


@pytest.mark.parametrize("later_events", [0, 1, 5])
async def test_a_restored_redis_is_a_gap(
    following: Following, redis_server: RedisServer, path: Path, later_events: int
) -> None:
    for value in range(4):
        paint(redis_server, [Change(0, 0, 0, value)])
    await following.catch_up()
    with redis_server.admin() as admin:
        admin.flushall()
    for value in range(later_events):
        paint(redis_server, [Change(9, 9, 0, value)])
    await following.catch_up()
    [gap] = queries.gaps(path)
    assert (gap.events, gap.reason) == (None, "restored")
    assert [r.value for r in records(path) if r.x == 9] == list(range(later_events))[::-1]


@pytest.mark.parametrize("is_archived", [False, True])
async def test_a_snapshot_of_a_deposed_master_is_not_stored(
    following: Following,
    redis_server: RedisServer,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_archived: bool,
) -> None:
    """While the follower reads the canvas, its link moves to the new master."""
    key, _ = locate(9, 9)

    def become(tile: bytes, *events: tuple[str, int]) -> None:
        with redis_server.admin() as admin:
            admin.delete(EVENTS)
            admin.xadd(EVENTS, {"c": pack([Change(0, 0, 0, 1)])}, "1-0")
            admin.xtrim(EVENTS, 0, approximate=False)  # so the first snapshot is due
            for event, epoch in events:
                admin.xadd(EVENTS, {"c": pack([Change(9, 9, 0, 1)]), "e": epoch}, event)
            admin.set(key, tile)

    common, phantom = ("5-0", 1), ("7-0", 1)
    become(b"deposed", common, *[phantom] * is_archived)
    ask = following.link.ask_at_once

    async def moving(*commands: Command) -> list[Any]:
        if len(commands) == 2:
            return await ask(*commands)
        monkeypatch.setattr(following.link, "ask_at_once", ask)
        become(b"deposed", common, phantom)
        replies = await ask(*commands)
        become(b"true", common, ("8-0" if is_archived else "6-0", 2))
        return replies

    monkeypatch.setattr(following.link, "ask_at_once", moving)
    async with asyncio.timeout(10):
        await following.catch_up()
    assert [gap.reason for gap in queries.gaps(path)] == (["diverged"] if is_archived else [])
    with queries.reading(path) as database:
        firsts = database.execute("SELECT first FROM snapshots").fetchall()
        assert [read_tile(database, first, key).rstrip(b"\0") for (first,) in firsts] == [b"true"]


async def test_an_archive_of_a_newer_release_is_refused(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="newer release"):
        Archive(path)


def entries(changes: Iterable[tuple[int, Change, str | None]]) -> list[Entry]:
    """Events of one change, from (milliseconds, change, author)."""
    return [Entry(EventId(time, n), [change], [author]) for n, (time, change, author) in enumerate(changes)]


def test_an_archive_with_the_former_names_of_tiles_is_updated(path: Path) -> None:
    archive = Archive(path)
    archive.begin(5)
    archive.add_snapshot({tile_key(3, 12): bytes([7])})
    archive.close()
    with sqlite3.connect(path) as database:
        database.executescript(
            "UPDATE tiles SET key = 'pixel:{3:12}'; ALTER TABLE position DROP COLUMN epoch;"
            "PRAGMA user_version = 1;"
        )
    database.close()
    archive = Archive(path)
    with queries.reading(path) as database:
        assert read_tile(database, 1, tile_key(3, 12))[0] == 7
    assert archive.position == (EventId(0, 0), 5, 1, False)
    archive.close()


def test_old_changes_are_painted_into_the_first_snapshot(path: Path) -> None:
    archive = Archive(path)
    archive.begin(0)
    events = entries((1000 + n, Change(n % 300, 0, 0, n % 256), f"key:{n}") for n in range(1000))
    archive.append(events, events[-1].event, 1000)
    assert archive.trim(1400, 10**9) == 400
    assert archive.trim(1400, 10**9) == 0
    with queries.reading(path) as database:
        assert database.execute("SELECT first FROM snapshots").fetchall() == [(401,)]
        assert read_tile(database, 401, tile_key(0, 0))[0] == 300 % 256
        assert read_tile(database, 401, tile_key(1, 0))[43 * 3] == 299 % 256
        assert database.execute("SELECT count(*) FROM authors").fetchone() == (600,)
    assert len(records(path)) == 600
    # Size: as many as allowed at once.
    assert archive.trim(0, 0) == 600
    assert records(path) == []
    # IDs go on.
    archive.append(entries([(3000, Change(1, 1, 1, 1), None)]), EventId(3000, 0), 1001)
    assert [record.event for record in records(path)] == [EventId(3000, 0)]
    archive.close()


def test_a_later_snapshot_replaces_the_first_one(path: Path) -> None:
    archive = Archive(path)
    archive.begin(0)
    events = entries((n, Change(0, 0, 0, n), None) for n in range(10))
    archive.append(events, events[-1].event, 10)
    archive.skip(EventId(9, 9), 12, missing=2, reason="trimmed")
    archive.add_snapshot({tile_key(0, 0): bytes([77])})
    archive.append(entries([(20, Change(1, 0, 0, 5), None)]), EventId(20, 0), 13)
    assert archive.trim(15, 10**9) == 10
    with queries.reading(path) as database:
        assert database.execute("SELECT first FROM snapshots").fetchall() == [(11,)]
        assert read_tile(database, 11, tile_key(0, 0))[0] == 77
    archive.close()


def test_selections_and_pages(path: Path) -> None:
    archive = Archive(path)
    archive.begin(0)
    chance = random.Random(7)
    events = entries(
        (
            1000 + 10 * n,
            Change(chance.randrange(20), chance.randrange(20), n % 3, n % 256),
            chance.choice(["key:a", "addr:1", None]),
        )
        for n in range(500)
    )
    archive.append(events, events[-1].event, 500)
    archive.close()
    everything = [
        queries.Record(event, 0, c.x, c.y, "RGB"[c.channel], c.value, author)
        for event, [c], [author] in reversed(events)
    ]
    assert records(path) == everything
    region = Region(3, 4, 5, 6)
    inside = [r for r in everything if 3 <= r.x < 8 and 4 <= r.y < 10]
    assert records(path, Selection(region)) == inside
    assert records(path, Selection(region, ["key:a"])) == [r for r in inside if r.author == "key:a"]
    assert records(path, Selection(None, ["key:a", "addr:1"], 2000, 4000)) == [
        r for r in everything if r.author and 2000 <= r.event.milliseconds < 4000
    ]
    assert records(path, Selection(None, ["key:nobody"])) == []
    assert [r for part in queries.export(path, 2000, 4000) for r in part] == [
        r for r in reversed(everything) if 2000 <= r.event.milliseconds < 4000
    ]
    x, y = everything[0].x, everything[0].y
    of_pixel = [r for r in everything if (r.x, r.y) == (x, y)]
    found, after = [], None
    while not found or after:
        page = queries.pixel_page(path, x, y, after, 2)
        found += page.records
        after = page.next
    assert found == of_pixel


def test_an_export_in_parts_has_each_change_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second event is in two parts; the last one has several changes."""
    monkeypatch.setattr(queries, "EXPORTED_AT_ONCE", 3)
    archive = Archive(path)
    archive.begin(0)
    written = [Entry(EventId(n, 0, 7), [Change(n, m, 0, 1) for m in range(2)], [None] * 2) for n in range(3)]
    archive.append(written, written[-1].event, 3)
    archive.close()
    parts = [[(r.x, r.y) for r in part] for part in islice(queries.export(path, None, None), 4)]
    assert parts == [[(0, 0), (0, 1), (1, 0)], [(1, 1), (2, 0), (2, 1)]]


def test_a_page_examines_a_bounded_number_of_changes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "SCANNED", 100)
    archive = Archive(path)
    archive.begin(0)
    events = entries((n, Change(n // 450, 0, 0, n % 256), "key:a") for n in range(500))
    archive.append(events, events[-1].event, 500)
    archive.close()
    page = queries.page(path, Selection(Region(0, 0, 1, 1)), None, 10)
    assert len(page.records) == 10
    page = queries.page(path, Selection(Region(5, 5, 1, 1)), None, 10)
    assert page == ([], "400-400.0")
    assert records(path, Selection(Region(0, 0, 1, 1)))[-1].event == EventId(0, 0)
    assert records(path, Selection(Region(5, 5, 1, 1), ["key:a"])) == []


# A canvas of four tiles, of which only one is whole: an undo examines it strip by strip.
SMALL = Canvas(320, 272)


def undone(path: Path, server: RedisServer, selection: Selection, *, apply: bool = True) -> Outcome:
    """Undo changes, on a connection with the rights of the application."""

    async def run() -> Outcome:
        connection = await Connection.open(Server.of(server.settings()))
        undo = Undo(path, connection, SMALL, selection, "operator:olga", 20_000)
        outcome = await undo.run(apply=apply)
        connection.close()
        return outcome

    return asyncio.run(run())


def follow(path: Path, server: RedisServer) -> None:
    """Bring the history up to date."""

    async def run() -> None:
        following = Following(server, path)
        await following.catch_up()
        following.close()

    asyncio.run(run())


AUTHORS = ("key:vandal", "key:a", None)
CELLS = [(0, 0, 0), (0, 0, 2), (255, 255, 1), (256, 255, 1), (319, 271, 0)]
STROKES = st.lists(
    st.lists(
        st.tuples(st.sampled_from(CELLS), st.integers(0, 3), st.sampled_from(AUTHORS)), min_size=1, max_size=5
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=30)
@given(strokes=STROKES, archived=st.integers(0, 8))
def test_an_undo_equals_a_replay_without_the_author(
    shared_redis: RedisServer,
    strokes: list[list[tuple[tuple[int, int, int], int, str | None]]],
    archived: int,
) -> None:
    """``archived`` events are in the history when the others are painted; those are in the stream only."""
    with shared_redis.admin() as admin:
        admin.flushall()
    directory = shared_redis.directory
    for file in directory.glob("undo.sqlite*"):
        file.unlink()
    path = directory / "undo.sqlite"
    painted: dict[tuple[int, int, int], list[tuple[int, str | None]]] = {cell: [] for cell in CELLS}
    for number, stroke in enumerate(strokes):
        if number == archived:
            follow(path, shared_redis)
        paint(
            shared_redis,
            [Change(*cell, value) for cell, value, _ in stroke],
            *((author or "", 1) for _, _, author in stroke),
        )
        if number < archived:
            for cell, value, author in stroke:
                painted[cell].append((value, author))
    if archived >= len(strokes):
        follow(path, shared_redis)
    before = {cell: shown(shared_redis, *cell) for cell in CELLS}
    later = {cell for stroke in strokes[archived:] for cell, _, _ in stroke}
    expected = dict(before)
    for cell, history in painted.items():
        if cell not in later and history and history[-1][1] == "key:vandal":
            others = [value for value, author in history if author != "key:vandal"]
            expected[cell] = others[-1] if others else 0
    selection = Selection(None, ["key:vandal"])
    counted = undone(path, shared_redis, selection, apply=False)
    assert {cell: shown(shared_redis, *cell) for cell in CELLS} == before
    assert undone(path, shared_redis, selection) == counted
    assert {cell: shown(shared_redis, *cell) for cell in CELLS} == expected
    assert counted.changed == sum(before[cell] != expected[cell] for cell in CELLS)
    # The undo can be undone.
    follow(path, shared_redis)
    undone(path, shared_redis, Selection(None, ["operator:olga"]))
    assert {cell: shown(shared_redis, *cell) for cell in CELLS} == before


def test_an_undo_of_an_area_and_a_time(redis_server: RedisServer, path: Path) -> None:
    paint(redis_server, [Change(1, 1, 0, 1), Change(9, 9, 0, 1)])
    time.sleep(0.02)
    middle = round(time.time() * 1000)
    time.sleep(0.02)
    paint(redis_server, [Change(1, 1, 0, 2), Change(9, 9, 0, 2)], ("addr:192.0.2.1", 2))
    follow(path, redis_server)
    assert undone(path, redis_server, Selection(Region(0, 0, 5, 5), None, middle)) == Outcome(changed=1)
    assert (shown(redis_server, 1, 1, 0), shown(redis_server, 9, 9, 0)) == (1, 2)
    follow(path, redis_server)
    newest = records(path)[0]
    assert newest[2:] == (1, 1, "R", 1, "operator:olga")
    assert undone(path, redis_server, Selection(Region(0, 0, 5, 5), None, middle, middle)) == Outcome()


def test_an_undo_reports_what_it_left_alone(redis_server: RedisServer, path: Path) -> None:
    paint(redis_server, [Change(0, 0, 0, 1), Change(3, 0, 0, 6)])
    with redis_server.admin() as admin:
        admin.xtrim(EVENTS, 0, approximate=False)
    vandal = ("key:vandal", 4)
    paint(redis_server, [Change(n, 0, 0, 5) for n in range(4)], vandal)
    paint(redis_server, [Change(1, 0, 0, 7)])
    # In the history's first snapshot, these are already painted over.
    follow(path, redis_server)
    assert undone(path, redis_server, Selection(None, ["key:vandal"])) == Outcome(unknown=3, painted_over=1)
    paint(redis_server, [Change(0, 0, 0, 8), Change(2, 0, 0, 5), Change(1, 0, 0, 9)], ("key:late", 3))
    follow(path, redis_server)
    outcome = undone(path, redis_server, Selection(None, ["key:late"]))
    assert outcome == Outcome(changed=2, equal=1)
    assert [shown(redis_server, n, 0, 0) for n in range(4)] == [5, 7, 5, 5]


def test_changes_in_a_gap_are_not_undone(redis_server: RedisServer, path: Path) -> None:
    paint(redis_server, [Change(0, 0, 0, 1), Change(1, 0, 0, 1)])
    paint(redis_server, [Change(0, 0, 0, 2), Change(1, 0, 0, 2)], ("key:vandal", 2))
    follow(path, redis_server)
    paint(redis_server, [Change(0, 0, 0, 3)])
    with redis_server.admin() as admin:
        admin.xtrim(EVENTS, 0, approximate=False)
    follow(path, redis_server)
    paint(redis_server, [Change(0, 0, 0, 4), Change(1, 0, 0, 4)], ("key:vandal", 2))
    follow(path, redis_server)
    assert undone(path, redis_server, Selection(None, ["key:vandal"])) == Outcome(changed=2)
    # What another one has painted in the gap, and what was there before the vandal.
    assert (shown(redis_server, 0, 0, 0), shown(redis_server, 1, 0, 0)) == (3, 1)


async def test_an_undo_of_a_large_area_loses_no_write_of_others(
    redis_server: RedisServer, path: Path, following: Following
) -> None:
    """Others paint the same tile meanwhile; each of their acknowledged writes is kept."""
    cells = [Change(n % 200, n // 200, 0, 9) for n in range(20_000)]
    for start in range(0, len(cells), 1000):
        paint(redis_server, cells[start : start + 1000], ("key:vandal", 1000))
    await following.catch_up()
    store = Store(redis_server.settings())
    kept = {}

    async def others() -> None:
        chance = random.Random(3)
        for _ in range(400):
            place = chance.randrange(20_000)
            await store.write([Change(place % 200, place // 200, 0, 100)])
            kept[place] = 100
            await asyncio.sleep(0.002)

    connection = await Connection.open(Server.of(redis_server.settings()))
    undo = Undo(path, connection, Canvas(1024, 1024), Selection(None, ["key:vandal"]), "operator:o", 20_000)
    outcome, _ = await asyncio.gather(undo.run(apply=True), others())
    connection.close()
    store.close()
    assert outcome.busy == 0
    assert outcome.changed + outcome.painted_over == 20_000
    assert outcome.changed > 19_000
    with redis_server.admin() as admin:
        tile = admin.get(tile_key(0, 0))
    assert [tile[locate(n % 200, n // 200)[1]] for n in range(20_000)] == [
        kept.get(n, 0) for n in range(20_000)
    ]


@pytest.fixture
def history(redis_server: RedisServer, path: Path) -> Iterator[TestClient]:
    """The history service in this process, up to date with a canvas of five changes."""
    paint(
        redis_server, [Change(1, 2, n % 3, n) for n in range(4)], ("key:a", 1), ("addr:192.0.2.7", 2), ("", 1)
    )
    paint(redis_server, [Change(900, 2, 0, 5)], ("operator:olga", 1))
    app = create_app(redis_server.settings(instance="c5", release="r1"), HistorySettings(path=path))
    with TestClient(app) as client:
        wait_until(lambda: client.get("/history/state").json()["changes"] == 5)
        yield client


def test_the_history_of_a_pixel(history: TestClient) -> None:
    answer = history.get("/pixel/1/2/history")
    assert answer.headers["cache-control"] == "no-store"
    changes = answer.json()["changes"]
    assert [(c["channel"], c["value"], c["author"]) for c in changes] == [
        ("R", 3, None),
        ("B", 2, "anonymous"),
        ("G", 1, "anonymous"),
        ("R", 0, "key:a"),
    ]
    assert answer.json()["next"] is None
    assert moment(changes[0]["time"]) == int(changes[0]["event"].split("-")[0])
    first = history.get("/pixel/1/2/history?limit=3").json()
    rest = history.get("/pixel/1/2/history", params={"after": first["next"]}).json()
    assert first["changes"] + rest["changes"] == changes
    assert history.get("/pixel/7/7/history").json() == {"changes": [], "next": None}
    for path in ("/pixel/1024/0/history", "/pixel/a/0/history"):
        assert history.get(path).status_code == 404


def test_a_private_history_needs_a_key(redis_server: RedisServer, path: Path) -> None:
    settings = redis_server.settings(instance="c5", release="r1", anonymous="none")
    with TestClient(create_app(settings, HistorySettings(path=path))) as client:
        for question in ("/pixel/1/2/history", "/history", "/history/state", "/history.csv.gz"):
            answer = client.get(question)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="pixel"')
        assert client.get("/metrics").status_code == client.get("/healthz").status_code == 200


def test_the_history_of_an_area(history: TestClient) -> None:
    def values(**parameters: str) -> list[int]:
        return [c["value"] for c in history.get("/history", params=parameters).json()["changes"]]

    assert values() == [5, 3, 2, 1, 0]
    assert values(area="0,0,100,100") == [3, 2, 1, 0]
    assert values(area="0,0,100,100", author="key:a") == [0]
    assert values(until="2020-01-01") == []
    assert values(since="2020-01-01T00:00:00+02:00", limit="1") == [5]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("area=1,2,3", "area"),
        ("area=0,0,0,1", "area"),
        ("area=1000,0,100,1", "area"),
        ("since=yesterday", "since"),
        ("until=2026-13-01", "until"),
        ("author=addr:192.0.2.7", "author"),
        ("after=5-5", "after"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
    ],
)
def test_an_invalid_question_is_refused_by_field(history: TestClient, query: str, field: str) -> None:
    answer = history.get(f"/history?{query}")
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert [error["field"] for error in answer.json()["errors"]] == [field]


def test_an_export(history: TestClient) -> None:
    answer = history.get("/history.csv.gz?since=2020-01-01")
    assert answer.headers["content-type"] == "application/gzip"
    rows = list(csv.DictReader(io.StringIO(gzip.decompress(answer.content).decode())))
    assert [(row["x"], row["channel"], row["value"], row["author"]) for row in rows] == [
        ("1", "R", "0", "key:a"),
        ("1", "G", "1", "anonymous"),
        ("1", "B", "2", "anonymous"),
        ("1", "R", "3", ""),
        ("900", "R", "5", "operator:olga"),
    ]
    assert gzip.decompress(history.get("/history.csv.gz?until=2020-01-01").content).count(b"\n") == 1


def test_other_answers_of_the_history(history: TestClient) -> None:
    assert history.get("/healthz").json() == {"status": "ok"}
    assert history.get("/nothing").json()["title"] == "Not Found"
    refused = history.post("/history")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
    assert history.head("/history").content == b""
    described = history.get("/openapi.json").json()["paths"]
    assert sorted(described) == [
        "/history",
        "/history.csv.gz",
        "/history/authors",
        "/history/state",
        "/history/undo",
        "/pixel/{x}/{y}/history",
    ]
    lines = dict(line.rsplit(" ", 1) for line in history.get("/metrics").text.splitlines() if line[0] != "#")
    assert lines["pixel_history_changes"] == "5.0"
    assert lines["pixel_history_archived_total"] == "5.0"
    assert lines["pixel_history_gaps_total"] == "0.0"
    assert float(lines["pixel_history_lag_seconds"]) < 10
    assert float(lines["pixel_history_bytes"]) > 10_000


async def create_key(server: RedisServer, name: str, scopes: str) -> dict[str, str]:
    """Create a key; returns the header with its token."""
    command = keys.parse(["create", name, "--scopes", scopes])
    return {"Authorization": f"Bearer {await keys.execute(command, Redis(server.settings()))}"}


@pytest.fixture
def moderator(redis_server: RedisServer) -> dict[str, str]:
    return asyncio.run(create_key(redis_server, "mod", "moderate"))


def undo_all(history: TestClient, moderator: dict[str, str], **wanted: Any) -> list[dict[str, Any]]:
    """All parts of an undo."""
    parts: list[dict[str, Any]] = []
    while not parts or parts[-1]["next"] is not None:
        after = parts[-1]["next"] if parts else 0
        answer = history.post("/history/undo", json=wanted | {"after": after}, headers=moderator)
        assert answer.status_code == 200, answer.text
        parts.append(answer.json())
    return parts


def test_moderators_see_who_painted(moderator: dict[str, str], history: TestClient) -> None:
    answer = history.get("/history/authors", headers=moderator).json()
    assert [(one["author"], one["changes"]) for one in answer["authors"]] == [
        ("addr:192.0.2.7", 2),
        ("operator:olga", 1),
        (None, 1),
        ("key:a", 1),
    ]
    assert answer["examined"] is None
    here = history.get("/history/authors?area=900,0,1,9", headers=moderator).json()["authors"]
    assert [one["author"] for one in here] == ["operator:olga"]
    assert moment(here[0]["first"]) == moment(here[0]["last"])
    late = history.get("/history/authors?since=2100-01-01", headers=moderator).json()
    assert late == {"authors": [], "examined": None}


def test_a_bounded_number_of_changes_is_examined_for_authors(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "SCANNED", 100)
    archive = Archive(path)
    archive.begin(0)
    events = entries((n, Change(0, 0, 0, n % 256), f"key:{n // 250}") for n in range(500))
    archive.append(events, events[-1].event, 500)
    archive.close()
    assert queries.painters(path, Selection()) == ([("key:1", 100, 400, 499)], 400)
    assert queries.painters(path, Selection(None, None, None, 300)) == (
        [("key:1", 50, 250, 299), ("key:0", 50, 200, 249)],
        200,
    )
    assert queries.painters(path, Selection(None, None, 450)) == ([("key:1", 50, 450, 499)], None)


def test_an_undo_over_http_can_be_undone(
    moderator: dict[str, str], history: TestClient, redis_server: RedisServer
) -> None:
    wanted = {"authors": ["addr:192.0.2.7"], "area": "0,0,64,64"}
    [counted] = undo_all(history, moderator, **wanted, cells=True)
    assert (counted["applied"], counted["changed"], shown(redis_server, 1, 2, 1)) == (False, 2, 1)
    assert counted["cells"] == [[1, 2, "G", 0], [1, 2, "B", 0]]
    [done] = undo_all(history, moderator, **wanted, apply=True)
    assert (done["applied"], done["changed"], done["cells"]) == (True, 2, None)
    assert [shown(redis_server, 1, 2, n) for n in range(3)] == [3, 0, 0]
    wait_until(lambda: history.get("/history/state").json()["changes"] == 7)
    newest = history.get("/pixel/1/2/history?limit=1").json()["changes"][0]
    assert newest["author"] == done["author"] == "key:mod"
    # What it has changed can be selected, and nothing else.
    back = {"authors": [done["author"]], "since": done["since"], "until": done["until"]}
    [undone_again] = undo_all(history, moderator, **back, apply=True)
    assert undone_again["changed"] == 2
    assert [shown(redis_server, 1, 2, n) for n in range(3)] == [3, 1, 2]
    acts = asyncio.run(moderation.acts(Redis(redis_server.settings()), 10))
    assert [(act.by, act.did, act.what["authors"]) for act in acts] == [
        ("key:mod", "undo", ["key:mod"]),
        ("key:mod", "undo", ["addr:192.0.2.7"]),
    ]


def test_the_parts_of_a_long_undo(
    moderator: dict[str, str], history: TestClient, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request ends after a time, or after a number of listed cells; the next one goes on."""
    cells = [(x, y) for y in range(0, 400, 50) for x in range(0, 400, 50)]
    paint(redis_server, [Change(x, y, 0, 77) for x, y in cells], ("key:vandal", len(cells)))
    wait_until(lambda: history.get("/history/state").json()["changes"] == 5 + len(cells))
    monkeypatch.setattr(moderators, "UNDO_CELLS", 10)
    wanted = {"authors": ["key:vandal"]}
    parts = undo_all(history, moderator, **wanted, cells=True)
    assert len(parts) > 4
    assert sorted((x, y) for part in parts for x, y, _, _ in part["cells"]) == sorted(cells)
    assert all(value == 0 for part in parts for *_, value in part["cells"])
    monkeypatch.setattr(moderators, "UNDO_SECONDS", 0)
    parts = undo_all(history, moderator, **wanted, area="0,0,400,400", apply=True)
    assert len(parts) == 2 * 400 // 16 + 1  # the strips of two tiles, and the end
    assert sum(part["changed"] for part in parts) == len(cells)
    assert {shown(redis_server, x, y, 0) for x, y in cells} == {0}
    acts = asyncio.run(moderation.acts(Redis(redis_server.settings()), 10))
    assert len(acts) == 1


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({}, "the body"),
        ({"apply": True}, "the body"),
        ({"area": "1,2,3"}, "area"),
        ({"since": "yesterday"}, "since"),
        ({"until": "2026-13-01"}, "until"),
        ({"authors": "key:a"}, "authors"),
        ({"authors": ["key:a"], "apply": "true"}, "apply"),
        ({"authors": ["key:a"], "after": -1}, "after"),
    ],
)
def test_an_invalid_undo_is_refused_by_field(
    moderator: dict[str, str], history: TestClient, wanted: dict[str, Any], field: str
) -> None:
    answer = history.post("/history/undo", json=wanted, headers=moderator)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)


def test_moderation_needs_its_scope(history: TestClient, redis_server: RedisServer) -> None:
    painter = asyncio.run(create_key(redis_server, "painter", "paint,batch"))
    time.sleep(1)
    for headers, expected in (({}, 401), (painter, 403)):
        assert history.get("/history/authors", headers=headers).status_code == expected
        answer = history.post("/history/undo", json={"authors": ["key:a"], "apply": True}, headers=headers)
        assert (answer.status_code, answer.json()["status"]) == (expected, expected)
    assert shown(redis_server, 1, 2, 1) == 1


def test_during_maintenance_moderators_undo_nothing(
    moderator: dict[str, str], history: TestClient, redis_server: RedisServer
) -> None:
    with redis_server.admin() as admin:
        admin.set(MAINTENANCE, Maintenance("read-only", "New disks").encode())
    wanted = {"authors": ["addr:192.0.2.7"]}
    answer = history.post("/history/undo", json=wanted | {"apply": True}, headers=moderator)
    assert (answer.status_code, answer.json()["maintenance"]) == (503, "read-only")
    assert undo_all(history, moderator, **wanted)[0]["changed"] == 2


@pytest.mark.parametrize("opened", [False, True])
async def test_an_undo_ends_if_redis_does_not_answer(
    fragile_redis: RedisServer, path: Path, monkeypatch: pytest.MonkeyPatch, opened: bool
) -> None:
    monkeypatch.setattr(moderation, "TIMEOUT", 0.2)
    open_connection = Redis.open

    async def open_and_pause(redis: Redis, kind: type[Connection]) -> Connection:
        if not opened:
            fragile_redis.pause()
        connection = await open_connection(redis, kind)
        fragile_redis.pause()
        return connection

    monkeypatch.setattr(Redis, "open", open_and_pause)
    selection = Selection(None, ["key:a"])
    wanted = moderators.WantedUndo(authors=["key:a"])
    async with asyncio.timeout(5):
        with pytest.raises(TimeoutError):
            await moderators._undo(path, fragile_redis.settings(), selection, "key:mod", wanted)
    fragile_redis.resume()


async def test_questions_beyond_the_bounds_are_refused() -> None:
    slots = Slots(2, 3)
    release = asyncio.Event()

    async def question() -> None:
        async with slots.slot():
            await release.wait()

    running = [asyncio.create_task(question()) for _ in range(5)]
    await asyncio.sleep(0)
    with pytest.raises(Problem, match="waiting") as refusal:
        await question()
    assert refusal.value.status == 503
    release.set()
    await asyncio.gather(*running)
    await question()


def test_the_operators_commands(
    redis_server: RedisServer, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paint(redis_server, [Change(1, 2, 0, 3), Change(1, 2, 1, 4)], ("addr:192.0.2.7", 2))
    follow(path, redis_server)
    monkeypatch.setenv("HISTORY_PATH", str(path))
    monkeypatch.setattr(commands, "load_pixel", redis_server.settings)
    commands.main(["show", "--area", "0,0,5,5", "--limit", "1"])
    assert capsys.readouterr().out.split()[1:] == ["1,2", "G", "4", "addr:192.0.2.7"]
    commands.main(["undo", "--author", "addr:192.0.2.7,key:b"])
    counted = json.loads(capsys.readouterr().out)
    assert (counted["applied"], counted["changed"], shown(redis_server, 1, 2, 0)) == (False, 2, 3)
    commands.main(["undo", "--author", "addr:192.0.2.7", "--apply", "--user", "olga"])
    assert json.loads(capsys.readouterr().out) == counted | {"applied": True}
    assert shown(redis_server, 1, 2, 0) == 0
    commands.main(["backup", str(path.with_name("copy"))])
    assert records(path.with_name("copy")) == records(path)
    for words, message in (
        (["undo"], "choose changes"),
        (["undo", "--area", "1,2"], "must be x,y,width,height"),
        (["undo", "--since", "now"], "now"),
    ):
        with pytest.raises(SystemExit, match=message):
            commands.main(words)


def test_a_film_ends_with_the_canvas(redis_server: RedisServer, path: Path) -> None:
    chance = random.Random(1)
    for _ in range(50):
        paint(
            redis_server, [Change(chance.randrange(250, 270), chance.randrange(20), n, 99) for n in range(3)]
        )
        time.sleep(0.002)
    follow(path, redis_server)
    region = Region(252, 3, 10, 12)
    film = Film(region, None, None, 1, 1)
    frames = list(film.frames(path))
    with redis_server.admin() as admin:
        canvas = region.assemble([admin.get(key) for key in region.tile_keys()])
    assert len(frames) == 25
    assert frames[-1] == canvas != frames[0]
    # Each frame has all that the one before it has: every change is to the same value.
    painted = [frame.count(99) for frame in frames]
    assert painted == sorted(painted)
    [half] = [records(path)[75].event.milliseconds]
    rest = list(Film(region, half, None, 1, 1).frames(path))
    assert rest[-1] == canvas
    assert 0 < rest[0].count(99) < canvas.count(99)
    file = io.BytesIO()
    Film(region, None, None, 1, 2).write_webp(path, file)
    with Image.open(file) as image:
        image.seek(image.n_frames - 1)
        last = image.convert("RGB").resize((10, 12), Image.Resampling.NEAREST)
    assert last.tobytes() == canvas
    with pytest.raises(ValueError, match="no changes"):
        list(Film(region, 5 * 10**12, None, 1, 1).frames(path))


def test_a_film_as_mp4_ends_with_the_canvas(redis_server: RedisServer, path: Path) -> None:
    paint(redis_server, [Change(x, 0, 1, 200) for x in range(5)])
    time.sleep(0.01)
    paint(redis_server, [Change(x, 2, 0, 255) for x in range(5)])
    follow(path, redis_server)
    film = path.with_name("film.mp4")
    with film.open("wb") as file:
        Film(Region(0, 0, 5, 3), None, None, 1, 3).write_mp4(path, file)
    shown = subprocess.check_output(
        ["ffmpeg", "-loglevel", "error", "-i", film, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    )
    width, height = 16, 10  # 15 x 9, made even
    frame = width * height * 3
    assert len(shown) == 25 * frame
    for x, y in ((0, 0), (4, 0), (0, 1), (3, 2)):
        place = (3 * y + 1) * width + 3 * x + 1
        wanted = {0: (0, 200, 0), 1: (0, 0, 0), 2: (255, 0, 0)}[y]
        pixel = shown[-frame:][3 * place : 3 * place + 3]
        assert all(abs(one - other) < 40 for one, other in zip(pixel, wanted, strict=True)), (x, y, pixel)


def test_without_ffmpeg_an_mp4_is_refused_with_a_reason(
    redis_server: RedisServer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint(redis_server, [Change(0, 0, 1, 200)])
    follow(path, redis_server)
    monkeypatch.setenv("HISTORY_PATH", str(path))
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(commands, "load_pixel", redis_server.settings)
    with pytest.raises(SystemExit, match="apt install ffmpeg, or use --format webp"):
        commands.main(["timelapse", "--format", "mp4"])


def test_a_follower_that_is_killed_archives_every_acknowledged_change_once(
    redis_server: RedisServer, path: Path
) -> None:
    """It is killed 20 times during more than 500 writes a second; then the rows are the changes."""
    [port] = free_ports(1)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(__file__).parent.parent / "src"),
        "HISTORY_PATH": str(path),
        "HISTORY_PORT": str(port),
        "PIXEL_REDIS_URL": redis_server.url,
        "PIXEL_REDIS_USERNAME": "pixel",
        "PIXEL_REDIS_PASSWORD": PASSWORD,
    }
    written: list[Change] = []

    async def write(stop: asyncio.Event) -> None:
        store = Store(redis_server.settings())
        while not stop.is_set():
            change = Change(len(written) % 1024, len(written) // 1024, len(written) % 3, len(written) % 256)
            await store.write([change])
            written.append(change)
            await asyncio.sleep(0)
        store.close()

    async def kill(stop: asyncio.Event) -> None:
        chance = random.Random(5)
        for _ in range(20):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "pixel.history", "serve", env=environment, stderr=subprocess.DEVNULL
            )
            before = archived()
            await asyncio.to_thread(wait_until, lambda before=before: archived() > before, 30)
            await asyncio.sleep(chance.uniform(0, 0.3))
            process.kill()
            await process.wait()
        stop.set()

    def archived() -> int:
        with suppress(sqlite3.OperationalError):
            return queries.state(path).changes
        return 0

    async def run() -> None:
        stop = asyncio.Event()
        await asyncio.gather(write(stop), kill(stop))

    asyncio.run(run())
    before = archived()
    assert 0 < before < len(written)
    follow(path, redis_server)
    found = [
        (r.x, r.y, "RGB".index(r.channel), r.value) for part in queries.export(path, None, None) for r in part
    ]
    assert found == written
    assert queries.gaps(path) == []
